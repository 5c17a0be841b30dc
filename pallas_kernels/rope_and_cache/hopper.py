"""Implements `rope_and_cache` on Hopper, in one launch that updates the pages in place.

A tile is some heads of one token. A thread has the same few elements of both halves of a head, so a
rotation needs no other thread. With few tokens a thread block has one tile, so that all tiles are
read at once. With many it has all tiles of a token, and reads the token's angles and page once.
Cosines and sines are the same in all layers, and XLA computes them once (`angles`).
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import e4m3, tuned
from pallas_kernels.device import num_sms
from pallas_kernels.rope_and_cache.projections import Projections
from pallas_kernels.rope_and_cache.xla import angles

NAME = "rope_and_cache"
HEAD_DIMS = (64, 128)
PAGE_DTYPES = (jnp.bfloat16, jnp.float32, e4m3.DTYPE)
WARPS, LANES = 4, 32
# Heads per tile; fewer if SMs would otherwise be idle.
MOST_HEADS, FEWER_HEADS = 8, 4
# Consecutive elements per thread: 16 bytes of float32.
MAX_ELEMENTS = 4
# From this many tiles per SM on, a thread block has all tiles of a token.
TILES_PER_SM = 8
# Tiles that are read before the first is rotated and stored.
TILES_AT_ONCE = 6


@dataclass(frozen=True)
class Config:
    """The division of the work.

    heads: per tile.
    is_by_token: whether a thread block has all tiles of a token, or a single tile.
    """

    heads: int
    is_by_token: bool


def refusal(parts: Projections, k_pages: Array, dtype: jnp.dtype) -> str | None:
    """Return why the kernel cannot take these arrays; None if it can."""
    if dtype != jnp.bfloat16:
        return f"q must be bfloat16, got {dtype}"
    if k_pages.dtype not in PAGE_DTYPES:
        return f"pages must be bfloat16, float32 or float8_e4m3fn, got {k_pages.dtype}"
    if k_pages.shape[3] not in HEAD_DIMS:
        return f"head_dim must be 64 or 128, got {k_pages.shape[3]}"
    if wrong := [each.dtype for each in parts if each.dtype not in (jnp.bfloat16, jnp.float32)]:
        return f"parts must be bfloat16 or float32, got {wrong[0]}"
    return None


def rope_and_cache(
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
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Array, Array, Array]:
    """Compute the package's `rope_and_cache` for operands that `refusal` accepts.

    cos_and_sin: the result of `angles`, if it has been computed before.
    config: for tuning; None takes `configure`'s.
    interpret: plgpu.InterpretGPUParams, to run in the simulator.
    """
    config = config or configure(parts, positions.size)
    if reason := unfit(config, parts):
        raise ValueError(f"{config} cannot work: {reason}")
    cos, sin = cos_and_sin or angles(positions, frequencies)
    operands = Operands(
        parts, weight_scales, cos, sin, page_table, cached_lens, kv_lens,
        k_scale.astype(jnp.float32).reshape(-1), v_scale.astype(jnp.float32).reshape(-1),
    )  # fmt: skip
    batch, tokens = positions.shape
    q, k_pages, v_pages = _launch(
        operands, k_pages, v_pages, tokens=tokens, is_q_scaled=k_scale.ndim > 0, dtype=dtype,
        config=config, interpret=interpret,
    )  # fmt: skip
    return q.reshape(batch, tokens, *q.shape[1:]), k_pages, v_pages


class Operands(NamedTuple):
    """The operands: arrays outside of the kernel, references to global memory within.

    cos, sin: [batch * tokens, head_dim / 2]. k_scale, v_scale: [1] or [num_kv_heads].
    """

    parts: Projections
    weight_scales: Projections | None
    cos: Any
    sin: Any
    page_table: Any
    cached_lens: Any
    kv_lens: Any
    k_scale: Any
    v_scale: Any


class Tile(NamedTuple):
    """The heads of q, k or v ("kind") in a tile. first: the first of them, static or an index."""

    kind: str
    first: Any


class Halves(NamedTuple):
    """Elements j (a) and j + head_dim / 2 (b) of heads, each [heads, head_dim / 2]."""

    a: Array
    b: Array


def configure(parts: Projections, rows: int) -> Config:
    """Return the tuned configuration of the GPU in use, or else the heuristic's. rows: all
    tokens."""
    found = tuned.find(NAME, tuned_as(parts, rows))
    return Config(**found) if found else heuristic(parts, rows)


def tuned_as(parts: Projections, rows: int) -> str:
    """Name the problems that share a tuned configuration: rows are rounded up to a power of two."""
    count, _, num_heads, head_dim = parts.q.shape
    heads = f"{num_heads}/{parts.k.shape[2]}x{head_dim}"
    return f"heads={heads} parts={count} {parts.q.dtype} rows<={pl.next_power_of_2(rows)}"


def heuristic(parts: Projections, rows: int) -> Config:
    """Return an untuned configuration: smaller tiles if SMs would otherwise be idle, and by token
    if there are many tiles and no partial sums to add."""
    num_kv_heads = parts.k.shape[2]
    tiles = rows * pl.cdiv(parts.q.shape[2] + 2 * num_kv_heads, MOST_HEADS)
    most = FEWER_HEADS if tiles < num_sms() else MOST_HEADS
    heads = max(each for each in (1, 2, 4, 8) if num_kv_heads % each == 0 and each <= most)
    is_many = tiles >= TILES_PER_SM * num_sms()
    return Config(heads, is_many and parts.q.shape[0] == 1)


def unfit(config: Config, parts: Projections) -> str | None:
    """Return why a configuration cannot work; None if it can."""
    num_kv_heads = parts.k.shape[2]
    if config.heads not in (1, 2, 4, 8) or num_kv_heads % config.heads:
        return f"heads must be 1, 2, 4 or 8 and divide {num_kv_heads}, got {config.heads}"
    return None


def tile_layout(heads: int, half: int) -> Any:
    """Return a warpgroup's layout of [heads, half] elements: lanes along a head, warps along heads.
    If there are too few heads, several warps have the same elements."""
    elements = max(half // LANES, min(MAX_ELEMENTS, heads * half // (WARPS * LANES)))
    of_warp = LANES * elements // half
    warps = max(1, heads // of_warp)
    repeated = (plgpu.Replicated(WARPS // warps),) if warps < WARPS else ()
    by_lane = (-3, -2) if of_warp > 1 else (-2,)
    if of_warp == 1 or warps == 1:
        tiling: tuple[tuple[int, ...], ...] = ((heads, half), (elements,))
        by_warp = -3
    else:
        tiling, by_warp = ((heads, half), (of_warp, half), (elements,)), -5
    over_warps = ((by_warp,) if warps > 1 else ()) + repeated
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiling), warp_dims=over_warps, lane_dims=by_lane, vector_dim=-1
    )


@functools.partial(
    jax.jit, static_argnames=("tokens", "is_q_scaled", "dtype", "config", "interpret")
)
def _launch(
    operands: Operands,
    k_pages: Array,
    v_pages: Array,
    *,
    tokens: int,
    is_q_scaled: bool,
    dtype: jnp.dtype,
    config: Config,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """Launch the kernel. Returns q [batch * tokens, num_heads, head_dim], and the pages."""
    rows, half = operands.cos.shape
    num_kv_heads, head_dim = k_pages.shape[2:]
    num_heads = operands.parts.q.shape[2]
    problem = Problem(tokens, config.heads, half, num_heads // num_kv_heads, is_q_scaled)
    tiles = [
        Tile(kind, first)
        for kind, count in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads))
        for first in range(0, count, config.heads)
    ]

    def body(gmem: Operands, k_gmem: Any, v_gmem: Any, q_gmem: Any) -> None:
        row = Row(problem, gmem, q_gmem, k_gmem, v_gmem, lax.axis_index("row"))
        if config.is_by_token:
            for some in itertools.batched(tiles, TILES_AT_ONCE):
                for tile, x in [(tile, row.total(tile)) for tile in some]:
                    row.finish(tile, x)
            return
        index = lax.axis_index("tile")
        for kind in Projections._fields:
            here = [i for i, tile in enumerate(tiles) if tile.kind == kind]

            @pl.when((here[0] <= index) & (index <= here[-1]))
            def of_kind(kind: str = kind, first: int = here[0]) -> None:
                tile = Tile(kind, (index - first) * config.heads)
                row.finish(tile, row.total(tile))

    k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
    q = pl.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, num_heads, head_dim), dtype),
        mesh=plgpu.Mesh(
            grid=(1 if config.is_by_token else len(tiles), rows), grid_names=("tile", "row")
        ),
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret or False,
        name=NAME,
    )(operands, k_ref, v_ref)  # fmt: skip
    return q, jax.freeze(k_ref), jax.freeze(v_ref)


@dataclass(frozen=True)
class Problem:
    """The static properties of a launch.

    tokens: new tokens per sequence.
    heads, half: of a tile [heads, half], which has half of each head.
    group: query heads per kv head.
    is_q_scaled: whether q is multiplied by the scales of its kv heads.
    """

    tokens: int
    heads: int
    half: int
    group: int
    is_q_scaled: bool

    @property
    def layout(self) -> Any:
        return tile_layout(self.heads, self.half)

    @property
    def shape(self) -> tuple[int, int]:
        return self.heads, self.half

    @property
    def halves(self) -> tuple[Any, Any]:
        """Return the slices of both halves of a head."""
        return pl.ds(0, self.half), pl.ds(self.half, self.half)

    def load(self, ref: Any, *place: Any) -> Halves:
        """Load a tile of both halves."""
        return Halves(
            *(
                plgpu.load(ref.at[*place, each], layout=self.layout, optimized=False)
                for each in self.halves
            )
        )

    def per_head(self, ref: Any, first: Any, heads_of_each: int) -> Array:
        """Return the scales of a tile's heads: a number, or [heads, half]."""
        if ref.shape[0] == 1:
            return ref[0]
        index = lax.div(first, heads_of_each)
        found = ref[index]
        row = plgpu.broadcasted_iota(jnp.int32, self.shape, 0, layout=self.layout)
        for i in range(1, pl.cdiv(self.heads, heads_of_each)):
            found = jnp.where(lax.div(row, heads_of_each) >= i, ref[index + i], found)
        return found


