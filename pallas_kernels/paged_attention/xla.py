"""Implements `paged_attention` for XLA: a loop over blocks of keys with an online softmax.

The loop's trip count depends on the longest sequence at run time, so one compiled program serves
every length, and neither time nor memory grows with the page pool. Blocks past a sequence's end
contribute exactly zero, so its result does not depend on the length of others.

Algorithm: FlashAttention (Dao et al., 2022), online softmax (Milakov and Gimelshein, 2018).
"""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.paged_attention.reference import load_pages

KEYS_PER_BLOCK = 256
_MASKED = -1e30


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    cached_lens: Array,
    kv_lens: Array,
    k_scale: Array | float,
    v_scale: Array | float,
) -> Array:
    batch, tokens, num_heads, head_dim = q.shape
    page_size, num_kv_heads = k_pages.shape[1:3]
    pages_per_block = min(max(1, KEYS_PER_BLOCK // page_size), page_table.shape[1])
    block = pages_per_block * page_size
    padding = -page_table.shape[1] % pages_per_block
    page_table = jnp.pad(page_table, ((0, 0), (0, padding)))

    scale = k_scale * head_dim**-0.5
    grouped = q.astype(jnp.float32).reshape(batch, tokens, num_kv_heads, -1, head_dim) * scale
    queries = grouped.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, -1, head_dim)
    positions = cached_lens[:, None] + jnp.arange(tokens)
    group = num_heads // num_kv_heads

    def body(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, total, peak = carry
        ids = lax.dynamic_slice_in_dim(page_table, i * pages_per_block, pages_per_block, axis=1)
        k, v = load_pages(k_pages, ids), load_pages(v_pages, ids)
        scores = jnp.einsum("bkqd,bskd->bkqs", queries, k, precision=lax.Precision.HIGHEST)
        slots = i * block + jnp.arange(block)
        visible = (slots <= positions[..., None]) & (slots < kv_lens[:, None, None])
        visible = jnp.tile(visible, (1, group, 1))[:, None]
        scores = jnp.where(visible, scores, _MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        shrink = jnp.exp(peak - new_peak)
        weights = jnp.where(visible, jnp.exp(scores - new_peak[..., None]), 0.0)
        out = out * shrink[..., None] + jnp.einsum(
            "bkqs,bskd->bkqd", weights, v, precision=lax.Precision.HIGHEST
        )
        return out, total * shrink + weights.sum(axis=-1), new_peak

    shape = queries.shape[:3]
    carry = (jnp.zeros_like(queries), jnp.zeros(shape), jnp.full(shape, _MASKED))
    # As in fp8_matmul, the barrier ties the zeros to the queries: XLA would hoist them to the start
    # of the program.
    carry, queries = lax.optimization_barrier((carry, queries))
    blocks = -(-jnp.max(kv_lens) // block)
    out, total, _ = lax.fori_loop(0, blocks, body, carry)
    out = out * v_scale / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    out = out.reshape(batch, num_kv_heads, group, tokens, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape).astype(q.dtype)
