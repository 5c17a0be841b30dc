"""Writes Hugging Face's safetensors files, a piece of a tensor at a time.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors). As there, tensors of wider dtypes come first and the
header is padded with spaces, so that the offset of each tensor is a multiple of its item size.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from converters.dialects.layout import LazyArray, pieces
from converters.safetensors_reader import DTYPES

SHARD_BYTES = 5 * 1000**3
_TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, LazyArray],
    written: Callable[[int], None],
    shard_bytes: int = SHARD_BYTES,
) -> tuple[str, ...]:
    """Write `model.safetensors`, or numbered shards with `model.safetensors.index.json`.

    Shards are filled in the order of `tensors` up to `shard_bytes`; a larger tensor gets a shard of
    its own.

    written: called with the number of bytes of each piece.
    Returns the names of the safetensors files.
    """
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        _write_file(directory / "model.safetensors", shards[0], written)
        return ("model.safetensors",)
    names = tuple(
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    )
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, written)
    index = {
        "metadata": {"total_size": sum(array.nbytes for array in tensors.values())},
        "weight_map": {
            key: name for name, shard in zip(names, shards, strict=True) for key in shard
        },
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return names


def _shards(tensors: Mapping[str, LazyArray], limit: int) -> list[dict[str, LazyArray]]:
    shards: list[dict[str, LazyArray]] = [{}]
    filled = 0
    for name, array in tensors.items():
        if shards[-1] and filled + array.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    return shards


def _write_file(
    path: Path, tensors: Mapping[str, LazyArray], written: Callable[[int], None]
) -> None:
    wider_first = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in wider_first:
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _TAGS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for _, array in wider_first:
            for piece in pieces(array):
                file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
                written(piece.nbytes)
