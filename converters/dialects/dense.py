"""Unquantised checkpoints as transformers writes them, in bfloat16, float16 or float32."""

from collections.abc import Mapping
from typing import Any

from converters.dialects.layout import Dialect, Plan, Shape, Tensors, dense_module, source_name
from llama_jax.config import PARAM_DTYPES, LlamaConfig


def applies(hf_config: Mapping[str, Any], tensors: Tensors) -> bool:
    declared = ("quantization_config", "compression_config", "use_fp8_e4m3")
    return not any(hf_config.get(key) for key in declared) and all(
        tensor.dtype.name in PARAM_DTYPES
        for name, tensor in tensors.items()
        if name.endswith(".weight")
    )


def plan(
    hf_config: Mapping[str, Any],
    config: LlamaConfig,
    tensors: Tensors,
    weights: Mapping[str, Shape],
) -> Plan:
    modules = {path: dense_module(tensors, path, shape) for path, shape in weights.items()}
    return Plan(modules, frozenset(f"{source_name(path)}.weight" for path in weights))


DENSE = Dialect(
    name="dense",
    description="bfloat16, float16 or float32 weights without quantisation",
    applies=applies,
    plan=plan,
)
