"""Implements decode attention on Hopper: one to a few new tokens per sequence, the paged cache.

Its time is that of reading the cache. The query heads that share keys, times the new tokens, are
the rows of one tile, and the keys are split over thread blocks until every SM has some. Operands
are swapped: keys and values are wgmma's left operands, with a height of 64, and the few rows of
queries its right operands, with a width from 8. So the softmax computes hardly any padding.

A block has two warpgroups, and two blocks share an SM:

    k_pages_gmem, v_pages_gmem
         │ TMA                               the loader: `hopper_loop.stream`
    rings of keys and of values              barriers "filled" and "free"
         │ upcast to float16 where needed    the compute warpgroup: `Operand.wait`
         │ scores = K q^T                    meanwhile, values are upcast
         │ softmax, weights_smem
         │ out += V^T weights^T
    a part of the softmax in gmem            or the result, if keys are not split
         │ a second launch adds the parts    hopper_combine.py, or the first block of a cluster
    result in gmem

FP8 keys are multiplied without conversion, with each row of queries as two float8 terms
(`_in_two_terms`): a right operand of twice the width costs nothing. Values have to be upcast.

Algorithm: Flash-Decoding (Dao et al., 2023).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic_gpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3
from pallas_kernels.hopper import BOX_ROWS, tile
from pallas_kernels.paged_attention.hopper_combine import (
    MATRIX,
    PER_ROW,
    combine,
    combined,
    filled,
    per_row,
    store,
)
from pallas_kernels.paged_attention.hopper_decode_config import (
    NAME,
    DecodeConfig,
    configure,
    tiling,
    unfit,
)
from pallas_kernels.paged_attention.hopper_loop import (
    FLOOR,
    HEADROOM,
    PAGE_SIZE,
    Gmem,
    Ref,
    Ring,
    operand_dtype,
    operand_query,
    positive,
    product,
    ring_types,
    stream,
    two_terms,
    upcast,
)

COMPUTE, LOADER = range(2)
TERM_RATIO = 16  # the second term is its code divided by this
FLOAT32 = jnp.dtype(jnp.float32)


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
    _, tokens, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    capacity = page_table.shape[1] * PAGE_SIZE
    config = config or configure(q, k_pages, capacity, is_batch_invariant)
    if reason := unfit(config, k_pages, capacity):
        raise ValueError(f"{config} cannot work: {reason}")
    problem = DecodeProblem(tokens, num_heads // num_kv_heads, head_dim, config)
    packed, q_unit = (q, 1.0) if config.in_fp8 else operand_query(q, k_pages.dtype)
    packed = _packed(problem, packed, num_kv_heads)
    k_scale, v_scale = (jnp.asarray(each, FLOAT32).reshape(1) for each in (k_scale, v_scale))
    gmem = Gmem(packed, k_pages, v_pages, page_table, cached_lens, kv_lens, k_scale, v_scale)
    out = launch(problem, gmem, packed, q_unit, q.dtype, interpret)
    return unpacked(problem, out)


@dataclass(frozen=True)
class DecodeProblem:
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
        return tiling(self.tokens * self.group)[0]

    @property
    def rows(self) -> int:
        """Return the rows of queries in a tile."""
        return tiling(self.tokens * self.group)[1]

    @property
    def is_whole(self) -> bool:
        """Return whether keys are not split, so that there are no parts to add."""
        return self.config.splits == 1


class _DecodeSmem(NamedTuple):
    """Shared memory and a barrier: scratch types outside of the kernel, references within.

    q: [rows, head_dim]; also holds the result that TMA stores.
    terms: float8_e4m3fn [2 rows, head_dim], the two terms of q; None unless `in_fp8`.
    weights: [rows, keys], from the softmax to the second product.
    written: the cluster's parts are in global memory; None unless `in_cluster`.
    """

    keys: Operand
    q_filled: Any
    q: Any
    terms: Any
    values: Operand
    weights: Any
    written: Any


def _out_type(problem: DecodeProblem, packed: Any) -> list[jax.ShapeDtypeStruct]:
    """Return the results' types: the packed result unless a second launch makes it, and the fields
    of each split's `DecodeCarry` unless keys are not split."""
    batch, num_kv_heads = packed.shape[:2]
    result = [jax.ShapeDtypeStruct(packed.shape, packed.dtype)]
    parts = problem.config.splits, batch, num_kv_heads, problem.tiles
    carries = [
        jax.ShapeDtypeStruct((*parts, problem.head_dim, problem.rows), FLOAT32),
        jax.ShapeDtypeStruct((*parts, problem.rows), FLOAT32),
        jax.ShapeDtypeStruct((*parts, problem.rows), FLOAT32),
    ]
    if problem.is_whole:
        return result
    return result + carries if problem.config.in_cluster else carries


def _scratch_types(problem: DecodeProblem, pages: jnp.dtype, q_dtype: jnp.dtype) -> _DecodeSmem:
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
        written=plgpu.ClusterBarrier(collective_axes=("split",)) if config.in_cluster else None,
    )


