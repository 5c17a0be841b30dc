"""Fusions between the products of a layer: sums left to the next launch, and SwiGLU in FP8.

On a Hopper GPU a product of few rows is divided among thread blocks along K. The kernel then leaves
its partial sums (`Parts`) to the launch that reads them, which saves a launch per product.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.model.linear import Products
from llama_jax.model.spec import ModelSpec
from pallas_kernels import e4m3, row_fusions
from pallas_kernels.fp8_matmul import Choice, Kernel, choose, swiglu
from pallas_kernels.fp8_matmul.terms import Parts, Terms


class Pending(NamedTuple):
    """A residual stream [b, t, d] and a product that has not been added to it yet."""

    residual: Array
    product: Parts


def added(x: Array | Pending) -> Array:
    """Return the residual stream [b, t, d] with a pending product added."""
    if not isinstance(x, Pending):
        return x
    residual, product = x
    rows = residual.reshape(-1, residual.shape[-1]).astype(jnp.float32)
    return (product.total() + rows).astype(residual.dtype).reshape(residual.shape)


def residual_of(x: Array | Pending) -> Array:
    """Return the residual stream [b, t, d] without a pending product, for its shape and dtype."""
    return x.residual if isinstance(x, Pending) else x


def add_rms_norm(x: Array | Pending, weight: Array, eps: float) -> tuple[Array, Terms]:
    """Add a pending product and normalise, in one launch.

    Returns the residual stream [b, t, d] and RMSNorm of its rows [b * t, d].
    """
    residual, product = x if isinstance(x, Pending) else (x, None)
    rows = residual.reshape(-1, residual.shape[-1])
    summed, terms = row_fusions.add_rms_norm(product, rows, weight, eps)
    return summed.reshape(residual.shape), terms


def leave_sums(
    spec: ModelSpec, residual: Array, launches: Sequence[Products], intermediate: int = 0
) -> bool:
    """Return whether each product leaves its sums over splits of K to the launch that follows.

    That needs a kernel which can do so for each product, and few rows; and `row_fusions` must take
    the activations between the products.

    launches: products that share a launch each.
    intermediate: columns of SwiGLU between them, or 0.
    """
    rows = jax.ShapeDtypeStruct(
        (residual.size // residual.shape[-1], residual.shape[-1]), residual.dtype
    )
    if spec.activations != "bf16" or row_fusions.why_not(rows, intermediate):
        return False

    def is_possible(products: Products) -> bool:
        choices = [choice for choice in products.choices if choice]
        return (
            len(choices) == len(products.linears)
            and all(choice.kernel.parts for choice in choices)
            and len({linear.format.scale for linear in products.linears}) == 1
            and not any(linear.stored().summed_over for linear in products.linears)
        )

    return all(map(is_possible, launches))


def choose_swiglu(
    spec: ModelSpec, rows: int, gate_up: Products, down: Products
) -> Choice[Kernel] | None:
    """Choose a kernel that computes silu(gate(x)) * up(x) and quantises it, all in one launch.

    Its result has a scale per token and 128 columns; without such a kernel, down_proj quantises
    with one scale per token. Returns None if no kernel takes these products.
    """
    (gate, up), (last,) = gate_up.linears, down.choices
    formats = [linear.format for linear in (gate, up, *down.linears)]
    if (
        spec.activations != "dynamic"
        or any(each.scale is None or each.activation_scale_ub for each in formats)
        or formats[0].scale != formats[1].scale
        or last is None
    ):
        return None
    codes = jax.ShapeDtypeStruct((rows, gate.in_features), e4m3.DTYPE)
    choice, of_up = (choose(codes, *each.stored().quantized, None) for each in (gate, up))
    is_fused = (
        choice.kernel.swiglu
        and choice.kernel is of_up.kernel is last.kernel
        and choice.kernel.is_meant_by(spec.implementation)
    )
    return choice if is_fused else None


def quantized_swiglu(gate_up: Products, x: Array, choice: Choice[Kernel]) -> tuple[Array, Array]:
    """Compute silu(gate(x)) * up(x) of x [b, t, d] by the kernel of `choose_swiglu`.

    Returns FP8 codes [b * t, intermediate] and their scales, as `fp8_matmul` takes them.
    """
    gate, up = gate_up.linears
    codes, x_scale, matrix = gate.operands(x)
    with jax.named_scope(gate_up.name):
        return swiglu(
            codes, *matrix.quantized, *up.stored().quantized, x_scale=x_scale,
            implementation=choice,
        )  # fmt: skip
