"""What Mosaic GPU kernels for Hopper share: how much shared memory there is, and its layout."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

# Per block (CUDA C++ programming guide, compute capability 9.0).
SHARED_MEMORY_BYTES = 232_448


def swizzled(dtype: jnp.dtype, columns: int) -> tuple[Any, ...]:
    """Transforms of a shared-memory tile that TMA and wgmma access without bank conflicts.

    columns: the length of the tile's last dimension, in bytes a multiple of 16.
    """
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(columns * bits)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]
