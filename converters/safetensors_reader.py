"""Reads safetensors checkpoints (one file, or shards with an index), strictly and by memory maps.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors). Views use ml_dtypes, because the safetensors package's
numpy frontend lacks the FP8 dtypes.
"""

import math
import mmap
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from msgspec import Struct

from llama_jax.checkpoint.store import CheckpointError
from llama_jax.json_file import MAX_BYTES, convert, is_there, kind, parse, read_json

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "I64": np.dtype(np.int64),
        "I32": np.dtype(np.int32),
        "I16": np.dtype(np.int16),
        "I8": np.dtype(np.int8),
        "U8": np.dtype(np.uint8),
        "BOOL": np.dtype(np.bool_),
    }
)
_MAX_AXES = 32
_MAX_ELEMENTS = 2**60
# Constants that follow from the config. Old versions and ColossalAI store them, and an index may
# list them although they are not stored.
ROTARY_CONSTANT = re.compile(r"\.rotary_emb\.(?:inv_freq|cos_cached|sin_cached)$")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place: `offset` bytes from the start of the file `path`."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_rows(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    """Return rows [start, stop) of a tensor as a read-only view of the file.

    A scalar has one row. Each call maps only the bytes that it returns, and the mapping ends with
    the array, so a process that drops its arrays does not grow with the checkpoint.
    """
    rows, *rest = tensor.shape or (1,)
    row_bytes = math.prod(rest) * tensor.dtype.itemsize
    shape = (stop - start, *rest) if tensor.shape else ()
    first = tensor.offset + start * row_bytes
    length = (stop - start) * row_bytes
    if not 0 <= start <= stop <= rows:
        raise IndexError(f"{tensor.name} has {rows} rows, asked for {start}:{stop}")
    if not length:
        return np.empty(shape, tensor.dtype)
    aligned = first - first % mmap.ALLOCATIONGRANULARITY
    with tensor.path.open("rb") as file:
        mapped = mmap.mmap(
            file.fileno(), first - aligned + length, access=mmap.ACCESS_READ, offset=aligned
        )
    flat = np.frombuffer(mapped, np.uint8, length, first - aligned)
    return flat.view(tensor.dtype).reshape(shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file, by name.

    Raises `CheckpointError`, which names the file, for a header that is truncated or not JSON, for
    offsets that do not cover the file exactly, and for unknown dtypes.
    """
    header, end = _read_json(path)
    _metadata(header, path)
    header.pop("__metadata__", None)
    tensors = {name: _entry(name, entry, path, end) for name, entry in header.items()}
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: {tensor.name} starts at byte {tensor.offset} where {end} is expected; "
                "tensors must lie back to back, without gaps and without overlap"
            )
        end += tensor.nbytes
    size = path.stat().st_size
    if end != size:
        state = "is truncated" if end > size else "has bytes that no tensor owns"
        raise CheckpointError(
            f"{path} {state}: its header describes {end} bytes, the file has {size}. "
            "Download it again."
        )
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in a safetensors file's header, {} without any.

    Raises `CheckpointError` for a damaged header, and for metadata that are not strings.
    """
    return _metadata(_read_json(path)[0], path)


def read_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a Hugging Face directory, by name.

    They are in `model.safetensors`, or in the shards of `model.safetensors.index.json`, or, with
    neither, in any complete set of `*.safetensors`.
    Raises `CheckpointError` for a missing shard, one outside the directory, a duplicate tensor, and
    an index that differs from the shards.
    """
    return read_shards(directory, "model.safetensors", "*.safetensors", read_header)


