"""Decode attention on Hopper: one to a few new tokens per sequence against the paged cache.

Reading the cache is all the work. The heads that share keys, times the new tokens, are the rows of
one tile; the keys are split over thread blocks until every multiprocessor has some. Operands are
swapped: keys and values are wgmma's left sides, whose height is 64, and the few rows of queries its
right sides, whose width can be 8. So the softmax computes no rows that do not exist.

FP8 keys are multiplied as they are, with each row of queries as two float8 terms (`_in_two_terms`):
twice as wide a right side costs nothing. Values have to be widened.

Where keys are split, each split leaves its part of the online softmax in memory, and a second
launch adds the parts up in their order; where they are not, the first one writes the result.

Algorithm: Flash-Decoding (Dao et al., 2023).
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3, tuned
from pallas_kernels.device import multiprocessors
from pallas_kernels.hopper import BOX_ROWS, SHARED_MEMORY_BYTES
from pallas_kernels.paged_attention.hopper_loop import (
    BARRIERS_BYTES,
    FLOOR,
    HEADROOM,
    PAGE_SIZE,
    Ref,
    Side,
    operand_dtype,
    operand_query,
    product,
    side,
    stream,
    tile,
    two_terms,
    widen,
)

NAME = "paged_attention_decode"
MAX_ROWS = 48  # of queries in one thread block; with 64 registers spill
FEW_ROWS = 8  # up to which blocks of two pages leave registers for two blocks an SM
MAX_SPLITS = 32
WORTHWHILE_FP8_SPLITS = 16  # more cost the second launch what they save the first
INVARIANT_KEYS_PER_SPLIT = 1024
BLOCKS_PER_MULTIPROCESSOR = 2
MAX_STAGES = 6
SHARED_BYTES_EACH = 233_472 // BLOCKS_PER_MULTIPROCESSOR - 1024  # 1 KiB is the system's
COMPUTE, LOADER = range(2)
TERM_RATIO = 16  # of the second of two terms to its code
MATRIX = plgpu.Layout.WGMMA
PER_ROW = MATRIX.reduce(0)  # rows of queries are the columns of scores and of sums


@dataclass(frozen=True)
class Config:
    """splits: thread blocks that divide the keys of a sequence and head among them.
    keys_per_split: a multiple of `keys`; None to divide evenly what keys a sequence has.
    stages: blocks of keys in flight.
    keys: of a block, a multiple of the page size.
    in_fp8: FP8 keys as they are, and queries as two float8 terms, instead of keys as float16.
    """

    splits: int
    keys_per_split: int | None
    stages: int
    keys: int = PAGE_SIZE
    in_fp8: bool = False


class Carry(NamedTuple):
    """The online softmax of some rows over the keys so far, float32.

    out: [head_dim, rows], sum of weight * value; total: [keys, rows], of the
    weights at each place of a block; peak: [rows], the largest score. Scores are in
    units of log(2).
    """

    out: Array
    peak: Array
    total: Array


class Operand(NamedTuple):
    """Keys or values: the ring that they come by, and, if they have to be widened, where one slot
    of it goes, float16 [keys, head_dim]."""

    ring: Side
    wide: Ref

    def wait(self, slot: Array) -> None:
        plgpu.barrier_wait(self.ring.filled.at[slot])
        if self.wide is not None:
            widen(self.ring.slots.at[slot], self.wide)
            plgpu.barrier_arrive(self.ring.free.at[slot])

    def block(self, slot: Array) -> Ref:
        return self.ring.slots.at[slot] if self.wide is None else self.wide

    def release(self, slot: Array) -> None:
        if self.wide is None:
            plgpu.barrier_arrive(self.ring.free.at[slot])


def configure(q: Array, k_pages: Array, capacity: int, is_batch_invariant: bool) -> Config:
    """The tuned configuration of the GPU in use, or else the heuristic's, which is the only one
    that is batch-invariant. capacity: keys that a sequence has room for."""
    found = None if is_batch_invariant else tuned.find(NAME, tuned_as(q, k_pages, capacity))
    if found:
        return Config(**found)
    return heuristic(q, k_pages, capacity, is_batch_invariant)


def tuned_as(q: Array, k_pages: Array, capacity: int) -> str:
    """What problems that share a tuned configuration are called: batch and capacity up to powers
    of two."""
    batch, tokens, num_heads, head_dim = q.shape
    rows, capacity = (1 << (each - 1).bit_length() for each in (batch, capacity))
    heads = f"{num_heads}/{k_pages.shape[2]}x{head_dim}"
    return f"heads={heads} {k_pages.dtype} tokens={tokens} batch<={rows} capacity<={capacity}"


def heuristic(q: Array, k_pages: Array, capacity: int, is_batch_invariant: bool) -> Config:
    """Untuned. capacity: as in `configure`.

    As many stages as let two thread blocks share a multiprocessor. The fewest splits within a tenth
    of the shortest time, if a wave of thread blocks took as long as one split has keys. If
    batch-invariant, splits whose size does not depend on the batch.
    """
    batch, tokens, num_heads, _ = q.shape
    rows = _tiling(tokens * num_heads // k_pages.shape[2])[1]
    is_fp8 = k_pages.dtype == e4m3.DTYPE
    keys = 2 * PAGE_SIZE if is_fp8 and rows <= FEW_ROWS else PAGE_SIZE
    shape = Config(1, None, 0, keys, is_fp8)
    free = SHARED_BYTES_EACH - _fixed_bytes(shape, k_pages, rows)
    stages = min(MAX_STAGES, free // _stage_bytes(shape, k_pages))
    if is_batch_invariant:
        share = max(INVARIANT_KEYS_PER_SPLIT, pl.cdiv(pl.cdiv(capacity, MAX_SPLITS), keys) * keys)
        return replace(
            shape, splits=pl.cdiv(capacity, share), keys_per_split=share, stages=stages
        )  # fmt: skip
    most = min(WORTHWHILE_FP8_SPLITS if is_fp8 else MAX_SPLITS, pl.cdiv(capacity, keys))
    at_once = BLOCKS_PER_MULTIPROCESSOR * multiprocessors()
    streams = batch * k_pages.shape[2]
    times = [pl.cdiv(streams * n, at_once) / n for n in range(1, most + 1)]
    splits = next(n for n, time in enumerate(times, 1) if time <= 1.1 * min(times))
    return replace(shape, splits=splits, stages=stages)


def unfit(config: Config, k_pages: Array, capacity: int) -> str | None:
    """Why no kernel can be made of a configuration; None if one can."""
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


def _stage_bytes(config: Config, k_pages: Array) -> int:
    """Of shared memory: the keys and values of a stage."""
    return 2 * config.keys * k_pages.shape[3] * k_pages.dtype.itemsize


def _fixed_bytes(config: Config, k_pages: Array, rows: int) -> int:
    """Of shared memory: what a block is widened to, `rows` of queries, weights and results, and
    barriers."""
    head_dim, sides = k_pages.shape[3], 0
    if k_pages.dtype == e4m3.DTYPE:
        sides = 1 if config.in_fp8 else 2
    queries = rows * head_dim * (2 + 2 * config.in_fp8)
    return sides * config.keys * head_dim * 2 + queries + rows * config.keys * 2 + BARRIERS_BYTES


def _tiling(rows: int) -> tuple[int, int]:
    """How many tiles rows of queries make, and how many rows each has."""
    tiles = pl.cdiv(rows, MAX_ROWS)
    return tiles, pl.cdiv(pl.cdiv(rows, tiles), BOX_ROWS) * BOX_ROWS


@functools.partial(jax.jit, static_argnames=("config", "is_batch_invariant", "interpret"))
def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    starts: Array,
    lengths: Array,
    k_scale: Array | float,
    v_scale: Array | float,
    *,
    config: Config | None = None,
    is_batch_invariant: bool = False,
    interpret: Any = None,
) -> Array:
    """As the package's; see `hopper` for what is taken. config: for tuning; None takes
    `configure`'s. interpret: a plgpu.InterpretGPUParams to run in the simulator."""
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    group = num_heads // num_kv_heads
    capacity = page_table.shape[1] * PAGE_SIZE
    config = config or configure(q, k_pages, capacity, is_batch_invariant)
    if reason := unfit(config, k_pages, capacity):
        raise ValueError(f"{config} cannot work: {reason}")

    widened = operand_dtype(k_pages.dtype)  # what is not in FP8 is this
    packed, q_unit = (q, 1.0) if config.in_fp8 else operand_query(q, k_pages.dtype)
    packed = packed.reshape(batch, tokens, num_kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(batch, num_kv_heads, tokens * group, head_dim)
    tiles, rows = _tiling(tokens * group)
    if tokens * group > BOX_ROWS:
        packed = jnp.pad(packed, ((0, 0), (0, 0), (0, tiles * rows - tokens * group), (0, 0)))
    is_whole = config.splits == 1

    def body(
        q_ref: Ref, k_ref: Ref, v_ref: Ref, table: Ref, starts_ref: Ref,
        lengths_ref: Ref, k_scale_ref: Ref, v_scale_ref: Ref,
        *refs: Ref,
        q_tile: Ref, terms: Ref, weights: Ref, keys: Operand, values: Operand, q_filled: Ref,
    ) -> None:  # fmt: skip
        warpgroup, row = lax.axis_index("warpgroup"), lax.axis_index("row")
        kv_head, first_row = lax.axis_index("kv_head"), lax.axis_index("tile") * rows
        position, length = starts_ref[row], lengths_ref[row]
        end = lax.min(position + tokens, length)
        share = _keys_per_split(end, config)
        first = lax.axis_index("split") * share
        end = lax.min(first + share, end)
        blocks = pl.cdiv(lax.max(end - first, 0), config.keys)

        @pl.when(warpgroup == COMPUTE)
        def _() -> None:
            place = (row, kv_head, pl.ds(first_row, rows))
            plgpu.copy_gmem_to_smem(q_ref.at[place], q_tile, q_filled)
            plgpu.barrier_wait(q_filled)
            unit = _in_two_terms(q_tile, terms) if config.in_fp8 else q_unit
            scale = k_scale_ref[0] * (math.log2(math.e) / math.sqrt(head_dim)) * unit
            token = lax.div(
                first_row + plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=PER_ROW), group
            )
            limit = lax.min(position + token, length - 1) - first
            queries = terms if config.in_fp8 else q_tile

            def step(block: Array, carry: Carry) -> Carry:
                slot = lax.rem(block, config.stages)
                seen = limit - block * config.keys
                return _attend(carry, queries, keys, values, weights, slot, scale, seen)

            carry = Carry(
                out=_filled((head_dim, rows), 0.0, MATRIX),
                peak=_filled((rows,), FLOOR, PER_ROW),
                total=_filled((config.keys, rows), 0.0, MATRIX),
            )
            carry = lax.fori_loop(0, blocks, step, carry)

            total = carry.total.sum(axis=0)
            if is_whole:
                result = carry.out * _per_row(v_scale_ref[0] / _positive(total), carry.out)
                _store(result, q_tile, refs[0].at[place], q.dtype)
                return
            part = lax.axis_index("split"), row, kv_head, lax.axis_index("tile")
            for ref, each in zip(refs, (carry.out, carry.peak, total), strict=True):
                ref[part] = each

        @pl.when((warpgroup == LOADER) & (blocks > 0))
        def _() -> None:
            first_page, last_page = lax.div(first, PAGE_SIZE), lax.div(end - 1, PAGE_SIZE)
            stream(
                keys.ring, values.ring, k_ref.at[:, :, kv_head], v_ref.at[:, :, kv_head],
                lambda i: table[row, lax.min(first_page + i, last_page)], blocks,
            )  # fmt: skip

    parts = (config.splits, batch, num_kv_heads, tiles)
    ring = side(k_pages.dtype, config.stages, config.keys, head_dim, readers=1)
    wide = tile((config.keys, head_dim), widened) if k_pages.dtype == e4m3.DTYPE else None
    float32 = jnp.dtype(jnp.float32)
    k_scale, v_scale = (jnp.asarray(each, float32).reshape(1) for each in (k_scale, v_scale))
    scratch: dict[str, Any] = {
        "q_tile": tile((rows, head_dim), packed.dtype),
        "terms": tile((2 * rows, head_dim), e4m3.DTYPE) if config.in_fp8 else None,
        "weights": tile((rows, config.keys), widened),
        "keys": Operand(ring, None if config.in_fp8 else wide),
        "values": Operand(ring, wide),
        "q_filled": plgpu.Barrier(),
    }
    found = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(packed.shape, packed.dtype)]
        if is_whole
        else [
            jax.ShapeDtypeStruct((*parts, head_dim, rows), float32),
            jax.ShapeDtypeStruct((*parts, rows), float32),
            jax.ShapeDtypeStruct((*parts, rows), float32),
        ],
        grid=(config.splits, tiles, num_kv_heads, batch),
        grid_names=("split", "tile", "kv_head", "row"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name=NAME,
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(packed, k_pages, v_pages, page_table, starts, lengths, k_scale, v_scale)
    if is_whole:
        out = lax.bitcast_convert_type(found[0], q.dtype)
    else:
        out, peak, total = found
        out = _combine(out, peak, total, v_scale, packed, q.dtype, interpret)
    out = out[:, :, : tokens * group].reshape(batch, num_kv_heads, tokens, group, head_dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape)


def _keys_per_split(end: Array, config: Config) -> Array | int:
    """end: int32, keys that a sequence's last token sees."""
    if config.keys_per_split is not None:
        return config.keys_per_split
    return pl.cdiv(pl.cdiv(end, config.keys), config.splits) * config.keys


def _filled(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _per_row(each: Array, like: Array) -> Array:
    """A number for each row of queries, for the columns of `like`."""
    return lax.broadcast_in_dim(each, like.shape, (1,))


def _positive(total: Array) -> Array:
    return lax.max(total, jnp.finfo(jnp.float32).tiny)


def _in_two_terms(q: Ref, terms: Ref) -> Array:
    """Write rows of queries [rows, head_dim] as codes [2 rows, head_dim], of a and then of b.

    Returns unit [rows], powers of two: q = unit * (a + b / 16), exact where a number is at least
    2^-13 of its row's largest; what is lost of others is below 2^-18 of it.
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
    carry: Carry,
    q: Ref,
    keys: Operand,
    values: Operand,
    weights: Ref,
    slot: Array,
    scale: Array,
    limit: Array,
) -> Carry:
    """Take one slot of keys and values into the carry, and free it.

    q: [rows, head_dim], or its two terms [2 rows, head_dim], and weights: [rows, keys] in shared
    memory. scale: of the scores, for all or [rows]; log2(e) included, positive. limit: int32
    [rows], the last key of the slot that each row sees.
    """
    rows = weights.shape[0]

    keys.wait(slot)
    scores = product(keys.block(slot), q.transpose((1, 0)), lambda: values.wait(slot))
    keys.release(slot)
    if q.shape[0] > rows:
        scores = scores[:, :rows] + scores[:, rows:] * (1 / TERM_RATIO)
    key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=MATRIX)
    scores = jnp.where(key <= _per_row(limit, scores), scores, -jnp.inf)
    peak = lax.max(carry.peak, scores.max(axis=0) * scale)
    shrink = jnp.exp2(carry.peak - peak)
    scale = _per_row(scale, scores) if q.shape[0] > rows else scale
    weight = jnp.exp2(scores * scale - _per_row(peak - HEADROOM, scores))
    weights.transpose((1, 0))[...] = weight.astype(weights.dtype)
    plgpu.commit_smem()
    added = product(values.block(slot).transpose((1, 0)), weights.transpose((1, 0)))
    values.release(slot)
    return Carry(
        out=carry.out * _per_row(shrink, carry.out) + added,
        peak=peak,
        total=carry.total * _per_row(shrink, carry.total) + weight,
    )


def _store(result: Array, staged: Ref, target: Ref, dtype: jnp.dtype) -> None:
    """Write a result [head_dim, rows] as `dtype` [rows, head_dim], by way of shared memory."""
    result = lax.bitcast_convert_type(result.astype(dtype), staged.dtype)
    staged.transpose((1, 0))[...] = result
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staged, target)
    plgpu.wait_smem_to_gmem(0)


def _combine(
    out: Array,
    peak: Array,
    total: Array,
    v_scale: Array,
    packed: Array,
    dtype: jnp.dtype,
    interpret: Any,
) -> Array:
    """The softmax over all keys from its parts, times v_scale [1], in one launch.

    out: [parts, batch, kv_heads, tiles, head_dim, rows]; peak, total: without head_dim.
    Returns the shape of `packed`, the queries; a part is added after the other.
    """
    parts, batch, num_kv_heads, tiles, head_dim, rows = out.shape
    groups = rows // BOX_ROWS

    def body(
        out_ref: Ref, peak_ref: Ref, total_ref: Ref, v_scale_ref: Ref, y_ref: Ref, y_tile: Ref
    ) -> None:
        row, kv_head, group = (lax.axis_index(name) for name in ("row", "kv_head", "group"))
        within = pl.ds(lax.rem(group, groups) * BOX_ROWS, BOX_ROWS)

        def load(ref: Ref, part: int, layout: Any, *columns: Any) -> Array:
            place = ref.at[part, row, kv_head, lax.div(group, groups), *columns, within]
            return plgpu.load(place, layout=layout, optimized=False)

        peaks = [load(peak_ref, part, PER_ROW) for part in range(parts)]
        highest = functools.reduce(lax.max, peaks)
        y = _filled((head_dim, BOX_ROWS), 0.0, MATRIX)
        weights = _filled((BOX_ROWS,), 0.0, PER_ROW)
        for part, each in enumerate(peaks):
            weight = jnp.exp2(each - highest)
            part_out = load(out_ref, part, MATRIX, pl.ds(0, head_dim))
            y += part_out * _per_row(weight, y)
            weights += load(total_ref, part, PER_ROW) * weight
        y = y * _per_row(v_scale_ref[0] / _positive(weights), y)
        _store(y, y_tile, y_ref.at[row, kv_head, pl.ds(group * BOX_ROWS, BOX_ROWS)], dtype)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(packed.shape, dtype),
        grid=(tiles * groups, num_kv_heads, batch),
        grid_names=("group", "kv_head", "row"),
        kernel_name="paged_attention_combine",
        scratch_types=[tile((BOX_ROWS, head_dim), dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(out, peak, total, v_scale)
