"""Moves pages of the cache through shared memory to wgmma, for both Hopper attention kernels.

One warpgroup, the loader, copies blocks of keys and values from the cache's pages into two rings of
slots; the others multiply. Each slot has barriers "filled" and "free":

    k_pages_gmem, v_pages_gmem           [num_pages, 64, head_dim], one head of the pool
         │ TMA, page by page             `stream`: the loader's work
    codes_smem (FP8 that is upcast)      barriers: landed
         │ upcast to float16             `upcast`, by the loader
    slots_smem                           barriers: filled, free
         │ wgmma                         `product`

wgmma takes two operands of one dtype. With bfloat16 pages all operands are bfloat16. FP8 keys can
be multiplied without conversion, with queries as two float8 terms (`two_terms`). FP8 values have to
be upcast, because FP8 wgmma can read its operands along the summed dimension only. They become
float16, which is exact and takes one instruction for two codes, where bfloat16 takes four.
Attention weights, and queries for upcast keys, are then float16 too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3
from pallas_kernels.hopper import tile

Ref = Any  # the classes of references in a kernel are not public

PAGE_SIZE = 64
BARRIERS_BYTES = 3072  # the most shared memory that is needed besides tiles
# Less than any score, but finite, so that a row that has seen no key does not compute inf - inf.
FLOOR = -1e30
# Weights are exp2(score - peak + HEADROOM); float16 reaches from 2^-24 (subnormal) to 2^16.
HEADROOM = 14.0
# Queries are divided by this for float16, so that they do not overflow below 2^20, and the smallest
# lose less than 2^-20.
QUERY_UNIT = 16.0
# Slots that FP8 blocks are upcast into: one is filled while another is read.
UPCAST_SLOTS = 2
# Masks of a float32's bits: its exponent, and sign, exponent and the bits that float8_e4m3fn keeps.
_EXPONENT, _FOUR_BITS = 0x7F800000, -0x100000
_EXPONENT_ONE, _EXPONENT_BIAS = 1 << 23, 127


class Gmem(NamedTuple):
    """A kernel's arguments: arrays outside of it, references to global memory within.

    q: queries in the kernel's layout. k_scale, v_scale: float32 [1]. The others as in
    `pallas_kernels.paged_attention.paged_attention`.
    """

    q: Any
    k_pages: Any
    v_pages: Any
    page_table: Any
    cached_lens: Any
    kv_lens: Any
    k_scale: Any
    v_scale: Any


class Ring(NamedTuple):
    """A ring in shared memory that passes blocks of keys, or of values, to the tensor cores.

    slots: [slots, keys, head_dim]; filled, free: barriers [slots].
    codes: float8_e4m3fn [stages, keys, head_dim], FP8 pages that the loader upcasts.
    landed: their barriers [stages]. Both are None if pages go directly to the slots.

    Fields are scratch types outside of a kernel, references within.
    """

    slots: Ref
    filled: Ref
    free: Ref
    codes: Ref
    landed: Ref

    def slot(self, block: Array) -> Array:
        """Return the slot of the stream's block number `block`."""
        return lax.rem(block, self.slots.shape[0])

    def wait(self, slot: Array) -> None:
        """Wait until a slot is filled."""
        plgpu.barrier_wait(self.filled.at[slot])

    def release(self, slot: Array) -> None:
        """Tell the loader that this warpgroup has read a slot."""
        plgpu.barrier_arrive(self.free.at[slot])


def operand_dtype(pages: jnp.dtype) -> jnp.dtype:
    """Return the dtype of wgmma's 16-bit operands, given the dtype of the pages."""
    return jnp.dtype(jnp.float16 if pages == e4m3.DTYPE else jnp.bfloat16)


def operand_query(q: Array, pages: jnp.dtype) -> tuple[Array, float]:
    """Return q divided by a factor, as `operand_dtype`, and the factor."""
    if operand_dtype(pages) == q.dtype:
        return q, 1.0
    limit = jnp.finfo(jnp.float16).max
    scaled = jnp.clip(q.astype(jnp.float32) / QUERY_UNIT, -limit, limit)
    return scaled.astype(jnp.float16), QUERY_UNIT


def positive(total: Array) -> Array:
    """Return sums of weights as divisors: a row that sees no key has 0, which becomes 1.

    Other rows have at least exp2(HEADROOM), the weight of their largest score.
    """
    return lax.max(total, 1.0)


def two_terms(x: Array, axis: int) -> tuple[Array, Array, Array]:
    """Split x, float32 of bfloat16's precision, into unit * (a + b).

    float8_e4m3fn represents a exactly. It represents b exactly where x is at least 2^-9 of the
    largest number along `axis`, and is off by at most 2^-17 of that elsewhere; for 16 * b these are
    2^-13 and 2^-18.
    Returns a and b, float32 of x's shape, and unit: powers of two, without `axis`.
    """
    largest = lax.bitcast_convert_type(jnp.abs(x).max(axis=axis), jnp.int32)
    # The unit brings the largest number to [128, 256); float8_e4m3fn ends at 448.
    exponent = lax.max(largest & _EXPONENT, 8 * _EXPONENT_ONE) - 7 * _EXPONENT_ONE
    inverse = lax.bitcast_convert_type(2 * _EXPONENT_BIAS * _EXPONENT_ONE - exponent, jnp.float32)
    v = x * lax.broadcast_in_dim(inverse, x.shape, (1 - axis,))
    cut = lax.bitcast_convert_type(v, jnp.int32) & _FOUR_BITS
    # Truncated, so that b needs no more bits. Below 2^-6 a would have fewer bits, hence 0.
    a = jnp.where(jnp.abs(v) < 2**-6, 0.0, lax.bitcast_convert_type(cut, jnp.float32))
    return a, v - a, lax.bitcast_convert_type(exponent, jnp.float32)


