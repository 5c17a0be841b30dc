"""Implements `rope_and_cache` for XLA, which fuses the rotation with its surroundings and scatters
keys and values into the pages in place."""

import functools
import operator

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import e4m3
from pallas_kernels.rope_and_cache.projections import Projections


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
) -> tuple[Array, Array, Array]:
    rows = products(parts, weight_scales, positions.size, dtype)
    q, k, v = (each.reshape(*positions.shape, *each.shape[1:]) for each in rows)
    q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
    where = (page_table, cached_lens, kv_lens)
    k_pages = write_pages(k_pages, k, *where, k_scale)
    v_pages = write_pages(v_pages, v, *where, v_scale)
    return per_head(q, k_scale), k_pages, v_pages


def products(
    parts: Projections, weight_scales: Projections | None, rows: int, dtype: jnp.dtype
) -> Projections:
    """Add the parts of the first `rows` rows up, apply scales, and round to `dtype`.

    Returns [rows, heads, head_dim] of q, k and v.
    """

    def product(part: Array, weight_scale: Array | None) -> Array:
        y = functools.reduce(operator.add, part)[:rows]
        return (y if weight_scale is None else y * weight_scale).astype(dtype)

    scales = weight_scales or (None, None, None)
    return Projections(*(product(*each) for each in zip(parts, scales, strict=True)))


def angles(positions: Array, frequencies: np.ndarray) -> tuple[Array, Array]:
    """Return cosines and sines, float32 [batch * tokens, head_dim / 2] each, as in `apply_rope`."""
    each = positions.reshape(-1, 1).astype(jnp.float32) * frequencies
    return jnp.cos(each), jnp.sin(each)


def apply_rope(x: Array, positions: Array, frequencies: np.ndarray) -> Array:
    """Rotate pairs (j, j + head_dim / 2) of x [batch, tokens, heads, head_dim] by float32 angles.

    positions: int32 [batch, tokens].
    """
    turns = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(turns), jnp.sin(turns)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def write_pages(
    pages: Array, new: Array, page_table: Array, cached_lens: Array, kv_lens: Array, scale: Array
) -> Array:
    """Store the new tokens of each sequence at positions cached_lens[b] to kv_lens[b] - 1.

    pages: [num_pages, page_size, num_kv_heads, head_dim].
    new: [batch, tokens, num_kv_heads, head_dim]; tokens at or past kv_lens[b] are dropped.
    page_table: int32 [batch, pages_per_sequence].
    scale: float32 [] or [num_kv_heads].
    """
    num_pages, page_size = pages.shape[:2]
    positions = cached_lens[:, None] + jnp.arange(new.shape[1])
    column = jnp.minimum(positions // page_size, page_table.shape[1] - 1)
    page = jnp.take_along_axis(page_table, column, axis=1)
    page = jnp.where(positions < kv_lens[:, None], page, num_pages)
    if pages.dtype in (e4m3.DTYPE, jnp.int8):
        new = e4m3.store(new.astype(jnp.float32) / jnp.asarray(scale)[..., None], pages.dtype)
    return pages.at[page, positions % page_size].set(new.astype(pages.dtype), mode="drop")


def per_head(x: Array, scale: Array) -> Array:
    """Multiply x [b, t, heads, head_dim] by scales per kv head, [kv_heads].

    Scales of keys may be applied to queries, and scales of values to the result. A scalar is not
    applied, because attention does that.
    """
    if scale.ndim == 0:
        return x
    wide = jnp.repeat(scale, x.shape[2] // scale.shape[0])[:, None]
    return (x.astype(jnp.float32) * wide).astype(x.dtype)
