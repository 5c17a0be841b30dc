"""Defines `rope_and_cache` plainly: a pair is a complex number, and tokens are stored one by
one."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

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
    batch, tokens = positions.shape

    def product(part: Array, weight_scale: Array | None) -> Array:
        y = part.astype(jnp.float32).sum(axis=0)
        if weight_scale is not None:
            y = y * weight_scale
        rounded = y[: batch * tokens].astype(dtype).astype(jnp.float32)
        return rounded.reshape(batch, tokens, *part.shape[2:])

    def rotated(x: Array) -> Array:
        half = x.shape[-1] // 2
        angles = positions[..., None, None].astype(jnp.float32) * frequencies
        pairs = lax.complex(x[..., :half], x[..., half:]) * jnp.exp(1j * angles)
        return jnp.concatenate([pairs.real, pairs.imag], axis=-1).astype(dtype)

    def stored(pages: Array, new: Array, scale: Array) -> Array:
        is_fp8 = pages.dtype in (e4m3.DTYPE, jnp.int8)
        wide = new.astype(jnp.float32) / scale[..., None] if is_fp8 else new
        values = e4m3.store(wide, pages.dtype) if is_fp8 else wide.astype(pages.dtype)

        def store(i: Array, pages: Array) -> Array:
            row, token = i // tokens, i % tokens
            position = cached_lens[row] + token
            column = jnp.minimum(position // pages.shape[1], page_table.shape[1] - 1)
            page = page_table[row, column]
            place = (page, position % pages.shape[1], 0, 0)
            is_stored = (position < kv_lens[row]) & (page < pages.shape[0])
            with_it = lax.dynamic_update_slice(pages, values[row, token][None, None], place)
            return jnp.where(is_stored, with_it, pages)

        return lax.fori_loop(0, batch * tokens, store, pages)

    scales = weight_scales or (None, None, None)
    q, k, v = (product(*each) for each in zip(parts, scales, strict=True))
    q = rotated(q)
    if k_scale.ndim:
        wide = jnp.repeat(k_scale, q.shape[2] // k_scale.shape[0])[:, None]
        q = (q.astype(jnp.float32) * wide).astype(dtype)
    return q, stored(k_pages, rotated(k), k_scale), stored(v_pages, v.astype(dtype), v_scale)
