"""Kernels for Hopper in JAX's GPU simulator, and lowered for one: two views of the same call.

The simulator shows what a kernel computes, and races. It takes what Hopper does not, such as tiles
that TMA cannot copy; lowering, which compiles nothing and needs neither GPU nor CUDA, refuses them.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dev import sm90


def simulate(kernel: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `kernel` returns in the simulator, whose race detector finds nothing; it is lowered for
    an H200 with the same arguments before."""
    lower(lambda: kernel(*arguments, **options))
    found = kernel(*arguments, **options, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert not gpu_callbacks.get_races().races_found
    return found


def lower(function: Callable[..., Any], *arguments: Any) -> jax.stages.Lowered:
    """For an H200; raises what Mosaic GPU has against a kernel.

    arguments: trees of arrays or `jax.ShapeDtypeStruct`s.
    """
    with jax.sharding.use_abstract_mesh(sm90.H200):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
