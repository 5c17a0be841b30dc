"""Implements decode attention on Hopper: one to a few new tokens per sequence, the paged cache.

Its time is that of reading the cache. The query heads that share keys, times the new tokens, are
the rows of one tile, and the keys are split over thread blocks until every SM has some. Operands
are
swapped: keys and values are wgmma's left operands, with a height of 64, and the few rows of queries
its right operands, with a width from 8. So the softmax computes hardly any padding.

A block has two warpgroups, and two blocks share an SM:

    k_pages_gmem, v_pages_gmem
         │ TMA                               the loader: `hopper_loop.stream`
    rings of keys and of values              barriers "filled" and "free"
         │ upcast to float16 where needed    the compute warpgroup: `Operand.wait`
         │ scores = K q^T                    meanwhile, values are upcast
         │ softmax, weights_smem
         │ out += V^T weights^T
    a part of the softmax in gmem            or the result, if keys are not split
         │ a second launch adds the parts    hopper_combine.py
    result in gmem

FP8 keys are multiplied without conversion, with each row of queries as two float8 terms
(`_in_two_terms`): a right operand of twice the width costs nothing. Values have to be upcast.

Algorithm: Flash-Decoding (Dao et al., 2023).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3, tuned
from pallas_kernels.device import num_sms
from pallas_kernels.hopper import BOX_ROWS, SHARED_MEMORY_BYTES, tile
from pallas_kernels.paged_attention.hopper_combine import (
    MATRIX,
    PER_ROW,
    combine,
    filled,
    per_row,
    positive,
    store,
)
from pallas_kernels.paged_attention.hopper_loop import (
    BARRIERS_BYTES,
    FLOOR,
    HEADROOM,
    PAGE_SIZE,
    Gmem,
    Ref,
    Ring,
    operand_dtype,
    operand_query,
    product,
    ring_types,
    stream,
    two_terms,
    upcast,
)

NAME = "paged_attention_decode"
MAX_ROWS = 48  # of queries in one thread block; 64 would spill registers
FEW_ROWS = 8  # up to this, blocks of two pages leave registers for two blocks per SM
MAX_SPLITS = 32
WORTHWHILE_FP8_SPLITS = 16  # more cost the second launch as much as they save in the first
INVARIANT_KEYS_PER_SPLIT = 1024
BLOCKS_PER_SM = 2
MAX_STAGES = 6
SHARED_BYTES_EACH = 233_472 // BLOCKS_PER_SM - 1024  # 1 KiB is reserved by the system
COMPUTE, LOADER = range(2)
TERM_RATIO = 16  # the second term is its code divided by this
FLOAT32 = jnp.dtype(jnp.float32)


@dataclass(frozen=True)
class DecodeConfig:
    """The division of the work.

    splits: thread blocks that divide the keys of a sequence and head.
    keys_per_split: a multiple of `keys`; None to divide the keys of each sequence evenly.
    stages: blocks of keys in flight.
    keys: per block, 64 or 128.
    in_fp8: whether FP8 keys are multiplied by queries in two float8 terms, instead of upcast.
    """

    splits: int
    keys_per_split: int | None
    stages: int
    keys: int = PAGE_SIZE
    in_fp8: bool = False


class DecodeCarry(NamedTuple):
    """The online softmax over the keys so far, in float32, of a tile's rows of queries.

    out: [head_dim, rows], the sum of weight * value.
    peak: [rows], the largest score, in units of log(2).
    total: [keys, rows], the sum of the weights at each place of a block.
    """

    out: Array
    peak: Array
    total: Array


class Operand(NamedTuple):
    """Keys or values, in shared memory.

    ring: passes them from the loader.
    upcast_smem: float16 [keys, head_dim], the upcast FP8 codes of a slot; None without upcasting.
    """

    ring: Ring
    upcast_smem: Ref

    def wait(self, slot: Array) -> None:
        """Wait until a slot is filled. Upcast it and free the slot, if necessary."""
        self.ring.wait(slot)
        if self.upcast_smem is not None:
            upcast(self.ring.slots.at[slot], self.upcast_smem)
            self.ring.release(slot)

    def block(self, slot: Array) -> Ref:
        """Return the block to multiply, [keys, head_dim]."""
        return self.ring.slots.at[slot] if self.upcast_smem is None else self.upcast_smem

    def release(self, slot: Array) -> None:
        """Free a slot after the product, unless upcasting has freed it."""
        if self.upcast_smem is None:
            self.ring.release(slot)


def configure(q: Array, k_pages: Array, capacity: int, is_batch_invariant: bool) -> DecodeConfig:
    """Return the tuned configuration of the GPU in use, or else the heuristic's.

    capacity: keys that a sequence has room for.
    is_batch_invariant: take the heuristic's, because tuned ones may depend on the batch.
    """
    found = None if is_batch_invariant else tuned.find(NAME, tuned_as(q, k_pages, capacity))
    if found:
        return DecodeConfig(**found)
    return heuristic(q, k_pages, capacity, is_batch_invariant)


def tuned_as(q: Array, k_pages: Array, capacity: int) -> str:
    """Name the problems that share a tuned configuration.

    Batch and capacity are rounded up to powers of two.
    """
    batch, tokens, num_heads, head_dim = q.shape
    rows, capacity = (1 << (each - 1).bit_length() for each in (batch, capacity))
    heads = f"{num_heads}/{k_pages.shape[2]}x{head_dim}"
    return f"heads={heads} {k_pages.dtype} tokens={tokens} batch<={rows} capacity<={capacity}"


def heuristic(q: Array, k_pages: Array, capacity: int, is_batch_invariant: bool) -> DecodeConfig:
    """Return an untuned configuration; arguments as in `configure`.

    It has the most stages with which two thread blocks can share an SM, and the fewest splits whose
    estimated time is within 10 % of the least; the estimate takes the time of a wave of thread
    blocks as proportional to the keys of a split. If batch-invariant, the size of the splits does
    not depend on the batch.
    """
    batch, tokens, num_heads, _ = q.shape
    rows = _tiling(tokens * num_heads // k_pages.shape[2])[1]
    is_fp8 = k_pages.dtype == e4m3.DTYPE
    keys = 2 * PAGE_SIZE if is_fp8 and rows <= FEW_ROWS else PAGE_SIZE
    shape = DecodeConfig(1, None, 0, keys, is_fp8)
    free = SHARED_BYTES_EACH - _fixed_bytes(shape, k_pages, rows)
    stages = min(MAX_STAGES, free // _stage_bytes(shape, k_pages))
    if is_batch_invariant:
        share = max(INVARIANT_KEYS_PER_SPLIT, pl.cdiv(pl.cdiv(capacity, MAX_SPLITS), keys) * keys)
        return replace(
            shape, splits=pl.cdiv(capacity, share), keys_per_split=share, stages=stages
        )  # fmt: skip
    most = min(WORTHWHILE_FP8_SPLITS if is_fp8 else MAX_SPLITS, pl.cdiv(capacity, keys))
    at_once = BLOCKS_PER_SM * num_sms()
    streams = batch * k_pages.shape[2]
    times = [pl.cdiv(streams * n, at_once) / n for n in range(1, most + 1)]
    splits = next(n for n, time in enumerate(times, 1) if time <= 1.1 * min(times))
    return replace(shape, splits=splits, stages=stages)


def unfit(config: DecodeConfig, k_pages: Array, capacity: int) -> str | None:
    """Return why a configuration cannot work; None if it can."""
    keys, share = config.keys, config.keys_per_split
    if keys not in (PAGE_SIZE, 2 * PAGE_SIZE):
        return f"keys must be {PAGE_SIZE} or {2 * PAGE_SIZE}, got {keys}"
    if config.in_fp8 and k_pages.dtype != e4m3.DTYPE:
        return f"keys in {k_pages.dtype} cannot be multiplied in FP8"
    if not 1 <= config.splits <= MAX_SPLITS:
        return f"splits must be 1 to {MAX_SPLITS}, got {config.splits}"
    if share is not None and (share < 1 or share % keys):
        return f"keys_per_split must be a multiple of {keys}, got {share}"
    if share is not None and config.splits * share < capacity:
        return f"{config.splits} splits of {share} keys do not hold {capacity}"
    if config.stages < 2:
        return f"at least 2 stages are needed, got {config.stages}"
    fixed = _fixed_bytes(config, k_pages, MAX_ROWS)
    if (needed := config.stages * _stage_bytes(config, k_pages) + fixed) > SHARED_MEMORY_BYTES:
        return f"{needed} bytes of shared memory, of {SHARED_MEMORY_BYTES}"
    return None


def _stage_bytes(config: DecodeConfig, k_pages: Array) -> int:
    """Return the shared memory of a stage's keys and values."""
    return 2 * config.keys * k_pages.shape[3] * k_pages.dtype.itemsize


