"""FriendliAI's FP8 checkpoints, as the Friendli Model Optimizer and friendli-client write them.

Each matrix of a decoder layer is an int8 `weight` whose bytes are float8_e4m3fn bit patterns (they
are not integers) with a `weight_scale`. Two kinds exist:

- static: one `weight_scale` and one calibrated `in_scale` per matrix, both float32 scalars. The
  config says `use_fp8_e4m3`, from optimizer 0.5 on also `quantization_config` with
  `activation_scheme: static`.
- dynamic: a bfloat16 `weight_scale` per output row, `zeros` that are all zero, no `in_scale`. The
  config has only `quantization_config` with `activation_scheme: dynamic`.

Source: fmo-core 0.3 to 0.10; `FP8Quantizer` in friendli-client 1.4.2.
"""

from collections.abc import Mapping

import numpy as np

from converters.dialects.layout import (
    Dialect,
    Module,
    Plan,
    Shape,
    Tensors,
    bits_as_e4m3,
    dense_module,
    is_linear,
    row_scale,
    scalar_scale,
    source_name,
    take,
)
from converters.safetensors_reader import read_rows
from converters.source import Source
from llama_jax.checkpoint import CheckpointError
from llama_jax.fp8 import WeightFormat

_CODES = ("int8", "float8_e4m3fn")


def applies(source: Source) -> bool:
    quantization = source.quantization
    if quantization.get("quant_method", "fp8") != "fp8" or "weight_block_size" in quantization:
        return False
    if source.hf_config.get("use_fp8_e4m3") or any(
        name.endswith(".in_scale") for name in source.tensors
    ):
        return True
    return "quant_method" in quantization and any(
        name.endswith("_proj.weight") and tensor.dtype == np.int8
        for name, tensor in source.tensors.items()
    )


def plan(source: Source, weights: Mapping[str, Shape]) -> Plan:
    tensors = source.tensors
    scheme = source.quantization.get("activation_scheme", "static")
    if scheme not in ("static", "dynamic"):
        raise CheckpointError(
            f"quantization_config.activation_scheme is {scheme!r}, expected 'static' or 'dynamic'"
        )
    modules: dict[str, Module] = {}
    used: set[str] = set()
    for path, shape in weights.items():
        name = source_name(path)
        stored = tensors.get(f"{name}.weight")
        used.add(f"{name}.weight")
        if stored is None or stored.dtype.name not in _CODES or not is_linear(path):
            modules[path] = dense_module(tensors, path, shape)
            continue
        codes = take(tensors, f"{name}.weight", (shape,), _CODES)
        arrays = {
            "weight": bits_as_e4m3(codes),
            "weight_scale": row_scale(tensors, f"{name}.weight_scale", shape[0]),
        }
        used.add(f"{name}.weight_scale")
        if scheme == "static":
            arrays["input_scale"] = scalar_scale(tensors, f"{name}.in_scale")
            used.add(f"{name}.in_scale")
        if f"{name}.zeros" in tensors:
            _check_zeros(tensors, f"{name}.zeros", shape[0])
            used.add(f"{name}.zeros")
        stored_as = WeightFormat("float8_e4m3fn", "row", input_scale=scheme == "static")
        modules[path] = Module(stored_as, arrays)
    return Plan(modules, frozenset(used))


def _check_zeros(tensors: Tensors, name: str, rows: int) -> None:
    zeros = take(tensors, name, ((rows, 1),), _CODES)
    if (read_rows(zeros, 0, rows).view(np.uint8) & 0x7F).any():
        raise CheckpointError(
            f"{name} is not all zero: this matrix is quantised asymmetrically, which is not "
            "supported. Export it with symmetric weights."
        )


FRIENDLI = Dialect(
    name="friendli",
    description="FriendliAI FP8: int8 float8_e4m3fn bits, weight_scale, in_scale (or dynamic)",
    applies=applies,
    plan=plan,
)
