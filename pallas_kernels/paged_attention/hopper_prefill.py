"""Prefill attention on Hopper: many new tokens per sequence against the paged cache.

A thread block takes 128 rows of queries: a span of tokens times as many heads of one key/value head
as fit. Heads that share keys share their loads, and all rows of a tile end at nearly the same key.
Blocks of keys above the diagonal or past the sequence's end are not loaded, and those that every
row sees are not masked. The two compute warpgroups take turns at the tensor cores: one multiplies
while the other is in its softmax.

FP8 keys are multiplied as they are, with queries as the sum of two float8 terms: two FP8 products
take the time of one of 16 bits. The loader has only values to widen.

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
from pallas_kernels.hopper import SHARED_MEMORY_BYTES, in_whole_boxes
from pallas_kernels.paged_attention.hopper_loop import (
    BARRIERS_BYTES,
    FLOOR,
    HEADROOM,
    PAGE_SIZE,
    WIDENED_SLOTS,
    Ref,
    Side,
    operand_dtype,
    operand_query,
    product,
    product_of_sum,
    side,
    stream,
    tile,
    two_terms,
    widening_side,
)

NAME = "paged_attention_prefill"
ROWS = 64  # of queries that one compute warpgroup holds: wgmma's M
COMPUTE_WARPGROUPS = 2
LOADER = COMPUTE_WARPGROUPS  # the last warpgroup of a thread block
MATRIX = plgpu.Layout.WGMMA
PER_ROW = MATRIX.reduce(1)
TILE_ROWS = COMPUTE_WARPGROUPS * ROWS
MAX_STAGES = 4
MAX_PACKED_HEADS = 16  # leaves a span of 8 tokens, the height of a tile of shared memory


@dataclass(frozen=True)
class Config:
    """keys: per block, a multiple of the page size. stages: blocks in flight.
    in_fp8: FP8 keys as they are, and queries as two float8 terms, instead of keys as float16.
    """

    keys: int
    stages: int
    in_fp8: bool = False


class Carry(NamedTuple):
    """The online softmax of some rows over the keys so far, float32.

    out: [rows, head_dim], sum of weight * value; total: [rows], of the weights; peak: [rows], the
    largest score. Scores are in units of log(2).
    """

    out: Array
    peak: Array
    total: Array


class Registers(NamedTuple):
    """Per thread of a compute and of the loader warpgroup. Three warpgroups start with 168 each."""

    compute: int
    loader: int


def configure(num_heads: int, k_pages: Array) -> Config:
    """The tuned configuration of the GPU in use, or else the heuristic's."""
    found = tuned.find(NAME, tuned_as(num_heads, k_pages))
    return Config(**found) if found else heuristic(k_pages)


def tuned_as(num_heads: int, k_pages: Array) -> str:
    """What problems that share a tuned configuration are called: how many tokens is no part."""
    num_kv_heads, head_dim = k_pages.shape[2:]
    return f"head_dim={head_dim} packed={_packed(num_heads // num_kv_heads)} {k_pages.dtype}"


def heuristic(k_pages: Array) -> Config:
    """Untuned: FlashAttention-3's tile, and as many stages as shared memory has room for. Keys in
    FP8 are left to `tune`, since no GPU has measured them yet."""
    configs = (Config(128, stages) for stages in range(MAX_STAGES, 1, -1))
    return next(config for config in configs if unfit(config, k_pages) is None)


