"""Writes an array to one file, from which any rectangular part can be read on its own.

The layout is zarr version 3 with the codec `sharding_indexed`, uncompressed
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed). A directory holds
`zarr.json` and one file: the equal chunks of the array, one after another, and then an index of
their offsets. A device that owns a sixteenth of the rows or columns has chunks of its own. Arrays
have at most two axes.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Advance = Callable[[int], None]

# The number of threads that write or check files: two per core, because a thread waits for the disk
# half of the time. Each holds a few pieces of an array, so memory grows with the number.
WORKERS = min(8, 2 * (os.cpu_count() or 1))
_METADATA = "zarr.json"
_PIECE_BYTES = 4 * 1024 * 1024
_MIN_CHUNK = 128


def chunk_shape(shape: Shape) -> Shape:
    """Return the shape of the chunks. Each axis is divided into 16, 8, 4, 2 or 1 equal parts, the
    most with at least 128 elements each."""
    return tuple(
        next(
            (n // parts for parts in (16, 8, 4, 2) if n % parts == 0 and n >= _MIN_CHUNK * parts), n
        )
        for n in shape
    )


def file_names(directory: str, shape: Shape) -> tuple[str, str]:
    """Return the names of an array's files in `directory`."""
    return f"{directory}/{_METADATA}", f"{directory}/{_data_name(shape)}"


