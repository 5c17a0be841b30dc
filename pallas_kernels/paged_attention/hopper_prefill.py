"""Implements prefill attention on Hopper: many new tokens per sequence, the paged cache.

A thread block takes 128 rows of queries: a span of tokens times as many query heads of one
key/value head as fit. Heads that share keys share their loads, and all rows of a tile end at nearly
the same key. Blocks of keys above the diagonal or past the sequence's end are not loaded, and
blocks that every row sees are not masked.

A block has three warpgroups: a loader, which fills the rings of keys and values (hopper_loop.py),
and two that compute, with 64 rows of queries each. They take turns with the tensor cores: one
multiplies while the other computes its softmax.

    warpgroup 0    Q K   | softmax | P V, Q K | softmax  | P V, Q K | ...
    warpgroup 1          | Q K     | softmax  | P V, Q K | softmax  | ...

FP8 keys are multiplied without conversion (`PrefillConfig.in_fp8`), with queries as the sum of two
float8 terms: two FP8 products take the time of one in 16 bits, and the loader upcasts only values.

Algorithm: FlashAttention-3 (Shah et al., 2024); online softmax (Milakov and Gimelshein, 2018).
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
from pallas_kernels.hopper import SHARED_MEMORY_BYTES, in_whole_boxes, tile
from pallas_kernels.paged_attention.hopper_loop import (
    BARRIERS_BYTES,
    FLOOR,
    HEADROOM,
    PAGE_SIZE,
    UPCAST_SLOTS,
    Gmem,
    Ref,
    Ring,
    operand_dtype,
    operand_query,
    positive,
    product,
    product_of_sum,
    ring_types,
    stream,
    two_terms,
    upcasting_ring_types,
)

NAME = "paged_attention_prefill"
ROWS = 64  # of queries per compute warpgroup: wgmma's M
COMPUTE_WARPGROUPS = 2
LOADER = COMPUTE_WARPGROUPS  # the last warpgroup of a thread block
MATRIX = plgpu.Layout.WGMMA
PER_ROW = MATRIX.reduce(1)
TILE_ROWS = COMPUTE_WARPGROUPS * ROWS
MAX_STAGES = 4
MAX_PACKED_HEADS = 16  # leaves a span of 8 tokens, the height of a tile of shared memory


@dataclass(frozen=True)
class PrefillConfig:
    """The division of the work.

    keys: per block, 64 or 128.
    stages: blocks of keys in flight.
    in_fp8: whether FP8 keys are multiplied by queries in two float8 terms, instead of upcast.
    """

    keys: int
    stages: int
    in_fp8: bool = False


class PrefillCarry(NamedTuple):
    """The online softmax over the keys so far, in float32, of a warpgroup's 64 rows of queries.

    out: [rows, head_dim], the sum of weight * value.
    peak: [rows], the largest score, in units of log(2).
    total: [rows], the sum of the weights.
    """

    out: Array
    peak: Array
    total: Array


class Registers(NamedTuple):
    """Registers per thread of each compute warpgroup and of the loader. All start with 168."""

    compute: int
    loader: int


def configure(num_heads: int, k_pages: Array) -> PrefillConfig:
    """Return the tuned configuration of the GPU in use, or else the heuristic's."""
    found = tuned.find(NAME, tuned_as(num_heads, k_pages))
    return PrefillConfig(**found) if found else heuristic(k_pages)


def tuned_as(num_heads: int, k_pages: Array) -> str:
    """Name the problems that share a tuned configuration; they have any number of tokens."""
    num_kv_heads, head_dim = k_pages.shape[2:]
    return f"head_dim={head_dim} packed={_packed(num_heads // num_kv_heads)} {k_pages.dtype}"


def heuristic(k_pages: Array) -> PrefillConfig:
    """Return an untuned configuration: FlashAttention-3's tile, and FP8 keys without conversion.

    On an H200 it was the fastest of those that `tune` tries, for bfloat16 and FP8 pages
    (benchmarks/results/h200.md).
    """
    return PrefillConfig(128, 2, in_fp8=k_pages.dtype == e4m3.DTYPE)