def unfit(config: Config, k_pages: Array) -> str | None:
    """Why no kernel can be made of a configuration; None if one can."""
    head_dim, is_fp8 = k_pages.shape[3], k_pages.dtype == e4m3.DTYPE
    sides = 2 - config.in_fp8 if is_fp8 else 0  # that are widened
    slots = 2 * config.stages * k_pages.dtype.itemsize + sides * WIDENED_SLOTS * 2
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
    starts: Array,
    lengths: Array,
    k_scale: Array | float,
    v_scale: Array | float,
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> Array:
    """As the package's; see `hopper` for what is taken. A sequence's result does not depend on the
    batch around it. config: for tuning; None takes `configure`'s. interpret: a
    plgpu.InterpretGPUParams to run in the simulator."""
    batch, tokens, num_heads, head_dim = q.shape
    group = num_heads // k_pages.shape[2]
    config = config or configure(num_heads, k_pages)
    if reason := unfit(config, k_pages):
        raise ValueError(f"{config} cannot work: {reason}")
    packed = _packed(group)
    span = TILE_ROWS // packed
    tiles = pl.cdiv(tokens, span)
    box = min(span, ROWS)  # tokens of one head within one warpgroup's rows
    boxes = ROWS // box
    is_fp8 = k_pages.dtype == e4m3.DTYPE
    # The split with which nothing spills: widening takes registers, copying next to none.
    split = Registers(216, 72) if is_fp8 else Registers(232, 40)
    operand = operand_dtype(k_pages.dtype)
    q_operand, q_unit = (q, 1.0) if config.in_fp8 else operand_query(q, k_pages.dtype)
    q_operand = in_whole_boxes(q_operand, axis=1)

    def body(
        q_ref: Ref, k_ref: Ref, v_ref: Ref, table: Ref, starts_ref: Ref,
        lengths_ref: Ref, k_scale_ref: Ref, v_scale_ref: Ref, out_ref: Ref,
        q_tile: Ref, terms: Ref | None, weights: Ref | None, keys: Side, values: Side,
        q_filled: Ref, turns: Ref,
    ) -> None:  # fmt: skip
        warpgroup, row = lax.axis_index("warpgroup"), lax.axis_index("row")
        head = lax.axis_index("heads") * packed
        first = (tiles - 1 - lax.axis_index("tile")) * span  # the longest tiles start first
        position, length = starts_ref[row] + first, lengths_ref[row]
        end = jnp.where(position < length, lax.min(position + span, length), 0)
        blocks = pl.cdiv(end, config.keys)

        @pl.when(warpgroup < LOADER)
        def _() -> None:
            plgpu.set_max_registers(split.compute, action="increase")
            rows = q_tile.at[warpgroup]
            places = []  # of this warpgroup's rows in q and in the result
            for i in range(boxes):
                r = warpgroup * ROWS + i * box
                token = pl.ds(first + lax.rem(r, span), box)
                places.append((pl.ds(i * box, box), (row, token, head + lax.div(r, span))))
            for part, place in places:
                plgpu.copy_gmem_to_smem(q_ref.at[place], rows.at[part], q_filled.at[warpgroup])
            plgpu.barrier_wait(q_filled.at[warpgroup])

            queries: list[Ref] = [rows]
            unit: Array | float = q_unit
            if terms is not None:
                queries = [terms.at[warpgroup, i] for i in range(2)]
                unit = _in_two_terms(rows, queries)
            scale = k_scale_ref[0] * (math.log2(math.e) / math.sqrt(head_dim)) * unit
            r = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=PER_ROW)
            limit = lax.min(position + lax.rem(warpgroup * ROWS + r, span), length - 1)

            def turn() -> None:
                plgpu.barrier_arrive(turns)
                plgpu.barrier_wait(turns)

            def step(block: Array, carry: Carry, is_masked: bool) -> Carry:
                return _attend(
                    carry, queries, keys, values, block, scale,
                    limit=limit - block * config.keys if is_masked else None,
                    weights=None if weights is None else weights.at[warpgroup],
                    turn=turn,
                )  # fmt: skip

            whole = lax.min(lax.div(lax.min(position + 1, length), config.keys), blocks)
            pl.when(warpgroup == 1)(turn)
            carry = Carry(
                out=plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), MATRIX),
                peak=plgpu.layout_cast(jnp.full((ROWS,), FLOOR, jnp.float32), PER_ROW),
                total=plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW),
            )
            carry = lax.fori_loop(0, whole, lambda i, c: step(i, c, False), carry)
            carry = lax.fori_loop(whole, blocks, lambda i, c: step(i, c, True), carry)
            pl.when(warpgroup == 0)(turn)

            factor = v_scale_ref[0] / lax.max(carry.total, jnp.finfo(jnp.float32).tiny)
            out = carry.out * lax.broadcast_in_dim(factor, carry.out.shape, (0,))
            rows[...] = lax.bitcast_convert_type(out.astype(q.dtype), rows.dtype)
            plgpu.commit_smem()
            for part, place in places:
                plgpu.copy_smem_to_gmem(rows.at[part], out_ref.at[place])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == LOADER)
        def _() -> None:
            plgpu.set_max_registers(split.loader, action="decrease")
            kv_head = lax.div(head, group)
            last = lax.max(pl.cdiv(end, PAGE_SIZE) - 1, 0)
            stream(
                keys, values, k_ref.at[:, :, kv_head], v_ref.at[:, :, kv_head],
                lambda i: table[row, lax.min(i, last)], blocks,
            )  # fmt: skip

    sizes = config.stages, config.keys, head_dim, COMPUTE_WARPGROUPS
    as_is = side(k_pages.dtype, *sizes)
    values = widening_side(*sizes) if is_fp8 else as_is
    terms = None
    if config.in_fp8:
        terms = tile((COMPUTE_WARPGROUPS, 2, ROWS, head_dim), e4m3.DTYPE)
    # The simulator's wgmma does not take its left side from registers.
    weights = tile((COMPUTE_WARPGROUPS, ROWS, config.keys), operand) if interpret else None
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q_operand.shape, q_operand.dtype),  # bits of q's dtype
        grid=(num_heads // packed, tiles, batch),
        grid_names=("heads", "tile", "row"),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=NAME,
        scratch_types=[
            tile((COMPUTE_WARPGROUPS, ROWS, head_dim), q_operand.dtype),
            terms,
            weights,
            as_is if config.in_fp8 else values,
            values,
            plgpu.Barrier(num_arrivals=boxes, num_barriers=COMPUTE_WARPGROUPS),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(
        q_operand, k_pages, v_pages, page_table, starts, lengths,
        *(jnp.asarray(each, jnp.float32).reshape(1) for each in (k_scale, v_scale)),
    )  # fmt: skip
    return lax.bitcast_convert_type(out[:, :tokens], q.dtype)


def _packed(group: int) -> int:
    """Heads in a tile, of a group that shares keys."""
    return math.gcd(group, MAX_PACKED_HEADS)


def _in_two_terms(q: Ref, terms: Sequence[Ref]) -> Array:
    """Write rows of queries [rows, head_dim] as two terms of the same shape, codes of a and b.

    Returns unit [rows], powers of two: q = unit * (a + b), exact where a number is at least 2^-9 of
    its row's largest; what is lost of others is at most 2^-17 of it.
    """
    wide = plgpu.load(q, layout=MATRIX, optimized=False).astype(jnp.float32)
    a, b, unit = two_terms(wide, axis=1)
    for ref, term in zip(terms, (a, b), strict=True):
        ref[...] = term.astype(ref.dtype)
    plgpu.commit_smem()
    return unit


def _attend(
    carry: Carry,
    queries: Sequence[Ref],
    keys: Side,
    values: Side,
    block: Array,
    scale: Array,
    *,
    limit: Array | None,
    weights: Ref | None,
    turn: Callable[[], None],
) -> Carry:
    """Take one block of keys and values into the carry, and free it; a compute warpgroup's work.

    queries: terms of them, [rows, head_dim] in shared memory.
    scale: of the scores, for all or [rows]; log2(e) included, positive.
    limit: int32 [rows], the last key of the block that each row sees; None if all see all.
    weights: [rows, keys] in shared memory, by way of which the weights go into the second product;
        None to leave them in registers.
    turn: called where this warpgroup stops using the tensor cores, and where it wants them again.
    """
    shape = (ROWS, keys.slots.shape[1])

    slot = keys.slot(block)
    plgpu.barrier_wait(keys.filled.at[slot])
    scores = product_of_sum(queries, keys.slots.at[slot].transpose((1, 0)), turn)
    plgpu.barrier_arrive(keys.free.at[slot])
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
    plgpu.barrier_wait(values.filled.at[slot])
    out = _add_product(out, weight, values.slots.at[slot], weights)
    plgpu.barrier_arrive(values.free.at[slot])
    return Carry(out, peak, total)


def _add_product(out: Array, weight: Array, values: Ref, weights: Ref | None) -> Array:
    """out + weight @ values, float32."""
    if weights is None:
        return pl.run_state(lambda acc: plgpu.wgmma(acc, weight, values))(
            plgpu.WGMMAAccumulatorRef.init(out)
        )
    weights[...] = weight
    plgpu.commit_smem()
    return out + product(weights, values)
