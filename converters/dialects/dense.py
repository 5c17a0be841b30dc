"""Reads unquantised checkpoints in transformers' layout: bfloat16, float16 or float32."""

from collections.abc import Mapping

from converters.dialects.layout import Dialect, Plan, Shape, dense_module, source_name
from converters.source import Source
from llama_jax.model.config import PARAM_DTYPES


def applies(source: Source) -> bool:
    return (
        bool(source.hf_config)
        and not source.quantization
        and not source.hf_config.get("use_fp8_e4m3")
        and all(
            tensor.dtype.name in PARAM_DTYPES
            for name, tensor in source.tensors.items()
            if name.endswith((".weight", ".qweight"))
        )
    )


def plan(source: Source, weights: Mapping[str, Shape]) -> Plan:
    modules = {path: dense_module(source.tensors, path, shape) for path, shape in weights.items()}
    return Plan(modules, frozenset(f"{source_name(path)}.weight" for path in weights))


DENSE = Dialect(
    name="dense",
    description="bfloat16, float16 or float32 weights without quantisation",
    applies=applies,
    plan=plan,
)
