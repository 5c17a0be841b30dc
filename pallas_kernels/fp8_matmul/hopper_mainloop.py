"""Implements the main loop of the FP8 x FP8 matmuls on Hopper: a compute warpgroup's sums over K.

There are three ways to add, all of them in the order of K:

- `_accumulate` leaves the sums in the tensor cores' accumulator.
- `_promote` scales the sums of each step, 128 products, and adds them in float32 registers.
- `_promote_in_turn` does so for one step while the tensor cores compute the next one:

      tensor cores   step 0 | step 1          | step 2          | ...
      registers             | promote step 0  | promote step 1  | ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_matmul.hopper_config import TILE_K, WARPGROUP_ROWS, Config
from pallas_kernels.fp8_matmul.hopper_ring import Ring
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.hopper import tile_bounds

# Steps per iteration, each promoted while the tensor cores compute the next one.
IN_TURN = 2
MATRIX = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


@dataclass(frozen=True)
class Problem:
    """The static properties of a launch.

    m, k: of x [m, k]; m is up to 8, or a multiple of it.
    ns: of each product [m, n]; tiles are counted product by product.
    x_grouped, w_grouped: whether scales of x, and of the weights, change every 128 along K.
    """

    m: int
    ns: tuple[int, ...]
    k: int
    config: Config
    x_grouped: bool
    w_grouped: bool

    @property
    def promote(self) -> bool:
        return self.config.promote or self.x_grouped or self.w_grouped

    @property
    def steps(self) -> int:
        """Return the steps along K of each tile."""
        return self.k // TILE_K

    @property
    def rows_per_step(self) -> int:
        """Return the rows of x per cluster. Arrays that are indexed by row are padded to it."""
        return self.config.tile_m * self.config.cluster

    @property
    def grid(self) -> tuple[int, int]:
        """Return the number of tiles along M, counted by cluster, and along N."""
        return pl.cdiv(self.m, self.rows_per_step), self.bounds[-1][1]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Return the range of tiles (first, end) along N of each product."""
        return tile_bounds(pl.cdiv(n, self.config.tile_n) for n in self.ns)


class Operands(NamedTuple):
    """The operands: arrays outside of the kernel, references to global memory within.

    x: [m, k].
    x_scale: [padded m], or [k / 128, padded m] if it is grouped.
    weights: each [n, k], one for each product, or two for that of `swiglu`.
    weight_scales: each [padded n] or [n blocks, k blocks].
    residual: [m, n] or None.
    """

    x: Any
    x_scale: Any
    weights: tuple[Any, ...]
    weight_scales: tuple[Any, ...]
    residual: Any


class StepTiles(NamedTuple):
    """The tiles of a step, references to shared memory; the first dimension is the ring's slot.

    x: [stages, tile_m, 128]; weights: each [stages, tile_n, 128]; x_scale: [stages, tile_m], None
    unless it is grouped.
    """

    x: Any
    weights: tuple[Any, ...]
    x_scale: Any


class Tile(NamedTuple):
    """One warpgroup's part of a block's tile of the result.

    rows: a slice of the result's rows.
    row, column: the first ones within the block's tile, to index operands in shared memory.
    first_column: the first column of the result.
    """

    warpgroup: Array
    rows: Any
    row: Any
    column: Any
    first_column: Array


def tile_of(config: Config, warpgroup: Array, tile_m: Array, tile_n: Array) -> Tile:
    """Return a warpgroup's part of the block's tile [tile_m, tile_n], both counted in tiles."""
    row: Any = warpgroup * WARPGROUP_ROWS if config.tile_m == 128 else 0
    column: Any = 0 if config.tile_m == 128 else warpgroup * config.columns
    rows = pl.ds(tile_m * config.tile_m + row, WARPGROUP_ROWS)
    return Tile(warpgroup, rows, row, column, tile_n * config.tile_n + column)


