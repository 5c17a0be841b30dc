"""Defines `fp8_matmul` and `swiglu`: dequantise in float32, multiply in float32."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import e4m3

BLOCK = 128
# A GPU flushes scales below float32's smallest normal number to zero, and cannot divide by them.
MIN_ABSMAX = e4m3.MAX * float(jnp.finfo(jnp.float32).tiny)


def expand_scale(scale: Array, shape: tuple[int, int]) -> Array:
    """Make scales broadcastable to an (out, in) matrix of `shape`: (out, 1) or (out, in).

    scale: [out], one per row; [out, groups], one per row and equal group of columns; or
        [ceil(out / 128), ceil(in / 128)], one per block.
    """
    if scale.ndim == 1:
        return scale[:, None]
    if not is_per_block(scale, shape):
        return jnp.repeat(scale, shape[1] // scale.shape[1], axis=1)
    wide = jnp.repeat(jnp.repeat(scale, BLOCK, axis=0), BLOCK, axis=1)
    return wide[: shape[0], : shape[1]]


def is_per_block(scale: Array, shape: tuple[int, int]) -> bool:
    """Return whether the scales of an (out, in) matrix are one per 128x128 block."""
    return scale.shape == (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK))


def is_grouped(x_scale: Array, columns: int) -> bool:
    """Return whether activations [m, columns] have scales [m, ceil(columns / 128)]."""
    return x_scale.ndim == 2 and x_scale.shape[1] == -(-columns // BLOCK) != 1


def dequantize_activations(x: Array, x_scale: Array) -> Array:
    """Return float32 [m, in] of codes [m, in] and scales [m, ceil(in / 128)], [m, 1] or []."""
    if is_grouped(x_scale, x.shape[1]):
        x_scale = jnp.repeat(x_scale, BLOCK, axis=1)[:, : x.shape[1]]
    return x.astype(jnp.float32) * x_scale


def fp8_matmul(
    x: Array,
    weight: Array,
    weight_scale: Array,
    x_scale: Array | None,
    out_dtype: jnp.dtype,
    residual: Array | None = None,
) -> Array:
    w = e4m3.load(weight) * expand_scale(weight_scale, (weight.shape[0], weight.shape[1]))
    a = x.astype(jnp.float32) if x_scale is None else dequantize_activations(x, x_scale)
    y = jnp.einsum("mk,nk->mn", a, w, precision=lax.Precision.HIGHEST)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def quantize_groups(h: Array) -> tuple[Array, Array]:
    """Quantise h [m, n] by rows and groups of 128 columns.

    Returns float8_e4m3fn codes [m, n] and float32 scales [m, n / 128]: absmax / 448, or 1 if the
    whole group is zero, or so small (below `MIN_ABSMAX`) that it becomes zero.
    """
    groups = h.astype(jnp.float32).reshape(h.shape[0], -1, BLOCK)
    absmax = jnp.max(jnp.abs(groups), axis=2)
    scale = jnp.where(absmax < MIN_ABSMAX, 1.0, absmax / e4m3.MAX)
    return e4m3.cast(groups / scale[:, :, None]).reshape(h.shape), scale


def swiglu(
    x: Array, gate: Array, gate_scale: Array, up: Array, up_scale: Array, x_scale: Array | None
) -> tuple[Array, Array]:
    float32 = jnp.dtype(jnp.float32)
    g = fp8_matmul(x, gate, gate_scale, x_scale, float32)
    return quantize_groups(jax.nn.silu(g) * fp8_matmul(x, up, up_scale, x_scale, float32))
