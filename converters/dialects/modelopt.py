"""Reads NVIDIA modelopt's FP8 checkpoints: `quant_method: "modelopt"`, or `hf_quant_config.json`.

- `quant_algo: FP8`: float8_e4m3fn `weight`, one float32 `weight_scale` and one `input_scale`.
- `FP8_PER_CHANNEL_PER_TOKEN`: `weight_scale` [out], activations dynamic.
- `FP8_PB_WO`: `weight_scale` per 128x128 block, [blocks, 1, blocks, 1] or without the ones.
- `MIXED_PRECISION`: `quantized_layers` has the `quant_algo` of each matrix; others are unquantised.

Scales of the KV cache are stored with the projections, `k_proj.k_scale` and `v_proj.v_scale`. The
lists of modules that are not quantised may have wildcards.

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
from llama_jax.checkpoint.store import CheckpointError

_WHERE = "quantization_config"
_MIXED = "MIXED_PRECISION"
_SCHEMES: Mapping[str, Scheme] = {
    "FP8": Scheme(static=True),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme(),
    "FP8_PB_WO": Scheme(layout="block"),
    "FP8_PB_REAL": Scheme(layout="block"),  # the same, where it was not simulated
}
_CACHE_FIELDS = ("kv_cache_scheme", "kv_cache_quant_algo")


def applies(source: Source) -> bool:
    return source.quantization.get("quant_method") == "modelopt"


def plan(source: Source, weights: Mapping[str, Shape]) -> Plan:
    quantization = {**source.quantization, "quant_algo": _algorithm(source.quantization)}
    check_fields(
        quantization,
        _WHERE,
        {
            "quant_method": None,
            "quant_algo": (*_SCHEMES, _MIXED),
            "ignore": None,
            "kv_cache_quant_algo": ("FP8", None),
            "kv_cache_scheme": None,
            "config_groups": None,
            "producer": None,
            "quantized_layers": None,
        },
    )
    # Only for FP8 does the algorithm tell whether modelopt's activations are dynamic.
    dynamic = (False,) if quantization["quant_algo"] == "FP8" else None
    _check_numbers(quantization, "kv_cache_scheme", _WHERE, (False,))
    groups = as_object(quantization, "config_groups", _WHERE)
    for name in groups:
        group = as_object(groups, name, f"{_WHERE}.config_groups")
        where = f"{_WHERE}.config_groups.{name}"
        _check_numbers(group, "weights", where, (False,))
        _check_numbers(group, "input_activations", where, dynamic)
    promises = {bool(quantization[key]): key for key in _CACHE_FIELDS if key in quantization}
    if len(promises) == 2:
        raise CheckpointError(
            f"{promises[True]} makes the KV cache quantised, {promises[False]} does not"
        )
    ignored = name_list(quantization, "ignore")
    is_mixed = quantization["quant_algo"] == _MIXED
    mixed = _mixed(quantization) if is_mixed else {}

    def scheme_of(name: str) -> Scheme | None:
        if is_mixed:
            return mixed.get(name)
        return None if is_named(name, ignored) else _SCHEMES[quantization["quant_algo"]]

    return quantized_plan(
        source,
        weights,
        scheme_of,
        "quantized_layers"
        if is_mixed
        else "its list of modules left out (ignore, exclude_modules)",
        cache_scales_promised_by=promises.get(True),
    )


def _algorithm(fields: Mapping[str, Any]) -> Any:
    """Return the algorithm's name in capitals, which modelopt does not always use."""
    found = fields.get("quant_algo")
    return found.upper() if isinstance(found, str) else found


def _mixed(quantization: Mapping[str, Any]) -> Mapping[str, Scheme]:
    layers, where = (
        as_object(quantization, "quantized_layers", _WHERE),
        f"{_WHERE}.quantized_layers",
    )
    found = {name: _algorithm(as_object(layers, name, where)) for name in layers}
    for name, algorithm in found.items():
        check_fields({"quant_algo": algorithm}, f"{where}.{name}", {"quant_algo": tuple(_SCHEMES)})
    return {name: _SCHEMES[algorithm] for name, algorithm in found.items()}


def _check_numbers(
    fields: Mapping[str, Any], key: str, where: str, dynamic: tuple[bool, ...] | None
) -> None:
    check_fields(
        as_object(fields, key, where),
        f"{where}.{key}",
        {
            "num_bits": (8,),
            "type": ("float",),
            "dynamic": dynamic,
            "strategy": ("tensor", "channel", None),
        },
    )


MODELOPT = Dialect(
    name="modelopt",
    description="NVIDIA modelopt FP8: static per tensor, per channel and token, per 128x128 block",
    applies=applies,
    plan=plan,
)
