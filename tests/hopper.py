"""Helpers that run a kernel for Hopper in JAX's GPU simulator, and lower the same call for a GPU.

The simulator shows results and races. It accepts some things that Hopper does not, such as tiles
that TMA cannot copy; lowering refuses them, and needs neither a GPU nor CUDA.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dev import sm90


def simulate(kernel: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Lower `kernel` for an H200, run it in the simulator, check for races, return its result."""
    lower(lambda: kernel(*arguments, **options))
    # What the simulator ignores is a fence (`hopper_decode`); it has one memory, always up to date.
    interpret = plgpu.InterpretGPUParams(detect_races=True, inline_mgpu="ignore")
    found = kernel(*arguments, **options, interpret=interpret)
    assert not gpu_callbacks.get_races().races_found
    return found


def lower(function: Callable[..., Any], *arguments: Any) -> jax.stages.Lowered:
    """Lower a function for an H200. Raises Mosaic GPU's error if it refuses a kernel.

    arguments: trees of arrays or `jax.ShapeDtypeStruct`s.
    """
    with jax.sharding.use_abstract_mesh(sm90.H200):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
