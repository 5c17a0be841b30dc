"""What both Hopper attention kernels share: pages on their way through shared memory to wgmma.

One warpgroup, the loader, copies blocks of keys and values from the cache's pages into a ring of
slots, by TMA; others multiply. Barriers per slot say "filled" and "free".

wgmma takes two operands of one dtype. Next to bfloat16 pages all are bfloat16. FP8 keys can be
multiplied as they are, with queries as two float8 terms (`two_terms`). FP8 values have to be
widened, since FP8 wgmma reads its operands along the dimension that it sums over alone: to float16,
which holds them exactly and is one instruction for two codes where bfloat16 takes four. Weights,
and queries next to widened keys, are then float16 too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3
from pallas_kernels.hopper import swizzled

Ref = Any  # the classes of references in a kernel are not public

PAGE_SIZE = 64
BARRIERS_BYTES = 3072  # at most, of what shared memory holds beside tiles
# Less than any score, and finite: a row that has seen no key must not compute inf - inf.
FLOOR = -1e30
# Weights are exp2(score - peak + HEADROOM): float16 ends at 2^16 and, subnormal, at 2^-24.
HEADROOM = 14.0
# Queries are divided by it for float16: those of less than 2^20 do not overflow, and what is lost
# below is less than 2^-20.
QUERY_UNIT = 16.0
# Slots that FP8 blocks are widened into; one is filled while another is read.
WIDENED_SLOTS = 2
# Of a float32: what its exponent counts, and all bits of a number that float8_e4m3fn keeps.
_EXPONENT, _FOUR_BITS = 0x7F800000, -0x100000
_EXPONENT_ONE, _EXPONENT_BIAS = 1 << 23, 127


class Side(NamedTuple):
    """A ring of slots in shared memory: the keys, or the values, on their way to the tensor cores.

    slots: [slots, keys, head_dim]; filled, free: barriers [slots].
    codes: float8_e4m3fn [stages, keys, head_dim], and landed: barriers [stages], where FP8 pages
        arrive if the loader is to widen them; None if pages go straight to the slots.
    """

    slots: Ref
    filled: Ref
    free: Ref
    codes: Ref
    landed: Ref

    def slot(self, block: Array) -> Array:
        """Where the stream's `block` is."""
        return lax.rem(block, self.slots.shape[0])


def tile(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Scratch in shared memory that TMA writes and wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype, shape[-1]))


def operand_dtype(pages: jnp.dtype) -> jnp.dtype:
    """Of wgmma's operands, given the dtype of the pages."""
    return jnp.dtype(jnp.float16 if pages == e4m3.DTYPE else jnp.bfloat16)


def operand_query(q: Array, pages: jnp.dtype) -> tuple[Array, float]:
    """q as `operand_dtype`, and what it has to be multiplied by to be q again."""
    if operand_dtype(pages) == q.dtype:
        return q, 1.0
    limit = jnp.finfo(jnp.float16).max
    scaled = jnp.clip(q.astype(jnp.float32) / QUERY_UNIT, -limit, limit)
    return scaled.astype(jnp.float16), QUERY_UNIT


def two_terms(x: Array, axis: int) -> tuple[Array, Array, Array]:
    """float32 x of bfloat16's precision as unit * (a + b).

    float8_e4m3fn holds every number of a. It holds those of b of numbers of at least 2^-9 of the
    largest one along `axis`, and for others is off by at most 2^-17 of that; of 16 * b, they are
    2^-13 and 2^-18. Returns a, b, and unit: powers of two, without `axis`.
    """
    largest = lax.bitcast_convert_type(jnp.abs(x).max(axis=axis), jnp.int32)
    # The largest is to be from 128 to 256; float8_e4m3fn ends at 448.
    exponent = lax.max(largest & _EXPONENT, 8 * _EXPONENT_ONE) - 7 * _EXPONENT_ONE
    inverse = lax.bitcast_convert_type(2 * _EXPONENT_BIAS * _EXPONENT_ONE - exponent, jnp.float32)
    v = x * lax.broadcast_in_dim(inverse, x.shape, (1 - axis,))
    cut = lax.bitcast_convert_type(v, jnp.int32) & _FOUR_BITS
    # Cut off, not rounded, so that b is at least as short; less than 2^-6 has fewer bits in a.
    a = jnp.where(jnp.abs(v) < 2**-6, 0.0, lax.bitcast_convert_type(cut, jnp.float32))
    return a, v - a, lax.bitcast_convert_type(exponent, jnp.float32)


