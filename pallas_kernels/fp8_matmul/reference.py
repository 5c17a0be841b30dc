"""The meaning of `fp8_matmul`: dequantise in float32, multiply in float32."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import e4m3

BLOCK = 128


def expand_scale(scale: Array, shape: tuple[int, int]) -> Array:
    """Scales broadcastable to an (out, in) matrix of `shape`: (out, 1) or (out, in).

    scale: [out], one per row, or [ceil(out / 128), ceil(in / 128)], one per block.
    """
    if scale.ndim == 1:
        return scale[:, None]
    wide = jnp.repeat(jnp.repeat(scale, BLOCK, axis=0), BLOCK, axis=1)
    return wide[: shape[0], : shape[1]]


def fp8_matmul(
    x: Array, weight: Array, weight_scale: Array, x_scale: Array | None, out_dtype: jnp.dtype
) -> Array:
    shape = (weight.shape[0], weight.shape[1])
    w = e4m3.load(weight) * expand_scale(weight_scale, shape)
    a = x.astype(jnp.float32)
    if x_scale is not None:
        a = a * x_scale
    y = jnp.einsum("mk,nk->mn", a, w, precision=lax.Precision.HIGHEST)
    return y.astype(out_dtype)
