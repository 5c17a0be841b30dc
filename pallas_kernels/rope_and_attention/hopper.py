"""Implements rotary embedding, the write into the cache, and decode attention on Hopper in one
launch.

It is the launch of `paged_attention.hopper_decode`, and two things differ in a thread block. Its
compute warpgroup adds up, scales and rotates the queries itself, while the loader fetches pages:

    q parts_gmem ── sums, rotation ── q_smem        in `rope_and_cache`'s layout of registers
         │                                          then in the layout that wgmma reads

And the thread block whose split ends with the sequence's new token makes its key and value. Their
codes take their place in the last block in shared memory, before it is multiplied:

    k, v parts_gmem ── sums, rotation, codes ── key_smem, value_smem
         │ when TMA has filled the last block        `insert`
    row of the block in shared memory
         │ when the loop is over                     `store`
    row of the page in gmem

So all numbers are rounded as in two launches. TMA never reads what the launch writes: it has
filled the slot by then, and no other thread block reads a page that has room for a new token.
"""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3, tuned
from pallas_kernels.hopper import BOX_ROWS
from pallas_kernels.paged_attention import hopper as attention
from pallas_kernels.paged_attention.hopper_decode import (
    DecodeProblem,
    DecodeWork,
    NewTokens,
    launch,
    packed_shape,
    unpacked,
)
from pallas_kernels.paged_attention.hopper_decode_config import (
    MAX_ROWS,
    DecodeConfig,
    configure,
    tuned_as,
    unfit,
)
from pallas_kernels.paged_attention.hopper_loop import PAGE_SIZE, Gmem, Ref
from pallas_kernels.rope_and_cache import hopper as rope
from pallas_kernels.rope_and_cache.projections import Projections
from pallas_kernels.rope_and_cache.xla import angles

