"""Weight-only FP8 matmul on Hopper for few rows of activations: decoding.

Reading the weight is all the work. A thread block is three warpgroups: the last one streams tiles
of the weight, and the columns of x that belong to them, by TMA through a ring in shared memory; the
other two widen codes to bfloat16 in registers and multiply with the tensor cores. Operands are
swapped: 64 rows of the weight are what wgmma takes from registers, x is what it takes from shared
memory, padded to a multiple of 8 rows only.

Or nothing is widened (x is `Terms`): FP8 wgmma takes the codes from shared memory as they are, and
x as two float8 terms, which are twice as many rows and as many bytes. Tensor cores add FP8 products
with about 14 bits, so sums of 128 products are added up in registers.

K is split until every multiprocessor has work. Parts go to memory as float32 (`parts`); who reads
them adds them up in one order, together with scales per row and the residual. Where a row's result
is to be the same in any batch, the splits are the same for any number of rows (`configure`).

Several weights with the same x (q, k and v; gate and up) are one launch over all their rows.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3, tuned
from pallas_kernels.device import multiprocessors
from pallas_kernels.fp8_matmul.limits import MAX_WEIGHT_ONLY_ROWS
from pallas_kernels.fp8_matmul.reference import BLOCK, is_per_block
from pallas_kernels.fp8_matmul.terms import (
    MIN_ROWS_TO_SHARE,
    TERM_RATIO,
    Parts,
    Terms,
    padded_rows,
    two_terms,
)
from pallas_kernels.hopper import BOX_ROWS, SHARED_MEMORY_BYTES, in_whole_boxes, swizzled

NAME = "fp8_matmul_weight_only"
COMPUTE_WARPGROUPS = 2
LOADER = COMPUTE_WARPGROUPS
WARPGROUP_ROWS = 64
# Of a weight, per thread block and step: a block of scales.
TILE_N = TILE_K = BLOCK
TYPICAL_ROWS = 16
MAX_STAGES = 12
# What TMA divides the columns of the results into.
OUT_GRANULE = 32
BARRIERS_BYTES = 2048
MATRIX = plgpu.Layout.WGMMA


@dataclass(frozen=True)
class Config:
    """How the work is cut up.

    splits: thread blocks that divide K among them.
    stages: tiles of the weight, 128x128, in flight.
    cluster: 1, or 2 for pairs of blocks that share the loads of x.
    in_fp8: x as two float8 terms instead of the weight as bfloat16, where x does not come in terms.
    """

    splits: int
    stages: int
    cluster: int = 1
    in_fp8: bool = False


def fp8_matmul(
    x: Array,
    weight: Array,
    weight_scale: Array,
    out_dtype: jnp.dtype,
    residual: Array | None = None,
    *,
    is_batch_invariant: bool = False,
    config: Config | None = None,
    interpret: Any = None,
) -> Array:
    """As `pallas_kernels.fp8_matmul.fp8_matmul`, for what `refusal` does not refuse.

    config: for tuning; None takes `configure`'s.
    interpret: plgpu.InterpretGPUParams, to run in the simulator.
    """
    (y,) = _matmuls(x, (weight,), (weight_scale,), is_batch_invariant, config, interpret)
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return y.astype(out_dtype)


def fp8_matmuls(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    out_dtype: jnp.dtype,
    *,
    is_batch_invariant: bool = False,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """`fp8_matmul` of one x and several weights [n_i, k], in one launch.

    weight_scales: of one kind, all per row or all per block.
    """
    ys = _matmuls(x, weights, weight_scales, is_batch_invariant, config, interpret)
    return tuple(y.astype(out_dtype) for y in ys)


def refusal(
    x: Array | jax.ShapeDtypeStruct, weight: Array, weight_scale: Array, out_dtype: jnp.dtype
) -> str | None:
    """Why the kernel cannot take these operands; None if it can."""
    (m, k), n = x.shape, weight.shape[0]
    if x.dtype != jnp.bfloat16 or weight.dtype != e4m3.DTYPE:
        return f"x must be bfloat16 and weight float8_e4m3fn, got {x.dtype} and {weight.dtype}"
    if not 1 <= m <= MAX_WEIGHT_ONLY_ROWS:
        return f"x must have 1 to {MAX_WEIGHT_ONLY_ROWS} rows, got {m}"
    if k % TILE_K:
        return f"in = {k} must be a multiple of {TILE_K}"
    if n % OUT_GRANULE:
        return f"out = {n} must be a multiple of {OUT_GRANULE}"
    if weight_scale.ndim == 2 and not is_per_block(weight_scale, (n, k)):
        return f"weight_scale {weight_scale.shape} is neither per row nor per 128x128 block"
    if out_dtype not in (jnp.bfloat16, jnp.float32):
        return f"out_dtype must be bfloat16 or float32, got {out_dtype}"
    return None


def configure(
    m: int,
    ns: Sequence[int],
    k: int,
    is_batch_invariant: bool = False,
    *,
    in_terms: bool = False,
) -> Config:
    """Return the tuned splits of the GPU in use, or else the heuristic's, and what follows from m.

    ns: rows of each weight.
    is_batch_invariant: take the same splits for any m, so that a row's result does not depend on
        how many there are.
    in_terms: x comes in terms. Else they are made of bfloat16 x where that was measured to be
        faster.
    """
    typical = TYPICAL_ROWS if is_batch_invariant else typical_rows(m)
    found = tuned.find(NAME, tuned_as(ns, k, typical, in_terms=in_terms))
    # Older tables name x in terms as they do bfloat16 x.
    found = found or tuned.find(NAME, tuned_as(ns, k, typical))
    found = found or {"splits": heuristic_splits(ns, k, typical)}
    cluster = 2 if m >= MIN_ROWS_TO_SHARE else 1
    rows = _padded(m, cluster)
    free = SHARED_MEMORY_BYTES - BARRIERS_BYTES - _staged_bytes(rows)
    stages = min(MAX_STAGES, free // _stage_bytes(rows))
    return Config(found["splits"], stages, cluster, found.get("in_fp8", False))


def typical_rows(m: int) -> int:
    """The number of rows that splits for m rows are chosen for: a power of two from 8 on."""
    return max(BOX_ROWS, pl.next_power_of_2(m))


def tuned_as(ns: Sequence[int], k: int, rows: int, *, in_terms: bool = False) -> str:
    """Name the problems that share tuned splits. rows: see `typical_rows`."""
    return f"n={'+'.join(map(str, ns))} k={k} m<={rows}" + (" terms" if in_terms else "")


def heuristic_splits(ns: Sequence[int], k: int, rows: int) -> int:
    """Splits that no GPU has measured: those of the least cost. On an H200 they are the fastest of
    those tried, or within 3 % (benchmarks/results/h200.md)."""
    return min(range(1, k // TILE_K + 1), key=functools.partial(heuristic_cost, ns, k, rows))


def heuristic_cost(ns: Sequence[int], k: int, rows: int, splits: int) -> float:
    """In bytes: what all thread blocks would read if each read as much as the busiest, a tile that
    it begins counted as a quarter of a step; and the parts of so many rows, written and read."""
    tiles, blocks = sum(pl.cdiv(n, TILE_N) for n in ns), multiprocessors()
    busiest = pl.cdiv(tiles * splits, blocks) * (pl.cdiv(k // TILE_K, splits) + 0.25)
    return busiest * blocks * TILE_N * TILE_K + splits * sum(ns) * rows * 2 * 4


def unfit(config: Config, m: int, k: int) -> str | None:
    """Why no kernel can be made of a configuration; None if one can."""
    steps, rows = k // TILE_K, _padded(m, config.cluster)
    needed = config.stages * _stage_bytes(rows) + _staged_bytes(rows) + BARRIERS_BYTES
    if not 1 <= config.splits <= steps:
        return f"splits must be 1 to {steps}, got {config.splits}"
    if config.cluster not in (1, 2):
        return f"cluster must be 1 or 2, got {config.cluster}"
    if config.in_fp8 and _padded(m, config.cluster) > padded_rows(m):
        return f"cluster {config.cluster} needs more rows of x than {m} in terms"
    if config.stages < 2:
        return f"at least 2 stages are needed, got {config.stages}"
    if needed > SHARED_MEMORY_BYTES:
        return f"{needed} bytes of shared memory, of {SHARED_MEMORY_BYTES}"
    return None


def _padded(m: int, cluster: int) -> int:
    """Rows of x that are multiplied: each block loads its share, which TMA takes by eights."""
    return pl.cdiv(m, BOX_ROWS * cluster) * BOX_ROWS * cluster


def _stage_bytes(rows: int) -> int:
    """Of a tile of the weight, and of x in bfloat16 or in two terms."""
    return TILE_K * (TILE_N + 2 * rows)


def _staged_bytes(rows: int) -> int:
    return COMPUTE_WARPGROUPS * rows * WARPGROUP_ROWS * 4


def parts(
    x: Array | Terms,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    *,
    m: int | None = None,
    is_batch_invariant: bool = False,
    config: Config | None = None,
    interpret: Any = None,
) -> list[Parts]:
    """The products of one x with several weights [n_i, k], not summed up, in one launch.

    x: [m, k], bfloat16, or its terms, which do not tell m.
    """
    ns, k = tuple(weight.shape[0] for weight in weights), weights[0].shape[1]
    m = x.shape[0] if isinstance(x, Array) else m
    assert m is not None
    config = config or configure(m, ns, k, is_batch_invariant, in_terms=isinstance(x, Terms))
    if isinstance(x, Terms):
        config = replace(config, in_fp8=True)
    if reason := unfit(config, m, k):
        raise ValueError(f"{config} cannot work: {reason}")
    by_block = weight_scales[0].ndim == 2
    units = mean_squares = None
    if config.in_fp8:
        x, units, mean_squares = x if isinstance(x, Terms) else two_terms(x)
        problem = _Problem(m if m <= BOX_ROWS else len(x) // 2, ns, k, config, len(units))
    else:
        assert isinstance(x, Array)
        x = in_whole_boxes(x)
        problem = _Problem(x.shape[0], ns, k, config)
    block_scales = tuple(weight_scales) if by_block else ()
    operands = _Operands(x, units, mean_squares, tuple(weights), block_scales)
    sums = _launch(problem, operands, interpret)
    scales = [None] * len(ns) if by_block else weight_scales
    return [Parts(each[:, :m], scale) for each, scale in zip(sums, scales, strict=True)]


def _matmuls(
    x: Array | Terms,
    weights: Sequence[Array],
    scales: Sequence[Array],
    is_batch_invariant: bool,
    config: Config | None,
    interpret: Any,
) -> list[Array]:
    """float32 [m, n_i] for each weight."""
    found = parts(
        x, weights, scales,
        is_batch_invariant=is_batch_invariant, config=config, interpret=interpret,
    )  # fmt: skip
    return [each.total() for each in found]


@dataclass(frozen=True)
class _Problem:
    """What is static.

    A unit of work is one of `config.splits` parts of the sums of one tile; clusters take units in
    turn, with a tile for each of their thread blocks. Tiles are counted over all weights; where
    they end, what a cluster has too many reads zeros and stores nothing. m: up to 8, or a multiple.
    groups: of columns that have a unit each, where x is in terms.
    """

    m: int
    ns: tuple[int, ...]
    k: int
    config: Config
    groups: int = 1

    @property
    def rows(self) -> int:
        return _padded(self.m, self.config.cluster)

    @property
    def x_rows(self) -> int:
        """That are multiplied: x, or its two terms."""
        return self.rows * (2 if self.config.in_fp8 else 1)

    @property
    def steps(self) -> int:
        return self.k // TILE_K

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """The first tile of each weight, and the next one's."""
        cluster = self.config.cluster
        ends = list(itertools.accumulate(pl.cdiv(n, TILE_N * cluster) * cluster for n in self.ns))
        return list(zip([0, *ends], ends, strict=False))

    @property
    def units(self) -> int:
        """For a whole cluster."""
        return self.bounds[-1][1] // self.config.cluster * self.config.splits

    @property
    def clusters(self) -> int:
        return min(self.units, multiprocessors() // self.config.cluster)


class _Operands(NamedTuple):
    """Arrays outside of the kernel, references within. x: [m, k], or in terms [2 rows, k], with
    units [groups, rows] and perhaps mean_squares [parts, rows]; weights: each [n, k];
    block_scales: each [n / 128, k / 128], or none at all if scales are per row."""

    x: Any
    units: Any
    mean_squares: Any
    weights: tuple[Any, ...]
    block_scales: tuple[Any, ...]


class _Ring(NamedTuple):
    """Shared memory that tiles pass through, x [stages, x_rows, 128] and weight [stages, 128, 128];
    for each slot, barriers that say that the loader has filled it, and that it is free."""

    x: Any
    weight: Any
    filled: Any
    free: Any

    def slot(self, position: Array) -> Array:
        return lax.rem(position, self.x.shape[0])


class _Part(NamedTuple):
    """A thread block's part of a unit: a tile, the split, its first step along K and the one that
    is not its any more; position: how many steps the block has done before."""

    tile: Array
    split: Array
    first: Array
    end: Array
    position: Array


@functools.partial(jax.jit, static_argnames=("problem", "interpret"))
def _launch(problem: _Problem, operands: _Operands, interpret: Any) -> list[Array]:
    """Sums over each split of K, float32 [splits, m, n_i]; scaled per block, but not per row."""
    config, rows = problem.config, problem.rows
    shared = ("cluster",) if config.cluster > 1 else ()
    accumulator = plgpu.ACC((WARPGROUP_ROWS, problem.x_rows), jnp.float32)
    by_block = bool(operands.block_scales)

    def kernel(refs: _Operands, *outputs: Any, ring: _Ring, staged: Any, widened: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        of_warpgroup = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

        def load(part: _Part) -> None:
            def stream(weight: Any, tile: Array) -> None:
                @pl.loop(part.first, part.end)
                def _(step: Array) -> None:
                    position = part.position + step - part.first
                    slot = ring.slot(position)
                    filled = ring.filled.at[slot]

                    @pl.when(position >= config.stages)
                    def _() -> None:
                        plgpu.barrier_wait(ring.free.at[slot])

                    columns = pl.ds(step * TILE_K, TILE_K)
                    plgpu.copy_gmem_to_smem(
                        weight.at[pl.ds(tile * TILE_N, TILE_N), columns],
                        ring.weight.at[slot],
                        filled,
                    )
                    plgpu.copy_gmem_to_smem(
                        refs.x.at[pl.ds(0, problem.x_rows), columns],
                        ring.x.at[slot],
                        filled,
                        collective_axes=shared,
                    )

            _for_weight_of(problem, part.tile, refs.weights, stream)

        def multiply(sums: Any, slot: Array) -> None:
            x = ring.x.at[slot].transpose((1, 0))
            if config.in_fp8:
                plgpu.wgmma(sums, ring.weight.at[slot, of_warpgroup], x)
                return
            codes = plgpu.load(ring.weight.at[slot, of_warpgroup], layout=MATRIX)
            # Exact; there is no instruction from float8 to bfloat16.
            weight = codes.astype(jnp.float32).astype(jnp.bfloat16)
            if interpret:  # The simulator's wgmma takes nothing from registers.
                widened[warpgroup] = weight
                plgpu.commit_smem()
                weight = widened.at[warpgroup]
            plgpu.wgmma(sums, weight, x)

        def sum_up(part: _Part) -> Array:
            def accumulate(sums: Any) -> Array:
                @pl.loop(part.first, part.end)
                def _(step: Array) -> None:
                    slot = ring.slot(part.position + step - part.first)
                    plgpu.barrier_wait(ring.filled.at[slot])
                    multiply(sums, slot)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(ring.free.at[slot])

                return sums[...]

            return pl.run_scoped(accumulate, accumulator)

        def per_row(ref: Any, i: Array | int) -> Array:
            """ref[i], numbers for the rows of x: as the accumulator's columns lie in registers."""
            place = ref.at[i, pl.ds(0, rows)]
            return plgpu.load(place, layout=MATRIX.reduce(0), optimized=False)

        def inverse_rms() -> Array | None:
            if (ref := refs.mean_squares) is None:
                return None
            each = [per_row(ref, i) for i in range(ref.shape[0])]
            return lax.rsqrt(functools.reduce(jnp.add, each))

        def sum_up_by_steps(part: _Part) -> Array:
            """Sums of 128 products, scaled where scales are per block, are added in registers."""

            def scale_at(step: Array) -> Array | None:
                if not by_block:
                    return None
                return _scale_at(problem, refs.block_scales, part.tile, step)

            def units_at(step: Array) -> Array:
                """The units of a step's columns."""
                steps_per_group = problem.steps // problem.groups
                group = lax.div(lax.min(step, problem.steps - 1), steps_per_group)
                return per_row(refs.units, group)

            def factors_at(step: Array) -> tuple[Array | None, Array | None]:
                return scale_at(step), units_at(step) if problem.groups > 1 else None

            def add(step: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
                total, (scale, units) = carry
                # Asked for now, they are there when the next step wants them.
                following = factors_at(step + 1)
                slot = ring.slot(part.position + step - part.first)
                plgpu.barrier_wait(ring.filled.at[slot])

                def product(sums: Any) -> Array:
                    multiply(sums, slot)
                    y = sums[...]
                    return y[:, :rows] + y[:, rows:] * (1 / TERM_RATIO) if config.in_fp8 else y

                y = pl.run_scoped(product, accumulator)
                plgpu.barrier_arrive(ring.free.at[slot])
                return total + _scaled(_scaled(y, units), scale), following

            # What it needs, asked for now, is there after the last step.
            rms = inverse_rms()
            zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, rows), jnp.float32), MATRIX)
            total, _ = lax.fori_loop(part.first, part.end, add, (zeros, factors_at(part.first)))
            has_one_unit = config.in_fp8 and problem.groups == 1
            total = _scaled(total, units_at(part.first) if has_one_unit else None)
            return _scaled(total, rms)

        def compute(part: _Part) -> None:
            total = sum_up_by_steps(part) if by_block or config.in_fp8 else sum_up(part)
            stage = staged.at[warpgroup]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            stage.transpose((1, 0))[...] = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()

            def store(output: Any, tile: Array) -> None:
                columns = pl.ds(tile * TILE_N + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
                plgpu.copy_smem_to_gmem(stage, output.at[part.split, pl.ds(0, rows), columns])

            _for_weight_of(problem, part.tile, outputs, store)

        @pl.when(warpgroup == LOADER)
        def _() -> None:
            end = _for_each_part(problem, load)

            # Every phase of a barrier has to be seen; the other block of the cluster signals here.
            @pl.loop(lax.max(end - config.stages, 0), end)
            def _(position: Array) -> None:
                plgpu.barrier_wait(ring.free.at[ring.slot(position)])

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _() -> None:
            _for_each_part(problem, compute)
            plgpu.wait_smem_to_gmem(0)

    free = (
        functools.partial(plgpu.ClusterBarrier, collective_axes=shared) if shared else plgpu.Barrier
    )
    bfloat16 = jnp.dtype(jnp.bfloat16)
    scratch: dict[str, Any] = {
        "ring": _Ring(
            x=_tile((config.stages, problem.x_rows, TILE_K), operands.x.dtype),
            weight=_tile((config.stages, TILE_N, TILE_K), e4m3.DTYPE),
            filled=plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            free=free(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=config.stages),
        ),
        "staged": plgpu.SMEM((COMPUTE_WARPGROUPS, rows, WARPGROUP_ROWS), jnp.float32),
        "widened": _tile((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, TILE_K), bfloat16)
        if interpret and not config.in_fp8
        else None,
    }
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((config.splits, problem.m, n), jnp.float32) for n in problem.ns
        ],
        scratch_types=scratch,
        grid=(problem.clusters,),
        grid_names=("clusters",),
        cluster=(config.cluster,) if shared else (),
        cluster_names=shared,
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name=NAME,
        interpret=interpret,
    )(operands)


