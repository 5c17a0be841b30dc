"""Implements the loops of the weight-only FP8 matmul on Hopper: the loader's and the main loop.

The loader streams tiles of the weight and the matching columns of x through the ring. Each of the
two compute warpgroups multiplies 64 rows of the weight with x, in one of two ways:

- `_accumulate` leaves the sums of all steps in the tensor cores' accumulator.
- `_promote` adds each step's sums of 128 products in float32 registers, scaled where scales are per
  block, and where the units of x's terms change along K.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import num_sms
from pallas_kernels.fp8_matmul.hopper_ring import Ring
from pallas_kernels.fp8_matmul.hopper_weight_only_config import (
    TILE_K,
    TILE_N,
    WARPGROUP_ROWS,
    WeightOnlyConfig,
    rows_in_boxes,
)
from pallas_kernels.fp8_matmul.terms import TERM_RATIO
from pallas_kernels.hopper import for_owner_of, tile_bounds

MATRIX = plgpu.Layout.WGMMA


@dataclass(frozen=True)
class WeightOnlyProblem:
    """The static properties of a launch.

    A unit of work is one of the `config.splits` partial sums of one tile. Clusters take units in
    turn, with a tile for each of their thread blocks. Tiles are counted over all weights; surplus
    tiles of the last cluster read zeros and store nothing.

    m: up to 8, or a multiple of it.
    groups: of columns with a unit each, if x is in terms.
    """

    m: int
    ns: tuple[int, ...]
    k: int
    config: WeightOnlyConfig
    groups: int = 1

    @property
    def rows(self) -> int:
        return rows_in_boxes(self.m, self.config.cluster)

    @property
    def x_rows(self) -> int:
        """Return the rows that are multiplied, of x or of its two terms."""
        return self.rows * (2 if self.config.in_fp8 else 1)

    @property
    def steps(self) -> int:
        return self.k // TILE_K

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Return the range of tiles (first, end) of each weight."""
        cluster = self.config.cluster
        return tile_bounds(pl.cdiv(n, TILE_N * cluster) * cluster for n in self.ns)

    @property
    def units(self) -> int:
        """Return the number of units for clusters."""
        return self.bounds[-1][1] // self.config.cluster * self.config.splits

    @property
    def clusters(self) -> int:
        return min(self.units, num_sms() // self.config.cluster)


class WeightOnlyOperands(NamedTuple):
    """The operands: arrays outside of the kernel, references to global memory within.

    x: [m, k], or the codes of terms, [2 rows, k].
    units, mean_squares: of terms, [groups, rows] and [parts, rows]; otherwise None.
    weights: each [n, k].
    block_scales: each [n / 128, k / 128]; empty if scales are per row.
    """

    x: Any
    units: Any
    mean_squares: Any
    weights: tuple[Any, ...]
    block_scales: tuple[Any, ...]


class WeightOnlyTiles(NamedTuple):
    """The tiles of a step, references to shared memory; the first dimension is the ring's slot.

    x: [stages, x_rows, 128]; weight: [stages, 128, 128].
    """

    x: Any
    weight: Any


class Part(NamedTuple):
    """A thread block's part of a unit: K steps [first, end) of a split of a tile.

    position: the number of steps that the block has done before.
    """

    tile: Array
    split: Array
    first: Array
    end: Array
    position: Array


def load_part(problem: WeightOnlyProblem, gmem: WeightOnlyOperands, ring: Ring, part: Part) -> None:
    """Copy the operands of a part's steps into the ring: the loader's work."""
    shared = shared_axes(problem.config)

    def load_steps(weight_gmem: Any, tile: Array) -> None:
        @pl.loop(part.first, part.end)
        def load_step(step: Array) -> None:
            slot = ring.acquire(part.position + step - part.first)
            filled = ring.filled.at[slot]
            columns = pl.ds(step * TILE_K, TILE_K)
            plgpu.copy_gmem_to_smem(
                weight_gmem.at[pl.ds(tile * TILE_N, TILE_N), columns],
                ring.smem.weight.at[slot],
                filled,
            )
            plgpu.copy_gmem_to_smem(
                gmem.x.at[pl.ds(0, problem.x_rows), columns],
                ring.smem.x.at[slot],
                filled,
                collective_axes=shared,
            )

    for_owner_of(part.tile, problem.bounds, gmem.weights, load_steps)


def sums(
    problem: WeightOnlyProblem,
    gmem: WeightOnlyOperands,
    ring: Ring,
    upcast_smem: Any,
    warpgroup: Array,
    part: Part,
) -> Array:
    """Multiply a compute warpgroup's rows of a part's tile by x, and add along the part's K.

    upcast_smem: the place of wgmma's register operand in the simulator; None elsewhere.
    Returns float32 [64, rows], with all scales applied but per-row scales of the weight.
    """
    loop = _WeightOnlyMainloop(problem, gmem, ring, upcast_smem, warpgroup, part)
    promote = gmem.block_scales or problem.config.in_fp8
    return loop._promote() if promote else loop._accumulate()


@dataclass(frozen=True)
class _WeightOnlyMainloop:
    """The main loop with its arguments, which are those of `sums`."""

    problem: WeightOnlyProblem
    gmem: WeightOnlyOperands
    ring: Ring
    upcast_smem: Any
    warpgroup: Array
    part: Part

    @property
    def accumulator(self) -> Any:
        return plgpu.ACC((WARPGROUP_ROWS, self.problem.x_rows), jnp.float32)

    def _accumulate(self) -> Array:
        def add_steps(acc: Any) -> Array:
            @pl.loop(self.part.first, self.part.end)
            def add_step(step: Array) -> None:
                slot = self._await_step(step)
                self._multiply(acc, slot)
                plgpu.wgmma_wait(0)
                self.ring.release(slot)

            return acc[...]

        return pl.run_scoped(add_steps, self.accumulator)

    def _promote(self) -> Array:
        problem, part, rows = self.problem, self.part, self.problem.rows

        def add(step: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            total, (scale, units) = carry
            # Loaded early, to arrive before the next step needs them.
            following = self._factors_at(step + 1)
            slot = self._await_step(step)
            y = pl.run_scoped(functools.partial(self._product, slot), self.accumulator)
            self.ring.release(slot)
            return total + _scaled(_scaled(y, units), scale), following

        # Loaded early, to arrive before the last step ends.
        rms = self._inverse_rms()
        zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, rows), jnp.float32), MATRIX)
        first = zeros, self._factors_at(part.first)
        total, _ = lax.fori_loop(part.first, part.end, add, first)
        if problem.config.in_fp8 and problem.groups == 1:
            total = _scaled(total, self._units_at(part.first))
        return _scaled(total, rms)

    def _await_step(self, step: Array) -> Array:
        """Wait for the operands of a step. Returns their slot."""
        return self.ring.wait(self.part.position + step - self.part.first)

    def _multiply(self, acc: Any, slot: Array) -> None:
        """Start adding a step's products to an accumulator."""
        x = self.ring.smem.x.at[slot].transpose((1, 0))
        weight_smem = self.ring.smem.weight.at[
            slot, pl.ds(self.warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        ]
        if self.problem.config.in_fp8:
            plgpu.wgmma(acc, weight_smem, x)
            return
        codes = plgpu.load(weight_smem, layout=MATRIX)
        # Exact. There is no instruction that converts float8 to bfloat16.
        weight = codes.astype(jnp.float32).astype(jnp.bfloat16)
        if self.upcast_smem is not None:  # The simulator's wgmma cannot take registers.
            self.upcast_smem[self.warpgroup] = weight
            plgpu.commit_smem()
            weight = self.upcast_smem.at[self.warpgroup]
        plgpu.wgmma(acc, weight, x)

    def _product(self, slot: Array, acc: Any) -> Array:
        """Return the sums of one step, float32 [64, rows], of both terms if x is in terms."""
        self._multiply(acc, slot)
        y, rows = acc[...], self.problem.rows
        return y[:, :rows] + y[:, rows:] * (1 / TERM_RATIO) if self.problem.config.in_fp8 else y

    def _factors_at(self, step: Array) -> tuple[Array | None, Array | None]:
        """Return the factors of a step's sums: the block's scale, and the units of its columns."""
        has_units = self.problem.groups > 1
        return self._scale_at(step), self._units_at(step) if has_units else None

    def _scale_at(self, step: Array) -> Array | None:
        """Return the scale of the tile's block at a step, or past the end at the last one."""
        if not self.gmem.block_scales:
            return None
        step, tile = lax.min(step, self.problem.steps - 1), self.part.tile
        found = jnp.float32(0)
        for (first, end), scales in zip(self.problem.bounds, self.gmem.block_scales, strict=True):
            here = scales[lax.clamp(0, tile - first, scales.shape[0] - 1), step]
            found = jnp.where((first <= tile) & (tile < end), here, found)
        return found

    def _units_at(self, step: Array) -> Array:
        """Return the units of a step's columns of x."""
        steps_per_group = self.problem.steps // self.problem.groups
        group = lax.div(lax.min(step, self.problem.steps - 1), steps_per_group)
        return self._per_row(self.gmem.units, group)

    def _inverse_rms(self) -> Array | None:
        """Return 1 / rms of the rows of x, if they still have to be normalised; otherwise None."""
        if (parts_gmem := self.gmem.mean_squares) is None:
            return None
        each = [self._per_row(parts_gmem, i) for i in range(parts_gmem.shape[0])]
        return lax.rsqrt(functools.reduce(jnp.add, each))

    def _per_row(self, ref: Any, i: Array | int) -> Array:
        """Load a number for each row of x, in the register layout of the accumulator's columns."""
        place = ref.at[i, pl.ds(0, self.problem.rows)]
        return plgpu.load(place, layout=MATRIX.reduce(0), optimized=False)


def _scaled(y: Array, factor: Array | None) -> Array:
    """Multiply by one number, by one for each column of y, or by None for 1."""
    if factor is None:
        return y
    return y * (lax.broadcast_in_dim(factor, y.shape, (1,)) if factor.ndim else factor)


def shared_axes(config: WeightOnlyConfig) -> tuple[str, ...]:
    """Return the axes of the cluster whose blocks share the loads of x."""
    return ("cluster",) if config.cluster > 1 else ()


def for_each_part(problem: WeightOnlyProblem, visit: Callable[[Part], None]) -> Array:
    """Visit a thread block's parts in order. Returns the total number of their steps."""
    config, cluster = problem.config, lax.axis_index("clusters")

    def one(i: Array, position: Array) -> Array:
        unit = i * problem.clusters + cluster
        tile, split = lax.div(unit, config.splits), lax.rem(unit, config.splits)
        if config.cluster > 1:
            tile = tile * config.cluster + lax.axis_index("cluster")
        first = lax.div(split * problem.steps, config.splits)
        end = lax.div((split + 1) * problem.steps, config.splits)
        visit(Part(tile, split, first, end, position))
        return position + end - first

    visits = lax.div(problem.units - 1 - cluster, problem.clusters) + 1
    return lax.fori_loop(0, visits, one, jnp.int32(0))
