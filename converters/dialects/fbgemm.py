"""Reads FBGEMM's FP8 checkpoints: `quant_method: "fbgemm_fp8"`, the layout of Llama 3.1 405B.

Each quantised `weight` is float8_e4m3fn with a float32 `weight_scale` [out, 1]. Activations are
quantised per token, and clipped at `activation_scale_ub`. `modules_to_not_convert` has names of
modules or of their parents; without it only lm_head is not quantised.

Source: transformers' `integrations/fbgemm_fp8.py`, and FBGEMM's `quantize.cu` for the arithmetic.
"""

from collections.abc import Mapping

from converters.dialects.layout import Dialect, Plan, Shape
from converters.dialects.quantized import Scheme, check_fields, is_named, name_list, quantized_plan
from converters.source import Source
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.json_file import shown

# transformers' default.
_DEFAULT_UPPER_BOUND = 1200.0


def applies(source: Source) -> bool:
    return source.quantization.get("quant_method") == "fbgemm_fp8"


def plan(source: Source, weights: Mapping[str, Shape]) -> Plan:
    quantization = source.quantization
    check_fields(
        quantization,
        "quantization_config",
        {"quant_method": None, "activation_scale_ub": None, "modules_to_not_convert": None},
    )
    bound = quantization.get("activation_scale_ub", _DEFAULT_UPPER_BOUND)
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < 1e30:
        raise CheckpointError(
            f"quantization_config.activation_scale_ub must be a positive number, got {shown(bound)}"
        )
    plain = name_list(quantization, "modules_to_not_convert") or ["lm_head"]
    scheme = Scheme(activation_scale_ub=float(bound))
    return quantized_plan(
        source,
        weights,
        lambda name: None if is_named(name, plain) else scheme,
        "quantization_config.modules_to_not_convert",
    )


FBGEMM = Dialect(
    name="fbgemm",
    description="FBGEMM FP8 (Meta's 405B): a scale per row, activations bounded and dynamic",
    applies=applies,
    plan=plan,
)
