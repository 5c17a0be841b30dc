"""Implements the epilogues of the FP8 x FP8 matmuls on Hopper, which finish a warpgroup's sums.

Results are staged in shared memory and stored by TMA. A store may still run while the next tile's
products are computed, but must end before its place in shared memory is written again.

An epilogue declares the results (`out_type`) and its shared memory and barriers (`scratch_types`).
Each compute warpgroup calls `begin` before a tile's products, and `finish` with their sums.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3
from pallas_kernels.fp8_matmul.hopper_config import WARPGROUP_ROWS, ring_bytes
from pallas_kernels.fp8_matmul.hopper_mainloop import Operands, Problem, Tile, scaled
from pallas_kernels.fp8_matmul.reference import BLOCK, MIN_ABSMAX
from pallas_kernels.hopper import SHARED_MEMORY_BYTES, swizzled
from pallas_kernels.hopper import tile as smem_tile

SWIGLU_WIDTH = 32  # columns finished at a time; scales of more would take too many registers


@dataclass(frozen=True)
class Store:
    """Scales the sums, adds the residual, rounds and stores, part by part of the columns.

    A warpgroup has `slots` places in shared memory for parts of [64, width]. A part of the residual
    is loaded into the place of the part of the result.
    """

    problem: Problem
    out_dtype: jnp.dtype
    has_residual: bool

    @property
    def width(self) -> int:
        """Return the columns of a part: the span of a swizzle, and a divisor of n for TMA."""
        return math.gcd(
            self.problem.config.columns, 128 // self.out_dtype.itemsize, *self.problem.ns
        )

    @property
    def parts(self) -> int:
        return self.problem.config.columns // self.width

    @property
    def slots(self) -> int:
        """Return 2, or 1 if float32 results and scales of x along K leave no room for more."""
        ring = ring_bytes(self.problem.config, x_grouped=self.problem.x_grouped)
        slot = 2 * WARPGROUP_ROWS * self.width * self.out_dtype.itemsize
        return min(2, self.parts, (SHARED_MEMORY_BYTES - ring) // slot)

    @property
    def out_type(self) -> Sequence[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((self.problem.m, n), self.out_dtype) for n in self.problem.ns]

    @property
    def scratch_types(self) -> dict[str, Any]:
        places = 2 * self.slots
        loaded = {"loaded": plgpu.Barrier(num_barriers=places)} if self.has_residual else {}
        return {
            "staged": smem_tile((places, WARPGROUP_ROWS, self.width), self.out_dtype),
            **loaded,
        }

    def begin(self, tile: Tile, gmem: Operands, scratch: dict[str, Any]) -> None:
        if self.has_residual:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for part in range(self.slots):
                self._load_residual(part, tile, gmem, scratch)

    def finish(
        self,
        tile: Tile,
        sums: Sequence[Array],
        gmem: Operands,
        outputs_gmem: Sequence[Any],
        scratch: dict[str, Any],
    ) -> None:
        (y_gmem,) = outputs_gmem
        # All loads of scales are started before the first is waited for.
        ys = [
            scaled(
                self.problem, gmem, tile, 0,
                sums[0][:, part * self.width : (part + 1) * self.width], self._columns(part, tile),
            )
            for part in range(self.parts)
        ]  # fmt: skip
        for part, y in enumerate(ys):
            slot = self._slot(part, tile)
            staged_smem = scratch["staged"].at[slot]
            if self.has_residual:
                plgpu.barrier_wait(scratch["loaded"].at[slot])
                y = y + staged_smem[...].astype(jnp.float32)
            else:
                plgpu.wait_smem_to_gmem(self.slots - 1, wait_read_only=True)
            staged_smem[...] = y.astype(self.out_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged_smem, y_gmem.at[tile.rows, self._columns(part, tile)])
            if self.has_residual and part + self.slots < self.parts:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                self._load_residual(part + self.slots, tile, gmem, scratch)

    def _columns(self, part: int, tile: Tile) -> Any:
        return pl.ds(tile.first_column + part * self.width, self.width)

    def _slot(self, part: int, tile: Tile) -> Array:
        return tile.warpgroup * self.slots + part % self.slots

    def _load_residual(
        self, part: int, tile: Tile, gmem: Operands, scratch: dict[str, Any]
    ) -> None:
        slot = self._slot(part, tile)
        plgpu.copy_gmem_to_smem(
            gmem.residual.at[tile.rows, self._columns(part, tile)],
            scratch["staged"].at[slot],
            scratch["loaded"].at[slot],
        )


@dataclass(frozen=True)
class Swiglu:
    """Scales the sums of gate and up, multiplies silu(gate) by up, quantises per row and block of
    128 columns, and stores codes and scales."""

    problem: Problem

    @property
    def out_type(self) -> Sequence[jax.ShapeDtypeStruct]:
        problem = self.problem
        rows = pl.cdiv(problem.m, problem.rows_per_step) * problem.rows_per_step
        return [
            jax.ShapeDtypeStruct((problem.m, *problem.ns), e4m3.DTYPE),
            jax.ShapeDtypeStruct((problem.ns[0] // BLOCK, rows), jnp.float32),
        ]

    @property
    def scratch_types(self) -> dict[str, Any]:
        return {
            "staged": plgpu.SMEM(
                (2, WARPGROUP_ROWS, BLOCK),
                e4m3.DTYPE,
                transforms=swizzled(e4m3.DTYPE, SWIGLU_WIDTH),
            )
        }

    def begin(self, tile: Tile, gmem: Operands, scratch: dict[str, Any]) -> None:
        """Do nothing: no operand has to be loaded before the sums."""

    def finish(
        self,
        tile: Tile,
        sums: Sequence[Array],
        gmem: Operands,
        outputs_gmem: Sequence[Any],
        scratch: dict[str, Any],
    ) -> None:
        codes_gmem, scales_gmem = outputs_gmem
        parts = []
        for start in range(0, BLOCK, SWIGLU_WIDTH):
            columns = pl.ds(tile.first_column + start, SWIGLU_WIDTH)
            gate, up = (
                scaled(
                    self.problem, gmem, tile, i, sums[i][:, start : start + SWIGLU_WIDTH], columns
                )
                for i in range(2)
            )
            parts.append(gate / (1 + jnp.exp(-gate)) * up)
        absmax = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(h), axis=1) for h in parts])
        is_zero = absmax < MIN_ABSMAX
        inverse = jnp.where(is_zero, 1.0, e4m3.MAX / absmax)
        staged_smem = scratch["staged"].at[tile.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, h in enumerate(parts):
            codes = h * lax.broadcast_in_dim(inverse, h.shape, (0,))
            columns = pl.ds(i * SWIGLU_WIDTH, SWIGLU_WIDTH)
            staged_smem[:, columns] = codes.astype(e4m3.DTYPE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            staged_smem, codes_gmem.at[tile.rows, pl.ds(tile.first_column, BLOCK)]
        )
        scales = jnp.where(is_zero, 1.0, absmax / e4m3.MAX)
        scales_gmem[tile.first_column // BLOCK, tile.rows] = scales


Epilogue = Store | Swiglu
