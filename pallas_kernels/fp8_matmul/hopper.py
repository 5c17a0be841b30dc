"""Implements the FP8 x FP8 matmul on Hopper's tensor cores, fused with its epilogue.

A thread block has three warpgroups. The last one, the loader, copies tiles of both operands by TMA
into a ring in shared memory. The other two each compute and store a part of the block's tile of the
result:

    x_gmem, weights_gmem
         │ TMA                                  the loader, `_load_tiles`
    ring: x_smem, weights_smem                  hopper_ring.py: barriers "filled" and "free"
         │ wgmma                                the two others: hopper_mainloop.py
    sums in registers, float32 [64, columns]
         │ scales, residual; silu(gate) * up    hopper_epilogues.py
    staged_smem
         │ TMA, while the next tile's products begin
    results in gmem

Blocks are persistent: each takes every n-th tile, in an order that keeps the operands of neighbours
in L2. The loader is up to `stages` steps ahead, also across tiles. Two blocks may form a cluster,
which loads a tile of the weight once, for two tiles of x.

The tensor cores add FP8 products with fewer bits than float32 has, about 14 (DeepSeek-V3 report,
section 3.3.2). Where scales change along K, sums of 128 products are scaled and added in float32
registers; with one scale per row that is a choice, `Config.promote`.

Products are added along K in one order for any tiles, so a row of the result depends neither on the
other rows nor on the configuration, except for `promote`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3
from pallas_kernels.device import num_sms
from pallas_kernels.fp8_matmul import hopper_mainloop
from pallas_kernels.fp8_matmul.hopper_config import TILE_K, Config, configure, unfit
from pallas_kernels.fp8_matmul.hopper_epilogues import Epilogue, Store, Swiglu
from pallas_kernels.fp8_matmul.hopper_mainloop import Operands, Problem, StepTiles, tile_of
from pallas_kernels.fp8_matmul.hopper_ring import Ring, ring_types
from pallas_kernels.fp8_matmul.reference import BLOCK, is_grouped, is_per_block
from pallas_kernels.hopper import for_owner_of, in_whole_boxes
from pallas_kernels.hopper import tile as smem_tile

COMPUTE_WARPGROUPS = 2
LOADER = COMPUTE_WARPGROUPS  # the last warpgroup of a thread block
# Per thread; a block is launched with 168 for each of its 3 x 128 threads.
LOADER_REGISTERS, COMPUTE_REGISTERS = 40, 232
# The narrowest swizzle.
MIN_WIDTH_BYTES = 32


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
    """Compute `pallas_kernels.fp8_matmul.fp8_matmul` for float8_e4m3fn x and weight.

    config: for tuning; None takes `configure`'s.
    interpret: plgpu.InterpretGPUParams, to run in the simulator.
    Raises ValueError for a configuration that cannot work.
    """
    (y,) = _matmuls(
        x, (weight,), (weight_scale,), x_scale, out_dtype, residual, config, interpret
    )  # fmt: skip
    return y


@functools.partial(jax.jit, static_argnames=("out_dtype", "config", "interpret"))
def fp8_matmuls(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    x_scale: Array,
    out_dtype: jnp.dtype,
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """Compute `fp8_matmul` of one x and several weights [n_i, k], in one launch.

    weight_scales: of one kind, all per row or all per block.
    """
    return _matmuls(x, weights, weight_scales, x_scale, out_dtype, None, config, interpret)


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
    """Compute `pallas_kernels.fp8_matmul.swiglu` for float8_e4m3fn x and weights, in one launch.

    config, interpret: as in `fp8_matmul`.
    """
    rows, x = x.shape[0], in_whole_boxes(x)
    problem = _problem(x, x_scale, gate.shape[:1], gate_scale, config, weights=2)
    codes, scales = _launch(
        problem,
        _operands(problem, x, x_scale, (gate, up), (gate_scale, up_scale)),
        Swiglu(problem),
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
    """Return why the kernels cannot take these operands; None if they can.

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