def _fixed_bytes(config: DecodeConfig, k_pages: Array, rows: int) -> int:
    """Return the shared memory that does not grow with the stages.

    It holds upcast blocks, `rows` of queries, weights and results, and barriers.
    """
    head_dim, upcast_blocks = k_pages.shape[3], 0
    if k_pages.dtype == e4m3.DTYPE:
        upcast_blocks = 1 if config.in_fp8 else 2
    queries = rows * head_dim * (2 + 2 * config.in_fp8)
    blocks = upcast_blocks * config.keys * head_dim * 2
    return blocks + queries + rows * config.keys * 2 + BARRIERS_BYTES


def _tiling(rows: int) -> tuple[int, int]:
    """Return the number of tiles for these rows of queries, and the rows of each."""
    tiles = pl.cdiv(rows, MAX_ROWS)
    return tiles, pl.cdiv(pl.cdiv(rows, tiles), BOX_ROWS) * BOX_ROWS


@functools.partial(jax.jit, static_argnames=("config", "is_batch_invariant", "interpret"))
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
    config: DecodeConfig | None = None,
    is_batch_invariant: bool = False,
    interpret: Any = None,
) -> Array:
    """Compute `pallas_kernels.paged_attention.paged_attention`, for operands that `hopper` accepts.

    config: for tuning; None takes `configure`'s.
    interpret: plgpu.InterpretGPUParams, to run in the simulator.
    """
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    capacity = page_table.shape[1] * PAGE_SIZE
    config = config or configure(q, k_pages, capacity, is_batch_invariant)
    if reason := unfit(config, k_pages, capacity):
        raise ValueError(f"{config} cannot work: {reason}")
    problem = _DecodeProblem(tokens, num_heads // num_kv_heads, head_dim, config)
    packed, q_unit = (q, 1.0) if config.in_fp8 else operand_query(q, k_pages.dtype)
    packed = _packed(problem, packed, num_kv_heads)
    k_scale, v_scale = (jnp.asarray(each, FLOAT32).reshape(1) for each in (k_scale, v_scale))

    def kernel(gmem: Gmem, *outputs_gmem: Ref, smem: _DecodeSmem) -> None:
        warpgroup = lax.axis_index("warpgroup")
        work = _work(problem, gmem)

        @pl.when(warpgroup == COMPUTE)
        def compute() -> None:
            _compute(problem, work, gmem, smem, outputs_gmem, q_unit, q.dtype)

        @pl.when((warpgroup == LOADER) & (work.blocks > 0))
        def load() -> None:
            _load(work, gmem, smem)

    found = plgpu.kernel(
        kernel,
        out_type=_out_type(problem, packed),
        grid=(config.splits, problem.tiles, num_kv_heads, batch),
        grid_names=("split", "tile", "kv_head", "sequence"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name=NAME,
        scratch_types={"smem": _scratch_types(problem, k_pages.dtype, packed.dtype)},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(Gmem(packed, k_pages, v_pages, page_table, cached_lens, kv_lens, k_scale, v_scale))
    if problem.is_whole:
        out = lax.bitcast_convert_type(found[0], q.dtype)
    else:
        out, peak, total = found
        out = combine(out, peak, total, v_scale, packed, q.dtype, interpret)
    return _unpacked(problem, out)


@dataclass(frozen=True)
class _DecodeProblem:
    """The static properties of a launch.

    tokens: new tokens per sequence.
    group: query heads per key/value head.
    """

    tokens: int
    group: int
    head_dim: int
    config: DecodeConfig

    @property
    def tiles(self) -> int:
        return _tiling(self.tokens * self.group)[0]

    @property
    def rows(self) -> int:
        """Return the rows of queries in a tile."""
        return _tiling(self.tokens * self.group)[1]

    @property
    def is_whole(self) -> bool:
        """Return whether keys are not split, so that one launch makes the result."""
        return self.config.splits == 1


class _DecodeSmem(NamedTuple):
    """Shared memory and a barrier: scratch types outside of the kernel, references within.

    q: [rows, head_dim]; also holds the result if keys are not split.
    terms: float8_e4m3fn [2 rows, head_dim], the two terms of q; None unless `in_fp8`.
    weights: [rows, keys], from the softmax to the second product.
    """

    keys: Operand
    q_filled: Any
    q: Any
    terms: Any
    values: Operand
    weights: Any


def _out_type(problem: _DecodeProblem, packed: Array) -> list[jax.ShapeDtypeStruct]:
    """Return the results' types: the packed result, or the fields of each split's `DecodeCarry`."""
    if problem.is_whole:
        return [jax.ShapeDtypeStruct(packed.shape, packed.dtype)]
    batch, num_kv_heads = packed.shape[:2]
    parts = problem.config.splits, batch, num_kv_heads, problem.tiles
    return [
        jax.ShapeDtypeStruct((*parts, problem.head_dim, problem.rows), FLOAT32),
        jax.ShapeDtypeStruct((*parts, problem.rows), FLOAT32),
        jax.ShapeDtypeStruct((*parts, problem.rows), FLOAT32),
    ]


def _scratch_types(problem: _DecodeProblem, pages: jnp.dtype, q_dtype: jnp.dtype) -> _DecodeSmem:
    config, rows, head_dim = problem.config, problem.rows, problem.head_dim
    ring = ring_types(pages, config.stages, config.keys, head_dim, readers=1)
    operand = operand_dtype(pages)
    upcast_smem = tile((config.keys, head_dim), operand) if pages == e4m3.DTYPE else None
    return _DecodeSmem(
        keys=Operand(ring, None if config.in_fp8 else upcast_smem),
        q_filled=plgpu.Barrier(),
        q=tile((rows, head_dim), q_dtype),
        terms=tile((2 * rows, head_dim), e4m3.DTYPE) if config.in_fp8 else None,
        values=Operand(ring, upcast_smem),
        weights=tile((rows, config.keys), operand),
    )


def _packed(problem: _DecodeProblem, q: Array, num_kv_heads: int) -> Array:
    """Bring q [batch, tokens, num_heads, head_dim] to [batch, num_kv_heads, rows, head_dim].

    The rows are the query heads that share keys, token by token, padded with zeros to full tiles.
    """
    batch, tokens, _, head_dim = q.shape
    rows = tokens * problem.group
    q = q.reshape(batch, tokens, num_kv_heads, problem.group, head_dim).transpose(0, 2, 1, 3, 4)
    q = q.reshape(batch, num_kv_heads, rows, head_dim)
    if rows > BOX_ROWS:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, problem.tiles * problem.rows - rows), (0, 0)))
    return q


