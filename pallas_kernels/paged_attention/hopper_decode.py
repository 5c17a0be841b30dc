"""Decode attention on Hopper: one to a few new tokens per sequence against the paged cache.

Reading the cache is all the work. The heads that share keys, times the new tokens, are the rows of
one tile; the keys are split over thread blocks until every multiprocessor has some. Operands are
swapped: keys and values are wgmma's left sides, whose height is 64, and the few rows of queries its
right sides, whose width can be 8. So the softmax computes no rows that do not exist. Each split
leaves its part of the online softmax in memory, and the parts are added up in their order.

Algorithm: Flash-Decoding (Dao et al., 2023).
"""

import functools
import math
from dataclasses import dataclass
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
    widen,
)

NAME = "paged_attention_decode"
KEYS = PAGE_SIZE  # per block
MAX_ROWS = 48  # of queries in one thread block; with 64 registers spill
MAX_SPLITS = 32
INVARIANT_KEYS_PER_SPLIT = 1024
BLOCKS_PER_MULTIPROCESSOR = 2
# 96 KiB for two thread blocks each. In flight it is 64 KiB or more (FP8 at head_dim 64: 48) where
# 36 KiB keep up with 4.8 TB/s at a latency of 1 us.
RING_BYTES, MAX_STAGES = 96 * 1024, 6
COMPUTE, LOADER = range(2)
MATRIX = plgpu.Layout.WGMMA
PER_ROW = MATRIX.reduce(0)  # rows of queries are the columns of scores and of sums


