"""FP8 x FP8 matmul on Hopper's tensor cores, and what would otherwise be a pass over its result.

A thread block is three warpgroups. The last one loads tiles of both operands by TMA into a ring in
shared memory; the other two multiply, each its part of the block's tile of the result. Blocks are
persistent: each takes every so-many-th tile, in an order that keeps what neighbours read in L2. Two
blocks may form a cluster and load a tile of the weight once, for two tiles of x.

The tensor cores add FP8 products with fewer bits than float32 has, about 14 (DeepSeek-V3 report,
section 3.3.2). Where scales change along K, sums of 128 products are scaled and added in float32
registers; with one scale per row that is a choice, `Config.promote`.

Products are added along K in one order whatever the tiles are: a row of the result depends neither
on the other rows nor on the configuration, `promote` aside.
"""

import functools
import math
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
from pallas_kernels.fp8_matmul.reference import BLOCK, MIN_ABSMAX, is_grouped, is_per_block
from pallas_kernels.hopper import SHARED_MEMORY_BYTES, in_whole_boxes, swizzled

TILE_K = 128
WARPGROUP_ROWS = 64
COMPUTE_WARPGROUPS = 2
# Per thread; a block is launched with 168 for each of its 3 x 128 threads.
LOADER_REGISTERS, COMPUTE_REGISTERS = 40, 232
MAX_STAGES = 8
# Steps whose sums are promoted while the tensor cores are at the next one's.
IN_TURN = 2
# The narrowest swizzle.
MIN_WIDTH_BYTES = 32
# What a block may need beside its ring of tiles: staged results, scales, barriers.
MAX_STAGING_BYTES = 35 * 1024
MATRIX = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


