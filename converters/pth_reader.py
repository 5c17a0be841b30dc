"""Locates the tensors in PyTorch's state dicts (.pth, .pt, .bin), for `read_rows`.

Such a file is a zip archive of uncompressed members: `data.pkl`, which `torch_pickle` reads, and
the raw bytes of each storage. Format: `torch.save` since PyTorch 1.6 (torch/serialization.py).
"""

import math
import os
import re
import struct
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from converters.safetensors_reader import StoredTensor, read_shards, shard_path
from converters.torch_pickle import MAX_PROGRAM, Tensor, described_tensors
from llama_jax.checkpoint.store import CheckpointError

# The signature, fields that the archive's directory repeats, and the lengths of the name and of the
# extra field.
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ENCRYPTED = 0x1
_MAX_DIMENSIONS, _MAX_LENGTH = 8, 2**48
_CONSOLIDATED = re.compile(r"consolidated\.(\d+)\.pth")
_SCALES = re.compile(r"fp8_scales_(\d+)\.pt")


def read_state_dict(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file, by name.

    Raises `CheckpointError`, which names the file, unless it is an intact state dict of plain
    tensors in PyTorch's zip format, stored row by row.
    """
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            members = _members(archive)
            root, program = _program(archive, members)
            return {
                name: _stored(name, tensor, path, file, members.get(_data(root, tensor)))
                for name, tensor in described_tensors(program).items()
            }
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        # zipfile's errors for damaged archives.
        except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError,
                OSError, OverflowError, struct.error) as error:  # fmt: skip
            file.seek(0)
            raise CheckpointError(f"{path} {_explanation(file.read(2), error)}") from error


def read_bin_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a directory with `pytorch_model.bin` or its shards, by name.

    Raises `CheckpointError` like `read_state_dict` and `safetensors_reader.read_checkpoint`.
    """
    return read_shards(directory, "pytorch_model.bin", "pytorch_model*.bin", read_state_dict)


def read_consolidated(directory: Path) -> dict[str, StoredTensor]:
    """Return all tensors of Meta's `consolidated.*.pth`, and of `fp8_scales_*.pt` if there are any.

    Each file has the part of one rank under the same names, so tensors are named by file and name:
    "consolidated.00/norm.weight", "fp8_scales_0/1_feed_forward.w1_0".
    Raises `CheckpointError` for a missing rank, and like `read_state_dict`.
    """
    directory = directory.resolve()
    tensors: dict[str, StoredTensor] = {}
    for pattern in (_CONSOLIDATED, _SCALES):
        for name in _ranks(directory, pattern):
            for tensor in read_state_dict(shard_path(directory, name)).values():
                key = f"{name.rpartition('.')[0]}/{tensor.name}"
                tensors[key] = replace(tensor, name=key)
    return tensors


def _ranks(directory: Path, pattern: re.Pattern[str]) -> list[str]:
    """Return the names of all ranks' files, in order."""
    found = sorted(
        (int(match[1]), match[0])
        for match in (pattern.fullmatch(path.name) for path in directory.iterdir())
        if match
    )
    for rank, (number, name) in enumerate(found):
        if number != rank:
            raise CheckpointError(
                f"{directory} holds {name} but no file of rank {rank}. Download the rest of the "
                "checkpoint."
            )
    return [name for _, name in found]


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    names = Counter(info.filename for info in infos)
    for info in infos:
        if names[info.filename] > 1:
            raise CheckpointError(f"the archive has {info.filename} twice")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
            raise CheckpointError(
                f"{info.filename} is compressed or encrypted, which torch.save never does"
            )
    return {info.filename: info for info in infos}


def _program(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> tuple[str, bytes]:
    """Return the name of the archive's only folder, and the pickle in it."""
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError("is a zip archive, but not from torch.save: it needs one data.pkl")
    [root] = roots
    if f"{root}/constants.pkl" in members:
        raise CheckpointError("holds a TorchScript program; a state dict is expected")
    order = members.get(f"{root}/byteorder")
    if order is not None and archive.read(order) != b"little":
        raise CheckpointError("was saved on a big-endian machine. Save it on a little-endian one.")
    program = members[f"{root}/data.pkl"]
    if program.file_size > MAX_PROGRAM:
        raise CheckpointError(f"has a pickle of {program.file_size} bytes: no state dict")
    return root, archive.read(program)


def _data(root: str, tensor: Tensor) -> str:
    return f"{root}/data/{tensor.storage.key}"


def _stored(
    name: str, tensor: Tensor, path: Path, file: BinaryIO, member: zipfile.ZipInfo | None
) -> StoredTensor:
    """Return a tensor's place in the file, after checking everything about it."""
    storage, itemsize = tensor.storage, tensor.dtype.itemsize
    if member is None:
        raise CheckpointError(f"the storage {storage.key!r} of {name} is missing")
    stated = storage.length * (storage.dtype.itemsize if storage.dtype else 1)
    if member.file_size != stated:
        raise CheckpointError(
            f"the storage of {name} has {member.file_size} bytes, the pickle says {stated}"
        )
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if len(numbers) > 1 + 2 * _MAX_DIMENSIONS or not all(
        type(number) is int and 0 <= number <= _MAX_LENGTH for number in numbers
    ):
        raise CheckpointError(f"the shape, strides or offset of {name} are not lengths")
    if not _is_contiguous(tensor):
        raise CheckpointError(
            f"{name} is a view with shape {list(tensor.shape)} and strides {list(tensor.strides)}, "
            "not stored row by row. Save it after .contiguous()."
        )
    if (tensor.offset + math.prod(tensor.shape)) * itemsize > member.file_size:
        raise CheckpointError(f"{name} reaches beyond its storage of {member.file_size} bytes")
    start = _start(file, member) + tensor.offset * itemsize
    return StoredTensor(name, tensor.dtype, tensor.shape, path, start)


def _is_contiguous(tensor: Tensor) -> bool:
    """Return whether the tensor is stored row by row; strides of dimensions of length 1 are
    ignored."""
    if len(tensor.strides) != len(tensor.shape):
        return False
    if 0 in tensor.shape:
        return True
    step = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if length > 1 and stride != step:
            return False
        step *= length
    return True


def _start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Return the offset of a member's bytes, after checking the header before them."""
    file.seek(member.header_offset)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    name = file.read(name_length).decode()
    start = file.tell() + extra_length
    size = file.seek(0, os.SEEK_END)
    if signature != b"PK\3\4" or name != member.filename or start + member.file_size > size:
        raise CheckpointError(f"{member.filename} does not lie where the archive's directory says")
    return start


def _explanation(head: bytes, error: Exception) -> str:
    if head == b"PK":
        return f"is damaged ({error}). Download it again."
    return (
        "is not a zip archive, or is cut short. Download it again. If it is in PyTorch's format "
        "from before 1.6, write it anew where torch is installed: "
        "torch.save(torch.load(path, weights_only=True), path)"
    )