def packed_shape(problem: DecodeProblem, batch: int, num_kv_heads: int) -> tuple[int, ...]:
    """Return the shape in which a launch has queries: [batch, num_kv_heads, rows, head_dim].

    The rows are the query heads that share keys, token by token; more than a box of TMA's are
    padded to full tiles.
    """
    rows = problem.tokens * problem.group
    rows = problem.tiles * problem.rows if rows > BOX_ROWS else rows
    return batch, num_kv_heads, rows, problem.head_dim


def _packed(problem: DecodeProblem, q: Array, num_kv_heads: int) -> Array:
    """Bring q [batch, tokens, num_heads, head_dim] to `packed_shape`, padded with zeros."""
    batch, tokens, _, head_dim = q.shape
    rows = tokens * problem.group
    q = q.reshape(batch, tokens, num_kv_heads, problem.group, head_dim).transpose(0, 2, 1, 3, 4)
    q = q.reshape(batch, num_kv_heads, rows, head_dim)
    missing = packed_shape(problem, batch, num_kv_heads)[2] - rows
    return jnp.pad(q, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing else q


def unpacked(problem: DecodeProblem, out: Array) -> Array:
    """Undo `_packed`."""
    batch, num_kv_heads, _, head_dim = out.shape
    tokens, group = problem.tokens, problem.group
    out = out[:, :, : tokens * group].reshape(batch, num_kv_heads, tokens, group, head_dim)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, tokens, num_kv_heads * group, head_dim)


class DecodeWork(NamedTuple):
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


def _work(problem: DecodeProblem, gmem: Gmem) -> DecodeWork:
    sequence, kv_head = lax.axis_index("sequence"), lax.axis_index("kv_head")
    first_row = lax.axis_index("tile") * problem.rows
    position, length = gmem.cached_lens[sequence], gmem.kv_lens[sequence]
    end = lax.min(position + problem.tokens, length)
    share = _keys_per_split(end, problem.config)
    first = lax.axis_index("split") * share
    end = lax.min(first + share, end)
    blocks = pl.cdiv(lax.max(end - first, 0), problem.config.keys)
    return DecodeWork(sequence, kv_head, first_row, position, length, first, end, blocks)


def _keys_per_split(end: Array, config: DecodeConfig) -> Array | int:
    """Return the keys of a split. end: int32, keys that a sequence's last token sees."""
    if config.keys_per_split is not None:
        return config.keys_per_split
    return pl.cdiv(pl.cdiv(end, config.keys), config.splits) * config.keys


class NewToken(Protocol):
    """Makes a thread block's queries, and the key and the value of its sequence's new token, within
    the launch (see `rope_and_attention`)."""

    def prepare(self, q: Ref, has_newest: Array) -> None:
        """Write the queries into shared memory, and keep the key and the value where the split
        has them."""

    def insert(self, kind: str, block: Ref, key: Array) -> None:
        """Write the key or the value ("k", "v") into its place in a block of pages."""

    def store(self) -> None:
        """Store the key and the value in the cache."""


class NewTokens(NamedTuple):
    """Lets a launch make its `NewToken`s.

    operands: arrays. scratch: types of shared memory.
    of: makes a thread block's, from the launch's arguments, the references of both, and its work.
    """

    operands: Any
    scratch: Any
    of: Callable[[Gmem, Any, Any, DecodeWork], NewToken]


