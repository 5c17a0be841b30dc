"""Implements the ring in shared memory that passes tiles from a matmul's loader to its tensor
cores.

A slot holds the tiles of one step along K. Step s has slot s % stages, so up to `stages` steps are
in flight. Two barriers per slot hand it to and fro:

    loader                                compute warpgroups
    slot = ring.acquire(step)             slot = ring.wait(step)
    copy into the slot by TMA             multiply what the slot holds
         └── filled[slot] ───────────────────▲      ring.release(slot)
         ▲────────────────────────────────────────────── free[slot] ──┘

When it has loaded its last step, the loader calls `drain`. The names are those of CUTLASS's
pipelines: producer_acquire, consumer_wait, consumer_release, producer_tail.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Ring(NamedTuple):
    """Slots and their barriers: scratch types outside of a kernel, references within.

    smem: a tree of tiles, each [stages, ...].
    filled, free: barriers [stages].
    """

    smem: Any
    filled: Any
    free: Any

    @property
    def stages(self) -> int:
        return int(self.filled.shape[0])

    def slot(self, step: Array) -> Array:
        """Return the slot of a step."""
        return lax.rem(step, self.stages)

    def acquire(self, step: Array) -> Array:
        """Wait until a step's slot is free. Returns the slot; the loader's call."""
        slot = self.slot(step)

        @pl.when(step >= self.stages)
        def wait_until_free() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        return slot

    def drain(self, num_steps: Array) -> None:
        """Wait until all slots are free after `num_steps` steps; the loader's last call.

        Every phase of a barrier has to be waited for, and a block must not end while the other
        block of its cluster still signals to it.
        """

        @pl.loop(jnp.maximum(num_steps - self.stages, 0), num_steps)
        def wait_until_free(step: Array) -> None:
            plgpu.barrier_wait(self.free.at[self.slot(step)])

    def wait(self, step: Array) -> Array:
        """Wait until a step's tiles have arrived. Returns their slot."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.filled.at[slot])
        return slot

    def release(self, slot: Array) -> None:
        """Tell the loader that this warpgroup has read a slot."""
        plgpu.barrier_arrive(self.free.at[slot])


def ring_types(smem: Any, stages: int, *, readers: int, shared: tuple[str, ...] = ()) -> Ring:
    """Return the scratch types of a ring.

    smem: scratch types of the tiles, each [stages, ...] and filled by one copy.
    readers: warpgroups of a block that read each slot.
    shared: axes of the cluster whose blocks share copies; all of their readers free a slot.
    """
    free = (
        functools.partial(plgpu.ClusterBarrier, collective_axes=shared) if shared else plgpu.Barrier
    )
    return Ring(
        smem,
        filled=plgpu.Barrier(num_arrivals=len(jax.tree.leaves(smem)), num_barriers=stages),
        free=free(num_arrivals=readers, num_barriers=stages),
    )