@dataclass(frozen=True)
class Row:
    """One token of a thread block's work, with the references that it reads and writes."""

    problem: Problem
    gmem: Operands
    q_gmem: Any
    k_gmem: Any
    v_gmem: Any
    row: Array

    def total(self, tile: Tile) -> Halves:
        """Add a tile's parts in order, and scale the sum."""
        heads = pl.ds(tile.first, self.problem.heads)
        parts_gmem = getattr(self.gmem.parts, tile.kind)
        found = [
            self.problem.load(parts_gmem, part, self.row, heads)
            for part in range(parts_gmem.shape[0])
        ]
        a, b = (
            functools.reduce(jnp.add, [each.astype(jnp.float32) for each in side])
            for side in zip(*found, strict=True)
        )
        if self.gmem.weight_scales is not None:
            scale = self.problem.load(getattr(self.gmem.weight_scales, tile.kind), heads)
            a, b = a * scale.a, b * scale.b
        return Halves(a, b)

    def finish(self, tile: Tile, x: Halves) -> None:
        """Store a tile of q, or of keys or values in the token's page."""
        x = self.finished(tile, x)
        if tile.kind == "q":
            self._store(self.q_gmem, (self.row, pl.ds(tile.first, self.problem.heads)), x)
        else:
            self.cache(tile, x)

    def finished(self, tile: Tile, x: Halves) -> Halves:
        """Rotate a tile unless it is of v, and scale it: float32, to be rounded when stored."""
        if tile.kind != "v":
            x = self._rotated(x)
        if tile.kind == "q":
            if not self.problem.is_q_scaled:
                return x
            scale = self.problem.per_head(self.gmem.k_scale, tile.first, self.problem.group)
            return Halves(x.a * scale, x.b * scale)
        if self.k_gmem.dtype != e4m3.DTYPE:
            return x
        scale_gmem = self.gmem.k_scale if tile.kind == "k" else self.gmem.v_scale
        scale = self.problem.per_head(scale_gmem, tile.first, 1)
        return Halves(*(_saturated(each / scale) for each in x))

    def _rotated(self, x: Halves) -> Halves:
        cos, sin = (
            lax.broadcast_in_dim(
                plgpu.load(ref.at[self.row], layout=self.problem.layout.reduce(0), optimized=False),
                self.problem.shape,
                (1,),
            )
            for ref in (self.gmem.cos, self.gmem.sin)
        )
        return Halves(x.a * cos - x.b * sin, x.b * cos + x.a * sin)

    def cache(self, tile: Tile, x: Halves) -> None:
        """Store a tile of finished keys or values in the token's page, if it has one."""
        pages_gmem = self.k_gmem if tile.kind == "k" else self.v_gmem
        num_pages, page_size = pages_gmem.shape[:2]
        sequence = lax.div(self.row, self.problem.tokens)
        position = self.gmem.cached_lens[sequence] + lax.rem(self.row, self.problem.tokens)
        table = self.gmem.page_table
        page = table[sequence, lax.min(lax.div(position, page_size), table.shape[1] - 1)]

        @pl.when((position < self.gmem.kv_lens[sequence]) & (page < num_pages))
        def store() -> None:
            heads = pl.ds(tile.first, self.problem.heads)
            self._store(pages_gmem, (page, lax.rem(position, page_size), heads), x)

    def _store(self, ref: Any, place: tuple[Any, ...], x: Halves) -> None:
        for each, half_of_head in zip(x, self.problem.halves, strict=True):
            ref[*place, half_of_head] = each.astype(ref.dtype)


def _saturated(x: Array) -> Array:
    return lax.clamp(-e4m3.MAX, x, e4m3.MAX)
