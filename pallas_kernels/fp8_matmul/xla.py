"""Implements `fp8_matmul` in forms that XLA runs fast: as an FP8 dot, or by blocks of rows.

- With FP8 activations, enough rows, and one scale per row, it is a float8 x float8 dot, which XLA's
  GPU backend hands to cuBLASLt's FP8 matmul.
- Otherwise a loop upcasts some rows of the weight (`block_rows`) and multiplies, so that only one
  block at a time exists in a wider dtype. On a GPU that is bfloat16 if activations fit it, because
  the tensor cores multiply bfloat16 15 times as fast as a GPU multiplies float32.
"""

import operator
from functools import reduce

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import device, e4m3
from pallas_kernels.fp8_matmul.reference import (
    BLOCK,
    dequantize_activations,
    expand_scale,
    is_grouped,
    is_per_block,
    quantize_groups,
)

# Elements that are upcast at a time: on a CPU, in float32, what fits in the L2 caches of a few
# cores; on a GPU, in bfloat16, what fits in its L2 cache (50 MB on an H200).
_BLOCK_ELEMENTS, _BLOCK_ELEMENTS_ON_GPU = 1 << 20, 1 << 24
# From this many activation rows on, XLA multiplies faster in bf16 than in float32 on a CPU with
# bf16 dot products. With fewer, rearranging the weight for them takes longer than the product.
MIN_ROWS_FOR_BF16 = 9
# From this many rows on, XLA uses cuBLASLt's FP8 matmul. With fewer, it upcasts the weight.
MIN_ROWS_FOR_FP8_DOT = 16


def fp8_matmul(
    x: Array,
    weight: Array,
    weight_scale: Array,
    x_scale: Array | None,
    out_dtype: jnp.dtype,
    residual: Array | None = None,
) -> Array:
    if x_scale is not None and is_grouped(x_scale, x.shape[1]):
        x, x_scale = ungrouped(x, x_scale, out_dtype), None
    is_fp8_dot = weight.dtype == e4m3.DTYPE and x.dtype == e4m3.DTYPE and weight_scale.ndim == 1
    if is_fp8_dot and x.shape[0] >= MIN_ROWS_FOR_FP8_DOT:
        y = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        y = y * weight_scale
    else:
        y = by_row_blocks(x, weight, weight_scale)
    if x_scale is not None:
        y = y * x_scale
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def ungrouped(x: Array, x_scale: Array, out_dtype: jnp.dtype) -> Array:
    """Multiply x by its scales per token and 128 columns.

    Returns bfloat16, or float32 if out_dtype is float32.
    """
    wide = jnp.float32 if out_dtype == jnp.float32 else jnp.bfloat16
    return dequantize_activations(x, x_scale).astype(wide)


def swiglu(
    x: Array, gate: Array, gate_scale: Array, up: Array, up_scale: Array, x_scale: Array | None
) -> tuple[Array, Array]:
    float32 = jnp.dtype(jnp.float32)
    g = fp8_matmul(x, gate, gate_scale, x_scale, float32)
    return quantize_groups(jax.nn.silu(g) * fp8_matmul(x, up, up_scale, x_scale, float32))


def block_rows(columns: int) -> int:
    """Return the number of rows of a weight that are upcast at a time, a multiple of 128."""
    elements = _BLOCK_ELEMENTS_ON_GPU if device.platform() == "gpu" else _BLOCK_ELEMENTS
    return max(1, elements // columns // BLOCK) * BLOCK


def by_row_blocks(x: Array, weight: Array, weight_scale: Array | None) -> Array:
    """Compute x @ weight.T, upcasting at most `block_rows` rows of the weight at a time.

    On a GPU products are bfloat16 if x fits it, even if code * block scale has to be rounded. On a
    CPU they are bfloat16 if both sides fit it and there are enough rows. Otherwise they are
    float32.

    x: [m, in].
    weight: [out, in], of any float dtype, or e4m3fn bits.
    weight_scale: as in `fp8_matmul`; None for a weight without scales.
    Returns float32 [m, out].
    """
    rows, columns = weight.shape
    per_block = weight_scale is not None and is_per_block(weight_scale, (rows, columns))
    if device.platform() == "gpu":
        in_bf16 = x.dtype in (jnp.bfloat16, e4m3.DTYPE)
    else:
        is_exact = x.dtype == jnp.bfloat16 or (x.dtype == e4m3.DTYPE and not per_block)
        in_bf16 = x.shape[0] >= MIN_ROWS_FOR_BF16 and is_exact
    x = x.astype(jnp.bfloat16 if in_bf16 else jnp.float32)
    weight_first = _is_weight_first(x)

    def product_with(x: Array, w: Array) -> Array:
        w = w.astype(x.dtype)
        return _dot(w, x) if weight_first else _dot(x, w)

    def product(start: Array | int, count: int) -> Array:
        w = lax.dynamic_slice_in_dim(weight, start, count)
        unit = e4m3.BITS_SCALE if w.dtype == jnp.int8 else 1.0
        w = e4m3.from_bits(w) if w.dtype == jnp.int8 else w.astype(jnp.float32)
        if weight_scale is None:
            return product_with(x, w)
        if per_block:
            scale = lax.dynamic_slice_in_dim(weight_scale, start // BLOCK, -(-count // BLOCK))
            return product_with(x, w * expand_scale(scale * unit, (count, columns)))
        scale = lax.dynamic_slice_in_dim(weight_scale, start, count).reshape(count, -1) * unit
        groups = (jnp.split(each, scale.shape[1], axis=1) for each in (x, w))
        scales = (each[:, None] if weight_first else each for each in scale.T)
        products = (product_with(*pair) for pair in zip(*groups, strict=True))
        return reduce(operator.add, map(operator.mul, products, scales))

    # XLA would hoist work that does not depend on x to the start of the program for all layers, and
    # keep the results live; the barrier ties it to x.
    shape = (rows, x.shape[0]) if weight_first else (x.shape[0], rows)
    y, weight, x = lax.optimization_barrier((jnp.zeros(shape), weight, x))
    axis = 0 if weight_first else 1
    block = min(block_rows(columns), rows)

    def body(i: Array | int, y: Array) -> Array:
        start = i * block
        return lax.dynamic_update_slice_in_dim(y, product(start, block), start, axis)

    if block == rows:
        y = product(0, rows)
    else:
        y = lax.fori_loop(0, rows // block, body, y)
        if tail := rows % block:
            last = product(rows - tail, tail)
            y = lax.dynamic_update_slice_in_dim(y, last, rows - tail, axis)
    # XLA would turn a transposed product into one with the operands exchanged.
    return lax.optimization_barrier(y).T if weight_first else y


def dot(x: Array, weight: Array) -> Array:
    """Compute x [m, in] @ weight [out, in].T in float32, with the operands in the order that is
    faster on a CPU. Both have the same dtype."""
    if not _is_weight_first(x):
        return _dot(x, weight)
    # XLA would turn a transposed product into one with the operands exchanged.
    return lax.optimization_barrier(_dot(weight, x)).T


def _is_weight_first(x: Array) -> bool:
    """Return whether weight times activations is faster than the reverse.

    XLA first copies the second operand into another layout, and its tiles have more rows than
    columns.
    """
    return x.shape[0] <= 128 and (x.dtype == jnp.float32 or x.shape[0] >= 24)


def _dot(a: Array, b: Array) -> Array:
    """Multiply [m, k] by [n, k], in their dtype. Returns float32 [m, n]."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((1,), (1,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