def _for_each_part(problem: _Problem, visit: Callable[[_Part], None]) -> Array:
    """Visit a thread block's parts in their order. Returns how many steps they are in all."""
    config, cluster = problem.config, lax.axis_index("clusters")

    def one(i: Array, position: Array) -> Array:
        unit = i * problem.clusters + cluster
        tile, split = lax.div(unit, config.splits), lax.rem(unit, config.splits)
        if config.cluster > 1:
            tile = tile * config.cluster + lax.axis_index("cluster")
        first = lax.div(split * problem.steps, config.splits)
        end = lax.div((split + 1) * problem.steps, config.splits)
        visit(_Part(tile, split, first, end, position))
        return position + end - first

    visits = lax.div(problem.units - 1 - cluster, problem.clusters) + 1
    return lax.fori_loop(0, visits, one, jnp.int32(0))


def _for_weight_of(
    problem: _Problem, tile: Array, each: Sequence[Any], use: Callable[[Any, Array], None]
) -> None:
    """use(what belongs to the weight of `tile`, out of `each`, and which of its tiles it is)."""
    for (first, end), one in zip(problem.bounds, each, strict=True):
        here = functools.partial(use, one, tile - first)
        if len(each) == 1:
            here()
        else:
            pl.when((first <= tile) & (tile < end))(here)


def _scaled(y: Array, factor: Array | None) -> Array:
    """factor: one number, one for each column of y, or None for 1."""
    if factor is None:
        return y
    return y * (lax.broadcast_in_dim(factor, y.shape, (1,)) if factor.ndim else factor)


def _scale_at(problem: _Problem, scales: Sequence[Any], tile: Array, step: Array) -> Array:
    """Of the tile's block at a step; the last step's beyond it."""
    step = lax.min(step, problem.steps - 1)
    found = jnp.float32(0)
    for (first, end), scale in zip(problem.bounds, scales, strict=True):
        here = scale[lax.clamp(0, tile - first, scale.shape[0] - 1), step]
        found = jnp.where((first <= tile) & (tile < end), here, found)
    return found


def _tile(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Scratch in shared memory that TMA writes and wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype, shape[-1]))
