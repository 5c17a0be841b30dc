"""Decode attention on Hopper: one to a few new tokens per sequence against the paged cache.

Reading the cache is all the work. The heads that share keys, times the new tokens, are the rows of
one tile; the keys are split over thread blocks until every multiprocessor has some, and in a thread
block its two compute warpgroups take blocks of keys in turn. Each leaves its part of the online
softmax in memory, and the parts are added up in an order that the shapes alone decide.

Algorithm: Flash-Decoding (Dao et al., 2023).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import multiprocessors
from pallas_kernels.paged_attention.hopper_loop import (
    COMPUTE_WARPGROUPS,
    FLOOR,
    LOADER,
    PAGE_SIZE,
    PER_ROW,
    ROWS,
    Carry,
    Ref,
    Side,
    attend,
    registers,
    side,
    start,
    stream,
    tile,
)

KEYS = PAGE_SIZE  # per block
KEYS_PER_ROUND = COMPUTE_WARPGROUPS * KEYS
MAX_SPLITS = 32
INVARIANT_KEYS_PER_SPLIT = 1024


@dataclass(frozen=True)
class Config:
    """splits: thread blocks that divide the keys of a sequence and head among them.
    keys_per_split: a multiple of 128; None to divide evenly what keys a sequence has.
    stages: blocks of 64 keys in flight.
    """

    splits: int
    keys_per_split: int | None
    stages: int


def heuristic(
    batch: int, num_kv_heads: int, head_dim: int, capacity: int, is_batch_invariant: bool
) -> Config:
    """Untuned. capacity: keys that a sequence has room for.

    The fewest splits within a tenth of the shortest time, if a wave of thread blocks took as long
    as one split has keys. If batch-invariant, splits whose size does not depend on the batch.
    """
    stages = 4 * 128 // head_dim
    if is_batch_invariant:
        splits = pl.cdiv(capacity, INVARIANT_KEYS_PER_SPLIT)
        return Config(splits, INVARIANT_KEYS_PER_SPLIT, stages)
    most = min(MAX_SPLITS, pl.cdiv(capacity, KEYS_PER_ROUND))
    processors = multiprocessors()
    times = [pl.cdiv(batch * num_kv_heads * n, processors) / n for n in range(1, most + 1)]
    splits = next(n for n, time in enumerate(times, 1) if time <= 1.1 * min(times))
    return Config(splits, None, stages)


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
    """As the package's; see `hopper` for what is taken. config: by default the heuristic's.
    interpret: a plgpu.InterpretGPUParams to run in the simulator."""
    batch, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    group = num_heads // num_kv_heads
    capacity = page_table.shape[1] * PAGE_SIZE
    config = config or heuristic(batch, num_kv_heads, head_dim, capacity, is_batch_invariant)

    packed = q.reshape(batch, tokens, num_kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
    packed = packed.reshape(batch, num_kv_heads, tokens * group, head_dim)
    rows = min(pl.cdiv(tokens * group, 8) * 8, ROWS)
    tiles = pl.cdiv(tokens * group, rows)
    split = registers(k_pages.dtype)

    def body(
        q_ref: Ref, k_ref: Ref, v_ref: Ref, table: Ref, starts_ref: Ref,
        lengths_ref: Ref, k_scale_ref: Ref,
        out_ref: Ref, peak_ref: Ref, total_ref: Ref,
        q_tile: Ref, weights: Ref | None, out_tile: Ref, peak_tile: Ref,
        total_tile: Ref, keys: Side, values: Side, q_filled: Ref,
    ) -> None:  # fmt: skip
        warpgroup, row = lax.axis_index("warpgroup"), lax.axis_index("row")
        kv_head, first_row = lax.axis_index("kv_head"), lax.axis_index("tile") * rows
        position, length = starts_ref[row], lengths_ref[row]
        end = lax.min(position + tokens, length)
        share = _keys_per_split(end, config)
        first = lax.axis_index("split") * share
        end = lax.min(first + share, end)
        blocks = pl.cdiv(lax.max(end - first, 0), KEYS)

        @pl.when((warpgroup < LOADER) & (blocks > 0))
        def _() -> None:
            plgpu.set_max_registers(split.compute, action="increase")
            place = (row, kv_head, pl.ds(first_row, rows))

            @pl.when(warpgroup == 0)
            def _() -> None:
                plgpu.copy_gmem_to_smem(q_ref.at[place], q_tile.at[pl.ds(0, rows)], q_filled)

            plgpu.barrier_wait(q_filled)
            scale = k_scale_ref[0] * (math.log2(math.e) / math.sqrt(head_dim))
            token = lax.div(
                first_row + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW), group
            )
            limit = lax.min(position + token, length - 1) - first

            def step(turn: Array, carry: Carry, is_masked: bool) -> Carry:
                block = turn * COMPUTE_WARPGROUPS + warpgroup
                return attend(
                    carry, q_tile, keys, values, lax.rem(block, keys.slots.shape[0]), scale,
                    limit=limit - block * KEYS if is_masked else None,
                    weights=None if weights is None else weights.at[warpgroup],
                )  # fmt: skip

            def turns(blocks: Array) -> Array:
                return pl.cdiv(blocks - warpgroup, COMPUTE_WARPGROUPS)

            seen_by_all = lax.max(lax.min(position + 1, length) - first, 0)
            whole = turns(lax.min(lax.div(seen_by_all, KEYS), blocks))
            carry = start(head_dim)
            carry = lax.fori_loop(0, whole, lambda i, c: step(i, c, False), carry)
            carry = lax.fori_loop(whole, turns(blocks), lambda i, c: step(i, c, True), carry)

            part = lax.axis_index("split") * COMPUTE_WARPGROUPS + warpgroup
            results = (
                (carry.out, out_tile, out_ref),
                (carry.peak, peak_tile, peak_ref),
                (carry.total, total_tile, total_ref),
            )
            for value, stage, _ in results:
                stage[warpgroup] = value
            plgpu.commit_smem()
            for _, stage, target in results:
                # Rows beyond the packed ones came from queries nobody loaded.
                plgpu.copy_smem_to_gmem(
                    stage.at[warpgroup, pl.ds(0, rows)], target.at[part, *place]
                )
            plgpu.wait_smem_to_gmem(0)

        @pl.when((warpgroup == LOADER) & (blocks > 0))
        def _() -> None:
            plgpu.set_max_registers(split.loader, action="decrease")
            first_page, last_page = lax.div(first, PAGE_SIZE), lax.div(end - 1, PAGE_SIZE)
            stream(
                keys, values, k_ref.at[:, :, kv_head], v_ref.at[:, :, kv_head],
                lambda i: table[row, lax.min(first_page + i, last_page)], blocks,
            )  # fmt: skip

    parts = (config.splits * COMPUTE_WARPGROUPS, batch, num_kv_heads, tiles * rows)
    ring = side(k_pages.dtype, config.stages, KEYS, head_dim, readers=1)
    weights = tile((COMPUTE_WARPGROUPS, ROWS, KEYS), q.dtype) if interpret else None
    out, peak, total = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((*parts, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ],
        grid=(config.splits, tiles, num_kv_heads, batch),
        grid_names=("split", "tile", "kv_head", "row"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="paged_attention_decode",
        scratch_types=[
            tile((ROWS, head_dim), q.dtype),
            weights,
            tile((COMPUTE_WARPGROUPS, ROWS, head_dim), jnp.dtype(jnp.float32)),
            plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS), jnp.float32),
            ring,
            ring,
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(
        packed, k_pages, v_pages, page_table, starts, lengths,
        jnp.asarray(k_scale, jnp.float32).reshape(1),
    )  # fmt: skip
    end = jnp.minimum(starts + tokens, lengths)
    first = jnp.arange(config.splits).repeat(COMPUTE_WARPGROUPS)[:, None] * _keys_per_split(
        end, config
    )
    out = _combine(out, peak, total, first < end) * v_scale
    out = out[:, :, : tokens * group].reshape(batch, num_kv_heads, tokens, group, head_dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)


def _keys_per_split(end: Array, config: Config) -> Array:
    """end: int32, keys that a sequence's last token sees; a scalar, or one per sequence."""
    if config.keys_per_split is not None:
        return jnp.full_like(end, config.keys_per_split)
    return pl.cdiv(pl.cdiv(end, KEYS_PER_ROUND), config.splits) * KEYS_PER_ROUND


def _combine(out: Array, peak: Array, total: Array, is_written: Array) -> Array:
    """The softmax over all keys from its parts. out: [parts, batch, kv_heads, rows, head_dim];
    peak, total: [parts, batch, kv_heads, rows]; is_written: bool [parts, batch]."""
    is_written = is_written[:, :, None, None]
    peak = jnp.where(is_written, peak, FLOOR)
    weight = jnp.exp2(peak - peak.max(axis=0))
    out = _sum(jnp.where(is_written[..., None], out, 0) * weight[..., None])
    total = _sum(jnp.where(is_written, total, 0) * weight)
    return out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]


def _sum(parts: Array) -> Array:
    """Over the first axis, neighbours first: XLA's own reduction has an order for each shape."""
    while len(parts) > 1:
        pairs = len(parts) // 2
        parts = jnp.concatenate([parts[: 2 * pairs : 2] + parts[1::2], parts[2 * pairs :]])
    return parts[0]