def write_array(
    directory: Path, dtype: np.dtype, shape: Shape, pieces: Iterable[np.ndarray], advance: Advance
) -> str:
    """Write an array from consecutive pieces of its rows; a scalar is one row.

    directory: created or replaced. Orbax expects it to be named by the array's path with dots.
    advance: called with the number of bytes of each piece.
    Returns the SHA-256 of the array in C order, in hexadecimal, once the data are on the disk.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    digest = hashlib.sha256()
    columns = _matrix(shape)[1]
    start = 0
    with (directory / _data_name(shape)).open("wb") as file:
        for piece in pieces:
            rows = np.ascontiguousarray(piece).reshape(-1, columns).view(_bits(dtype))
            digest.update(rows.data)
            for row, column, offset in _runs(shape, start, start + len(rows)):
                file.seek(offset * dtype.itemsize)
                run = rows[row.start - start : row.stop - start, column]
                file.write(np.ascontiguousarray(run).data)
            start += len(rows)
            advance(rows.nbytes)
        file.seek(0, os.SEEK_END)
        file.write(_index(dtype, shape))
        file.flush()
        os.fsync(file.fileno())
    (directory / _METADATA).write_text(json.dumps(_metadata(dtype, shape)))
    return digest.hexdigest()


def read_rows(directory: Path, dtype: np.dtype, shape: Shape, start: int, stop: int) -> np.ndarray:
    """Read rows [start, stop) of an array that `check_layout` accepts; a scalar has one row."""
    rows = read_part(directory, dtype, shape, (slice(start, stop), slice(None)))
    return rows.reshape((stop - start, *shape[1:]) if shape else ())


def read_part(
    directory: Path, dtype: np.dtype, shape: Shape, part: tuple[slice, slice]
) -> np.ndarray:
    """Read some rows and columns of an array that `check_layout` accepts.

    The result has two axes: an array with one axis has one column, and a scalar one row as well.
    """
    rows, columns = (
        slice(*each.indices(size)[:2]) for each, size in zip(part, _matrix(shape), strict=True)
    )
    found = np.empty((rows.stop - rows.start, columns.stop - columns.start), _bits(dtype))
    with (directory / _data_name(shape)).open("rb") as file:
        for row, column, offset in _runs(shape, rows.start, rows.stop):
            first, last = max(column.start, columns.start), min(column.stop, columns.stop)
            if first >= last:
                continue
            file.seek(offset * dtype.itemsize)
            size = (row.stop - row.start, column.stop - column.start)
            run = np.frombuffer(file.read(math.prod(size) * dtype.itemsize), found.dtype)
            found[
                row.start - rows.start : row.stop - rows.start,
                first - columns.start : last - columns.start,
            ] = run.reshape(size)[:, first - column.start : last - column.start]
    return found.view(dtype)


def holds(directory: Path, dtype: np.dtype, shape: Shape, sha256: str, advance: Advance) -> bool:
    """Return whether the array is complete and has the SHA-256 that `write_array` returned.

    advance: called with the number of bytes of each piece that was read.
    """
    try:
        check_layout(directory, dtype, shape)
    except ValueError:
        return False
    rows, columns = _matrix(shape)
    step = max(1, _PIECE_BYTES // (columns * dtype.itemsize))
    digest = hashlib.sha256()
    for start in range(0, rows, step):
        piece = read_rows(directory, dtype, shape, start, min(start + step, rows))
        digest.update(piece.reshape(-1).view(np.uint8).data)
        advance(piece.nbytes)
    return digest.hexdigest() == sha256


def check_layout(directory: Path, dtype: np.dtype, shape: Shape) -> None:
    """Raise ValueError unless the array is complete and has this dtype and shape, without reading
    its elements."""
    name = directory.name
    try:
        stored = json.loads((directory / _METADATA).read_text(encoding="utf-8"))
        described = f"{stored['data_type']} {stored['shape']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name}/{_METADATA} is damaged: {error}") from error
    if stored != _metadata(dtype, shape):
        raise ValueError(
            f"{name} is stored as {described}, expected {dtype.name} {list(shape)} as "
            "llama_jax.checkpoint.array_file writes it"
        )
    path = directory / _data_name(shape)
    index = _index(dtype, shape)
    data_bytes = math.prod(shape) * dtype.itemsize
    if not path.is_file() or path.stat().st_size != data_bytes + len(index):
        raise ValueError(f"{name}/{path.name} is missing or truncated")
    with path.open("rb") as file:
        file.seek(data_bytes)
        if file.read() != index:
            raise ValueError(f"{name}/{path.name} has a damaged index")


def _data_name(shape: Shape) -> str:
    """Return the data file's name, which is the key of the only shard in zarr's terms."""
    return ".".join("0" for _ in shape) or "0"


def _matrix(shape: Shape) -> tuple[int, int]:
    rows, columns, *_ = (*shape, 1, 1)
    return rows, columns


def _bits(dtype: np.dtype) -> np.dtype:
    """Return the unsigned integer dtype of the same size, which numpy copies fastest."""
    return np.dtype(f"u{dtype.itemsize}")


def _runs(shape: Shape, start: int, stop: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield the runs of rows [start, stop): their rows, columns, and first element in the file.

    A run is the part of a chunk in these rows; its elements are contiguous in the file.
    """
    columns = _matrix(shape)[1]
    chunk_rows, chunk_columns = _matrix(chunk_shape(shape))
    while start < stop:
        first = start // chunk_rows * chunk_rows  # of the chunk
        end = min(stop, first + chunk_rows)
        for column in range(0, columns, chunk_columns):
            offset = first * columns + column * chunk_rows + (start - first) * chunk_columns
            yield slice(start, end), slice(column, column + chunk_columns), offset
        start = end


def _index(dtype: np.dtype, shape: Shape) -> bytes:
    """Return the offset and length of each chunk, 64 bits each, little-endian."""
    chunk = chunk_shape(shape)
    length = math.prod(chunk) * dtype.itemsize
    count = math.prod(shape) // math.prod(chunk)
    offsets = np.arange(count, dtype="<u8") * length
    return np.stack([offsets, np.full_like(offsets, length)], axis=1).tobytes()


def _metadata(dtype: np.dtype, shape: Shape) -> dict[str, Any]:
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": list(chunk_shape(shape)),
        "codecs": [{"name": "bytes"} if dtype.itemsize == 1 else little_endian],
        "index_codecs": [little_endian],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
        "fill_value": 0.0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
