"""A converted checkpoint as a `Plan`, so that it can be read like any published one."""

from functools import partial
from pathlib import Path

import numpy as np
import tensorstore as ts
from flax import traverse_util

from converters.dialects.layout import LazyArray, Module, Plan
from llama_jax.checkpoint import PARAMS, Manifest
from llama_jax.model import abstract_params


def converted_plan(directory: Path, manifest: Manifest) -> Plan:
    """The parameters of a converted checkpoint, read when asked for, by rows.

    directory: a converted checkpoint; manifest: what `read_manifest` says of it.
    """
    tree = traverse_util.flatten_dict(abstract_params(manifest.spec()))
    modules: dict[str, dict[str, LazyArray]] = {}
    for path, leaf in tree.items():
        read = partial(_read, directory.absolute() / PARAMS / ".".join(path))
        array = LazyArray(np.dtype(leaf.dtype), leaf.shape, read)
        modules.setdefault("/".join(path[:-1]), {})[path[-1]] = array
    return Plan(
        {path: Module(manifest.formats[path], arrays) for path, arrays in modules.items()},
        frozenset(),
        manifest.kv_scales,
    )


def _read(directory: Path, start: int, stop: int) -> np.ndarray:
    driver = "zarr" if (directory / ".zarray").is_file() else "zarr3"
    array = ts.open({"driver": driver, "kvstore": {"driver": "file", "path": f"{directory}/"}})
    opened = array.result()
    return np.asarray((opened[start:stop] if opened.rank else opened).read().result())