def ring_types(dtype: jnp.dtype, stages: int, keys: int, head_dim: int, readers: int) -> Ring:
    """Return the scratch types of a ring for pages of `dtype` that are not converted.

    stages: blocks in flight. keys: per block. readers: warpgroups that read each block.
    """
    pages = keys // PAGE_SIZE
    return Ring(
        slots=tile((stages, keys, head_dim), dtype),
        filled=plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
        codes=None,
        landed=None,
    )


def upcasting_ring_types(stages: int, keys: int, head_dim: int, readers: int) -> Ring:
    """Return the scratch types of a ring in which the loader upcasts FP8 pages.

    Arguments as in `ring_types`.
    """
    landing = ring_types(jnp.dtype(e4m3.DTYPE), stages, keys, head_dim, readers)
    return Ring(
        slots=tile((UPCAST_SLOTS, keys, head_dim), operand_dtype(e4m3.DTYPE)),
        filled=plgpu.Barrier(num_barriers=UPCAST_SLOTS),
        free=plgpu.Barrier(num_arrivals=readers, num_barriers=UPCAST_SLOTS),
        codes=landing.slots,
        landed=landing.filled,
    )


def stream(
    keys: Ring,
    values: Ring,
    k_pages: Ref,
    v_pages: Ref,
    page_at: Callable[[Array], Array],
    blocks: Array,
) -> None:
    """Stream `blocks` blocks through both rings: the loader's work.

    Values may be upcast without keys, but not keys without values.

    k_pages, v_pages: [num_pages, page_size, head_dim] in global memory, one head of the pool.
    page_at: returns the pool's page for the stream's i-th; also called beyond the last block.
    """
    rings = ((keys, k_pages), (values, v_pages))
    slots = max(ring.slots.shape[0] for ring, _ in rings)
    pages_per_block = keys.slots.shape[1] // PAGE_SIZE

    def pages_of(block: Array) -> list[Array]:
        return [page_at(block * pages_per_block + i) for i in range(pages_per_block)]

    def fetch_codes(block: Array) -> None:
        pages = pages_of(block)
        stage = lax.rem(block, values.codes.shape[0])
        for ring, pool in rings:
            if ring.codes is not None:
                _copy(pool, pages, ring.codes.at[stage], ring.landed.at[stage])

    if values.codes is not None:
        pl.loop(0, lax.min(blocks, values.codes.shape[0]))(fetch_codes)

    # After the last block, slots are only waited for, as every phase of a barrier has to be seen.
    @pl.loop(0, blocks + slots)
    def fill_slots(block: Array) -> None:
        pages = pages_of(block)
        for ring, pool in rings:
            slot, mine = ring.slot(block), ring.slots.shape[0]

            @pl.when((block >= mine) & (block < blocks + mine))
            def wait_until_free(ring: Ring = ring, slot: Array = slot) -> None:
                plgpu.barrier_wait(ring.free.at[slot])

            @pl.when(block < blocks)
            def fill(ring: Ring = ring, pool: Ref = pool, slot: Array = slot) -> None:
                if ring.codes is None:
                    _copy(pool, pages, ring.slots.at[slot], ring.filled.at[slot])
                else:
                    stage = lax.rem(block, ring.codes.shape[0])
                    plgpu.barrier_wait(ring.landed.at[stage])
                    upcast(ring.codes.at[stage], ring.slots.at[slot])
                    plgpu.barrier_arrive(ring.filled.at[slot])

        if values.codes is not None:
            ahead = block + values.codes.shape[0]
            pl.when(ahead < blocks)(lambda: fetch_codes(ahead))


def upcast(codes: Ref, target: Ref) -> None:
    """Convert FP8 codes [keys, head_dim] to float16, page by page to save registers."""
    for row in range(0, codes.shape[0], PAGE_SIZE):
        rows = pl.ds(row, PAGE_SIZE)
        # In this layout a thread reads four codes at once, in wgmma's own it would be two.
        page = plgpu.load(codes.at[rows], layout=plgpu.Layout.WGMMA_UPCAST_2X)
        target[rows] = page.astype(target.dtype)
    plgpu.commit_smem()


def product(a: Ref, b: Ref, meanwhile: Callable[[], None] = lambda: None) -> Array:
    """Return a @ b in float32, for a and b in shared memory.

    meanwhile: called while the tensor cores compute the product.
    """
    return product_of_sum([a], b, meanwhile)


def product_of_sum(
    terms: Sequence[Ref], b: Ref, meanwhile: Callable[[], None] = lambda: None
) -> Array:
    """Return sum(terms) @ b; see `product`."""

    def multiply(acc: Ref) -> Array:
        for a in terms:
            plgpu.wgmma(acc, a, b)
        meanwhile()
        return acc[...]

    shape = terms[0].shape[0], b.shape[1]
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _copy(pool: Ref, pages: list[Array], block: Ref, barrier: Ref) -> None:
    """Start copying pages of the pool into a block in shared memory."""
    for i, page in enumerate(pages):
        rows = pl.ds(i * PAGE_SIZE, PAGE_SIZE)
        plgpu.copy_gmem_to_smem(pool.at[page], block.at[rows], barrier)