def unfit(config: PrefillConfig, k_pages: Array) -> str | None:
    """Return why a configuration cannot work; None if it can."""
    head_dim, is_fp8 = k_pages.shape[3], k_pages.dtype == e4m3.DTYPE
    upcast_rings = 2 - config.in_fp8 if is_fp8 else 0
    slots = 2 * config.stages * k_pages.dtype.itemsize + upcast_rings * UPCAST_SLOTS * 2
    queries = TILE_ROWS * (2 + 2 * config.in_fp8)
    needed = (queries + config.keys * slots) * head_dim + BARRIERS_BYTES
    if config.keys not in (64, 128):
        return f"keys must be 64 or 128, got {config.keys}"
    if config.in_fp8 and not is_fp8:
        return f"keys in {k_pages.dtype} cannot be multiplied in FP8"
    if config.stages < 2:
        return f"at least 2 stages are needed, got {config.stages}"
    if needed > SHARED_MEMORY_BYTES:
        return f"{needed} bytes of shared memory, of {SHARED_MEMORY_BYTES}"
    return None


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    cached_lens: Array,
    kv_lens: Array,
    k_scale: Array | float,
    v_scale: Array | float,
    *,
    config: PrefillConfig | None = None,
    interpret: Any = None,
) -> Array:
    """Compute `pallas_kernels.paged_attention.paged_attention`, for operands that `hopper` accepts.

    A sequence's result does not depend on the batch around it.
    config: for tuning; None takes `configure`'s.
    interpret: plgpu.InterpretGPUParams, to run in the simulator.
    """
    batch, tokens, num_heads, head_dim = q.shape
    config = config or configure(num_heads, k_pages)
    if reason := unfit(config, k_pages):
        raise ValueError(f"{config} cannot work: {reason}")
    is_fp8 = k_pages.dtype == e4m3.DTYPE
    problem = _PrefillProblem(tokens, num_heads // k_pages.shape[2], head_dim, is_fp8, config)
    q_operand, q_unit = (q, 1.0) if config.in_fp8 else operand_query(q, k_pages.dtype)
    q_operand = in_whole_boxes(q_operand, axis=1)

    def kernel(gmem: Gmem, out_gmem: Ref, *, smem: _PrefillSmem) -> None:
        warpgroup = lax.axis_index("warpgroup")
        work = _work(problem, gmem)

        @pl.when(warpgroup < LOADER)
        def compute() -> None:
            _compute(problem, work, warpgroup, gmem, smem, out_gmem, q_unit, q.dtype)

        @pl.when(warpgroup == LOADER)
        def load() -> None:
            _load(problem, work, gmem, smem)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q_operand.shape, q_operand.dtype),  # bits of q's dtype
        grid=(num_heads // problem.packed, problem.tiles, batch),
        grid_names=("heads", "tile", "sequence"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=NAME,
        scratch_types={"smem": _scratch_types(problem, k_pages.dtype, q_operand.dtype, interpret)},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(
        Gmem(
            q_operand, k_pages, v_pages, page_table, cached_lens, kv_lens,
            *(jnp.asarray(each, jnp.float32).reshape(1) for each in (k_scale, v_scale)),
        )
    )  # fmt: skip
    return lax.bitcast_convert_type(out[:, :tokens], q.dtype)


@dataclass(frozen=True)
class _PrefillProblem:
    """The static properties of a launch.

    tokens: the most new tokens of a sequence.
    group: query heads per key/value head.
    """

    tokens: int
    group: int
    head_dim: int
    is_fp8: bool
    config: PrefillConfig

    @property
    def packed(self) -> int:
        """Return the heads of a tile."""
        return _packed(self.group)

    @property
    def span(self) -> int:
        """Return the tokens of a tile."""
        return TILE_ROWS // self.packed

    @property
    def tiles(self) -> int:
        """Return the tiles of a sequence."""
        return pl.cdiv(self.tokens, self.span)

    @property
    def box(self) -> int:
        """Return the tokens of one head within one warpgroup's rows, which one copy takes."""
        return min(self.span, ROWS)

    @property
    def boxes(self) -> int:
        return ROWS // self.box

    @property
    def registers(self) -> Registers:
        """Return a split of registers without spills: upcasting needs many, copying very few."""
        return Registers(216, 72) if self.is_fp8 else Registers(232, 40)


class _PrefillSmem(NamedTuple):
    """Shared memory and barriers: scratch types outside of the kernel, references within.

    q: [2, 64, head_dim], each compute warpgroup's queries, and later its results.
    terms: float8_e4m3fn [2, 2, 64, head_dim], the two terms of q; None unless `in_fp8`.
    weights: [2, 64, keys], only for the simulator, whose wgmma cannot take registers.
    turns: the barrier at which the compute warpgroups take turns.
    """

    q: Any
    terms: Any
    weights: Any
    keys: Ring
    values: Ring
    q_filled: Any
    turns: Any


def _scratch_types(
    problem: _PrefillProblem, pages: jnp.dtype, q_dtype: jnp.dtype, interpret: Any
) -> _PrefillSmem:
    config, head_dim = problem.config, problem.head_dim
    sizes = config.stages, config.keys, head_dim, COMPUTE_WARPGROUPS
    as_is = ring_types(pages, *sizes)
    values = upcasting_ring_types(*sizes) if problem.is_fp8 else as_is
    terms = weights = None
    if config.in_fp8:
        terms = tile((COMPUTE_WARPGROUPS, 2, ROWS, head_dim), e4m3.DTYPE)
    if interpret:
        weights = tile((COMPUTE_WARPGROUPS, ROWS, config.keys), operand_dtype(pages))
    return _PrefillSmem(
        q=tile((COMPUTE_WARPGROUPS, ROWS, head_dim), q_dtype),
        terms=terms,
        weights=weights,
        keys=as_is if config.in_fp8 else values,
        values=values,
        q_filled=plgpu.Barrier(num_arrivals=problem.boxes, num_barriers=COMPUTE_WARPGROUPS),
        turns=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
    )


class _PrefillWork(NamedTuple):
    """The work of a thread block; all numbers are int32.

    head: the first of the tile's heads.
    first, position: the first of its tokens, and that token's position in the sequence.
    length: keys of the sequence.
    end: keys that the tile's last token sees.
    blocks: the number of blocks of keys up to `end`.
    """

    sequence: Array
    head: Array
    first: Array
    position: Array
    length: Array
    end: Array
    blocks: Array


def _work(problem: _PrefillProblem, gmem: Gmem) -> _PrefillWork:
    sequence = lax.axis_index("sequence")
    head = lax.axis_index("heads") * problem.packed
    # The longest tiles start first.
    first = (problem.tiles - 1 - lax.axis_index("tile")) * problem.span
    position, length = gmem.cached_lens[sequence] + first, gmem.kv_lens[sequence]
    end = jnp.where(position < length, lax.min(position + problem.span, length), 0)
    blocks = pl.cdiv(end, problem.config.keys)
    return _PrefillWork(sequence, head, first, position, length, end, blocks)


def _compute(
    problem: _PrefillProblem,
    work: _PrefillWork,
    warpgroup: Array,
    gmem: Gmem,
    smem: _PrefillSmem,
    out_gmem: Ref,
    q_unit: float,
    out_dtype: jnp.dtype,
) -> None:
    """Attend from this warpgroup's rows of queries: a compute warpgroup's work."""
    config, span = problem.config, problem.span
    plgpu.set_max_registers(problem.registers.compute, action="increase")
    q_smem = smem.q.at[warpgroup]
    places = _places(problem, work, warpgroup)
    for part, place in places:
        plgpu.copy_gmem_to_smem(gmem.q.at[place], q_smem.at[part], smem.q_filled.at[warpgroup])
    plgpu.barrier_wait(smem.q_filled.at[warpgroup])

    queries: list[Ref] = [q_smem]
    unit: Array | float = q_unit
    if smem.terms is not None:
        queries = [smem.terms.at[warpgroup, i] for i in range(2)]
        unit = _in_two_terms(q_smem, queries)
    scale = gmem.k_scale[0] * (math.log2(math.e) / math.sqrt(problem.head_dim)) * unit
    r = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)
    limit = lax.min(work.position + lax.rem(warpgroup * ROWS + r, span), work.length - 1)

    def turn() -> None:
        plgpu.barrier_arrive(smem.turns)
        plgpu.barrier_wait(smem.turns)

    def attend(block: Array, carry: PrefillCarry, is_masked: bool) -> PrefillCarry:
        return _attend(
            carry, queries, smem.keys, smem.values, block, scale,
            limit=limit - block * config.keys if is_masked else None,
            weights=None if smem.weights is None else smem.weights.at[warpgroup],
            turn=turn,
        )  # fmt: skip

    visible = lax.div(lax.min(work.position + 1, work.length), config.keys)
    unmasked = lax.min(visible, work.blocks)  # blocks that every row sees whole
    pl.when(warpgroup == 1)(turn)
    carry = PrefillCarry(
        out=plgpu.layout_cast(jnp.zeros((ROWS, problem.head_dim), jnp.float32), MATRIX),
        peak=plgpu.layout_cast(jnp.full((ROWS,), FLOOR, jnp.float32), PER_ROW),
        total=plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW),
    )
    carry = lax.fori_loop(0, unmasked, lambda i, c: attend(i, c, False), carry)
    carry = lax.fori_loop(unmasked, work.blocks, lambda i, c: attend(i, c, True), carry)
    pl.when(warpgroup == 0)(turn)

    factor = gmem.v_scale[0] / positive(carry.total)
    out = carry.out * lax.broadcast_in_dim(factor, carry.out.shape, (0,))
    q_smem[...] = lax.bitcast_convert_type(out.astype(out_dtype), q_smem.dtype)
    plgpu.commit_smem()
    for part, place in places:
        plgpu.copy_smem_to_gmem(q_smem.at[part], out_gmem.at[place])
    plgpu.wait_smem_to_gmem(0)


