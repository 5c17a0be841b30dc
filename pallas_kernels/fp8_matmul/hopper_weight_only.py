"""Implements the weight-only FP8 matmul on Hopper, for few rows of activations, as in decode.

Its time is that of reading the weight. A thread block has three warpgroups. The last one streams
tiles of the weight, and the matching columns of x, by TMA through a ring in shared memory; the
other two upcast codes to bfloat16 in registers and multiply with the tensor cores:

    x_gmem, weights_gmem
         │ TMA                                  the loader, `load_part`
    ring: x_smem, weight_smem                   hopper_ring.py: barriers "filled" and "free"
         │ codes upcast in registers, wgmma     the two others: hopper_weight_only_loop.py
    sums in registers, float32 [64, rows of x]
         │ staged_smem, TMA
    parts in gmem, float32 [splits, m, n]

Operands are swapped: wgmma takes 64 rows of the weight from registers and x from shared memory, so
x is padded to a multiple of 8 rows only. If x is `Terms`, nothing is upcast: FP8 wgmma takes the
codes from shared memory, and x as two float8 terms, which are twice as many rows and as many bytes.
Tensor cores add FP8 products with about 14 bits, so sums of 128 products are added in registers.

K is split until every SM has work. The partial sums go to memory as float32 (`parts`). Their reader
adds them in one order, and applies per-row scales and the residual. For batch-invariant results the
splits are the same for any number of rows (`configure`).

Several weights with the same x (q, k and v; gate and up) are one launch over all their rows.
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3
from pallas_kernels.fp8_matmul import hopper_weight_only_loop as loop
from pallas_kernels.fp8_matmul.hopper_ring import Ring, ring_types
from pallas_kernels.fp8_matmul.hopper_weight_only_config import (
    COMPUTE_WARPGROUPS,
    NAME,
    TILE_K,
    TILE_N,
    WARPGROUP_ROWS,
    WeightOnlyConfig,
    configure,
    unfit,
)
from pallas_kernels.fp8_matmul.hopper_weight_only_loop import (
    Part,
    WeightOnlyOperands,
    WeightOnlyProblem,
    WeightOnlyTiles,
)
from pallas_kernels.fp8_matmul.limits import MAX_WEIGHT_ONLY_ROWS
from pallas_kernels.fp8_matmul.reference import is_per_block
from pallas_kernels.fp8_matmul.terms import Parts, Terms, two_terms
from pallas_kernels.hopper import BOX_ROWS, for_owner_of, in_whole_boxes
from pallas_kernels.hopper import tile as smem_tile

LOADER = COMPUTE_WARPGROUPS  # the last warpgroup of a thread block
# TMA needs columns of the results in multiples of this.
OUT_GRANULE = 32


def fp8_matmul(
    x: Array,
    weight: Array,
    weight_scale: Array,
    out_dtype: jnp.dtype,
    residual: Array | None = None,
    *,
    is_batch_invariant: bool = False,
    config: WeightOnlyConfig | None = None,
    interpret: Any = None,
) -> Array:
    """Compute `pallas_kernels.fp8_matmul.fp8_matmul` for operands that `refusal` accepts.

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
    config: WeightOnlyConfig | None = None,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """Compute `fp8_matmul` of one x and several weights [n_i, k], in one launch.

    weight_scales: of one kind, all per row or all per block.
    """
    ys = _matmuls(x, weights, weight_scales, is_batch_invariant, config, interpret)
    return tuple(y.astype(out_dtype) for y in ys)


def refusal(
    x: Array | jax.ShapeDtypeStruct, weight: Array, weight_scale: Array, out_dtype: jnp.dtype
) -> str | None:
    """Return why the kernel cannot take these operands; None if it can."""
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