def _unpacked(problem: _DecodeProblem, out: Array) -> Array:
    """Undo `_packed`."""
    batch, num_kv_heads, _, head_dim = out.shape
    tokens, group = problem.tokens, problem.group
    out = out[:, :, : tokens * group].reshape(batch, num_kv_heads, tokens, group, head_dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, num_kv_heads * group, head_dim)


class _DecodeWork(NamedTuple):
    """The work of a thread block; all numbers are int32.

    first_row: the tile's first row of queries.
    position: of the sequence's first new token.
    length: keys of the sequence.
    first, end: the keys of the split.
    blocks: the number of blocks of keys in the split.
    """

    sequence: Array
    kv_head: Array
    first_row: Array
    position: Array
    length: Array
    first: Array
    end: Array
    blocks: Array


def _work(problem: _DecodeProblem, gmem: Gmem) -> _DecodeWork:
    sequence, kv_head = lax.axis_index("sequence"), lax.axis_index("kv_head")
    first_row = lax.axis_index("tile") * problem.rows
    position, length = gmem.cached_lens[sequence], gmem.kv_lens[sequence]
    end = lax.min(position + problem.tokens, length)
    share = _keys_per_split(end, problem.config)
    first = lax.axis_index("split") * share
    end = lax.min(first + share, end)
    blocks = pl.cdiv(lax.max(end - first, 0), problem.config.keys)
    return _DecodeWork(sequence, kv_head, first_row, position, length, first, end, blocks)