def _places(
    problem: _PrefillProblem, work: _PrefillWork, warpgroup: Array
) -> list[tuple[Any, Any]]:
    """Return slices of a warpgroup's rows, and where each is in q and in the result."""
    places = []
    for i in range(problem.boxes):
        row = warpgroup * ROWS + i * problem.box
        tokens = pl.ds(work.first + lax.rem(row, problem.span), problem.box)
        head = work.head + lax.div(row, problem.span)
        places.append((pl.ds(i * problem.box, problem.box), (work.sequence, tokens, head)))
    return places


def _load(problem: _PrefillProblem, work: _PrefillWork, gmem: Gmem, smem: _PrefillSmem) -> None:
    """Fill the rings of keys and values: the loader's work."""
    plgpu.set_max_registers(problem.registers.loader, action="decrease")
    kv_head = lax.div(work.head, problem.group)
    last_page = lax.max(pl.cdiv(work.end, PAGE_SIZE) - 1, 0)
    stream(
        smem.keys, smem.values, gmem.k_pages.at[:, :, kv_head], gmem.v_pages.at[:, :, kv_head],
        lambda i: gmem.page_table[work.sequence, lax.min(i, last_page)], work.blocks,
    )  # fmt: skip


def _packed(group: int) -> int:
    """Return how many heads of a group that shares keys make a tile."""
    return math.gcd(group, MAX_PACKED_HEADS)