def side(dtype: jnp.dtype, stages: int, keys: int, head_dim: int, readers: int) -> Side:
    """Scratch types of a `Side` that pages of `dtype` pass as they are.

    stages: blocks in flight; readers: warpgroups that read each.
    """
    pages = keys // PAGE_SIZE
    return Side(
        slots=tile((stages, keys, head_dim), dtype),
        filled=plgpu.Barrier(num_arrivals=pages, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
        codes=None,
        landed=None,
    )


def widening_side(stages: int, keys: int, head_dim: int, readers: int) -> Side:
    """Scratch types of a `Side` in which the loader widens FP8 pages; arguments as `side` has."""
    landing = side(jnp.dtype(e4m3.DTYPE), stages, keys, head_dim, readers)
    return Side(
        slots=tile((WIDENED_SLOTS, keys, head_dim), operand_dtype(e4m3.DTYPE)),
        filled=plgpu.Barrier(num_barriers=WIDENED_SLOTS),
        free=plgpu.Barrier(num_arrivals=readers, num_barriers=WIDENED_SLOTS),
        codes=landing.slots,
        landed=landing.filled,
    )


def stream(
    keys: Side,
    values: Side,
    k_pages: Ref,
    v_pages: Ref,
    page_at: Callable[[Array], Array],
    blocks: Array,
) -> None:
    """Put blocks 0 to `blocks` - 1 through both rings; the loader's work.

    k_pages, v_pages: [num_pages, page_size, head_dim], one head of the pool.
    page_at: the page of the pool that is the stream's i-th; asked beyond the last block too.
    Values are widened if keys are, and may be if keys are not.
    """
    sides = ((keys, k_pages), (values, v_pages))
    slots = max(ring.slots.shape[0] for ring, _ in sides)
    pages_per_block = keys.slots.shape[1] // PAGE_SIZE

    def pages_of(block: Array) -> list[Array]:
        return [page_at(block * pages_per_block + i) for i in range(pages_per_block)]

    def fetch_codes(block: Array) -> None:
        pages = pages_of(block)
        stage = lax.rem(block, values.codes.shape[0])
        for ring, pool in sides:
            if ring.codes is not None:
                _copy(pool, pages, ring.codes.at[stage], ring.landed.at[stage])

    if values.codes is not None:
        pl.loop(0, lax.min(blocks, values.codes.shape[0]))(fetch_codes)

    # Beyond the last block, slots are only waited for: every phase of a barrier has to be seen.
    @pl.loop(0, blocks + slots)
    def _(block: Array) -> None:
        pages = pages_of(block)
        for ring, pool in sides:
            slot, mine = ring.slot(block), ring.slots.shape[0]

            @pl.when((block >= mine) & (block < blocks + mine))
            def _(ring: Side = ring, slot: Array = slot) -> None:
                plgpu.barrier_wait(ring.free.at[slot])

            @pl.when(block < blocks)
            def _(ring: Side = ring, pool: Ref = pool, slot: Array = slot) -> None:
                if ring.codes is None:
                    _copy(pool, pages, ring.slots.at[slot], ring.filled.at[slot])
                else:
                    stage = lax.rem(block, ring.codes.shape[0])
                    plgpu.barrier_wait(ring.landed.at[stage])
                    widen(ring.codes.at[stage], ring.slots.at[slot])
                    plgpu.barrier_arrive(ring.filled.at[slot])

        if values.codes is not None:
            ahead = block + values.codes.shape[0]
            pl.when(ahead < blocks)(lambda: fetch_codes(ahead))


def widen(codes: Ref, target: Ref) -> None:
    """FP8 [keys, head_dim] to float16, for wgmma to read; a page at a time to save registers."""
    for row in range(0, codes.shape[0], PAGE_SIZE):
        rows = pl.ds(row, PAGE_SIZE)
        # In this layout a thread reads four codes at once; in wgmma's own it would be two.
        page = plgpu.load(codes.at[rows], layout=plgpu.Layout.WGMMA_UPCAST_2X)
        target[rows] = page.astype(target.dtype)
    plgpu.commit_smem()


def product(a: Ref, b: Ref, meanwhile: Callable[[], None] = lambda: None) -> Array:
    """a @ b in float32, from shared memory. meanwhile: called when the product is under way."""
    return product_of_sum([a], b, meanwhile)


def product_of_sum(
    terms: Sequence[Ref], b: Ref, meanwhile: Callable[[], None] = lambda: None
) -> Array:
    """sum(terms) @ b, otherwise as `product`."""

    def multiply(acc: Ref) -> Array:
        for a in terms:
            plgpu.wgmma(acc, a, b)
        meanwhile()
        return acc[...]

    shape = terms[0].shape[0], b.shape[1]
    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def _copy(pool: Ref, pages: list[Array], block: Ref, barrier: Ref) -> None:
    for i, page in enumerate(pages):
        rows = pl.ds(i * PAGE_SIZE, PAGE_SIZE)
        plgpu.copy_gmem_to_smem(pool.at[page], block.at[rows], barrier)
