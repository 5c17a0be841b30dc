"""NVIDIA modelopt's FP8 checkpoints: `quant_method: "modelopt"`, or `hf_quant_config.json` alone.

- `quant_algo: FP8`: float8_e4m3fn `weight`, one float32 `weight_scale` and one `input_scale`.
- `FP8_PER_CHANNEL_PER_TOKEN`: `weight_scale` [out], activations dynamic.

Scales of the KV cache lie under the projections, `k_proj.k_scale` and `v_proj.v_scale`. The lists
of modules that are left out may hold wildcards.

Source: modelopt 0.47's export; vLLM's and sglang's readers.
"""

from collections.abc import Mapping
from typing import Any

from converters.dialects.layout import Dialect, Plan, Shape
from converters.dialects.quantized import (
    Scheme,
    check_fields,
    is_named,
    name_list,
    quantized_plan,
)
from converters.source import Source, as_object
from llama_jax.checkpoint import CheckpointError

_WHERE = "quantization_config"
_STATIC, _PER_ROW = "FP8", "FP8_PER_CHANNEL_PER_TOKEN"
_CACHE_FIELDS = ("kv_cache_scheme", "kv_cache_quant_algo")


def applies(source: Source) -> bool:
    return source.quantization.get("quant_method") == "modelopt"


def plan(source: Source, weights: Mapping[str, Shape]) -> Plan:
    quantization = {"quant_algo": None, **source.quantization}
    check_fields(
        quantization,
        _WHERE,
        {
            "quant_method": None,
            "quant_algo": (_STATIC, _PER_ROW),
            "ignore": None,
            "kv_cache_quant_algo": ("FP8", None),
            "kv_cache_scheme": None,
            "config_groups": None,
            "producer": None,
        },
    )
    is_static = quantization["quant_algo"] == _STATIC
    _check_numbers(quantization, "kv_cache_scheme", _WHERE, is_dynamic=False)
    groups = as_object(quantization, "config_groups", _WHERE)
    for name in groups:
        group = as_object(groups, name, f"{_WHERE}.config_groups")
        where = f"{_WHERE}.config_groups.{name}"
        _check_numbers(group, "weights", where, is_dynamic=False)
        _check_numbers(group, "input_activations", where, is_dynamic=not is_static)
    promises = {bool(quantization[key]): key for key in _CACHE_FIELDS if key in quantization}
    if len(promises) == 2:
        raise CheckpointError(
            f"{promises[True]} makes the KV cache quantised, {promises[False]} does not"
        )
    ignored = name_list(quantization, "ignore")
    scheme = Scheme(static=is_static)
    return quantized_plan(
        source,
        weights,
        lambda name: None if is_named(name, ignored) else scheme,
        "its list of modules left out (ignore, exclude_modules)",
        cache_scales_promised_by=promises.get(True),
    )


def _check_numbers(fields: Mapping[str, Any], key: str, where: str, *, is_dynamic: bool) -> None:
    check_fields(
        as_object(fields, key, where),
        f"{where}.{key}",
        {"num_bits": (8,), "type": ("float",), "dynamic": (is_dynamic,)},
    )


MODELOPT = Dialect(
    name="modelopt",
    description="NVIDIA modelopt FP8, static per tensor or FP8_PER_CHANNEL_PER_TOKEN",
    applies=applies,
    plan=plan,
)