@dataclass(frozen=True)
class Config:
    """splits: thread blocks that divide the keys of a sequence and head among them.
    keys_per_split: a multiple of 64; None to divide evenly what keys a sequence has.
    stages: blocks of 64 keys in flight.
    """

    splits: int
    keys_per_split: int | None
    stages: int


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
    """Keys or values: the ring that they come by, and for FP8, where one slot of it is widened to,
    float16 [keys, head_dim]."""

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
    stage, widened = _ring_bytes(k_pages)
    stages = min(MAX_STAGES, (RING_BYTES - widened) // stage)
    if is_batch_invariant:
        share = max(INVARIANT_KEYS_PER_SPLIT, pl.cdiv(pl.cdiv(capacity, MAX_SPLITS), KEYS) * KEYS)
        return Config(pl.cdiv(capacity, share), share, stages)
    most = min(MAX_SPLITS, pl.cdiv(capacity, KEYS))
    at_once = BLOCKS_PER_MULTIPROCESSOR * multiprocessors()
    streams = q.shape[0] * k_pages.shape[2]
    times = [pl.cdiv(streams * n, at_once) / n for n in range(1, most + 1)]
    splits = next(n for n, time in enumerate(times, 1) if time <= 1.1 * min(times))
    return Config(splits, None, stages)


def unfit(config: Config, k_pages: Array, capacity: int) -> str | None:
    """Why no kernel can be made of a configuration; None if one can."""
    stage, widened = _ring_bytes(k_pages)
    queries_and_weights = MAX_ROWS * (k_pages.shape[3] + KEYS) * 2
    needed = config.stages * stage + widened + queries_and_weights + BARRIERS_BYTES
    share = config.keys_per_split
    if not 1 <= config.splits <= MAX_SPLITS:
        return f"splits must be 1 to {MAX_SPLITS}, got {config.splits}"
    if share is not None and (share < 1 or share % KEYS):
        return f"keys_per_split must be a multiple of {KEYS}, got {share}"
    if share is not None and config.splits * share < capacity:
        return f"{config.splits} splits of {share} keys do not hold {capacity}"
    if config.stages < 2:
        return f"at least 2 stages are needed, got {config.stages}"
    if needed > SHARED_MEMORY_BYTES:
        return f"{needed} bytes of shared memory, of {SHARED_MEMORY_BYTES}"
    return None


def _ring_bytes(k_pages: Array) -> tuple[int, int]:
    """Of shared memory: keys and values of a stage, and what one of each is widened to."""
    elements = 2 * KEYS * k_pages.shape[3]
    return elements * k_pages.dtype.itemsize, elements * 2 if k_pages.dtype == e4m3.DTYPE else 0


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

    operand = operand_dtype(k_pages.dtype)
    packed, q_unit = operand_query(q, k_pages.dtype)
    packed = packed.reshape(batch, tokens, num_kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(batch, num_kv_heads, tokens * group, head_dim)
    tiles = pl.cdiv(tokens * group, MAX_ROWS)
    rows = pl.cdiv(pl.cdiv(tokens * group, tiles), BOX_ROWS) * BOX_ROWS
    if tokens * group > BOX_ROWS:
        packed = jnp.pad(packed, ((0, 0), (0, 0), (0, tiles * rows - tokens * group), (0, 0)))

    def body(
        q_ref: Ref, k_ref: Ref, v_ref: Ref, table: Ref, starts_ref: Ref,
        lengths_ref: Ref, k_scale_ref: Ref,
        out_ref: Ref, peak_ref: Ref, total_ref: Ref,
        q_tile: Ref, weights: Ref, keys: Operand, values: Operand, q_filled: Ref,
    ) -> None:  # fmt: skip
        warpgroup, row = lax.axis_index("warpgroup"), lax.axis_index("row")
        kv_head, first_row = lax.axis_index("kv_head"), lax.axis_index("tile") * rows
        position, length = starts_ref[row], lengths_ref[row]
        end = lax.min(position + tokens, length)
        share = _keys_per_split(end, config)
        first = lax.axis_index("split") * share
        end = lax.min(first + share, end)
        blocks = pl.cdiv(lax.max(end - first, 0), KEYS)

        @pl.when(warpgroup == COMPUTE)
        def _() -> None:
            place = (row, kv_head, pl.ds(first_row, rows))
            plgpu.copy_gmem_to_smem(q_ref.at[place], q_tile, q_filled)
            plgpu.barrier_wait(q_filled)
            scale = k_scale_ref[0] * (math.log2(math.e) / math.sqrt(head_dim) * q_unit)
            token = lax.div(
                first_row + plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=PER_ROW), group
            )
            limit = lax.min(position + token, length - 1) - first

            def step(block: Array, carry: Carry) -> Carry:
                slot = lax.rem(block, config.stages)
                seen = limit - block * KEYS
                return _attend(carry, q_tile, keys, values, weights, slot, scale, seen)

            carry = Carry(
                out=_filled((head_dim, rows), 0.0, MATRIX),
                peak=_filled((rows,), FLOOR, PER_ROW),
                total=_filled((KEYS, rows), 0.0, MATRIX),
            )
            carry = lax.fori_loop(0, blocks, step, carry)

            part = lax.axis_index("split"), row, kv_head, lax.axis_index("tile")
            out_ref[part] = carry.out
            peak_ref[part] = carry.peak
            total_ref[part] = carry.total.sum(axis=0)

        @pl.when((warpgroup == LOADER) & (blocks > 0))
        def _() -> None:
            first_page, last_page = lax.div(first, PAGE_SIZE), lax.div(end - 1, PAGE_SIZE)
            stream(
                keys.ring, values.ring, k_ref.at[:, :, kv_head], v_ref.at[:, :, kv_head],
                lambda i: table[row, lax.min(first_page + i, last_page)], blocks,
            )  # fmt: skip

    parts = (config.splits, batch, num_kv_heads, tiles)
    stream_type = Operand(
        side(k_pages.dtype, config.stages, KEYS, head_dim, readers=1),
        tile((KEYS, head_dim), operand) if k_pages.dtype == e4m3.DTYPE else None,
    )
    out, peak, total = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((*parts, head_dim, rows), jnp.float32),
            jax.ShapeDtypeStruct((*parts, rows), jnp.float32),
            jax.ShapeDtypeStruct((*parts, rows), jnp.float32),
        ],
        grid=(config.splits, tiles, num_kv_heads, batch),
        grid_names=("split", "tile", "kv_head", "row"),
        num_threads=2,
        thread_name="warpgroup",
        kernel_name=NAME,
        scratch_types=[
            tile((rows, head_dim), operand),
            tile((rows, KEYS), operand),
            stream_type,
            stream_type,
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(
        packed, k_pages, v_pages, page_table, starts, lengths,
        jnp.asarray(k_scale, jnp.float32).reshape(1),
    )  # fmt: skip
    v_scale = jnp.asarray(v_scale, jnp.float32).reshape(1)
    out = _combine(out, peak, total, v_scale, packed, q.dtype, interpret)
    out = out[:, :, : tokens * group].reshape(batch, num_kv_heads, tokens, group, head_dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape)


def _keys_per_split(end: Array, config: Config) -> Array | int:
    """end: int32, keys that a sequence's last token sees."""
    if config.keys_per_split is not None:
        return config.keys_per_split
    return pl.cdiv(pl.cdiv(end, KEYS), config.splits) * KEYS


def _filled(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


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

    q: [rows, head_dim] and weights: [rows, keys] in shared memory. scale: of the scores; log2(e)
    included, positive. limit: int32 [rows], the last key of the slot that each row sees.
    """
    shape = (KEYS, q.shape[0])

    keys.wait(slot)
    scores = product(keys.block(slot), q.transpose((1, 0)), lambda: values.wait(slot))
    keys.release(slot)
    key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
    scores = jnp.where(key <= lax.broadcast_in_dim(limit, shape, (1,)), scores, -jnp.inf)
    peak = lax.max(carry.peak, scores.max(axis=0) * scale)
    shrink = jnp.exp2(carry.peak - peak)
    weight = jnp.exp2(scores * scale - lax.broadcast_in_dim(peak - HEADROOM, shape, (1,)))
    weights.transpose((1, 0))[...] = weight.astype(weights.dtype)
    plgpu.commit_smem()
    added = product(values.block(slot).transpose((1, 0)), weights.transpose((1, 0)))
    values.release(slot)
    return Carry(
        out=carry.out * lax.broadcast_in_dim(shrink, carry.out.shape, (1,)) + added,
        peak=peak,
        total=carry.total * lax.broadcast_in_dim(shrink, shape, (1,)) + weight,
    )


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
            y += part_out * lax.broadcast_in_dim(weight, y.shape, (1,))
            weights += load(total_ref, part, PER_ROW) * weight
        factor = v_scale_ref[0] / lax.max(weights, jnp.finfo(jnp.float32).tiny)
        y = y * lax.broadcast_in_dim(factor, y.shape, (1,))
        y_tile.transpose((1, 0))[...] = y.astype(dtype)
        plgpu.commit_smem()
        target = y_ref.at[row, kv_head, pl.ds(group * BOX_ROWS, BOX_ROWS)]
        plgpu.copy_smem_to_gmem(y_tile, target)
        plgpu.wait_smem_to_gmem(0)

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
