"""Reads fine-grained FP8, as written by DeepSeek and transformers: a scale per 128x128 block.

Each quantised `weight` is float8_e4m3fn with `weight_scale_inv` [ceil(out / 128), ceil(in / 128)],
which multiplies the codes in spite of its name: float32, bfloat16, or exponents of two in a byte
(`scale_fmt: ue8m0`). Activations are dynamic, with a scale for each token and 128 features; or
static, with one `activation_scale` per matrix. `weight_block_size: null` makes the scale one per
matrix too.

Source: transformers' `FineGrainedFP8Config`; DeepSeek-V3's `inference/fp8_cast_bf16.py`.
"""

from collections.abc import Mapping

from converters.dialects.layout import Dialect, Plan, Shape
from converters.dialects.quantized import (
    SCALE_DTYPES,
    Scheme,
    check_fields,
    is_named,
    name_list,
    quantized_plan,
)
from converters.source import Source
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.json_file import shown
from llama_jax.model.config import PARAM_DTYPES
from pallas_kernels.fp8_matmul.reference import BLOCK


def applies(source: Source) -> bool:
    return source.quantization.get("quant_method") == "fp8" and (
        bool(source.quantization.get("weight_block_size"))
        or any(name.endswith(".weight_scale_inv") for name in source.tensors)
    )


def plan(source: Source, weights: Mapping[str, Shape]) -> Plan:
    quantization = source.quantization
    check_fields(
        quantization,
        "quantization_config",
        {
            "quant_method": ("fp8",),
            "activation_scheme": ("dynamic", "static"),
            "weight_block_size": None,
            "scale_fmt": ("float", "ue8m0", None),
            "fmt": ("e4m3", None),
            "expert_dtype": None,  # Llama has no experts
            "dequantize": None,
            "modules_to_not_convert": None,
            "ignored_layers": None,
        },
    )
    size = quantization.get("weight_block_size", "missing")
    if size not in ([BLOCK, BLOCK], None):
        found = shown(size) if "weight_block_size" in quantization else size
        raise CheckpointError(
            f"quantization_config.weight_block_size is {found}; only [{BLOCK}, {BLOCK}] is "
            "supported, which is what every FP8 kernel with blocks of scales is made for. Quantise "
            "the original checkpoint again with that size."
        )
    plain = [
        *name_list(quantization, "modules_to_not_convert"),
        *name_list(quantization, "ignored_layers"),
    ]
    has_exponents = quantization.get("scale_fmt") == "ue8m0"
    is_static = quantization.get("activation_scheme") == "static"
    scheme = Scheme(
        layout="block" if size else "row",
        static=is_static,
        activation_group=BLOCK if size and not is_static else None,
        weight_scale="weight_scale_inv",
        input_scales=("activation_scale",),
        scale_dtypes=(*SCALE_DTYPES, "uint8") if has_exponents else SCALE_DTYPES,
    )

    def scheme_of(name: str) -> Scheme | None:
        return None if is_named(name, plain) or _is_ragged_and_plain(source, name) else scheme

    return quantized_plan(source, weights, scheme_of, "quantization_config.modules_to_not_convert")


def _is_ragged_and_plain(source: Source, name: str) -> bool:
    """Return whether a matrix is unquantised because its shape is not a multiple of the block;
    transformers does not quantise such a matrix."""
    weight = source.tensors.get(f"{name}.weight")
    return (
        weight is not None
        and weight.dtype.name in PARAM_DTYPES
        and any(size % BLOCK for size in weight.shape)
    )


FINEGRAINED = Dialect(
    name="finegrained",
    description="fine-grained FP8 (DeepSeek, transformers): weight_scale_inv per 128x128 block",
    applies=applies,
    plan=plan,
)
