"""Has helpers for Mosaic GPU kernels on Hopper: shared memory, its layouts, TMA's boxes, tiles.

Mosaic GPU is imported inside functions: CPUs need the constants, and the import takes 0.3 s and
20 MB.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

# Per block (CUDA C++ programming guide, compute capability 9.0).
SHARED_MEMORY_BYTES = 232_448
# TMA copies a matrix to and from swizzled tiles in boxes of this many rows; fewer rows are one box.
BOX_ROWS = 8


def swizzled(dtype: jnp.dtype, columns: int) -> tuple[Any, ...]:
    """Return the transforms of a shared-memory tile for access without bank conflicts.

    columns: the length of the tile's last dimension, a multiple of 16 bytes.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(columns * bits)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def tile(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Return the scratch type of a tile in shared memory that TMA writes and wgmma reads."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype, shape[-1]))


def in_whole_boxes(x: Array, axis: int = 0) -> Array:
    """Pad x with zeros along `axis` to a multiple of `BOX_ROWS`, if it has more rows than that.

    Callers drop the surplus rows of the result. XLA fuses the padding into the producer of x, and
    the dropping into the consumer of the result.
    """
    rows = x.shape[axis]
    missing = -rows % BOX_ROWS if rows > BOX_ROWS else 0
    widths = [(0, missing if each == axis else 0) for each in range(x.ndim)]
    return jnp.pad(x, widths) if missing else x


def tile_bounds(counts: Iterable[int]) -> list[tuple[int, int]]:
    """Return the range of tiles (first, end) of each of several matrices, counted over all.

    counts: the number of tiles of each.
    """
    return list(itertools.pairwise(itertools.accumulate(counts, initial=0)))


def for_owner_of(
    tile: Array,
    bounds: Sequence[tuple[int, int]],
    each: Sequence[Any],
    use: Callable[[Any, Array], None],
) -> None:
    """Call use(owner, index): the one of `each` that owns a tile, and the tile's index in it.

    bounds: of each, from `tile_bounds`.
    """
    for (first, end), one in zip(bounds, each, strict=True):
        here = functools.partial(use, one, tile - first)
        if len(each) == 1:
            here()
        else:
            pl.when((first <= tile) & (tile < end))(here)
