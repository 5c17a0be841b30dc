"""Writes the files that make a directory of arrays an Orbax PyTree checkpoint.

Orbax itself saves only trees that are completely in memory. Its files without OCDBT are simple
enough to be streamed: for each array a zarr directory named by its path with dots (written by
`llama_jax.checkpoint.array_file`), and a `_METADATA` file that lists the tree.
"""

import json
from collections.abc import Mapping

_DICT_KEY = 2  # Orbax's number for a key of a dictionary
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


def tree_metadata(shapes: Mapping[tuple[str, ...], tuple[int, ...]]) -> dict[str, str]:
    """Return the contents of the two files beside the arrays of nested dictionaries, by name.

    shapes: the shape of each array, by its path in the tree.
    """
    tree = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in path],
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
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    return {
        "_METADATA": json.dumps(metadata),
        "_CHECKPOINT_METADATA": json.dumps({"item_handlers": _HANDLER}),
    }