def parts(
    x: Array | Terms,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    *,
    m: int | None = None,
    is_batch_invariant: bool = False,
    config: WeightOnlyConfig | None = None,
    interpret: Any = None,
) -> list[Parts]:
    """Compute the products of one x with several weights [n_i, k] as partial sums, in one launch.

    x: [m, k], bfloat16, or its terms. m: rows of x, which terms do not have.
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
        problem = WeightOnlyProblem(m if m <= BOX_ROWS else len(x) // 2, ns, k, config, len(units))
    else:
        assert isinstance(x, Array)
        x = in_whole_boxes(x)
        problem = WeightOnlyProblem(x.shape[0], ns, k, config)
    block_scales = tuple(weight_scales) if by_block else ()
    operands = WeightOnlyOperands(x, units, mean_squares, tuple(weights), block_scales)
    sums = _launch(problem, operands, interpret)
    scales = [None] * len(ns) if by_block else weight_scales
    return [Parts(each[:, :m], scale) for each, scale in zip(sums, scales, strict=True)]


def _matmuls(
    x: Array | Terms,
    weights: Sequence[Array],
    scales: Sequence[Array],
    is_batch_invariant: bool,
    config: WeightOnlyConfig | None,
    interpret: Any,
) -> list[Array]:
    """Return float32 [m, n_i] for each weight."""
    found = parts(
        x, weights, scales,
        is_batch_invariant=is_batch_invariant, config=config, interpret=interpret,
    )  # fmt: skip
    return [each.total() for each in found]


@functools.partial(jax.jit, static_argnames=("problem", "interpret"))
def _launch(
    problem: WeightOnlyProblem, operands: WeightOnlyOperands, interpret: Any
) -> list[Array]:
    """Launch the kernel.

    Returns sums over each split of K, float32 [splits, m, n_i], with block scales applied and
    per-row scales not.
    """
    config, shared = problem.config, loop.shared_axes(problem.config)

    def kernel(
        gmem: WeightOnlyOperands, *outputs_gmem: Any, ring: Ring, staged_smem: Any, upcast_smem: Any
    ) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == LOADER)
        def load() -> None:
            load_part = functools.partial(loop.load_part, problem, gmem, ring)
            ring.drain(loop.for_each_part(problem, load_part))

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def compute() -> None:
            def compute_part(part: Part) -> None:
                y = loop.sums(problem, gmem, ring, upcast_smem, warpgroup, part)
                _store(problem, y, warpgroup, part, staged_smem.at[warpgroup], outputs_gmem)

            loop.for_each_part(problem, compute_part)
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((config.splits, problem.m, n), jnp.float32) for n in problem.ns
        ],
        scratch_types=_scratch_types(problem, operands.x.dtype, bool(interpret)),
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


def _scratch_types(
    problem: WeightOnlyProblem, x_dtype: jnp.dtype, is_simulated: bool
) -> dict[str, Any]:
    """Return the scratch types: the ring, staged results, and, for the simulator, the operand that
    wgmma takes from registers."""
    config, bfloat16 = problem.config, jnp.dtype(jnp.bfloat16)
    tiles = WeightOnlyTiles(
        x=smem_tile((config.stages, problem.x_rows, TILE_K), x_dtype),
        weight=smem_tile((config.stages, TILE_N, TILE_K), e4m3.DTYPE),
    )
    upcast = smem_tile((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, TILE_K), bfloat16)
    return {
        "ring": ring_types(
            tiles, config.stages, readers=COMPUTE_WARPGROUPS, shared=loop.shared_axes(config)
        ),
        "staged_smem": plgpu.SMEM((COMPUTE_WARPGROUPS, problem.rows, WARPGROUP_ROWS), jnp.float32),
        "upcast_smem": upcast if is_simulated and not config.in_fp8 else None,
    }


def _store(
    problem: WeightOnlyProblem,
    y: Array,
    warpgroup: Array,
    part: Part,
    staged_smem: Any,
    outputs_gmem: Sequence[Any],
) -> None:
    """Store a warpgroup's sums of a part, float32 [64, rows], by TMA."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    transposed = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
    staged_smem.transpose((1, 0))[...] = transposed
    plgpu.commit_smem()

    def copy(output_gmem: Any, tile: Array) -> None:
        columns = pl.ds(tile * TILE_N + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)
        plgpu.copy_smem_to_gmem(
            staged_smem, output_gmem.at[part.split, pl.ds(0, problem.rows), columns]
        )

    for_owner_of(part.tile, problem.bounds, outputs_gmem, copy)
