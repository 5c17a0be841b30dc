"""Helpers that compare the converter's plan for a checkpoint bit for bit."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters.dialects import make_plan
from converters.dialects.layout import pieces
from converters.source import read_source
from llama_jax.model.fp8 import WeightFormat
from tests.tiny_checkpoints import Arrays


def planned(directory: Path) -> tuple[dict[str, WeightFormat], Arrays]:
    """Return formats and canonical arrays by path, without writing them."""
    plan, _ = make_plan(read_source(directory))
    arrays = {
        f"{path}/{leaf}": np.concatenate(list(pieces(array)))
        for path, module in plan.modules.items()
        for leaf, array in module.arrays.items()
    }
    return {path: module.format for path, module in plan.modules.items()}, arrays


def planned_as_published(directory: Path) -> tuple[dict[str, WeightFormat], Arrays]:
    """Return `planned` under Hugging Face's names of modules."""
    plan, _ = make_plan(read_source(directory))
    formats, arrays = {}, {}
    for path, module in plan.modules.items():
        name = "lm_head" if path == "lm_head" else f"model.{path}"
        name = name.replace("layers_", "layers.").replace("/", ".")
        formats[name] = module.format
        for leaf, array in module.arrays.items():
            parts = list(pieces(array))
            arrays[f"{name}.{leaf}"] = np.concatenate(parts) if array.shape else parts[0]
    return formats, arrays


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        other = expected[name]
        assert (array.shape, array.dtype) == (other.shape, other.dtype), name
        assert array.tobytes() == other.tobytes(), name