def _keys_per_split(end: Array, config: DecodeConfig) -> Array | int:
    """Return the keys of a split. end: int32, keys that a sequence's last token sees."""
    if config.keys_per_split is not None:
        return config.keys_per_split
    return pl.cdiv(pl.cdiv(end, config.keys), config.splits) * config.keys


def _compute(
    problem: _DecodeProblem,
    work: _DecodeWork,
    gmem: Gmem,
    smem: _DecodeSmem,
    outputs_gmem: Sequence[Ref],
    q_unit: float,
    out_dtype: jnp.dtype,
) -> None:
    """Attend from a tile's rows of queries to a split's keys: the compute warpgroup's work."""
    config, rows = problem.config, problem.rows
    place = (work.sequence, work.kv_head, pl.ds(work.first_row, rows))
    plgpu.copy_gmem_to_smem(gmem.q.at[place], smem.q, smem.q_filled)
    plgpu.barrier_wait(smem.q_filled)
    unit = _in_two_terms(smem.q, smem.terms) if config.in_fp8 else q_unit
    scale = gmem.k_scale[0] * (math.log2(math.e) / math.sqrt(problem.head_dim)) * unit
    row = work.first_row + plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=PER_ROW)
    token = lax.div(row, problem.group)
    limit = lax.min(work.position + token, work.length - 1) - work.first
    queries = smem.terms if config.in_fp8 else smem.q

    def attend(block: Array, carry: DecodeCarry) -> DecodeCarry:
        slot = lax.rem(block, config.stages)
        seen = limit - block * config.keys
        return _attend(carry, queries, smem.keys, smem.values, smem.weights, slot, scale, seen)

    carry = DecodeCarry(
        out=filled((problem.head_dim, rows), 0.0, MATRIX),
        peak=filled((rows,), FLOOR, PER_ROW),
        total=filled((config.keys, rows), 0.0, MATRIX),
    )
    carry = lax.fori_loop(0, work.blocks, attend, carry)

    total = carry.total.sum(axis=0)
    if problem.is_whole:
        result = carry.out * per_row(gmem.v_scale[0] / positive(total), carry.out)
        store(result, smem.q, outputs_gmem[0].at[place], out_dtype)
        return
    part = lax.axis_index("split"), work.sequence, work.kv_head, lax.axis_index("tile")
    for out_gmem, each in zip(outputs_gmem, (carry.out, carry.peak, total), strict=True):
        out_gmem[part] = each