def launch(
    problem: DecodeProblem,
    gmem: Gmem,
    packed: Any,
    q_unit: float,
    dtype: jnp.dtype,
    interpret: Any,
    *,
    name: str = NAME,
    new: NewTokens | None = None,
) -> Array:
    """Attend, and add the parts of split keys. Returns the result in the shape of `packed`.

    gmem: the arguments; without q if there is `new`, and then the pages may be `jax.Ref`s.
    packed: the queries, as `_packed` arranges them, or their type.
    q_unit: of the queries, from `operand_query`.
    dtype: of the result.
    """
    config = problem.config
    batch, num_kv_heads = packed.shape[:2]
    pages = gmem.k_pages.dtype

    def kernel(gmem: Gmem, operands_gmem: Any, *outputs_gmem: Ref) -> None:
        def body(smem: _DecodeSmem, scratch_smem: Any) -> None:
            warpgroup = lax.axis_index("warpgroup")
            work = _work(problem, gmem)
            new_token = new and new.of(gmem, operands_gmem, scratch_smem, work)

            @pl.when(warpgroup == COMPUTE)
            def compute() -> None:
                _compute(problem, work, gmem, smem, outputs_gmem, q_unit, dtype, new_token)

            @pl.when((warpgroup == LOADER) & (work.blocks > 0))
            def load() -> None:
                _load(work, gmem, smem)

        pl.run_scoped(
            body, _scratch_types(problem, pages, packed.dtype), new and new.scratch,
            collective_axes="warpgroup",
        )  # fmt: skip

    splits, split = (config.splits,), ("split",)
    grid, names = (problem.tiles, num_kv_heads, batch), ("tile", "kv_head", "sequence")
    found = pl.kernel(
        kernel,
        out_type=_out_type(problem, packed),
        mesh=plgpu.Mesh(
            grid=grid if config.in_cluster else splits + grid,
            grid_names=names if config.in_cluster else split + names,
            cluster=splits if config.in_cluster else (),
            cluster_names=split if config.in_cluster else (),
            num_threads=2,
            thread_name="warpgroup",
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or False,
        name=name,
    )(gmem, new and new.operands)
    if problem.is_whole or config.in_cluster:
        return lax.bitcast_convert_type(found[0], dtype)
    out, peak, total = found
    return combine(out, peak, total, gmem.v_scale, packed, dtype, interpret)


def _compute(
    problem: DecodeProblem,
    work: DecodeWork,
    gmem: Gmem,
    smem: _DecodeSmem,
    outputs_gmem: Sequence[Ref],
    q_unit: float,
    out_dtype: jnp.dtype,
    new_token: NewToken | None,
) -> None:
    """Attend from a tile's rows of queries to a split's keys: the compute warpgroup's work."""
    config, rows = problem.config, problem.rows
    place = (work.sequence, work.kv_head, pl.ds(work.first_row, rows))
    # Of the first new token, if the split has it; else it is not in a block of the split.
    newest = work.position - work.first
    has_newest = (work.first <= work.position) & (work.position < work.end)
    if new_token:
        new_token.prepare(smem.q, has_newest)
    else:
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

        def insert(kind: str, block_smem: Ref) -> None:
            if new_token:
                key = newest - block * config.keys
                is_here = has_newest & (block == work.blocks - 1)
                pl.when(is_here)(lambda: new_token.insert(kind, block_smem, key))

        return _attend(
            carry, queries, smem.keys, smem.values, smem.weights, slot, scale, seen, insert
        )

    carry = DecodeCarry(
        out=filled((problem.head_dim, rows), 0.0, MATRIX),
        peak=filled((rows,), FLOOR, PER_ROW),
        total=filled((config.keys, rows), 0.0, MATRIX),
    )
    carry = lax.fori_loop(0, work.blocks, attend, carry)
    if new_token:
        # Only now, as TMA has read the page.
        pl.when(has_newest)(new_token.store)

    total = carry.total.sum(axis=0)
    if problem.is_whole:
        result = carry.out * per_row(gmem.v_scale[0] / positive(total), carry.out)
        store(result, smem.q, outputs_gmem[0].at[place], out_dtype)
        return
    part = lax.axis_index("split"), work.sequence, work.kv_head, lax.axis_index("tile")
    parts_gmem = outputs_gmem[-3:]
    for out_gmem, each in zip(parts_gmem, (carry.out, carry.peak, total), strict=True):
        out_gmem[part] = each
    if config.in_cluster:
        _combine_in_cluster(
            problem, work, gmem.v_scale, smem, outputs_gmem[0], parts_gmem, out_dtype
        )


def _combine_in_cluster(
    problem: DecodeProblem,
    work: DecodeWork,
    v_scale_gmem: Ref,
    smem: _DecodeSmem,
    y_gmem: Ref,
    parts_gmem: Sequence[Ref],
    dtype: jnp.dtype,
) -> None:
    """Combine the parts that the blocks of a cluster have written, in the first of them."""
    _fence()
    plgpu.commit_smem()  # all threads of the warpgroup are here
    plgpu.barrier_arrive(smem.written)
    plgpu.barrier_wait(smem.written)  # each block, so that none ends before others arrive there

    @pl.when(lax.axis_index("split") == 0)
    def add_up() -> None:
        _fence()
        place = work.sequence, work.kv_head
        own = [each.at[:, *place, lax.axis_index("tile")] for each in parts_gmem]
        for first in range(0, problem.rows, BOX_ROWS):
            rows = pl.ds(first, BOX_ROWS)
            y = combined(own, rows, v_scale_gmem[0])
            target = y_gmem.at[*place, pl.ds(work.first_row + first, BOX_ROWS)]
            store(y, smem.q.at[rows], target, dtype)


@plgpu.inline_mgpu()
def _fence(_: Any) -> None:
    """Order this thread's reads and writes of global memory before and after for the whole GPU.

    A cluster's barrier orders those of shared memory only.
    """
    mosaic_gpu.utils.inline_ptx("fence.acq_rel.gpu;", has_side_effects=True)


def _load(work: DecodeWork, gmem: Gmem, smem: _DecodeSmem) -> None:
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
    insert: Callable[[str, Ref], None],
) -> DecodeCarry:
    """Attend to one slot of keys and values, update the carry, and free the slot.

    q: [rows, head_dim], or its two terms [2 rows, head_dim], in shared memory.
    weights: [rows, keys], scratch in shared memory.
    scale: the positive factor of scores, including log2(e); a number or [rows].
    limit: int32 [rows], the last key of the slot that each row sees.
    insert: adds what the pages lack to a block of keys ("k") or values ("v").
    """
    rows = weights.shape[0]

    keys.wait(slot)
    insert("k", keys.block(slot))
    scores = product(keys.block(slot), q.transpose((1, 0)), lambda: values.wait(slot))
    keys.release(slot)
    insert("v", values.block(slot))  # not above: a branch beside the product takes registers
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
