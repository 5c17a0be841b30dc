"""Weight-only FP8 matmul on Hopper for few rows of activations: decoding.

Reading the weight is all the work. A thread block is three warpgroups: the last one streams tiles
of the weight, and the columns of x that belong to them, by TMA through a ring in shared memory; the
other two widen codes to bfloat16 in registers and multiply with the tensor cores. Operands are
swapped: 64 rows of the weight are what wgmma takes from registers, x is what it takes from shared
memory, padded to a multiple of 8 rows only.

Or nothing is widened (`Config.in_fp8`): FP8 wgmma takes the codes from shared memory as they are,
and x as the two float8 terms of `two_terms`, which are twice as many rows and as many bytes. Tensor
cores add FP8 products with about 14 bits, so sums of 128 products are added up in registers.

K is split until every multiprocessor has work. Parts go to memory as float32, and XLA adds them up
in one order, together with scales per row, the residual and what else it fuses with them. Neither
the split nor any order depends on the number of rows of x: a row's result is the same in any batch.

Several weights with the same x (q, k and v; gate and up) are one launch over all their rows.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from pallas_kernels.hopper import BOX_ROWS, SHARED_MEMORY_BYTES, in_whole_boxes, swizzled

NAME = "fp8_matmul_weight_only"
COMPUTE_WARPGROUPS = 2
LOADER = COMPUTE_WARPGROUPS
WARPGROUP_ROWS = 64
# Of a weight, per thread block and step: a block of scales.
TILE_N = TILE_K = BLOCK
# From this many rows of x on, loading it for each tile of the weight adds to L2's traffic.
MIN_ROWS_TO_SHARE = 17
TYPICAL_ROWS = 16
MAX_STAGES = 12
# What TMA divides the columns of the results into.
OUT_GRANULE = 32
BARRIERS_BYTES = 2048
# Of the second of two terms to its code; of float32's smallest normal number.
TERM_RATIO, MIN_EXPONENT = 16, -126
MATRIX = plgpu.Layout.WGMMA


@dataclass(frozen=True)
class Config:
    """How the work is cut up.

    splits: thread blocks that divide K among them.
    stages: tiles of the weight, 128x128, in flight.
    cluster: 1, or 2 for pairs of blocks that share the loads of x.
    in_fp8: x as two float8 terms instead of the weight as bfloat16.
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


