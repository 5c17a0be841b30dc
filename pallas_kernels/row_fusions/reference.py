"""Defines the row fusions plainly, in float32."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.fp8_matmul.terms import Parts


def add_rms_norm(
    product: Parts | None, residual: Array, weight: Array, eps: float
) -> tuple[Array, Array]:
    """Compute `row_fusions.add_rms_norm` with the norm in bfloat16 instead of terms."""
    x = residual.astype(jnp.float32)
    if product is not None:
        x = x + product.total()
    rounded = lax.reduce_precision(x, 8, 7)
    normed = rounded * lax.rsqrt(jnp.mean(jnp.square(rounded), axis=1, keepdims=True) + eps)
    normed = lax.reduce_precision(normed, 8, 7) * weight.astype(jnp.float32)
    return rounded.astype(residual.dtype), normed.astype(jnp.bfloat16)


def silu_and_mul(gate: Parts, up: Parts) -> Array:
    """Compute `row_fusions.silu_and_mul` in bfloat16 instead of terms."""
    return (jax.nn.silu(gate.total()) * up.total()).astype(jnp.bfloat16)
