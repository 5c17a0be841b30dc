"""What stands between the products of a decode step, one launch each: residual and RMSNorm, SwiGLU.

Both read products that are not summed up yet (`Parts`) and give activations in float8 terms
(`Terms`), so that the products around them are a launch each and nothing else is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import device
from pallas_kernels.choice import Choice, Kernel
from pallas_kernels.fp8_matmul.terms import Parts, Terms
from pallas_kernels.row_fusions import reference


def add_rms_norm(
    product: Parts | None, residual: Array, weight: Array, eps: float
) -> tuple[Array, Terms]:
    """The sum x = residual + product, rounded to bfloat16, and RMSNorm of it in terms.

    product: [m, d], or None for nothing to add; residual: bfloat16 [m, d]; weight: [d]. The terms
    are x * weight, rounded once to bfloat16; their product is divided by rms(x), where Hugging
    Face's Llama rounds x / rms(x) and that times the weight.
    Needs a Hopper GPU; d as `refusal` says.
    """
    with Choice(ADD_RMS_NORM).scope():
        summed, terms = ADD_RMS_NORM.run(product, residual, weight, eps)
    return summed, terms


def silu_and_mul(gate: Parts, up: Parts) -> Terms:
    """silu(gate) * up in terms, rounded to bfloat16 once. Both are [m, n]. Needs a Hopper GPU."""
    with Choice(SILU_AND_MUL).scope():
        terms: Terms = SILU_AND_MUL.run(gate, up)
    return terms


def why_not(residual: Array | jax.ShapeDtypeStruct, inner: int) -> str | None:
    """Return why the kernels cannot take these activations on what is lowered for; None if they
    can.

    Operands as in `refusal`.
    """
    return device.not_hopper() or refusal(residual, inner) or device.not_local()


def refusal(residual: Array | jax.ShapeDtypeStruct, inner: int) -> str | None:
    """Return why the kernels cannot take these activations; None if they can.

    residual: [m, d]; inner: columns of what `silu_and_mul` returns.
    """
    if residual.dtype != jnp.bfloat16:
        return f"activations must be bfloat16, got {residual.dtype}"
    for name, size in (("hidden", residual.shape[1]), ("intermediate", inner)):
        if size % MULTIPLE:
            return f"{name} size {size} must be a multiple of {MULTIPLE}"
    return None


def _add_rms_norm(*operands: Any) -> tuple[Array, Terms]:
    from pallas_kernels.row_fusions import hopper

    return hopper.add_rms_norm(*operands)


def _silu_and_mul(*operands: Any) -> Terms:
    from pallas_kernels.row_fusions import hopper

    return hopper.silu_and_mul(*operands)


# A warpgroup's threads.
MULTIPLE = 128
_COST = "adds parts up, two terms in FP8 for the next product"
ADD_RMS_NORM = Kernel(
    name="hopper", run=_add_rms_norm, refusal=refusal, launches={"add_rms_norm": _COST}
)
SILU_AND_MUL = Kernel(
    name="hopper", run=_silu_and_mul, refusal=refusal, launches={"silu_and_mul": _COST}
)
__all__ = ["add_rms_norm", "reference", "refusal", "silu_and_mul", "why_not"]