def _in_two_terms(q: Ref, terms: Sequence[Ref]) -> Array:
    """Write rows of queries [rows, head_dim] as two float8 terms a and b of the same shape.

    Returns unit, float32 [rows], powers of two: q = unit * (a + b). This is exact where a number is
    at least 2^-9 of its row's largest, and off by at most 2^-17 of that elsewhere.
    """
    wide = plgpu.load(q, layout=MATRIX, optimized=False).astype(jnp.float32)
    a, b, unit = two_terms(wide, axis=1)
    for ref, term in zip(terms, (a, b), strict=True):
        ref[...] = term.astype(ref.dtype)
    plgpu.commit_smem()
    return unit


def _attend(
    carry: PrefillCarry,
    queries: Sequence[Ref],
    keys: Ring,
    values: Ring,
    block: Array,
    scale: Array,
    *,
    limit: Array | None,
    weights: Ref | None,
    turn: Callable[[], None],
) -> PrefillCarry:
    """Take one block of keys and values into the carry, and release their slots.

    queries: their terms, each [rows, head_dim] in shared memory.
    scale: what scores are multiplied by, one number or [rows]; log2(e) included, positive.
    limit: int32 [rows], the last key of the block that each row sees; None if all see all.
    weights: [rows, keys] in shared memory, through which the weights go into the second product;
        None to leave them in registers.
    turn: called where this warpgroup stops using the tensor cores, and where it wants them again.
    """
    shape = (ROWS, keys.slots.shape[1])

    slot = keys.slot(block)
    keys.wait(slot)
    scores = product_of_sum(queries, keys.slots.at[slot].transpose((1, 0)), turn)
    keys.release(slot)
    if limit is not None:
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
        scores = jnp.where(key <= lax.broadcast_in_dim(limit, shape, (0,)), scores, -jnp.inf)
    peak = lax.max(carry.peak, scores.max(axis=1) * scale)
    shrink = jnp.exp2(carry.peak - peak)
    if len(queries) > 1:
        scale = lax.broadcast_in_dim(scale, shape, (0,))
    weight = jnp.exp2(scores * scale - lax.broadcast_in_dim(peak - HEADROOM, shape, (0,)))
    total = carry.total * shrink + weight.sum(axis=1)
    out = carry.out * lax.broadcast_in_dim(shrink, carry.out.shape, (0,))
    weight = weight.astype(values.slots.dtype)
    turn()
    slot = values.slot(block)
    values.wait(slot)
    out = _add_product(out, weight, values.slots.at[slot], weights)
    values.release(slot)
    return PrefillCarry(out, peak, total)


def _add_product(out: Array, weight: Array, values: Ref, weights: Ref | None) -> Array:
    """Return out + weight @ values, float32; `weights` as in `_attend`."""
    if weights is None:
        return pl.run_state(lambda acc: plgpu.wgmma(acc, weight, values))(
            plgpu.WGMMAAccumulatorRef.init(out)
        )
    weights[...] = weight
    plgpu.commit_smem()
    return out + product(weights, values)
