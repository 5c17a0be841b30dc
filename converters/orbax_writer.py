"""An Orbax PyTree checkpoint written one block of rows at a time.

Orbax saves a tree that is wholly in memory. What it writes without OCDBT is simple enough to stream
instead: for each array a directory in zarr version 2 (https://zarr-specs.readthedocs.io, v2), named
by its path with dots, and a `_METADATA` file that lists the tree. Chunks hold whole rows,
uncompressed, so that a block of the source is written as it is.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from converters.dialects.layout import piece_rows


def write_array(
    directory: Path,
    dtype: np.dtype,
    shape: tuple[int, ...],
    chunks: Iterable[np.ndarray],
    written: Callable[[int], None],
) -> None:
    """Write one array from its consecutive chunks of `piece_rows` rows.

    directory: is made; Orbax expects it to be named by the array's path with dots.
    written: told the bytes of each chunk.
    """
    directory.mkdir()
    rows = piece_rows(shape, dtype.itemsize)
    chunk_shape = (rows, *shape[1:]) if shape else ()
    chunk_bytes = math.prod(chunk_shape) * dtype.itemsize
    for number, chunk in enumerate(chunks):
        name = ".".join([str(number), *("0" for _ in shape[1:])])
        with (directory / name).open("wb") as file:
            file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
            file.truncate(chunk_bytes)  # zarr wants a last chunk of full size; its tail is a hole
        written(chunk.nbytes)
    metadata = {
        "zarr_format": 2,
        "shape": list(shape),
        "chunks": list(chunk_shape),
        "dtype": {"float32": "<f4", "float16": "<f2"}.get(dtype.name, dtype.name),
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "order": "C",
        "dimension_separator": ".",
    }
    (directory / ".zarray").write_text(json.dumps(metadata))


def write_tree_metadata(directory: Path, shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> None:
    """The two files that make the arrays in `directory` one checkpoint of nested dictionaries.

    shapes: of each array, by its path in the tree.
    """
    dict_key = 2
    tree = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": dict_key} for key in path],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }
        for path, shape in shapes.items()
    }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (directory / "_METADATA").write_text(json.dumps(metadata))
    handlers = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": handlers}))
