"""Implements the second launch of decode attention on Hopper, which combines splits of the keys.

out, peak, total in gmem      a part of the online softmax for each split
     │ loads                  one warpgroup for every 8 rows of queries
y += out * exp2(peak - highest peak), weights += total * ..., in the order of the parts
     │ y / weights, by way of y_smem and TMA
result in gmem
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import BOX_ROWS, tile
from pallas_kernels.paged_attention.hopper_loop import Ref, positive

MATRIX = plgpu.Layout.WGMMA
PER_ROW = MATRIX.reduce(0)  # rows of queries are the columns of scores and of sums


def combine(
    out: Array,
    peak: Array,
    total: Array,
    v_scale: Array,
    packed: Array,
    dtype: jnp.dtype,
    interpret: Any,
) -> Array:
    """Combine the parts of a softmax over all keys, in order, and multiply by v_scale.

    out: float32 [parts, batch, kv_heads, tiles, head_dim, rows]; peak, total: the same without
        head_dim.
    v_scale: float32 [1].
    packed: the queries, [batch, kv_heads, rows of all tiles, head_dim].
    Returns the result in the shape of `packed`.
    """
    _, batch, num_kv_heads, tiles, head_dim, rows = out.shape
    groups = rows // BOX_ROWS

    def kernel(
        out_gmem: Ref, peak_gmem: Ref, total_gmem: Ref, v_scale_gmem: Ref, y_gmem: Ref, y_smem: Ref
    ) -> None:
        sequence, kv_head = lax.axis_index("sequence"), lax.axis_index("kv_head")
        group = lax.axis_index("group")
        within = pl.ds(lax.rem(group, groups) * BOX_ROWS, BOX_ROWS)
        parts_gmem = [
            each.at[:, sequence, kv_head, lax.div(group, groups)]
            for each in (out_gmem, peak_gmem, total_gmem)
        ]
        y = combined(parts_gmem, within, v_scale_gmem[0])
        rows_of_group = pl.ds(group * BOX_ROWS, BOX_ROWS)
        store(y, y_smem, y_gmem.at[sequence, kv_head, rows_of_group], dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(packed.shape, dtype),
        grid=(tiles * groups, num_kv_heads, batch),
        grid_names=("group", "kv_head", "sequence"),
        kernel_name="paged_attention_combine",
        scratch_types=[tile((BOX_ROWS, head_dim), dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(out, peak, total, v_scale)


def combined(parts_gmem: Sequence[Ref], rows: Any, v_scale: Array) -> Array:
    """Return the softmax of all parts times v_scale, float32 [head_dim, 8], for 8 of the rows.

    parts_gmem: out [parts, head_dim, all rows], peak and total [parts, all rows].
    """
    out_gmem, peak_gmem, total_gmem = parts_gmem
    parts, head_dim, _ = out_gmem.shape

    def load(place: Ref, layout: Any) -> Array:
        return plgpu.load(place, layout=layout, optimized=False)

    peaks = [load(peak_gmem.at[part, rows], PER_ROW) for part in range(parts)]
    highest = functools.reduce(lax.max, peaks)
    y = filled((head_dim, BOX_ROWS), 0.0, MATRIX)
    weights = filled((BOX_ROWS,), 0.0, PER_ROW)
    for part, each in enumerate(peaks):
        weight = jnp.exp2(each - highest)
        y += load(out_gmem.at[part, :, rows], MATRIX) * per_row(weight, y)
        weights += load(total_gmem.at[part, rows], PER_ROW) * weight
    return y * per_row(v_scale / positive(weights), y)


def filled(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    """Return float32 registers filled with one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def per_row(each: Array, like: Array) -> Array:
    """Spread a number for each row of queries over the columns of `like`."""
    return lax.broadcast_in_dim(each, like.shape, (1,))


def store(result: Array, staged_smem: Ref, target_gmem: Ref, dtype: jnp.dtype) -> None:
    """Write a result [head_dim, rows] as `dtype` [rows, head_dim], through shared memory."""
    result = lax.bitcast_convert_type(result.astype(dtype), staged_smem.dtype)
    staged_smem.transpose((1, 0))[...] = result
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged_smem, target_gmem)
    plgpu.wait_smem_to_gmem(0)
