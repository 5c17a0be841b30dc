"""Implements the row fusions as Mosaic GPU kernels: a warpgroup has a part of a row in registers.

They are for decode, where a step has few rows. Each row is read once, just after the product before
has written it, and most of the time is that of the launch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3
from pallas_kernels.fp8_matmul.terms import (
    MANTISSA_BITS,
    Parts,
    Terms,
    exponent_of,
    inverse,
    padded_rows,
    power_of_two,
    split,
    unit_exponent,
)

THREADS = 128
GROUPS = (512, 256, 128)
Ref = Any


def group_size(columns: int) -> int:
    """Return the columns of a row per thread block, which share a unit: up to 4 per thread."""
    return next(each for each in GROUPS if columns % each == 0)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def add_rms_norm(
    product: Parts | None, residual: Array, weight: Array, eps: float, interpret: Any = None
) -> tuple[Array, Terms]:
    """Compute `row_fusions.add_rms_norm`.

    A thread block has some columns of a row, and so computes only a part of its mean square.
    """
    m, d = residual.shape
    rows, size = padded_rows(m), group_size(d)

    def kernel(
        gmem: Any, residual_gmem: Ref, codes_gmem: Ref, units_gmem: Ref, mean_squares_gmem: Ref
    ) -> None:
        group, row = lax.axis_index("group"), lax.axis_index("row")
        columns = pl.ds(group * size, size)
        x = _load(gmem["residual"].at[row, columns], size).astype(jnp.float32)
        if "sums" in gmem:
            x = x + _total(gmem, row, columns, size)
            rounded = x.astype(jnp.bfloat16)
            residual_gmem.at[row, columns][...] = rounded
            x = rounded.astype(jnp.float32)
        mean_squares_gmem[group, row] = jnp.sum(x * x) / d + eps * size / d
        y = x * _load(gmem["weight"].at[columns], size).astype(jnp.float32)
        y = y.astype(jnp.bfloat16).astype(jnp.float32)
        _store_terms(y, codes_gmem, units_gmem, row, rows, group, columns)

    operands = {"residual": residual, "weight": weight} | _of_product(product)
    summed, codes, units, mean_squares = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((m, d), jnp.bfloat16),
            jax.ShapeDtypeStruct((2 * rows, d), e4m3.DTYPE),
            jax.ShapeDtypeStruct((d // size, rows), jnp.int32),
            jax.ShapeDtypeStruct((d // size, rows), jnp.float32),
        ),
        grid=(d // size, m),
        grid_names=("group", "row"),
        kernel_name="add_rms_norm",
        interpret=interpret,
    )(operands)
    terms = Terms(codes, lax.bitcast_convert_type(units, jnp.float32), mean_squares)
    return residual if product is None else summed, terms


@functools.partial(jax.jit, static_argnames="interpret")
def silu_and_mul(gate: Parts, up: Parts, interpret: Any = None) -> Terms:
    """Compute `row_fusions.silu_and_mul`."""
    _, m, n = gate.sums.shape
    rows, size = padded_rows(m), group_size(n)

    def kernel(gmem: Any, codes_gmem: Ref, units_gmem: Ref) -> None:
        group, row = lax.axis_index("group"), lax.axis_index("row")
        columns = pl.ds(group * size, size)
        g, u = (_total(each, row, columns, size) for each in gmem)
        y = (g / (1 + jnp.exp(-g)) * u).astype(jnp.bfloat16).astype(jnp.float32)
        _store_terms(y, codes_gmem, units_gmem, row, rows, group, columns)

    codes, units = plgpu.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((2 * rows, n), e4m3.DTYPE),
            jax.ShapeDtypeStruct((n // size, rows), jnp.int32),
        ),
        grid=(n // size, m),
        grid_names=("group", "row"),
        kernel_name="silu_and_mul",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )([_of_product(gate), _of_product(up)])
    return Terms(codes, lax.bitcast_convert_type(units, jnp.float32))


def _of_product(product: Parts | None) -> dict[str, Array]:
    if product is None:
        return {}
    scale = {} if product.scale is None else {"scale": product.scale}
    return {"sums": product.sums} | scale


def _total(gmem: Any, row: Array, columns: Any, size: int) -> Array:
    """Return `Parts.total` of some columns of a row."""
    sums_gmem = gmem["sums"]
    y = _load(sums_gmem.at[0, row, columns], size)
    for part in range(1, sums_gmem.shape[0]):
        y = y + _load(sums_gmem.at[part, row, columns], size)
    return y * _load(gmem["scale"].at[columns], size) if "scale" in gmem else y


def _load(ref: Ref, size: int) -> Array:
    """Load a vector over a warpgroup's threads, up to 4 consecutive numbers each."""
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=min(4, size // THREADS))
    return plgpu.load(ref, layout=layout, optimized=False)


def _store_terms(
    y: Array,
    codes_gmem: Ref,
    units_gmem: Ref,
    row: Array,
    rows: int,
    group: Array | int,
    columns: Any,
) -> None:
    """Store one group of a row, float32 with bfloat16's precision, as `Terms`."""
    exponent = unit_exponent(jnp.max(exponent_of(y)))
    a, b = split(y * power_of_two(jnp.full_like(y, inverse(exponent), jnp.int32)))
    codes_gmem.at[row, columns][...] = a.astype(e4m3.DTYPE)
    codes_gmem.at[rows + row, columns][...] = b.astype(e4m3.DTYPE)
    units_gmem[group, row] = lax.shift_left(exponent, jnp.int32(MANTISSA_BITS))
