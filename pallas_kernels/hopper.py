"""What Mosaic GPU kernels for Hopper share: shared memory, its layout, and what TMA can copy."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Per block (CUDA C++ programming guide, compute capability 9.0).
SHARED_MEMORY_BYTES = 232_448
# TMA copies a matrix to and from swizzled tiles in boxes of so many rows; fewer are one box.
BOX_ROWS = 8
# What one instruction of TMA asks the L2 cache to fetch of a matrix of codes.
PREFETCHED_ROWS, PREFETCHED_COLUMNS = 256, 128


def swizzled(dtype: jnp.dtype, columns: int) -> tuple[Any, ...]:
    """Transforms of a shared-memory tile that TMA and wgmma access without bank conflicts.

    columns: the length of the tile's last dimension, in bytes a multiple of 16.
    """
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(columns * bits)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def in_whole_boxes(x: Array, axis: int = 0) -> Array:
    """x with rows of zeros along `axis` up to a multiple of `BOX_ROWS`, if it has more than those.

    Results have as many rows, of which callers drop the last. XLA fuses the zeros into what makes
    x, and the dropping into what reads the result.
    """
    rows = x.shape[axis]
    missing = -rows % BOX_ROWS if rows > BOX_ROWS else 0
    widths = [(0, missing if each == axis else 0) for each in range(x.ndim)]
    return jnp.pad(x, widths) if missing else x


def prefetch(weights: Sequence[Any], most_bytes: int, share: Array, shares: int) -> None:
    """Have the L2 cache fetch float8 weights [n, k] that the next launch reads, and do not wait.

    A launch that reads little leaves the memory idle, before and after as much as within. Of larger
    weights boxes at equal distances are fetched, `most_bytes` in all, so that the next launch has
    from both the cache and the memory throughout. share: which of `shares` thread blocks this is.
    """
    size = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    distance = pl.cdiv(size, most_bytes)
    for weight in weights:
        columns = weight.shape[1] // PREFETCHED_COLUMNS
        boxes = pl.cdiv(weight.shape[0], PREFETCHED_ROWS) * columns

        @pl.loop(share, pl.cdiv(boxes, distance), step=shares)
        def _(i: Array, weight: Any = weight, columns: int = columns) -> None:
            row, column = lax.div(i * distance, columns), lax.rem(i * distance, columns)
            box = weight.at[
                pl.ds(row * PREFETCHED_ROWS, PREFETCHED_ROWS),
                pl.ds(column * PREFETCHED_COLUMNS, PREFETCHED_COLUMNS),
            ]
            plgpu.async_prefetch(box)
