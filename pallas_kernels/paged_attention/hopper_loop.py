"""The inner loop of both Hopper attention kernels: pages into shared memory, the online softmax.

A thread block is three warpgroups. The loader copies blocks of keys and values from the cache's
pages into a ring of slots, by TMA; two compute warpgroups multiply. FP8 pages are widened to
bfloat16 in between, by the loader, so that the computation never sees a code. Barriers per slot say
"filled" and "free".

Algorithm: FlashAttention-3 (Shah et al., 2024); online softmax (Milakov and Gimelshein, 2018).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3
from pallas_kernels.hopper import swizzled

Ref = Any  # the classes of references in a kernel are not public

PAGE_SIZE = 64
ROWS = 64  # of queries that one compute warpgroup holds: wgmma's M
COMPUTE_WARPGROUPS = 2
LOADER = COMPUTE_WARPGROUPS  # the last warpgroup of a thread block
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
# Less than any score, and finite: a row that has seen no key must not compute inf - inf.
FLOOR = -1e30
# Slots that FP8 blocks are widened into; one is filled while another is read.
WIDENED_SLOTS = 2


class Carry(NamedTuple):
    """The online softmax of some rows over the keys so far, float32.

    out: [rows, head_dim], sum of exp2(score - peak) * value; total: [rows], of exp2(score - peak);
    peak: [rows], the largest score. Scores are in units of log(2).
    """

    out: Array
    peak: Array
    total: Array


class Side(NamedTuple):
    """A ring of slots in shared memory: the keys, or the values, on their way to the tensor cores.

    slots: bfloat16 [slots, keys, head_dim]; filled, free: barriers [slots].
    codes: float8_e4m3fn [stages, keys, head_dim], and landed: barriers [stages], where FP8 pages
        arrive; None for bfloat16 pages, which go straight to the slots.
    """

    slots: Ref
    filled: Ref
    free: Ref
    codes: Ref
    landed: Ref


class Registers(NamedTuple):
    """Per thread of a compute and of the loader warpgroup. Three warpgroups start with 168 each."""

    compute: int
    loader: int


def tile(shape: tuple[int, ...], dtype: jnp.dtype) -> Any:
    """Scratch in shared memory that TMA writes and wgmma reads."""
    return plgpu.SMEM(shape, dtype, transforms=swizzled(dtype, shape[-1]))


def side(dtype: jnp.dtype, stages: int, keys: int, head_dim: int, readers: int) -> Side:
    """Scratch types of a `Side`. stages: blocks in flight; readers: warpgroups that read each."""
    is_fp8 = dtype == e4m3.DTYPE
    slots = WIDENED_SLOTS if is_fp8 else stages
    pages = keys // PAGE_SIZE
    return Side(
        slots=tile((slots, keys, head_dim), jnp.dtype(jnp.bfloat16)),
        filled=plgpu.Barrier(num_arrivals=1 if is_fp8 else pages, num_barriers=slots),
        free=plgpu.Barrier(num_arrivals=readers, num_barriers=slots),
        codes=tile((stages, keys, head_dim), dtype) if is_fp8 else None,
        landed=plgpu.Barrier(num_arrivals=pages, num_barriers=stages) if is_fp8 else None,
    )


def registers(dtype: jnp.dtype) -> Registers:
    """The split with which nothing spills: widening takes registers, copying next to none."""
    return Registers(216, 72) if dtype == e4m3.DTYPE else Registers(232, 40)


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
    """
    sides = ((keys, k_pages), (values, v_pages))
    slots, keys_per_block = keys.slots.shape[:2]
    pages_per_block = keys_per_block // PAGE_SIZE

    def pages_of(block: Array) -> list[Array]:
        return [page_at(block * pages_per_block + i) for i in range(pages_per_block)]

    def fetch_codes(block: Array) -> None:
        pages = pages_of(block)
        stage = lax.rem(block, keys.codes.shape[0])
        for ring, pool in sides:
            _copy(pool, pages, ring.codes.at[stage], ring.landed.at[stage])

    if keys.codes is not None:
        pl.loop(0, lax.min(blocks, keys.codes.shape[0]))(fetch_codes)

    # Beyond the last block, slots are only waited for: every phase of a barrier has to be seen.
    @pl.loop(0, blocks + slots)
    def _(block: Array) -> None:
        slot = lax.rem(block, slots)
        pages = pages_of(block)
        for ring, pool in sides:

            @pl.when(block >= slots)
            def _(ring: Side = ring) -> None:
                plgpu.barrier_wait(ring.free.at[slot])

            @pl.when(block < blocks)
            def _(ring: Side = ring, pool: Ref = pool) -> None:
                if ring.codes is None:
                    _copy(pool, pages, ring.slots.at[slot], ring.filled.at[slot])
                else:
                    _widen(ring, lax.rem(block, ring.codes.shape[0]), slot)

        if keys.codes is not None:
            ahead = block + keys.codes.shape[0]
            pl.when(ahead < blocks)(lambda: fetch_codes(ahead))