def _load(work: _DecodeWork, gmem: Gmem, smem: _DecodeSmem) -> None:
    """Fill the rings of keys and values: the loader's work."""
    first_page, last_page = lax.div(work.first, PAGE_SIZE), lax.div(work.end - 1, PAGE_SIZE)
    stream(
        smem.keys.ring, smem.values.ring,
        gmem.k_pages.at[:, :, work.kv_head], gmem.v_pages.at[:, :, work.kv_head],
        lambda i: gmem.page_table[work.sequence, lax.min(first_page + i, last_page)], work.blocks,
    )  # fmt: skip


def _in_two_terms(q: Ref, terms: Ref) -> Array:
    """Write rows of queries [rows, head_dim] as float8 terms [2 rows, head_dim]: a, and then b.

    Returns unit, float32 [rows], powers of two: q = unit * (a + b / 16). This is exact where a
    number is at least 2^-13 of its row's largest, and off by less than 2^-18 of that elsewhere.
    """
    rows = q.shape[0]
    wide = plgpu.load(q.transpose((1, 0)), layout=MATRIX, optimized=False).astype(jnp.float32)
    a, b, unit = two_terms(wide, axis=0)
    for i, term in enumerate((a, b * TERM_RATIO)):
        term = plgpu.layout_cast(term, plgpu.Layout.WGMMA_TRANSPOSED)
        terms.at[pl.ds(i * rows, rows)].transpose((1, 0))[...] = term.astype(e4m3.DTYPE)
    plgpu.commit_smem()
    return unit


def _attend(
    carry: DecodeCarry,
    q: Ref,
    keys: Operand,
    values: Operand,
    weights: Ref,
    slot: Array,
    scale: Array,
    limit: Array,
) -> DecodeCarry:
    """Attend to one slot of keys and values, update the carry, and free the slot.

    q: [rows, head_dim], or its two terms [2 rows, head_dim], in shared memory.
    weights: [rows, keys], scratch in shared memory.
    scale: the positive factor of scores, including log2(e); a number or [rows].
    limit: int32 [rows], the last key of the slot that each row sees.
    """
    rows = weights.shape[0]

    keys.wait(slot)
    scores = product(keys.block(slot), q.transpose((1, 0)), lambda: values.wait(slot))
    keys.release(slot)
    if q.shape[0] > rows:
        scores = scores[:, :rows] + scores[:, rows:] * (1 / TERM_RATIO)
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=MATRIX)
    scores = jnp.where(key <= per_row(limit, scores), scores, -jnp.inf)
    peak = lax.max(carry.peak, scores.max(axis=0) * scale)
    shrink = jnp.exp2(carry.peak - peak)
    scale = per_row(scale, scores) if q.shape[0] > rows else scale
    weight = jnp.exp2(scores * scale - per_row(peak - HEADROOM, scores))
    weights.transpose((1, 0))[...] = weight.astype(weights.dtype)
    plgpu.commit_smem()
    added = product(values.block(slot).transpose((1, 0)), weights.transpose((1, 0)))
    values.release(slot)
    return DecodeCarry(
        out=carry.out * per_row(shrink, carry.out) + added,
        peak=peak,
        total=carry.total * per_row(shrink, carry.total) + weight,
    )
