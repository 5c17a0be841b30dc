"""The simulator's race detector, on which the tests of the Hopper kernels rely, finds a race."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu


@pytest.mark.parametrize("waits", [True, False])
def test_a_tile_that_is_read_before_it_has_arrived_is_a_race(waits):
    def kernel(x, y, tile, arrived):
        plgpu.copy_gmem_to_smem(x, tile, arrived)
        if waits:
            plgpu.barrier_wait(arrived)
        y[...] = tile[...]
        if not waits:
            plgpu.barrier_wait(arrived)

    x = jnp.arange(128.0)
    y = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )(x)
    assert gpu_callbacks.get_races().races_found is not waits
    if waits:
        np.testing.assert_array_equal(y, x)
