"""Presents a converted checkpoint as a `Plan`, so that it can be read like a published one."""

from functools import partial
from pathlib import Path

import numpy as np
from flax import traverse_util

from converters.dialects.layout import LazyArray, Module, Plan
from llama_jax.checkpoint.array_file import read_rows
from llama_jax.checkpoint.store import PARAMS, Manifest, check_stored
from llama_jax.model.params import abstract_params


def converted_plan(directory: Path, manifest: Manifest) -> Plan:
    """Return the parameters of a converted checkpoint, which are read lazily by rows.

    directory: of the converted checkpoint. manifest: from `read_manifest`.
    Raises `CheckpointError` unless all parameters exist.
    """
    root, params = directory.absolute() / PARAMS, abstract_params(manifest.spec())
    check_stored(root, params)
    modules: dict[str, dict[str, LazyArray]] = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        dtype, shape = np.dtype(leaf.dtype), leaf.shape
        array = LazyArray(dtype, shape, partial(read_rows, root / ".".join(path), dtype, shape))
        modules.setdefault("/".join(path[:-1]), {})[path[-1]] = array
    return Plan(
        {path: Module(manifest.formats[path], arrays) for path, arrays in modules.items()},
        frozenset(),
        manifest.kv_scales,
    )