def sums(
    problem: Problem, gmem: Operands, ring: Ring, tile: Tile, first_step: Array
) -> Sequence[Array]:
    """Multiply and add along K, with those scales that change along K.

    first_step: the ring's step with the tile's first operands.
    Returns float32 [64, columns] for each weight.
    """
    loop = _Mainloop(problem, gmem, ring, tile, first_step)
    weights = len(gmem.weights)
    if not problem.promote:
        return pl.run_scoped(loop._accumulate, *[loop.accumulator] * weights)
    zeros = plgpu.layout_cast(jnp.zeros(loop.shape, jnp.float32), MATRIX)
    if weights == 1 and problem.steps % IN_TURN == 0:
        return [lax.fori_loop(0, problem.steps // IN_TURN, loop._promote_in_turn, zeros)]
    return lax.fori_loop(0, problem.steps, loop._promote, (zeros,) * weights)


def scaled(
    problem: Problem, gmem: Operands, tile: Tile, which: int, y: Array, columns: Any
) -> Array:
    """Multiply sums by the scales that do not change along K.

    y: float32 [64, width], sums of weight `which`.
    columns: their place in the result.
    """
    if not problem.x_grouped:
        per_row = load_vector(gmem.x_scale.at[tile.rows], PER_ROW)
        y = y * lax.broadcast_in_dim(per_row, y.shape, (0,))
    if not problem.w_grouped:
        per_column = load_vector(gmem.weight_scales[which].at[columns], PER_COLUMN)
        y = y * lax.broadcast_in_dim(per_column, y.shape, (1,))
    return y


def load_vector(ref: Any, layout: Any) -> Array:
    """Load a vector in the register layout of the accumulator's rows or columns."""
    return plgpu.load(ref, layout=layout, optimized=False)


class _Step(NamedTuple):
    """A step whose tiles have arrived.

    w_scales: a number for each weight, or None; x_scale: float32 [64] in registers, or None.
    """

    slot: Array
    w_scales: list[Array | None]
    x_scale: Array | None


@dataclass(frozen=True)
class _Mainloop:
    """The main loop with its arguments, which are those of `sums`."""

    problem: Problem
    gmem: Operands
    ring: Ring
    tile: Tile
    first_step: Array

    @property
    def shape(self) -> tuple[int, int]:
        return WARPGROUP_ROWS, self.problem.config.columns

    @property
    def accumulator(self) -> Any:
        return plgpu.ACC(self.shape, jnp.float32)

    def _accumulate(self, *accs: Any) -> list[Array]:
        """Return the sums of all steps. One product stays in flight, so slots are freed a step
        later."""
        ring = self.ring

        @pl.loop(0, self.problem.steps)
        def multiply_step(k: Array) -> None:
            slot = ring.wait(self.first_step + k)
            for acc, weight_smem in zip(accs, ring.smem.weights, strict=True):
                self._multiply(acc, weight_smem, slot)
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def release_previous() -> None:
                ring.release(ring.slot(self.first_step + (k - 1)))

        plgpu.wgmma_wait(0)
        ring.release(ring.slot(self.first_step + (self.problem.steps - 1)))
        return [acc[...] for acc in accs]

    def _promote(self, k: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        """Add the scaled sums of step k to those of each weight."""
        step = self._await_step(k)
        totals = tuple(
            total + _times(_times(self._product(weight_smem, step.slot), step.x_scale), w_scale)
            for total, weight_smem, w_scale in zip(
                totals, self.ring.smem.weights, step.w_scales, strict=True
            )
        )
        self.ring.release(step.slot)
        return totals

    def _promote_in_turn(self, i: Array, total: Array) -> Array:
        """Add the scaled sums of `IN_TURN` steps, each while the next one multiplies."""
        (weight_smem,) = self.ring.smem.weights

        def add(total: Array, pending: tuple[Any, Array, Array | None], in_flight: int) -> Array:
            acc, slot, scale = pending
            total = total + _times(plgpu.wgmma_accumulator_load(acc, wait_n=in_flight), scale)
            self.ring.release(slot)
            return total

        def multiply_from(
            j: int, total: Array, pending: tuple[Any, Array, Array | None] | None
        ) -> Array:
            """Start step j, promote the pending one meanwhile, and continue with step j + 1."""
            if j == IN_TURN:
                assert pending is not None
                return add(total, pending, 0)
            slot, (w_scale,), x_scale = self._await_step(i * IN_TURN + j)

            def with_accumulator(acc: Any) -> Array:
                self._multiply(acc, weight_smem, slot)
                scale = w_scale if x_scale is None else _times(x_scale, w_scale)
                added = total if pending is None else add(total, pending, 1)
                return multiply_from(j + 1, added, (acc, slot, scale))

            return pl.run_scoped(with_accumulator, self.accumulator)

        return multiply_from(0, total, None)

    def _await_step(self, k: Array) -> _Step:
        """Wait for the operands of step k."""
        slot = self.ring.slot(self.first_step + k)
        w_scales = [
            scale_gmem[self.tile.first_column // BLOCK, k] if self.problem.w_grouped else None
            for scale_gmem in self.gmem.weight_scales
        ]
        self.ring.wait(self.first_step + k)
        x_scale = None
        if self.problem.x_grouped:
            x_scale = load_vector(self.ring.smem.x_scale.at[slot, self._rows], PER_ROW)
            plgpu.commit_smem()  # so that it is read before TMA, another proxy, overwrites it
        return _Step(slot, w_scales, x_scale)

    def _product(self, weight_smem: Any, slot: Array) -> Array:
        """Return the sums of one step."""

        def with_accumulator(acc: Any) -> Array:
            self._multiply(acc, weight_smem, slot)
            return acc[...]

        return pl.run_scoped(with_accumulator, self.accumulator)

    def _multiply(self, acc: Any, weight_smem: Any, slot: Array) -> None:
        """Start adding a step's products to an accumulator."""
        columns = pl.ds(self.tile.column, self.problem.config.columns)
        weight = weight_smem.at[slot, columns].transpose((1, 0))
        plgpu.wgmma(acc, self.ring.smem.x.at[slot, self._rows], weight)

    @property
    def _rows(self) -> Any:
        return pl.ds(self.tile.row, WARPGROUP_ROWS)


def _times(y: Array, factor: Array | None) -> Array:
    """Multiply by one number, by one per row, or by None for 1.

    Two factors are applied to y one after the other, because their product would take registers
    that `swiglu` does not have.
    """
    if factor is None:
        return y
    return y * (lax.broadcast_in_dim(factor, y.shape, (0,)) if factor.ndim else factor)
