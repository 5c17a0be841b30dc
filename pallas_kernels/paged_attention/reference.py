"""The meaning of `paged_attention`: gathers every page, and takes one softmax in float32."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import e4m3


def load_pages(pages: Array, ids: Array) -> Array:
    """Gather pages. ids: [batch, n].

    Returns float32 [batch, n * page_size, num_kv_heads, head_dim].
    """
    blocks = jnp.take(pages, ids, axis=0, mode="clip")
    blocks = blocks.reshape(ids.shape[0], -1, *pages.shape[2:])
    if pages.dtype in (e4m3.DTYPE, jnp.int8):
        return e4m3.load(blocks)
    return blocks.astype(jnp.float32)


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
    batch, tokens, _, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    k = load_pages(k_pages, page_table) * k_scale
    v = load_pages(v_pages, page_table) * v_scale
    grouped = q.astype(jnp.float32).reshape(batch, tokens, num_kv_heads, -1, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, k, precision=lax.Precision.HIGHEST)
    slots = jnp.arange(k.shape[1])
    positions = cached_lens[:, None] + jnp.arange(tokens)
    visible = (slots <= positions[..., None]) & (slots < kv_lens[:, None, None])
    scores = jnp.where(visible[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v, precision=lax.Precision.HIGHEST)
    return out.reshape(q.shape).astype(q.dtype)
