"""Weight-only FP8 matmul on Hopper for few rows of activations: decoding.

Reading the weight is all the work. A thread block is three warpgroups: the last one streams tiles
of the weight, and the columns of x that belong to them, by TMA through a ring in shared memory; the
other two widen codes to bfloat16 in registers and multiply with the tensor cores. Operands are
swapped: 64 rows of the weight are what wgmma takes from registers, x is what it takes from shared
memory, padded to a multiple of 8 rows only.

K is split until every multiprocessor has work. Parts go to memory as float32, and XLA adds them up
in one order, together with scales per row, the residual and what else it fuses with them. Neither
the split nor any order depends on the number of rows of x: a row's result is the same in any batch.

Several weights with the same x (q, k and v; gate and up) are one launch over all their rows.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3
from pallas_kernels.device import multiprocessors
from pallas_kernels.fp8_matmul.reference import BLOCK, is_per_block
from pallas_kernels.hopper import SHARED_MEMORY_BYTES, swizzled

MAX_ROWS = 64
COMPUTE_WARPGROUPS = 2
LOADER = COMPUTE_WARPGROUPS
WARPGROUP_ROWS = 64
# Of a weight, per thread block: one block of scales, so that a tile has one scale.
TILE_N = TILE_K = BLOCK
BARRIERS_BYTES = 2048
MAX_STAGES = 12
MATRIX = plgpu.Layout.WGMMA


@dataclass(frozen=True)
class Config:
    """splits: thread blocks that divide K among them. stages: tiles of 128x128 in flight."""

    splits: int
    stages: int


def fp8_matmul(
    x: Array,
    weight: Array,
    weight_scale: Array,
    out_dtype: jnp.dtype,
    residual: Array | None = None,
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> Array:
    """As `pallas_kernels.fp8_matmul.fp8_matmul`, for what `refusal` does not refuse.

    config: for tuning; None takes `configure`'s.
    interpret: plgpu.InterpretGPUParams, to run in the simulator.
    """
    (y,) = _matmuls(x, (weight,), (weight_scale,), config, interpret)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def fp8_matmuls(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    out_dtype: jnp.dtype,
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """`fp8_matmul` of one x and several weights [n_i, k], in one launch.

    weight_scales: of one kind, all per row or all per block.
    """
    return tuple(
        y.astype(out_dtype) for y in _matmuls(x, weights, weight_scales, config, interpret)
    )


def refusal(x: Array, weight: Array, weight_scale: Array, out_dtype: jnp.dtype) -> str | None:
    """Why the kernel cannot take these operands; None if it can."""
    (m, k), n = x.shape, weight.shape[0]
    if x.dtype != jnp.bfloat16 or weight.dtype != e4m3.DTYPE:
        return f"x must be bfloat16 and weight float8_e4m3fn, got {x.dtype} and {weight.dtype}"
    if not 1 <= m <= MAX_ROWS:
        return f"x must have 1 to {MAX_ROWS} rows, got {m}"
    if k % 16:
        return f"in = {k} must be a multiple of 16"
    if n % 4:
        return f"out = {n} must be a multiple of 4"
    if weight_scale.ndim == 2 and not is_per_block(weight_scale, (n, k)):
        return f"weight_scale {weight_scale.shape} is neither per row nor per 128x128 block"
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        return f"out_dtype must be bfloat16 or float32, got {out_dtype}"
    return None


def configure(m: int, ns: Sequence[int], k: int) -> Config:
    """A heuristic, untuned: no GPU has measured it.

    ns: rows of each weight. The splits that keep the busiest thread block shortest; a tile that a
    block begins anew, and a part that has to be added up, count as a quarter of a step. They do
    not depend on m.
    """
    tiles, steps = sum(_tiles(ns)), pl.cdiv(k, TILE_K)

    def cost(splits: int) -> float:
        rounds = pl.cdiv(tiles * splits, multiprocessors())
        return rounds * (pl.cdiv(steps, splits) + 0.25) + 0.25 * splits

    staged = COMPUTE_WARPGROUPS * _padded(m) * WARPGROUP_ROWS * 4
    stages = (SHARED_MEMORY_BYTES - BARRIERS_BYTES - staged) // (TILE_K * (TILE_N + 2 * _padded(m)))
    return Config(min(range(1, steps + 1), key=cost), min(MAX_STAGES, stages))


class _Ring(NamedTuple):
    """Shared memory that tiles pass through, and barriers that say that the loader has filled a
    slot and that it is free. x: [stages, padded m, 128]; weight: [stages, 128, 128]."""

    x: Any
    weight: Any
    filled: Any
    free: Any


def _matmuls(
    x: Array,
    weights: Sequence[Array],
    scales: Sequence[Array],
    config: Config | None,
    interpret: Any,
) -> list[Array]:
    """float32 [m, n_i] for each weight."""
    ns = [weight.shape[0] for weight in weights]
    config = config or configure(x.shape[0], ns, x.shape[1])
    by_block = scales[0].ndim == 2
    parts = _launch(x, tuple(weights), tuple(scales) if by_block else (), config, interpret)
    sums = [functools.reduce(operator.add, part) for part in parts]
    return sums if by_block else [y * scale for y, scale in zip(sums, scales, strict=True)]


def _launch(
    x: Array,
    weights: tuple[Array, ...],
    block_scales: tuple[Array, ...],
    config: Config,
    interpret: Any,
) -> list[Array]:
    """Sums over each split of K, float32 [splits, m, n_i], with scales per block but none per row.

    block_scales: empty if scales are per row.
    """
    m, k = x.shape
    rows, steps, stages = _padded(m), pl.cdiv(k, TILE_K), config.stages
    ns = [weight.shape[0] for weight in weights]
    ends = [sum(_tiles(ns)[: i + 1]) for i in range(len(ns))]
    units = ends[-1] * config.splits
    blocks = min(units, multiprocessors())

    def kernel(
        x_ref: Any,
        weight_refs: Any,
        scale_refs: Any,
        *part_refs: Any,
        ring: _Ring,
        staged: Any,
        widened: Any,
    ) -> None:
        block, warpgroup = lax.axis_index("blocks"), lax.axis_index("warpgroup")

        def visit_all(visit: Callable[[Array, Array, Array, Array, Array], None]) -> Array:
            """visit(tile, split, first, end, position): steps of K, and how many came before.

            Returns how many there were.
            """

            def one(i: Array, position: Array) -> Array:
                unit = i * blocks + block
                tile, split = lax.div(unit, config.splits), lax.rem(unit, config.splits)
                first = lax.div(split * steps, config.splits)
                end = lax.div((split + 1) * steps, config.splits)
                visit(tile, split, first, end, position)
                return position + end - first

            return lax.fori_loop(0, lax.div(units - 1 - block, blocks) + 1, one, jnp.int32(0))

        def for_weight_of(tile: Array, use: Callable[[int, Array], None]) -> None:
            """use(which weight, its tile), with the one branch taken that the tile belongs to."""
            for which, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                here = functools.partial(use, which, tile - start)
                if len(ends) == 1:
                    here()
                else:
                    pl.when((start <= tile) & (tile < end))(here)

        def load(tile: Array, split: Array, first: Array, end: Array, position: Array) -> None:
            def stream(which: int, tile: Array) -> None:
                weight = weight_refs[which].at[pl.ds(tile * TILE_N, TILE_N)]

                @pl.loop(first, end)
                def _(step: Array) -> None:
                    at = position + step - first
                    slot = lax.rem(at, stages)
                    filled = ring.filled.at[slot]

                    @pl.when(at >= stages)
                    def _() -> None:
                        plgpu.barrier_wait(ring.free.at[slot])

                    columns = pl.ds(step * TILE_K, TILE_K)
                    plgpu.copy_gmem_to_smem(weight.at[:, columns], ring.weight.at[slot], filled)
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(0, rows), columns], ring.x.at[slot], filled
                    )

            for_weight_of(tile, stream)

        def multiply(acc: Any, slot: Array) -> None:
            codes = plgpu.load(
                ring.weight.at[slot, pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)],
                layout=MATRIX,
            )
            # Exact; there is no instruction from float8 to bfloat16.
            weight = codes.astype(jnp.float32).astype(jnp.bfloat16)
            if interpret:  # The simulator's wgmma takes nothing from registers.
                widened[warpgroup] = weight
                plgpu.commit_smem()
                weight = widened.at[warpgroup]
            plgpu.wgmma(acc, weight, ring.x.at[slot].transpose((1, 0)))

        def sum_up(first: Array, end: Array, position: Array) -> Array:
            def within(acc: Any) -> Array:
                @pl.loop(first, end)
                def _(step: Array) -> None:
                    slot = lax.rem(position + step - first, stages)
                    plgpu.barrier_wait(ring.filled.at[slot])
                    multiply(acc, slot)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(ring.free.at[slot])

                return acc[...]

            return pl.run_scoped(within, plgpu.ACC((WARPGROUP_ROWS, rows), jnp.float32))

        def sum_scaled(tile: Array, first: Array, end: Array, position: Array) -> Array:
            def scale_at(step: Array) -> Array:
                found = jnp.float32(0)
                for scale, start, stop in zip(scale_refs, [0, *ends], ends, strict=False):
                    row = lax.clamp(0, tile - start, scale.shape[0] - 1)
                    value = scale[row, lax.min(step, steps - 1)]
                    found = jnp.where((start <= tile) & (tile < stop), value, found)
                return found

            def one(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                total, scale = carry
                # Asked for now, it is there when the next step wants it.
                following = scale_at(step + 1)
                slot = lax.rem(position + step - first, stages)
                plgpu.barrier_wait(ring.filled.at[slot])

                def within(acc: Any) -> Array:
                    multiply(acc, slot)
                    return acc[...]

                product = pl.run_scoped(within, plgpu.ACC((WARPGROUP_ROWS, rows), jnp.float32))
                plgpu.barrier_arrive(ring.free.at[slot])
                return total + product * scale, following

            zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, rows), jnp.float32), MATRIX)
            total, _ = lax.fori_loop(first, end, one, (zeros, scale_at(first)))
            return total

        def compute(tile: Array, split: Array, first: Array, end: Array, position: Array) -> None:
            if scale_refs:
                total = sum_scaled(tile, first, end, position)
            else:
                total = sum_up(first, end, position)
            stage = staged.at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            stage.transpose((1, 0))[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()

            def store(which: int, tile: Array) -> None:
                columns = pl.ds(tile * TILE_N + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
                plgpu.copy_smem_to_gmem(stage, part_refs[which].at[split, pl.ds(0, rows), columns])

            for_weight_of(tile, store)

        @pl.when(warpgroup == LOADER)
        def _() -> None:
            total = visit_all(load)

            # Every phase of a barrier has to be seen.
            @pl.loop(lax.max(total - stages, 0), total)
            def _(at: Array) -> None:
                plgpu.barrier_wait(ring.free.at[lax.rem(at, stages)])

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _() -> None:
            visit_all(compute)
            plgpu.wait_smem_to_gmem(0)

    bfloat16 = jnp.dtype(jnp.bfloat16)
    widened: Any = (
        _tile((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, TILE_K), bfloat16) if interpret else None
    )
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((config.splits, m, n), jnp.float32) for n in ns],
        scratch_types={
            "ring": _Ring(
                x=_tile((stages, rows, TILE_K), bfloat16),
                weight=_tile((stages, TILE_N, TILE_K), e4m3.DTYPE),
                filled=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                free=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            ),
            "staged": plgpu.SMEM((COMPUTE_WARPGROUPS, rows, WARPGROUP_ROWS), jnp.float32),
            "widened": widened,
        },
        grid=(blocks,),
        grid_names=("blocks",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="fp8_matmul_weight_only",
        interpret=interpret,
    )(x, weights, block_scales)


def _tile(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Scratch in shared memory that TMA writes and wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype, shape[-1]))


def _tiles(ns: Sequence[int]) -> list[int]:
    return [pl.cdiv(n, TILE_N) for n in ns]


def _padded(m: int) -> int:
    """Rows of x that wgmma multiplies."""
    return pl.cdiv(m, 8) * 8