def configure(m: int, ns: Sequence[int], k: int) -> Config:
    """The tuned splits of the GPU in use, or else the heuristic's, and what follows from m; in FP8
    where that was measured to be faster.

    ns: rows of each weight.
    """
    found = tuned.find(NAME, tuned_as(ns, k)) or {"splits": heuristic_splits(ns, k)}
    cluster = 2 if m >= MIN_ROWS_TO_SHARE else 1
    rows = _padded(m, cluster)
    free = SHARED_MEMORY_BYTES - BARRIERS_BYTES - _staged_bytes(rows)
    stages = min(MAX_STAGES, free // _stage_bytes(rows))
    return Config(found["splits"], stages, cluster, found.get("in_fp8", False))


def tuned_as(ns: Sequence[int], k: int) -> str:
    """What problems that share tuned splits are called: m is no part of it, so that a row's result
    does not depend on it."""
    return f"n={'+'.join(map(str, ns))} k={k}"


def heuristic_splits(ns: Sequence[int], k: int) -> int:
    """Splits that no GPU has measured: those of the least cost."""
    return min(range(1, k // TILE_K + 1), key=functools.partial(heuristic_cost, ns, k))


def heuristic_cost(ns: Sequence[int], k: int, splits: int) -> float:
    """In bytes: what all thread blocks would read if each read as much as the busiest, a tile that
    it begins counted as a quarter of a step; and the parts, for `TYPICAL_ROWS` rows, written and
    read."""
    tiles, blocks = sum(pl.cdiv(n, TILE_N) for n in ns), multiprocessors()
    busiest = pl.cdiv(tiles * splits, blocks) * (pl.cdiv(k // TILE_K, splits) + 0.25)
    return busiest * blocks * TILE_N * TILE_K + splits * sum(ns) * TYPICAL_ROWS * 2 * 4


def unfit(config: Config, m: int, k: int) -> str | None:
    """Why no kernel can be made of a configuration; None if one can."""
    steps, rows = k // TILE_K, _padded(m, config.cluster)
    needed = config.stages * _stage_bytes(rows) + _staged_bytes(rows) + BARRIERS_BYTES
    if not 1 <= config.splits <= steps:
        return f"splits must be 1 to {steps}, got {config.splits}"
    if config.cluster not in (1, 2):
        return f"cluster must be 1 or 2, got {config.cluster}"
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


def _matmuls(
    x: Array,
    weights: Sequence[Array],
    scales: Sequence[Array],
    config: Config | None,
    interpret: Any,
) -> list[Array]:
    """float32 [m, n_i] for each weight."""
    (m, k), ns = x.shape, tuple(weight.shape[0] for weight in weights)
    config = config or configure(m, ns, k)
    if reason := unfit(config, m, k):
        raise ValueError(f"{config} cannot work: {reason}")
    by_block = scales[0].ndim == 2
    x = in_whole_boxes(x)
    problem, unit = _Problem(x.shape[0], ns, k, config), None
    if config.in_fp8:
        x, unit = two_terms(jnp.pad(x, ((0, problem.rows - x.shape[0]), (0, 0))))
    operands = _Operands(x, tuple(weights), tuple(scales) if by_block else ())
    parts = _launch(problem, operands, interpret)
    sums = [functools.reduce(operator.add, part)[:m] for part in parts]
    if unit is not None:
        sums = [y * unit[:m] for y in sums]
    return sums if by_block else [y * scale for y, scale in zip(sums, scales, strict=True)]


def two_terms(x: Array) -> tuple[Array, Array]:
    """bfloat16 x [m, k] as unit * (a + b / 16).

    Returns codes, float8_e4m3fn [2 m, k], the rows of a and then those of b, and units, float32
    [m, 1], powers of two.

    A bfloat16 number has 8 bits, a float8_e4m3fn one has 4, down to 2^-6. So this is exact where a
    number is at least 2^-13 of its row's largest; what is lost of others is below 2^-21 of it.
    """
    wide = x.astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(wide), axis=1, keepdims=True))
    unit = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent - 8, MIN_EXPONENT))
    v = wide / unit  # below 256
    # Rounded as a cast would; what is cast and cast back, a compiler may take for what it was.
    subnormal = lax.round(v * 512, lax.RoundingMethod.TO_NEAREST_EVEN) / 512
    a = jnp.where(jnp.abs(v) < 2**-6, subnormal, lax.reduce_precision(v, 8, 3))
    return jnp.concatenate([a, (v - a) * TERM_RATIO]).astype(e4m3.DTYPE), unit


@dataclass(frozen=True)
class _Problem:
    """What is static.

    A unit of work is one of `config.splits` parts of the sums of one tile; clusters take units in
    turn, with a tile for each of their thread blocks. Tiles are counted over all weights; where
    they end, what a cluster has too many reads zeros and stores nothing. m: up to 8, or a multiple.
    """

    m: int
    ns: tuple[int, ...]
    k: int
    config: Config

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
    """Arrays outside of the kernel, references within. x: [m, k], or in two terms [2 rows, k];
    weights: each [n, k]; block_scales: each [n / 128, k / 128], or none at all if scales are per
    row."""

    x: Any
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

        def sum_up_by_steps(part: _Part) -> Array:
            """Sums of 128 products, scaled where scales are per block, are added in registers."""

            def scale_at(step: Array) -> Array | None:
                if not by_block:
                    return None
                return _scale_at(problem, refs.block_scales, part.tile, step)

            def add(step: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
                total, scale = carry
                # Asked for now, it is there when the next step wants it.
                following = scale_at(step + 1)
                slot = ring.slot(part.position + step - part.first)
                plgpu.barrier_wait(ring.filled.at[slot])

                def product(sums: Any) -> Array:
                    multiply(sums, slot)
                    y = sums[...]
                    return y[:, :rows] + y[:, rows:] * (1 / TERM_RATIO) if config.in_fp8 else y

                y = pl.run_scoped(product, accumulator)
                total = total + (y if scale is None else y * scale)
                plgpu.barrier_arrive(ring.free.at[slot])
                return total, following

            zeros = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, rows), jnp.float32), MATRIX)
            return lax.fori_loop(part.first, part.end, add, (zeros, scale_at(part.first)))[0]

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
