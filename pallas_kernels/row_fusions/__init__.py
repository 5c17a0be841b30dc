"""Computes what is between the products of a decode step: residual with RMSNorm, and SwiGLU.

Each is one launch. They read products as partial sums (`Parts`) and return activations in float8
terms (`Terms`), so that a decode step has no launches besides these and the products.
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
    """Compute x = residual + product, rounded to bfloat16, and RMSNorm of it in terms.

    The terms are x * weight, rounded once to bfloat16, and the product that follows is divided by
    rms(x). Hugging Face's Llama rounds twice: x / rms(x), and that times the weight. Needs a Hopper
    GPU, and d as in `refusal`.

    product: [m, d], or None to add nothing.
    residual: bfloat16 [m, d].
    weight: [d].
    """
    with Choice(ADD_RMS_NORM).scope():
        summed, terms = ADD_RMS_NORM.run(product, residual, weight, eps)
    return summed, terms


def silu_and_mul(gate: Parts, up: Parts) -> Terms:
    """Compute silu(gate) * up of products [m, n] in terms, rounded once to bfloat16. Needs a Hopper
    GPU."""
    with Choice(SILU_AND_MUL).scope():
        terms: Terms = SILU_AND_MUL.run(gate, up)
    return terms


def why_not(residual: Array | jax.ShapeDtypeStruct, intermediate: int) -> str | None:
    """Return why the kernels cannot take these activations on the target device; None if they can.

    Operands are those of `refusal`.
    """
    return device.not_hopper() or refusal(residual, intermediate) or device.not_local()


def refusal(residual: Array | jax.ShapeDtypeStruct, intermediate: int) -> str | None:
    """Return why the kernels cannot take these activations; None if they can.

    residual: [m, d]. intermediate: columns of the result of `silu_and_mul`.
    """
    if residual.dtype != jnp.bfloat16:
        return f"activations must be bfloat16, got {residual.dtype}"
    for name, size in (("hidden", residual.shape[1]), ("intermediate", intermediate)):
        if size % MULTIPLE:
            return f"{name} size {size} must be a multiple of {MULTIPLE}"
    return None


def _add_rms_norm(*operands: Any) -> tuple[Array, Terms]:
    from pallas_kernels.row_fusions import hopper

    return hopper.add_rms_norm(*operands)


def _silu_and_mul(*operands: Any) -> Terms:
    from pallas_kernels.row_fusions import hopper

    return hopper.silu_and_mul(*operands)


# The threads of a warpgroup.
MULTIPLE = 128
_COST = "adds partial sums, makes two FP8 terms for the next product"
ADD_RMS_NORM = Kernel(
    name="hopper", run=_add_rms_norm, refusal=refusal, launches={"add_rms_norm": _COST}
)
SILU_AND_MUL = Kernel(
    name="hopper", run=_silu_and_mul, refusal=refusal, launches={"silu_and_mul": _COST}
)
__all__ = ["add_rms_norm", "reference", "refusal", "silu_and_mul", "why_not"]
