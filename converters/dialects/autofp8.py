"""Reads AutoFP8's checkpoints (Neural Magic, 2024): `quant_method: "fp8"`, one scale per matrix.

Each quantised `weight` is float8_e4m3fn with a `weight_scale`; `activation_scheme: static` adds an
`input_scale` (`act_scale` until June 2024), `kv_cache_scheme: static` scales of the KV cache:
`self_attn.k_scale` and `v_scale`, or one `kv_scale` for both in the oldest.

Source: neuralmagic/AutoFP8; vLLM's `fp8.py`, which reads `modules_to_not_convert` too.
"""

from collections.abc import Mapping

from converters.dialects.layout import Dialect, Plan, Shape
from converters.dialects.quantized import Scheme, check_fields, is_named, name_list, quantized_plan
from converters.source import Source

_WHERE = "quantization_config"


def applies(source: Source) -> bool:
    quantization = source.quantization
    return (
        quantization.get("quant_method") == "fp8"
        and not quantization.get("weight_block_size")
        and not source.hf_config.get("use_fp8_e4m3")
        and not any(
            name.endswith((".in_scale", ".weight_scale_inv"))
            or (name.endswith("_proj.weight") and tensor.dtype.name == "int8")
            for name, tensor in source.tensors.items()
        )
    )


def plan(source: Source, weights: Mapping[str, Shape]) -> Plan:
    quantization = source.quantization
    check_fields(
        quantization,
        _WHERE,
        {
            "quant_method": ("fp8",),
            "activation_scheme": ("static", "dynamic"),
            "ignored_layers": None,
            "modules_to_not_convert": None,
            "kv_cache_scheme": ("static", None),
            "fmt": ("e4m3", None),
            "weight_block_size": (None,),
        },
    )
    ignored = [
        *name_list(quantization, "ignored_layers"),
        *name_list(quantization, "modules_to_not_convert"),
    ]
    scheme = Scheme(static=quantization.get("activation_scheme", "static") == "static")
    return quantized_plan(
        source,
        weights,
        lambda name: None if is_named(name, ignored) else scheme,
        f"{_WHERE}.ignored_layers",
        cache_scales_promised_by=(
            f"{_WHERE}.kv_cache_scheme" if quantization.get("kv_cache_scheme") else None
        ),
    )


AUTOFP8 = Dialect(
    name="autofp8",
    description="AutoFP8: quant_method fp8, a scale per matrix, static or dynamic activations",
    applies=applies,
    plan=plan,
)