@dataclass(frozen=True)
class Config:
    """How a matmul is cut up.

    tile_m: rows of x per block: 128, or 64, where the two warpgroups share out tile_n instead.
    tile_n: rows of the weight per block, of each weight in `swiglu`: 64, 128 or 256.
    stages: how many tiles, 128 of K wide, are in flight.
    cluster: 1, or 2 for pairs of blocks that share the loads of the weight.
    band: how many tiles of x (or pairs of them) blocks walk through side by side.
    promote: sums of 128 products are added up in float32 registers.
    """

    tile_m: int
    tile_n: int
    stages: int
    cluster: int = 1
    band: int = 8
    promote: bool = False

    @property
    def columns(self) -> int:
        """Of the result, per warpgroup."""
        return self.tile_n * self.tile_m // (2 * WARPGROUP_ROWS)


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def fp8_matmul(
    x: Array,
    weight: Array,
    weight_scale: Array,
    x_scale: Array,
    out_dtype: jnp.dtype,
    residual: Array | None = None,
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> Array:
    """As `pallas_kernels.fp8_matmul.fp8_matmul`, for float8_e4m3fn x and weight.

    config: for tuning; None takes `configure`'s.
    interpret: plgpu.InterpretGPUParams, to run in the simulator.
    """
    rows, x = x.shape[0], in_whole_boxes(x)
    residual = None if residual is None else in_whole_boxes(residual)
    problem = _Problem.of(x, x_scale, weight, weight_scale, config)
    columns = problem.config.columns
    # Stored at a time: what a swizzle spans, and a divisor of n, as tiles of TMA have to be.
    width = math.gcd(columns, 128 // out_dtype.itemsize, problem.n)
    parts = columns // width
    # One, where float32 results and scales of x along K meet a long ring.
    room = SHARED_MEMORY_BYTES - ring_bytes(problem.config, x_grouped=problem.x_grouped)
    slots = min(2, parts, room // (2 * WARPGROUP_ROWS * width * out_dtype.itemsize))

    def part(tile: _Tile, i: int) -> tuple[Any, Array]:
        """Where it lies in the result, and its slot."""
        where = (tile.rows, pl.ds(tile.column + i * width, width))
        return where, tile.warpgroup * slots + i % slots

    def load(tile: _Tile, i: int, residual: Any, scratch: Any) -> None:
        where, slot = part(tile, i)
        target, loaded = scratch["staged"].at[slot], scratch["loaded"].at[slot]
        plgpu.copy_gmem_to_smem(residual.at[where], target, loaded)

    def begin(tile: _Tile, residual: Any, scratch: Any) -> None:
        if residual is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i in range(slots):
                load(tile, i, residual, scratch)

    def finish(
        tile: _Tile, scale: _Scale, sums: _Sums, residual: Any, outputs: Any, scratch: Any
    ) -> None:
        # All scales are asked for before any is waited for.
        scaled = [
            scale(0, sums[0][:, i * width : (i + 1) * width], part(tile, i)[0][1])
            for i in range(parts)
        ]
        for i, y in enumerate(scaled):
            where, slot = part(tile, i)
            staged = scratch["staged"].at[slot]
            if residual is None:
                plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            else:
                plgpu.barrier_wait(scratch["loaded"].at[slot])
                y = y + staged[...].astype(jnp.float32)
            staged[...] = y.astype(out_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, outputs[0].at[where])
            if residual is not None and i + slots < parts:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                load(tile, i + slots, residual, scratch)

    y = _launch(
        problem,
        _operands(problem, x, x_scale, (weight,), (weight_scale,), residual),
        jax.ShapeDtypeStruct((problem.m, problem.n), out_dtype),
        finish,
        begin=begin,
        scratch={
            "staged": plgpu.SMEM(
                (2 * slots, WARPGROUP_ROWS, width), out_dtype, transforms=swizzled(out_dtype, width)
            ),
            **({} if residual is None else {"loaded": plgpu.Barrier(num_barriers=2 * slots)}),
        },
        name="fp8_matmul",
        interpret=interpret,
    )
    return y[:rows]


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def swiglu(
    x: Array,
    gate: Array,
    gate_scale: Array,
    up: Array,
    up_scale: Array,
    x_scale: Array,
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Array, Array]:
    """As `pallas_kernels.fp8_matmul.swiglu`, for float8_e4m3fn x and weights, in one launch."""
    rows, x = x.shape[0], in_whole_boxes(x)
    problem = _Problem.of(x, x_scale, gate, gate_scale, config, weights=2)
    width = 32  # finished at a time: more would hold too many scales in registers
    padded_rows = pl.cdiv(problem.m, problem.rows_per_step) * problem.rows_per_step

    def finish(
        tile: _Tile, scale: _Scale, sums: _Sums, _: None, outputs: Any, scratch: Any
    ) -> None:
        codes_out, scales_out = outputs
        parts = []
        for start in range(0, BLOCK, width):
            columns = pl.ds(tile.column + start, width)
            g, u = (scale(i, sums[i][:, start : start + width], columns) for i in range(2))
            parts.append(g / (1 + jnp.exp(-g)) * u)
        absmax = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(h), axis=1) for h in parts])
        is_zero = absmax < MIN_ABSMAX
        inverse = jnp.where(is_zero, 1.0, e4m3.MAX / absmax)
        staged = scratch["staged"].at[tile.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, h in enumerate(parts):
            codes = h * lax.broadcast_in_dim(inverse, h.shape, (0,))
            staged[:, pl.ds(i * width, width)] = codes.astype(e4m3.DTYPE)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged, codes_out.at[tile.rows, pl.ds(tile.column, BLOCK)])
        scales_out[tile.column // BLOCK, tile.rows] = jnp.where(is_zero, 1.0, absmax / e4m3.MAX)

    codes, scales = _launch(
        problem,
        _operands(problem, x, x_scale, (gate, up), (gate_scale, up_scale)),
        (
            jax.ShapeDtypeStruct((problem.m, problem.n), e4m3.DTYPE),
            jax.ShapeDtypeStruct((problem.n // BLOCK, padded_rows), jnp.float32),
        ),
        finish,
        scratch={
            "staged": plgpu.SMEM(
                (2, WARPGROUP_ROWS, BLOCK), e4m3.DTYPE, transforms=swizzled(e4m3.DTYPE, width)
            )
        },
        name="fp8_swiglu",
        interpret=interpret,
    )
    return codes[:rows], scales[:, :rows].T


def refusal(
    x: Array | jax.ShapeDtypeStruct,
    weight: Array,
    weight_scale: Array,
    out_dtype: jnp.dtype | None,
    residual: Array | None = None,
) -> str | None:
    """Why the kernels cannot take these operands; None if they can.

    out_dtype: of `fp8_matmul`; None for `swiglu`.
    """
    (m, k), n = x.shape, weight.shape[0]
    granule = BLOCK if out_dtype is None else MIN_WIDTH_BYTES // out_dtype.itemsize
    if x.dtype != e4m3.DTYPE or weight.dtype != e4m3.DTYPE:
        return f"x and weight must be float8_e4m3fn, got {x.dtype} and {weight.dtype}"
    if m == 0:
        return "x has no rows"
    if k % TILE_K:
        return f"in = {k} must be a multiple of {TILE_K}"
    if n % granule:
        return f"out = {n} must be a multiple of {granule}"
    if weight_scale.ndim == 2 and not is_per_block(weight_scale, (n, k)):
        return f"weight_scale {weight_scale.shape} is neither per row nor per 128x128 block"
    if out_dtype is not None and out_dtype not in (jnp.bfloat16, jnp.float32):
        return f"out_dtype must be bfloat16 or float32, got {out_dtype}"
    if residual is not None and residual.dtype != out_dtype:
        return f"residual must be {out_dtype}, as the result is, got {residual.dtype}"
    return None


def configure(m: int, n: int, k: int, *, promote: bool, weights: int = 1) -> Config:
    """The tuned configuration of the GPU in use, or else the heuristic's."""
    kernel = "fp8_matmul" if weights == 1 else "fp8_swiglu"
    found = tuned.find(kernel, tuned_as(m, n, k, promote=promote))
    return heuristic(m, n, promote=promote, weights=weights) if found is None else Config(**found)


def tuned_as(m: int, n: int, k: int, *, promote: bool) -> str:
    """What problems that share a tuned configuration are called: m up to a power of two."""
    rows = max(WARPGROUP_ROWS, 1 << (m - 1).bit_length())
    return f"m<={rows} n={n} k={k}" + (" promote" if promote else "")


def heuristic(m: int, n: int, *, promote: bool, weights: int = 1) -> Config:
    """A configuration that no GPU has measured.

    Takes the width whose tiles take the fewest cycles, when a multiprocessor does 4096 products a
    cycle and gets 32 bytes of L2 in it. Pairs of blocks share the weight where there are two tiles
    of rows. The ring is as long as fits; its slots are a power of two, so that a mask and no
    division finds one.
    """
    tile_m = 64 if m <= 64 and weights == 1 else 128
    cluster = 2 if m > tile_m else 1
    groups = multiprocessors() // cluster

    def cycles(tile_n: int) -> int:
        rounds = pl.cdiv(pl.cdiv(m, tile_m * cluster) * pl.cdiv(n, tile_n), groups)
        loaded = (tile_m + tile_n // cluster) * TILE_K
        return rounds * max(tile_m * tile_n * TILE_K // 4096, loaded // 32)

    widest = 128 if promote and tile_m == 128 else 256
    widths = (BLOCK,) if weights == 2 else [each for each in (256, 128, 64) if each <= widest]
    tile_n = min(widths, key=cycles)
    stages = most_stages(tile_m, tile_n, weights)
    return Config(tile_m, tile_n, 1 << stages.bit_length() - 1, cluster)


def most_stages(tile_m: int, tile_n: int, weights: int) -> int:
    """How deep a ring of tiles shared memory holds."""
    tiles = ring_bytes(Config(tile_m, tile_n, stages=1), weights)
    return min(MAX_STAGES, (SHARED_MEMORY_BYTES - MAX_STAGING_BYTES) // tiles)


def ring_bytes(config: Config, weights: int = 1, *, x_grouped: bool = False) -> int:
    """Shared memory for the tiles in flight, and for their scales of x if those change along K."""
    scales = 4 * config.tile_m if x_grouped else 0
    return config.stages * ((config.tile_m + weights * config.tile_n) * TILE_K + scales)


def unfit(config: Config, *, promote: bool, weights: int = 1) -> str | None:
    """Why no kernel can be made of a configuration; None if one can.

    promote: sums are added up in registers, by choice or because scales change along K.
    """
    ring = ring_bytes(config, weights)
    if config.tile_m not in (64, 128):
        return f"tile_m must be 64 or 128, got {config.tile_m}"
    if config.tile_n not in (64, 128, 256):
        return f"tile_n must be 64, 128 or 256, got {config.tile_n}"
    if config.cluster not in (1, 2):
        return f"cluster must be 1 or 2, got {config.cluster}"
    if config.stages < 2:
        return f"at least 2 stages are needed, got {config.stages}"
    if ring + MAX_STAGING_BYTES > SHARED_MEMORY_BYTES:
        return f"{ring} + {MAX_STAGING_BYTES} bytes of shared memory, of {SHARED_MEMORY_BYTES}"
    if weights == 2 and config.columns != BLOCK:
        return f"swiglu needs {BLOCK} columns for each of two warpgroups, got {config.columns}"
    if promote and config.columns > BLOCK:
        return f"promoted sums fit {BLOCK} columns for a warpgroup, not {config.columns}"
    return None


@dataclass(frozen=True)
class _Problem:
    """What is static. m: up to 8, or a multiple. x_grouped, w_grouped: scales change along K, every
    128."""

    m: int
    n: int
    k: int
    config: Config
    x_grouped: bool
    w_grouped: bool

    @staticmethod
    def of(
        x: Array,
        x_scale: Array,
        weight: Array,
        weight_scale: Array,
        config: Config | None,
        weights: int = 1,
    ) -> "_Problem":
        (m, k), n = x.shape, weight.shape[0]
        x_grouped, w_grouped = is_grouped(x_scale, k), weight_scale.ndim == 2
        promote = x_grouped or w_grouped
        if config is None:
            config = configure(m, n, k, promote=promote, weights=weights)
        if reason := unfit(config, promote=promote or config.promote, weights=weights):
            raise ValueError(f"{config} cannot work: {reason}")
        return _Problem(m, n, k, config, x_grouped, w_grouped)

    @property
    def promote(self) -> bool:
        return self.config.promote or self.x_grouped or self.w_grouped

    @property
    def rows_per_step(self) -> int:
        """Rows of x that a cluster works on at a time; what is indexed by row is padded to it."""
        return self.config.tile_m * self.config.cluster


_Scale = Callable[[int, Array, Any], Array]
_Sums = Sequence[Array]


class _Operands(NamedTuple):
    """Arrays outside of the kernel, references within.

    x: [m, k]; x_scale: [padded m], or [k / 128, padded m] where it is grouped;
    weights: each [n, k]; weight_scales: each [padded n] or [n blocks, k blocks].
    """

    x: Any
    x_scale: Any
    weights: tuple[Any, ...]
    weight_scales: tuple[Any, ...]
    residual: Any


class _Ring(NamedTuple):
    """Shared memory that tiles pass through: slots of x, of each weight and, if x is grouped, of
    x_scale; for each slot, barriers that say that the loader has filled it, and that it is free."""

    x: Any
    weights: tuple[Any, ...]
    x_scale: Any
    filled: Any
    free: Any


class _Tile(NamedTuple):
    """One warpgroup's tile of the result: its slice of rows and its first column."""

    warpgroup: Array
    rows: Any
    column: Array


def _operands(
    problem: _Problem,
    x: Array,
    x_scale: Array,
    weights: tuple[Array, ...],
    weight_scales: tuple[Array, ...],
    residual: Array | None = None,
) -> _Operands:
    rows, config = problem.rows_per_step, problem.config
    if problem.x_grouped:
        x_scale = _padded(x_scale.T, 1, rows)
    else:
        per_row = x_scale.reshape(-1) if x_scale.ndim else jnp.full(problem.m, x_scale)
        x_scale = _padded(per_row, 0, rows)
    step = pl.cdiv(config.tile_n, BLOCK) if problem.w_grouped else config.tile_n
    weight_scales = tuple(_padded(each, 0, step) for each in weight_scales)
    return _Operands(x, x_scale, weights, weight_scales, residual)


def _padded(scale: Array, axis: int, multiple: int) -> Array:
    """Zeros at an axis' end, which tiles beyond the matrix read; their results are not stored."""
    missing = -scale.shape[axis] % multiple
    widths = [(0, missing if each == axis else 0) for each in range(scale.ndim)]
    return jnp.pad(scale, widths) if missing else scale


def _launch(
    problem: _Problem,
    operands: _Operands,
    out_type: Any,
    finish: Callable[..., None],
    *,
    begin: Callable[..., None] = lambda *_: None,
    scratch: dict[str, Any],
    name: str,
    interpret: Any,
) -> Any:
    """Sums over K, tile by tile, with those scales that change along K; `finish` stores them.

    begin(tile, residual, scratch) and, after the sums, finish(tile, scale, sums, residual, outputs,
    scratch) are called by each computing warpgroup;
    scale(which, y, columns) multiplies y [64, columns] of weight `which` by the other scales.
    """
    config, weights = problem.config, len(operands.weights)
    steps = problem.k // TILE_K
    grid = (pl.cdiv(problem.m, problem.rows_per_step), pl.cdiv(problem.n, config.tile_n))
    tiles = grid[0] * grid[1]
    clusters = min(tiles, multiprocessors() // config.cluster)
    streams = 1 + weights + problem.x_grouped
    shared = ("cluster",) if config.cluster > 1 else ()

    def kernel(refs: _Operands, *outputs: Any, ring: _Ring, scratch: dict[str, Any]) -> None:
        cluster, warpgroup = lax.axis_index("clusters"), lax.axis_index("warpgroup")
        visits = lax.div(tiles - 1 - cluster, clusters) + 1

        def locate(visit: Array) -> tuple[Array, Array]:
            m, n = plgpu.planar_snake(visit * clusters + cluster, grid, 0, config.band)
            return (m * config.cluster + lax.axis_index("cluster") if shared else m), n

        @pl.when(warpgroup == COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            @pl.loop(0, visits)
            def _(visit: Array) -> None:
                tile_m, tile_n = locate(visit)
                rows = pl.ds(tile_m * config.tile_m, config.tile_m)
                columns = pl.ds(tile_n * config.tile_n, config.tile_n)

                @pl.loop(0, steps)
                def _(k: Array) -> None:
                    step = visit * steps + k
                    slot = lax.rem(step, config.stages)
                    filled = ring.filled.at[slot]

                    @pl.when(step >= config.stages)
                    def _() -> None:
                        plgpu.barrier_wait(ring.free.at[slot])

                    ks = pl.ds(k * TILE_K, TILE_K)
                    plgpu.copy_gmem_to_smem(refs.x.at[rows, ks], ring.x.at[slot], filled)
                    for source, target in zip(refs.weights, ring.weights, strict=True):
                        plgpu.copy_gmem_to_smem(
                            source.at[columns, ks], target.at[slot], filled, collective_axes=shared
                        )
                    if problem.x_grouped:
                        plgpu.copy_gmem_to_smem(
                            refs.x_scale.at[k, rows], ring.x_scale.at[slot], filled
                        )

            # The other block of the cluster still signals here: stay until it has.
            @pl.loop(jnp.maximum(visits * steps - config.stages, 0), visits * steps)
            def _(step: Array) -> None:
                plgpu.barrier_wait(ring.free.at[lax.rem(step, config.stages)])

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

            def store(tile: _Tile, scale: _Scale, sums: _Sums) -> None:
                finish(tile, scale, sums, refs.residual, outputs, scratch)

            @pl.loop(0, visits)
            def _(visit: Array) -> None:
                tile = _tile(config, warpgroup, *locate(visit))
                begin(tile, refs.residual, scratch)
                _compute(problem, refs, ring, tile, visit * steps, store)

            plgpu.wait_smem_to_gmem(0)

    free = (
        functools.partial(plgpu.ClusterBarrier, collective_axes=shared) if shared else plgpu.Barrier
    )
    codes = swizzled(e4m3.DTYPE, TILE_K)
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types={
            "ring": _Ring(
                x=plgpu.SMEM((config.stages, config.tile_m, TILE_K), e4m3.DTYPE, transforms=codes),
                weights=(
                    plgpu.SMEM(
                        (config.stages, config.tile_n, TILE_K), e4m3.DTYPE, transforms=codes
                    ),
                )
                * weights,
                x_scale=plgpu.SMEM((config.stages, config.tile_m), jnp.float32)
                if problem.x_grouped
                else None,
                filled=plgpu.Barrier(num_arrivals=streams, num_barriers=config.stages),
                free=free(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=config.stages),
            ),
            "scratch": scratch,
        },
        grid=(clusters,),
        grid_names=("clusters",),
        cluster=(config.cluster,) if shared else (),
        cluster_names=shared,
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name=name,
        interpret=interpret,
    )(operands)


def _within(config: Config, warpgroup: Array) -> tuple[Any, Any]:
    """A warpgroup's first row and first column within its block's tile."""
    if config.tile_m == 128:
        return warpgroup * WARPGROUP_ROWS, 0
    return 0, warpgroup * config.columns


def _tile(config: Config, warpgroup: Array, tile_m: Array, tile_n: Array) -> _Tile:
    """tile_m, tile_n: the block's, counted in tiles."""
    row, column = _within(config, warpgroup)
    rows = pl.ds(tile_m * config.tile_m + row, WARPGROUP_ROWS)
    return _Tile(warpgroup, rows, tile_n * config.tile_n + column)


def _compute(
    problem: _Problem,
    refs: _Operands,
    ring: _Ring,
    tile: _Tile,
    first_step: Array,
    store: Callable[[_Tile, _Scale, _Sums], None],
) -> None:
    """One warpgroup's part of one tile, which passes through the ring from `first_step` on."""
    config = problem.config
    shape = (WARPGROUP_ROWS, config.columns)
    steps = problem.k // TILE_K
    row, column = _within(config, tile.warpgroup)
    of_x, of_weight = pl.ds(row, WARPGROUP_ROWS), pl.ds(column, config.columns)

    def slot_of(k: Array | int) -> Array:
        return lax.rem(first_step + k, config.stages)

    def multiply(sums: Any, weight: Any, slot: Array) -> None:
        plgpu.wgmma(sums, ring.x.at[slot, of_x], weight.at[slot, of_weight].transpose((1, 0)))

    def scale(which: int, y: Array, columns: Any) -> Array:
        if not problem.x_grouped:
            per_row = _load(refs.x_scale.at[tile.rows], PER_ROW)
            y = y * lax.broadcast_in_dim(per_row, y.shape, (0,))
        if not problem.w_grouped:
            per_column = _load(refs.weight_scales[which].at[columns], PER_COLUMN)
            y = y * lax.broadcast_in_dim(per_column, y.shape, (1,))
        return y

    def accumulate(*sums: Any) -> None:
        """One product stays in flight; it frees its slot a step later."""

        @pl.loop(0, steps)
        def _(k: Array) -> None:
            slot = slot_of(k)
            plgpu.barrier_wait(ring.filled.at[slot])
            for each, weight in zip(sums, ring.weights, strict=True):
                multiply(each, weight, slot)
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _() -> None:
                plgpu.barrier_arrive(ring.free.at[slot_of(k - 1)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(ring.free.at[slot_of(steps - 1)])
        store(tile, scale, [each[...] for each in sums])

    def promote(k: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        """Sums of one step, scaled and added."""
        slot, factors, x_scale = await_step(k)
        totals = tuple(
            total + _times(_times(product(weight, slot), x_scale), factor)
            for total, weight, factor in zip(totals, ring.weights, factors, strict=True)
        )
        plgpu.barrier_arrive(ring.free.at[slot])
        return totals

    def await_step(k: Array) -> tuple[Array, list[Array | None], Array | None]:
        """Wait for a step's operands. Returns their slot and the scales of weights and x."""
        slot = slot_of(k)
        factors = [
            each[tile.column // BLOCK, k] if problem.w_grouped else None
            for each in refs.weight_scales
        ]
        plgpu.barrier_wait(ring.filled.at[slot])
        x_scale = None
        if problem.x_grouped:
            x_scale = _load(ring.x_scale.at[slot, of_x], PER_ROW)
            plgpu.commit_smem()  # read before the copy engine, another proxy, overwrites it
        return slot, factors, x_scale

    def product(weight: Any, slot: Array) -> Array:
        def within(sums: Any) -> Array:
            multiply(sums, weight, slot)
            return sums[...]

        return pl.run_scoped(within, plgpu.ACC(shape, jnp.float32))

    def promote_in_turn(i: Array, total: Array) -> Array:
        """The sums of `IN_TURN` steps: one is scaled and added while the next one multiplies."""
        (weight,) = ring.weights

        def add(total: Array, pending: tuple[Any, Array, Array | None], in_flight: int) -> Array:
            sums, slot, scale = pending
            total = total + _times(plgpu.wgmma_accumulator_load(sums, wait_n=in_flight), scale)
            plgpu.barrier_arrive(ring.free.at[slot])
            return total

        def step(j: int, total: Array, pending: tuple[Any, Array, Array | None] | None) -> Array:
            if j == IN_TURN:
                assert pending is not None
                return add(total, pending, 0)
            slot, (factor,), x_scale = await_step(i * IN_TURN + j)

            def within(sums: Any) -> Array:
                multiply(sums, weight, slot)
                scale = factor if x_scale is None else _times(x_scale, factor)
                added = total if pending is None else add(total, pending, 1)
                return step(j + 1, added, (sums, slot, scale))

            return pl.run_scoped(within, plgpu.ACC(shape, jnp.float32))

        return step(0, total, None)

    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), MATRIX)
    if problem.promote and len(ring.weights) == 1 and steps % IN_TURN == 0:
        store(tile, scale, [lax.fori_loop(0, steps // IN_TURN, promote_in_turn, zeros)])
    elif problem.promote:
        store(tile, scale, lax.fori_loop(0, steps, promote, (zeros,) * len(ring.weights)))
    else:
        pl.run_scoped(accumulate, *[plgpu.ACC(shape, jnp.float32)] * len(ring.weights))


def _load(ref: Any, layout: Any) -> Array:
    """A vector as the accumulator's rows or columns lie in registers."""
    return plgpu.load(ref, layout=layout, optimized=False)


def _times(y: Array, factor: Array | None) -> Array:
    """factor: one number, one per row, or None for 1. Two factors are multiplied with y in turn:
    multiplied with each other first they would take registers that `swiglu` does not have."""
    if factor is None:
        return y
    return y * (lax.broadcast_in_dim(factor, y.shape, (0,)) if factor.ndim else factor)