def _matmuls(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    x_scale: Array,
    out_dtype: jnp.dtype,
    residual: Array | None,
    config: Config | None,
    interpret: Any,
) -> tuple[Array, ...]:
    rows, x = x.shape[0], in_whole_boxes(x)
    residual = None if residual is None else in_whole_boxes(residual)
    ns = tuple(weight.shape[0] for weight in weights)
    problem = _problem(x, x_scale, ns, weight_scales[0], config)
    ys = _launch(
        problem,
        _operands(problem, x, x_scale, weights, weight_scales, residual),
        Store(problem, out_dtype, has_residual=residual is not None),
        name="fp8_matmul",
        interpret=interpret,
    )
    return tuple(y[:rows] for y in ys)


def _problem(
    x: Array,
    x_scale: Array,
    ns: tuple[int, ...],
    weight_scale: Array,
    config: Config | None,
    weights: int = 1,
) -> Problem:
    """Describe a launch. weights: of each product."""
    m, k = x.shape
    x_grouped, w_grouped = is_grouped(x_scale, k), weight_scale.ndim == 2
    promote = x_grouped or w_grouped
    if config is None:
        config = configure(m, ns, k, promote=promote, weights=weights)
    if reason := unfit(config, promote=promote or config.promote, weights=weights):
        raise ValueError(f"{config} cannot work: {reason}")
    return Problem(m, ns, k, config, x_grouped, w_grouped)


def _operands(
    problem: Problem,
    x: Array,
    x_scale: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    residual: Array | None = None,
) -> Operands:
    """Bring the scales into the shapes that the kernel reads."""
    rows, config = problem.rows_per_step, problem.config
    if problem.x_grouped:
        x_scale = _padded(x_scale.T, 1, rows)
    else:
        per_row = x_scale.reshape(-1) if x_scale.ndim else jnp.full(problem.m, x_scale)
        x_scale = _padded(per_row, 0, rows)
    step = pl.cdiv(config.tile_n, BLOCK) if problem.w_grouped else config.tile_n
    weight_scales = tuple(_padded(each, 0, step) for each in weight_scales)
    return Operands(x, x_scale, tuple(weights), weight_scales, residual)


def _padded(scale: Array, axis: int, multiple: int) -> Array:
    """Add zeros at an axis' end. Tiles beyond the matrix read them, and store no results."""
    missing = -scale.shape[axis] % multiple
    widths = [(0, missing if each == axis else 0) for each in range(scale.ndim)]
    return jnp.pad(scale, widths) if missing else scale


