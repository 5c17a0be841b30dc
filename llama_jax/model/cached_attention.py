"""Attention over the paged cache of one layer: rotate, store the new keys and values, attend."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from llama_jax.model.rope import rope_frequencies
from llama_jax.model.sharding import divided_over
from llama_jax.model.spec import ModelSpec
from pallas_kernels.fp8_matmul.terms import Parts
from pallas_kernels.paged_attention import KERNELS as ATTENTION_KERNELS
from pallas_kernels.rope_and_attention import HOPPER, in_two, rope_and_attention, why_not
from pallas_kernels.rope_and_cache import KERNELS as ROPE_KERNELS
from pallas_kernels.rope_and_cache.projections import Projections


class LayerCache(NamedTuple):
    """One layer of a `KVCache`, with the page table of the sequences in this call.

    cached_lens, kv_lens: int32 [b], tokens stored before the call, and after it.
    """

    k: Array
    v: Array
    k_scale: Array
    v_scale: Array
    page_table: Array
    cached_lens: Array
    kv_lens: Array


def cached_attention(
    spec: ModelSpec, qkv: Sequence[Parts], positions: Array, cache: LayerCache
) -> tuple[Array, LayerCache]:
    """Store the keys and values of new tokens [b, t], and let their queries attend to the cache.

    qkv: the products of q_proj, k_proj and v_proj, each [b * t, heads * head_dim].
    positions: int [b, t], for rotary embedding.
    Returns [b, t, heads, head_dim] and the cache.
    """
    kv_heads, head_dim = cache.k.shape[2:]
    parts = Projections(*(each.sums.reshape(*each.sums.shape[:2], -1, head_dim) for each in qkv))
    scales = [each.scale.reshape(-1, head_dim) for each in qkv if each.scale is not None]
    dtype = jnp.dtype(spec.dtype)
    in_one = HOPPER.is_meant_by(spec.implementation) and not spec.is_batch_invariant
    in_one = in_one and not cache.k_scale.ndim and not cache.v_scale.ndim
    if in_one and not why_not(parts, cache.k, cache.page_table, positions.shape[1], dtype):
        run = rope_and_attention
    else:
        run = partial(
            in_two,
            is_batch_invariant=spec.is_batch_invariant,
            rope=spec.implementation_of(ROPE_KERNELS),
            attention=spec.implementation_of(ATTENTION_KERNELS),
        )
    y, k, v = run(
        parts, positions, cache.k, cache.v, cache.page_table, cache.cached_lens, cache.kv_lens,
        Projections(*scales) if scales else None,
        _of_own_heads(cache.k_scale, kv_heads), _of_own_heads(cache.v_scale, kv_heads),
        frequencies=rope_frequencies(spec.config), dtype=dtype,
    )  # fmt: skip
    return y, cache._replace(k=k, v=v)


def _of_own_heads(scale: Array, kv_heads: int) -> Array:
    """Slice scales per kv head down to those of this device's heads."""
    axis = divided_over("kv_heads")
    if scale.ndim == 0 or axis is None:
        return scale
    return lax.dynamic_slice_in_dim(scale, lax.axis_index(axis) * kv_heads, kv_heads)