def start(head_dim: int) -> Carry:
    """The carry before any key."""
    return Carry(
        out=plgpu.layout_cast(jnp.zeros((ROWS, head_dim), jnp.float32), plgpu.Layout.WGMMA),
        peak=plgpu.layout_cast(jnp.full((ROWS,), FLOOR, jnp.float32), PER_ROW),
        total=plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), PER_ROW),
    )


def attend(
    carry: Carry,
    q: Ref,
    keys: Side,
    values: Side,
    slot: Array,
    scale: Array,
    *,
    limit: Array | None,
    weights: Ref | None,
    turn: Callable[[], None] = lambda: None,
) -> Carry:
    """Take one slot of keys and values into the carry, and free it; a compute warpgroup's work.

    q: bfloat16 [rows, head_dim] in shared memory. scale: of the scores; log2(e) included, positive.
    limit: int32 [rows], the last key of the slot that each row sees; None if all see all.
    weights: bfloat16 [rows, keys] in shared memory, by way of which the weights go into the second
        product; None to leave them in registers, which the simulator's wgmma does not take.
    turn: called where this warpgroup stops using the tensor cores, and where it wants them again.
    """
    shape = (ROWS, keys.slots.shape[1])

    plgpu.barrier_wait(keys.filled.at[slot])
    scores = _product(q, keys.slots.at[slot].transpose((1, 0)), turn)
    plgpu.barrier_arrive(keys.free.at[slot])
    if limit is not None:
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        scores = jnp.where(key <= lax.broadcast_in_dim(limit, shape, (0,)), scores, -jnp.inf)
    peak = lax.max(carry.peak, scores.max(axis=1) * scale)
    shrink = jnp.exp2(carry.peak - peak)
    weight = jnp.exp2(scores * scale - lax.broadcast_in_dim(peak, shape, (0,)))
    total = carry.total * shrink + weight.sum(axis=1)
    out = carry.out * lax.broadcast_in_dim(shrink, carry.out.shape, (0,))
    weight = weight.astype(jnp.bfloat16)
    turn()
    plgpu.barrier_wait(values.filled.at[slot])
    out = _add_product(out, weight, values.slots.at[slot], weights)
    plgpu.barrier_arrive(values.free.at[slot])
    return Carry(out, peak, total)


def _copy(pool: Ref, pages: list[Array], block: Ref, barrier: Ref) -> None:
    for i, page in enumerate(pages):
        rows = pl.ds(i * PAGE_SIZE, PAGE_SIZE)
        plgpu.copy_gmem_to_smem(pool.at[page], block.at[rows], barrier)


def _widen(ring: Side, stage: Array, slot: Array) -> None:
    """One block, a page at a time: a warpgroup's registers do not hold more."""
    plgpu.barrier_wait(ring.landed.at[stage])
    for row in range(0, ring.slots.shape[1], PAGE_SIZE):
        rows = pl.ds(row, PAGE_SIZE)
        # In this layout a thread reads four codes at once; in wgmma's own it would be two.
        codes = plgpu.load(ring.codes.at[stage, rows], layout=plgpu.Layout.WGMMA_UPCAST_2X)
        # There is no instruction from float8 to bfloat16.
        ring.slots[slot, rows] = codes.astype(jnp.float32).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.barrier_arrive(ring.filled.at[slot])


def _add_product(out: Array, weight: Array, values: Ref, weights: Ref | None) -> Array:
    """out + weight @ values, float32."""
    if weights is None:
        return pl.run_state(lambda acc: plgpu.wgmma(acc, weight, values))(
            plgpu.WGMMAAccumulatorRef.init(out)
        )
    weights[...] = weight
    plgpu.commit_smem()

    return out + _product(weights, values)


def _product(a: Ref, b: Ref, meanwhile: Callable[[], None] = lambda: None) -> Array:
    """a @ b in float32. meanwhile: called when the product is under way."""

    def multiply(acc: Ref) -> Array:
        plgpu.wgmma(acc, a, b)
        meanwhile()
        return acc[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((a.shape[0], b.shape[1]), jnp.float32))