def _launch(
    problem: Problem, operands: Operands, epilogue: Epilogue, *, name: str, interpret: Any
) -> Any:
    """Launch the kernel: multiply tile by tile and apply the epilogue. Returns its results."""
    config, shared = problem.config, _shared_axes(problem.config)
    tiles = problem.grid[0] * problem.grid[1]
    clusters = min(tiles, num_sms() // config.cluster)

    def kernel(gmem: Operands, *outputs_gmem: Any, ring: Ring, scratch: dict[str, Any]) -> None:
        cluster, warpgroup = lax.axis_index("clusters"), lax.axis_index("warpgroup")
        visits = lax.div(tiles - 1 - cluster, clusters) + 1
        schedule = _Schedule(problem, clusters, cluster, visits)
        products = _products(problem, gmem, outputs_gmem)

        @pl.when(warpgroup == LOADER)
        def load() -> None:
            _load_tiles(schedule, products, ring)

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def compute() -> None:
            _compute_tiles(schedule, warpgroup, epilogue, products, ring, scratch)

    return plgpu.kernel(
        kernel,
        out_type=epilogue.out_type,
        scratch_types={
            "ring": _ring_types(problem, len(operands.weights) // len(problem.ns)),
            "scratch": epilogue.scratch_types,
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


def _ring_types(problem: Problem, weights: int) -> Ring:
    """Return the scratch types of the operands' ring."""
    config, code = problem.config, e4m3.DTYPE
    tiles = StepTiles(
        x=smem_tile((config.stages, config.tile_m, TILE_K), code),
        weights=(smem_tile((config.stages, config.tile_n, TILE_K), code),) * weights,
        x_scale=plgpu.SMEM((config.stages, config.tile_m), jnp.float32)
        if problem.x_grouped
        else None,
    )
    return ring_types(tiles, config.stages, readers=COMPUTE_WARPGROUPS, shared=_shared_axes(config))


def _shared_axes(config: Config) -> tuple[str, ...]:
    """Return the axes of the cluster whose blocks share the loads of the weight."""
    return ("cluster",) if config.cluster > 1 else ()


@dataclass(frozen=True)
class _Schedule:
    """The `visits` tiles of a thread block, in an order that reuses operands in L2.

    clusters: the number of clusters. cluster: the index of the block's own.
    """

    problem: Problem
    clusters: int
    cluster: Array
    visits: Array

    def locate(self, visit: Array) -> tuple[Array, Array]:
        """Return the position of a visit's tile along M and N, counted in tiles."""
        config, grid = self.problem.config, self.problem.grid
        m, n = plgpu.planar_snake(visit * self.clusters + self.cluster, grid, 0, config.band)
        if config.cluster > 1:
            m = m * config.cluster + lax.axis_index("cluster")
        return m, n


def _load_tiles(schedule: _Schedule, products: Sequence[tuple[Operands, Any]], ring: Ring) -> None:
    """Copy the operands of every tile and step into the ring: the loader's work."""
    problem, config, smem = schedule.problem, schedule.problem.config, ring.smem
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

    @pl.loop(0, schedule.visits)
    def load_tile(visit: Array) -> None:
        tile_m, tile_n = schedule.locate(visit)
        rows = pl.ds(tile_m * config.tile_m, config.tile_m)

        def load_product(product: tuple[Operands, Any], tile_n: Array) -> None:
            gmem, _ = product
            columns = pl.ds(tile_n * config.tile_n, config.tile_n)

            @pl.loop(0, problem.steps)
            def load_step(k: Array) -> None:
                slot = ring.acquire(visit * problem.steps + k)
                filled = ring.filled.at[slot]
                ks = pl.ds(k * TILE_K, TILE_K)
                plgpu.copy_gmem_to_smem(gmem.x.at[rows, ks], smem.x.at[slot], filled)
                for weight_gmem, weight_smem in zip(gmem.weights, smem.weights, strict=True):
                    plgpu.copy_gmem_to_smem(
                        weight_gmem.at[columns, ks], weight_smem.at[slot], filled,
                        collective_axes=_shared_axes(config),
                    )  # fmt: skip
                if problem.x_grouped:
                    plgpu.copy_gmem_to_smem(gmem.x_scale.at[k, rows], smem.x_scale.at[slot], filled)

        for_owner_of(tile_n, problem.bounds, products, load_product)

    ring.drain(schedule.visits * problem.steps)


def _compute_tiles(
    schedule: _Schedule,
    warpgroup: Array,
    epilogue: Epilogue,
    products: Sequence[tuple[Operands, Sequence[Any]]],
    ring: Ring,
    scratch: dict[str, Any],
) -> None:
    """Multiply and store this warpgroup's part of every tile: a compute warpgroup's work."""
    problem = schedule.problem
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")

    @pl.loop(0, schedule.visits)
    def compute_tile(visit: Array) -> None:
        tile_m, tile_n = schedule.locate(visit)

        def compute_product(product: tuple[Operands, Sequence[Any]], tile_n: Array) -> None:
            gmem, outputs_gmem = product
            tile = tile_of(problem.config, warpgroup, tile_m, tile_n)
            epilogue.begin(tile, gmem, scratch)
            sums = hopper_mainloop.sums(problem, gmem, ring, tile, visit * problem.steps)
            epilogue.finish(tile, sums, gmem, outputs_gmem, scratch)

        for_owner_of(tile_n, problem.bounds, products, compute_product)

    plgpu.wait_smem_to_gmem(0)


def _products(
    problem: Problem, gmem: Operands, outputs_gmem: Sequence[Any]
) -> list[tuple[Operands, Sequence[Any]]]:
    """Return the operands and the results of each product of the launch."""
    if len(problem.ns) == 1:
        return [(gmem, outputs_gmem)]
    return [
        (gmem._replace(weights=(weight,), weight_scales=(scale,)), (output,))
        for weight, scale, output in zip(
            gmem.weights, gmem.weight_scales, outputs_gmem, strict=True
        )
    ]
