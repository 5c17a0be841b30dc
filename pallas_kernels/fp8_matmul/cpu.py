"""Calls the weight-only FP8 matmul for CPUs, which is C++ (`pallas_kernels/cpu`).

Codes are upcast in registers, so a weight is read once and as float8. Sums are added in one order,
so a result depends on its row of x and its row of the weight alone. With the bfloat16 instructions
of AVX-512 and AMX, bfloat16 x is multiplied as it is, and products are added in float32 by pairs of
columns. Everything else is done in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import device, e4m3
from pallas_kernels.cpu import library
from pallas_kernels.fp8_matmul import xla
from pallas_kernels.fp8_matmul.reference import BLOCK, is_per_block

MIN_OUT = 8
# Nothing has been timed on an ARM machine. Fewer rows are bound by reading the weight, at least.
MAX_ROWS_ON_ARM = 16
# The number of columns that share a scale must be a multiple of this.
GRANULE = 64


def fp8_matmuls(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    *,
    out_dtype: jnp.dtype = jnp.float32,
    residual: Array | None = None,
    instructions: library.Instructions | None = None,
) -> tuple[Array, ...]:
    """Compute x @ dequantised(weight).T for each weight, plus a residual if there is one weight.

    x: [m, k], bfloat16 or float32.
    weights: each [n_i, k], float8_e4m3fn, its int8 bits, or bfloat16.
    weight_scales: as in `fp8_matmul`, of one kind.
    out_dtype: float32 or bfloat16, to which sums in float32 are rounded.
    residual: [m, n] of out_dtype, added before they are.
    instructions: for tests; None for the best.
    `refusal` must accept the operands.
    """
    how = _How(jnp.dtype(out_dtype), False, instructions)
    return _products(x, tuple(weights), tuple(weight_scales), residual, how)


def swiglu(
    x: Array,
    gate: Array,
    gate_scale: Array,
    up: Array,
    up_scale: Array,
    out_dtype: jnp.dtype,
    *,
    instructions: library.Instructions | None = None,
) -> Array:
    """Compute silu(x @ gate.T) * (x @ up.T), rounded to out_dtype after each operation.

    Operands as in `fp8_matmuls`; gate and up have the same shape, and scales of one kind.
    """
    how = _How(jnp.dtype(out_dtype), True, instructions)
    return _products(x, (gate, up), (gate_scale, up_scale), None, how)[0]


def dense(x: Array, weight: Array) -> Array:
    """Compute the same for one bfloat16 weight without scales."""
    return _products(x, (weight,), (None,), None, _How(jnp.dtype(jnp.float32)))[0]


def logit_stats(
    x: Array,
    weight: Array,
    weight_scale: Array | None,
    targets: Array,
    logits_dtype: jnp.dtype,
    *,
    instructions: library.Instructions | None = None,
) -> tuple[Array, ...]:
    """Compute what `logits.logit_stats` defines, while multiplying. It has no derivative.

    The tokens are divided into segments, whose sums are added in order. So results depend on a row
    of x alone, as products do.
    """
    rows = x.shape[:1]
    floats, ints = jax.ShapeDtypeStruct(rows, jnp.float32), jax.ShapeDtypeStruct(rows, jnp.int32)
    name = library.target(library.LOGIT_STATS, instructions)
    call = jax.ffi.ffi_call(name, (floats, ints, floats, floats))
    scale_rows, scale_columns = _extent(weight, weight_scale)
    found: Sequence[Array] = call(
        x, weight, jnp.zeros(0) if weight_scale is None else weight_scale, targets,
        scale_rows=scale_rows, scale_columns=min(scale_columns, x.shape[1]),
        is_rounded=jnp.dtype(logits_dtype) == jnp.bfloat16,
    )  # fmt: skip
    return tuple(found)


def refusal(
    x: Array | jax.ShapeDtypeStruct, weight: Array, weight_scale: Array | None
) -> str | None:
    """Return why the kernel cannot take these operands; None if it can."""
    if device.platform() != "cpu":
        return library.not_here()
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x must be bfloat16 or float32, got {x.dtype}"
    if weight.dtype not in (e4m3.DTYPE, jnp.int8, jnp.bfloat16):
        return f"weight must be float8_e4m3fn or bfloat16, got {weight.dtype}"
    if not x.size or weight.shape[0] < MIN_OUT:
        return f"x must have a row, and out be at least {MIN_OUT}, got {weight.shape[0]}"
    columns = _extent(weight, weight_scale)[1]
    if columns < weight.shape[1] and columns % GRANULE:
        return f"columns with scales of their own must be a multiple of {GRANULE}, got {columns}"
    return library.not_here()


def slower_than_xla(rows: int) -> str | None:
    """Return why XLA is faster for x of this many rows; None if it is not."""
    if reason := library.slower_than_xla():
        return reason
    if library.best() == "neon" and rows > MAX_ROWS_ON_ARM:
        return f"more than {MAX_ROWS_ON_ARM} rows are XLA's until NEON has been timed"
    return None


def instructions_here() -> library.Instructions | None:
    """Return the instruction set of the kernel, or None if it cannot run on the target device."""
    return None if library.not_here() else library.best()


@dataclass(frozen=True)
class _How:
    """Tells a call of the kernel what to do besides multiplying.

    is_gated: whether it is SwiGLU of two weights.
    """

    out_dtype: jnp.dtype
    is_gated: bool = False
    instructions: library.Instructions | None = None


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _products(
    x: Array,
    weights: tuple[Array, ...],
    scales: tuple[Array | None, ...],
    residual: Array | None,
    how: _How,
) -> tuple[Array, ...]:
    scale_rows, scale_columns = _extent(weights[0], scales[0])
    operands = []
    for weight, scale in zip(weights, scales, strict=True):
        operands += [weight, jnp.zeros(0) if scale is None else scale]
    if residual is not None:
        operands.append(residual)
    results = weights[:1] if how.is_gated else weights
    call = jax.ffi.ffi_call(
        library.target(library.MATMUL, how.instructions),
        [jax.ShapeDtypeStruct((x.shape[0], each.shape[0]), how.out_dtype) for each in results],
    )
    ys: Sequence[Array] = call(
        x, *operands, scale_rows=scale_rows, scale_columns=min(scale_columns, x.shape[1]),
        has_residual=residual is not None,
    )  # fmt: skip
    return tuple(ys)


@_products.defjvp
def _products_jvp(
    how: _How, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Differentiate XLA's form, because the kernel has no derivative."""

    def by_xla(
        x: Array,
        weights: tuple[Array, ...],
        scales: tuple[Array | None, ...],
        residual: Array | None,
    ) -> tuple[Array, ...]:
        pairs = zip(weights, scales, strict=True)
        ys = [xla.by_row_blocks(x, *each) for each in pairs]
        if residual is not None:
            ys[0] += residual
        ys = [y.astype(how.out_dtype) for y in ys]
        return (jax.nn.silu(ys[0]) * ys[1],) if how.is_gated else tuple(ys)

    return _products(*primals, how), jax.jvp(by_xla, primals, tangents)[1]


def _extent(weight: Array, scale: Array | None) -> tuple[int, int]:
    """Return the number of rows and of columns of a weight that share a scale."""
    if scale is None or scale.ndim == 1:
        return 1, weight.shape[1]
    if is_per_block(scale, (weight.shape[0], weight.shape[1])):
        return BLOCK, BLOCK
    return 1, weight.shape[1] // scale.shape[1]
