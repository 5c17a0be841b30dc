"""Defines the key/value cache: a pool of pages for each layer, and a page table for all slots.

Position p of slot b is in page `page_table[b, p // page_size]`, at offset `p % page_size`. The
model knows no more than that, so the engine is free to decide which slot owns which page.
"""

from typing import Annotated, Literal

import jax.numpy as jnp
from flax import struct
from jax import Array
from msgspec import Meta

from llama_jax.model.config import PAGE_SIZE, LlamaConfig
from pallas_kernels import device, e4m3

KVDtype = Literal["bf16", "fp8"]
# The scales (k, v) of an FP8 cache, per layer: a number each, or one for each kv head.
_Positive = Annotated[float, Meta(gt=0, le=3.4e38)]
Scale = _Positive | tuple[_Positive, ...]
KVScales = tuple[tuple[Scale, Scale], ...]


def storage_dtype(kv_dtype: KVDtype, dtype: str) -> jnp.dtype:
    """Return the dtype of the cache: the activations' `dtype`, or for "fp8" float8_e4m3fn, which a
    CPU stores as int8 bits (see `e4m3`).

    Raises ValueError for another name.
    """
    if kv_dtype == "bf16":
        return jnp.dtype(dtype)
    if kv_dtype == "fp8":
        return jnp.dtype(jnp.int8 if device.platform() == "cpu" else e4m3.DTYPE)
    raise ValueError(f"kv_dtype must be 'bf16' or 'fp8', got {kv_dtype!r}")


class KVCache(struct.PyTreeNode):
    """The pages of all layers, and the page table.

    k, v: per layer [num_pages, page_size, num_kv_heads, head_dim], bfloat16, float32,
        float8_e4m3fn or its int8 bits.
    k_scale, v_scale: per layer float32 [], or [num_kv_heads] if each head has its own; FP8 codes
        are multiplied by them, otherwise they are 1. One array per layer, because each layer would
        have to copy its scale out of a common array at every step.
    page_table: int32 [batch, pages_per_slot].
    cached_lens: int32 [batch], tokens stored per slot.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    k_scale: tuple[Array, ...]
    v_scale: tuple[Array, ...]
    page_table: Array
    cached_lens: Array

    @property
    def capacity(self) -> int:
        """Return the number of tokens that a slot has room for."""
        return self.page_table.shape[1] * self.k[0].shape[1]


def init_cache(
    config: LlamaConfig,
    batch_size: int,
    max_seq_len: int,
    dtype: jnp.dtype | str = "bfloat16",
    kv_scales: Array | None = None,
    num_pages: int | None = None,
) -> KVCache:
    """Make an empty cache in which every slot owns enough pages for `max_seq_len` tokens.

    dtype: bfloat16, float32, float8_e4m3fn, or int8 for e4m3fn bit patterns (faster on a CPU).
    kv_scales: `KVScales` as float32, [num_layers, 2] or [num_layers, 2, num_kv_heads].
    num_pages: makes a pool of this many pages that no slot owns yet. Every entry of the table is
        then `num_pages`, a page that does not exist, so nothing is written.
    """
    dtype = jnp.dtype(dtype)
    pages_per_slot = -(-max_seq_len // PAGE_SIZE)
    owned = batch_size * pages_per_slot
    table = jnp.arange(owned, dtype=jnp.int32) if num_pages is None else jnp.full(owned, num_pages)
    pool = (num_pages or owned, PAGE_SIZE, config.num_kv_heads, config.head_dim)
    is_fp8 = dtype in (e4m3.DTYPE, jnp.int8)
    if kv_scales is None or not is_fp8:
        kv_scales = jnp.ones((config.num_layers, 2), jnp.float32)
    return KVCache(
        k=tuple(jnp.zeros(pool, dtype) for _ in range(config.num_layers)),
        v=tuple(jnp.zeros(pool, dtype) for _ in range(config.num_layers)),
        k_scale=tuple(kv_scales[:, 0]),
        v_scale=tuple(kv_scales[:, 1]),
        page_table=table.astype(jnp.int32).reshape(batch_size, pages_per_slot),
        cached_lens=jnp.zeros(batch_size, jnp.int32),
    )


def copy_pages(cache: KVCache, sources: Array, targets: Array) -> KVCache:
    """Copy pages in every layer.

    sources, targets: int32 [n], page numbers; a target past the end is padding.
    """

    def copy(pages: Array) -> Array:
        return pages.at[targets].set(jnp.take(pages, sources, axis=0, mode="clip"), mode="drop")

    return cache.replace(k=tuple(map(copy, cache.k)), v=tuple(map(copy, cache.v)))