def read_shards(
    directory: Path, whole: str, shards: str, read: Callable[[Path], Mapping[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """Read all tensors like `read_checkpoint`, from files of any format.

    whole: the name of a single file with everything; the index is named after it.
    shards: a pattern of the shards' names.
    read: reads one file.
    """
    directory = directory.resolve()
    index = directory / f"{whole}.index.json"
    if is_there(directory / whole):
        return dict(read(shard_path(directory, whole)))
    if is_there(index):
        weight_map = _read_index(index)
        names: Iterable[str] = sorted(set(weight_map.values()))
    else:
        weight_map = None
        names = _unindexed_shards(directory, shards)

    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for tensor in read(shard_path(directory, name)).values():
            if tensor.name in tensors:
                other = tensors[tensor.name].path.name
                raise CheckpointError(f"{tensor.name} is in both {other} and {name} of {directory}")
            is_listed = weight_map is None or weight_map.get(tensor.name) == name
            if not is_listed and not ROTARY_CONSTANT.search(tensor.name):
                listed = (weight_map or {}).get(tensor.name, "nowhere")
                raise CheckpointError(
                    f"{name} holds {tensor.name}, which {index} lists in {listed}"
                )
            tensors[tensor.name] = tensor
    for lacking in (weight_map or {}).keys() - tensors.keys():
        if ROTARY_CONSTANT.search(lacking):
            continue
        raise CheckpointError(
            f"{index} lists {lacking} in {(weight_map or {})[lacking]}, which does not hold it"
        )
    return tensors


def shard_path(directory: Path, name: str) -> Path:
    """Return the path of a checkpoint's file, and refuse one outside the directory.

    A link may lead into the directory, or to the `blobs` of the Hugging Face hub's cache
    (`models--org--name/snapshots/<revision>/<file> -> ../../blobs/<hash>`), in which Meta's files
    are a folder or two further down.

    directory: resolved.
    """
    if name != Path(name).name or name in ("", ".", "..") or not name.isprintable():
        raise CheckpointError(
            f"{directory} is said to hold a file {name!r}; a plain file name is expected"
        )
    path = directory / name
    snapshots = [parent for parent in directory.parents if parent.name == "snapshots"]
    allowed = [directory, *(each.parent / "blobs" for each in snapshots)]
    try:
        target = path.resolve()
        mode = target.stat().st_mode if target.exists() else None
    except (OSError, RuntimeError) as error:  # the name is too long, or links form a circle
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
    if not any(target.is_relative_to(root) for root in allowed):
        raise CheckpointError(
            f"{path} is a link to {target}, outside the checkpoint. Copy the file, or link the "
            "whole directory."
        )
    if mode is None:
        raise CheckpointError(f"{path} is missing. Download the rest of the checkpoint.")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is {kind(mode)}, expected a file")
    return path


def _read_json(path: Path) -> tuple[dict[str, Any], int]:
    """Return a file's header, and the offset of the first tensor after it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise CheckpointError(
                f"{path} is truncated: its header alone needs {8 + length} bytes and the file has "
                f"{size}. Download it again."
            )
        if length > MAX_BYTES:
            raise CheckpointError(f"{path} is not a safetensors file: a header of {length} bytes")
        raw = file.read(length)
    header = f"{path}: the header of a safetensors file"
    return convert(parse(raw, header), dict[str, Any], header), 8 + length


def _metadata(header: Mapping[str, Any], path: Path) -> dict[str, str]:
    stored = header.get("__metadata__")
    metadata = {} if stored is None else stored
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header must map names to texts")
    return metadata


def _entry(name: str, entry: Any, path: Path, data_start: int) -> StoredTensor:
    where = f"{path}: {name:.200}"
    if not name.isprintable():
        raise CheckpointError(f"{path}: {name!r:.200} cannot be the name of a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: expected dtype, shape and data_offsets, got {entry!r:.200}"
        )
    shape, offsets, tag = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _is_shape(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where}: shape {shape!r:.200}, data_offsets {offsets!r:.200} are malformed"
        )
    if not isinstance(tag, str) or tag not in DTYPES:
        raise CheckpointError(f"{where}: dtype {tag!r:.200} is not known ({', '.join(DTYPES)})")
    tensor = StoredTensor(name, DTYPES[tag], tuple(shape), path, data_start + offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise CheckpointError(
            f"{where}: {tag} {shape} takes {tensor.nbytes} bytes, data_offsets "
            f"{offsets} hold {offsets[1] - offsets[0]}"
        )
    return tensor


def _is_shape(value: Any) -> bool:
    return (
        _naturals(value)
        and len(value) <= _MAX_AXES
        and math.prod(length or 1 for length in value) <= _MAX_ELEMENTS
    )


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= sys.maxsize for item in value
    )


class _Index(Struct):
    weight_map: dict[str, str]


def _read_index(path: Path) -> dict[str, str]:
    return read_json(path, _Index).weight_map


def _unindexed_shards(directory: Path, shards: str) -> list[str]:
    names = sorted(path.name for path in directory.glob(shards))
    if not names:
        others = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
        raise CheckpointError(
            f"{directory} has no safetensors weights; it holds {', '.join(others[:8]) or 'nothing'}"
        )
    for match in filter(None, map(_SHARD.fullmatch, names)):
        stem, count = match[1], int(match[3])
        for number in range(1, count + 1):
            expected = f"{stem}-{number:05d}-of-{match[3]}{match[4]}"
            if expected not in names:
                raise CheckpointError(
                    f"{directory / expected} is missing. Download the rest of the checkpoint."
                )
    return names