NAME = "rope_and_attention"
HEAD_DIM = 128
HEADS = 4  # of queries in a tile
TILES_AT_ONCE = 3  # with more of 11 parts, two thread blocks would not fit on an SM
GROUPS = (HEADS, *range(8, MAX_ROWS + 1, 8))
# Of registers, for 8 rows of a block of keys or values: 2 in a warp, 8 numbers in a thread.
BOX = plgpu.Layout.TILED(
    plgpu.Tiling(((BOX_ROWS, HEAD_DIM), (2, HEAD_DIM), (8,))),
    warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1,
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The launches to take.

    in_one: this launch; else `rope_and_cache` and `paged_attention`, one after the other.
    """

    in_one: bool


def is_faster(q: Any, k_pages: Array, capacity: int) -> bool:
    """Return whether one launch was measured to be faster on the GPU in use (`dev.tune`).

    q: the type of the queries, [batch, 1, num_heads, head_dim]. capacity: keys that a sequence has
        room for.
    """
    found = tuned.find(NAME, tuned_as(q, k_pages, capacity))
    return found is not None and Config(**found).in_one


def refusal(parts: Projections, k_pages: Array, tokens: int, dtype: jnp.dtype) -> str | None:
    """Return why the kernel cannot take these arrays, or be compiled; None if it can."""
    num_heads, head_dim = parts.q.shape[2:]
    q = jax.ShapeDtypeStruct((1, tokens, num_heads, head_dim), dtype)
    if reason := rope.refusal(parts, k_pages, dtype) or attention.refusal(q, k_pages):  # type: ignore[arg-type]
        return reason
    if tokens != 1:
        return f"each sequence must have one new token, got {tokens}"
    if head_dim != HEAD_DIM:
        return f"head_dim must be {HEAD_DIM}, got {head_dim}"
    if (group := num_heads // k_pages.shape[2]) not in GROUPS:
        return f"4 heads, or a multiple of 8 up to {MAX_ROWS}, must share keys, got {group}"
    return None


def rope_and_attention(
    parts: Projections,
    positions: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    cached_lens: Array,
    kv_lens: Array,
    weight_scales: Projections | None,
    k_scale: Array,
    v_scale: Array,
    *,
    frequencies: np.ndarray,
    dtype: jnp.dtype,
    cos_and_sin: tuple[Array, Array] | None = None,
    config: DecodeConfig | None = None,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """Compute the package's `rope_and_attention` for operands that `refusal` accepts.

    cos_and_sin: the result of `angles`, if it has been computed before.
    config: None takes that of attention alone.
    interpret: plgpu.InterpretGPUParams, to run in the simulator.
    """
    batch = len(cached_lens)
    num_heads, head_dim = parts.q.shape[2:]
    capacity = page_table.shape[1] * PAGE_SIZE
    if config is None:
        q: Any = jax.ShapeDtypeStruct((batch, 1, num_heads, head_dim), dtype)
        config = configure(q, k_pages, capacity, False)
        config = replace(config, in_fp8=k_pages.dtype == e4m3.DTYPE)
    if reason := unfit(config, k_pages, capacity):
        raise ValueError(f"{config} cannot work: {reason}")
    cos, sin = cos_and_sin or angles(positions, frequencies)
    operands = rope.Operands(
        parts, weight_scales, cos, sin, page_table, cached_lens, kv_lens,
        k_scale.astype(jnp.float32).reshape(-1), v_scale.astype(jnp.float32).reshape(-1),
    )  # fmt: skip
    y, k_pages, v_pages = _launch(
        operands, k_pages, v_pages, dtype=dtype, config=config, interpret=interpret,
    )  # fmt: skip
    return y, k_pages, v_pages


@functools.partial(jax.jit, static_argnames=("dtype", "config", "interpret"))
def _launch(
    operands: rope.Operands,
    k_pages: Array,
    v_pages: Array,
    *,
    dtype: jnp.dtype,
    config: DecodeConfig,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """Launch the kernel. Returns attention's result and the pages."""
    batch, num_kv_heads = len(operands.cached_lens), k_pages.shape[2]
    num_heads, head_dim = operands.parts.q.shape[2:]
    problem = DecodeProblem(1, num_heads // num_kv_heads, head_dim, config)
    packed = jax.ShapeDtypeStruct(packed_shape(problem, batch, num_kv_heads), dtype)
    k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
    gmem = Gmem(
        None, k_ref, v_ref, operands.page_table, operands.cached_lens, operands.kv_lens,
        operands.k_scale, operands.v_scale,
    )  # fmt: skip
    new = NewTokens(
        operands,
        _Scratch(
            q=plgpu.SMEM((problem.rows, head_dim), dtype),
            k=plgpu.SMEM((1, head_dim), k_pages.dtype),
            v=plgpu.SMEM((1, head_dim), k_pages.dtype),
        ),
        functools.partial(_NewToken, problem),
    )
    y = launch(problem, gmem, packed, 1.0, dtype, interpret, name=NAME, new=new)
    return unpacked(problem, y), jax.freeze(k_ref), jax.freeze(v_ref)


class _Scratch(NamedTuple):
    """Shared memory without swizzling: types outside of the kernel, references within.

    q: the rows of queries [rows, head_dim]. k, v: of the new token, [1, head_dim].
    """

    q: Any
    k: Any
    v: Any


@dataclass(frozen=True)
class _NewToken:
    """The new token of a thread block's sequence, and the heads of the block: a
    `hopper_decode.NewToken`."""

    problem: DecodeProblem
    gmem: Gmem
    operands: rope.Operands
    smem: _Scratch
    work: DecodeWork

    def prepare(self, q: Ref, has_newest: Array) -> None:
        group, rows = self.problem.group, self.problem.rows
        of_queries = [rope.Tile("q", first) for first in range(0, group, HEADS)]
        of_both = [*of_queries, rope.Tile("k", 0), rope.Tile("v", 0)]
        pl.when(has_newest)(lambda: self._make(of_both))
        pl.when(~has_newest)(lambda: self._make(of_queries))
        if group < rows:
            layout = rope.tile_layout(group, self.problem.head_dim // 2)
            nothing = jnp.zeros((rows - group, self.problem.head_dim // 2), jnp.float32)
            nothing = plgpu.layout_cast(nothing, layout)
            self._put(self.smem.q.at[pl.ds(group, rows - group)], rope.Halves(nothing, nothing))
        plgpu.commit_smem()
        wide = plgpu.load(
            self.smem.q.transpose((1, 0)), layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False
        )
        q.transpose((1, 0))[...] = wide
        plgpu.commit_smem()

    def _make(self, tiles: list[rope.Tile]) -> None:
        """Make tiles of this block's heads, and keep them, after several have been read."""
        first_head = {"q": self.work.kv_head * self.problem.group}
        for some in itertools.batched(tiles, TILES_AT_ONCE):
            read = []
            for kind, within in some:
                row = self._row(HEADS if kind == "q" else 1)
                tile = rope.Tile(kind, first_head.get(kind, self.work.kv_head) + within)
                read.append((row, tile, within, row.total(tile)))
            for row, tile, within, x in read:
                smem = getattr(self.smem, tile.kind).at[pl.ds(within, row.problem.heads)]
                self._put(smem, row.finished(tile, x))

    def insert(self, kind: str, block: Ref, key: Array) -> None:
        # Values have been upcast, keys have not, and there is no `where` for 8 bits.
        wide = jnp.float16 if block.dtype == e4m3.DTYPE else block.dtype

        def load(ref: Ref, layout: Any) -> Array:
            return plgpu.load(ref, layout=layout, optimized=False).astype(wide)

        def write(page: int) -> None:
            box = page * PAGE_SIZE + lax.div(at, BOX_ROWS) * BOX_ROWS
            rows = block.at[pl.ds(pl.multiple_of(box, BOX_ROWS), BOX_ROWS)]
            old = load(rows, BOX)
            new = lax.broadcast_in_dim(new_row, old.shape, (1,))
            row = plgpu.broadcasted_iota(jnp.int32, old.shape, 0, layout=BOX)
            mixed = jnp.where(row == lax.rem(at, BOX_ROWS), new, old)
            rows[...] = mixed.astype(block.dtype)

        at = lax.rem(key, PAGE_SIZE)
        new_row = load(getattr(self.smem, kind).at[0], BOX.reduce(0))
        for page in range(block.shape[0] // PAGE_SIZE):
            # Also in pages after it, which are the same page again (`hopper_decode._load`).
            pl.when(key < (page + 1) * PAGE_SIZE)(functools.partial(write, page))
        plgpu.commit_smem()

    def store(self) -> None:
        row = self._row(1)
        for kind in ("k", "v"):
            x = row.problem.load(getattr(self.smem, kind), pl.ds(0, 1))
            row.cache(rope.Tile(kind, self.work.kv_head), x)

    def _row(self, heads: int) -> rope.Row:
        """Return the sequence's row of the projections, in tiles of so many heads."""
        half, group = self.problem.head_dim // 2, self.problem.group
        problem = rope.Problem(1, heads, half, group, is_q_scaled=False)
        pages = self.gmem.k_pages, self.gmem.v_pages
        return rope.Row(problem, self.operands, None, *pages, self.work.sequence)

    def _put(self, smem: Ref, x: rope.Halves) -> None:
        half = self.problem.head_dim // 2
        for i, each in enumerate(x):
            smem.at[:, pl.ds(i * half, half)][...] = each.astype(smem.dtype)
