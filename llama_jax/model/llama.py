"""Llama 3.1's forward pass in Flax linen, read from top to bottom.

Source: meta-llama/llama-models (`models/llama3/model.py`); layouts as Hugging Face stores them:
matrices (out, in), rotary pairs (j, j + head_dim / 2). Shapes in comments: b batch, t tokens,
d hidden_size.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from llama_jax.model.fp8 import dequantize_rows
from llama_jax.model.kv_cache import KVCache
from llama_jax.model.linear import (
    Linear,
    Operands,
    Products,
    choose_swiglu,
    declared,
    leave_sums,
    multiply,
    parameter,
)
from llama_jax.model.rope import rope_frequencies
from llama_jax.model.sharding import divided_over
from llama_jax.model.spec import ModelSpec
from pallas_kernels.fp8_matmul import swiglu
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.fp8_matmul.terms import Parts, Terms
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.rope_and_cache import rope_and_cache
from pallas_kernels.rope_and_cache.projections import Projections
from pallas_kernels.rope_and_cache.xla import apply_rope, per_head
from pallas_kernels.row_fusions import add_rms_norm, silu_and_mul


class LayerCache(NamedTuple):
    """One layer's part of a `KVCache`, for the rows of this call.

    cached_lens, kv_lens: int32 [b], tokens stored before the call, and after it.
    """

    k: Array
    v: Array
    k_scale: Array
    v_scale: Array
    page_table: Array
    cached_lens: Array
    kv_lens: Array


class Embedding(Linear):
    """Looks up token embeddings, rows of a matrix [vocab_size, d]. A model with tied embeddings
    multiplies by the same matrix for its output."""

    def lookup(self, tokens: Array) -> Array:
        """Return the rows of these tokens [...] as [..., d]. If the matrix is quantised, no other
        row is dequantised."""
        matrix, axis = self.stored(), divided_over("vocab")
        if axis is not None:
            tokens = tokens - lax.axis_index(axis) * matrix.weight.shape[0]

        def rows(array: Array, places: Array) -> Array:
            if axis is None:
                return jnp.take(array, places, axis=0, mode="clip")
            return array.at[places].get(mode="fill", fill_value=0, wrap_negative_indices=False)

        x = rows(matrix.weight, tokens)
        if matrix.scale is not None:
            per = BLOCK if self.format.scale == "block" else 1
            x = dequantize_rows(x, rows(matrix.scale, tokens // per), self.format)
        x = x.astype(self.spec.dtype)
        return x if axis is None else lax.psum(x, axis)

    def logits(self, hidden: Array) -> Array:
        """Compute float32 logits [..., vocab_size] of hidden states [..., d]."""
        like = jax.ShapeDtypeStruct(hidden.shape, jnp.float32)
        choice = self.choose(like.size // self.in_features, hidden.dtype, out_dtype=like.dtype)
        return multiply(self.spec, self.operands(hidden), choice, like)


class Pending(NamedTuple):
    """A residual stream [b, t, d] and a product that whatever reads it still has to add."""

    residual: Array
    product: Parts

    def added(self) -> Array:
        rows = self.residual.reshape(-1, self.residual.shape[-1]).astype(jnp.float32)
        return (
            (self.product.total() + rows).astype(self.residual.dtype).reshape(self.residual.shape)
        )


def added(x: Array | Pending) -> Array:
    return x.added() if isinstance(x, Pending) else x


def residual_of(x: Array | Pending) -> Array:
    return x.residual if isinstance(x, Pending) else x


class RMSNorm(nn.Module):
    """x / rms(x) in float32, then cast, then times the weight, as Hugging Face orders it."""

    spec: ModelSpec

    def setup(self) -> None:
        dtype = self.spec.format_of(self.path).dtype
        shape = (self.spec.config.hidden_size,)
        self.weight = parameter(self, "weight", shape, ("embed",), dtype)

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * lax.rsqrt(mean_square + self.spec.config.rms_norm_eps)
        return normed.astype(x.dtype) * self.weight.astype(x.dtype)

    def in_terms(self, x: Array | Pending) -> tuple[Array, Terms]:
        """Add what is pending; return the residual stream, and the norm of its rows as `Terms`."""
        residual, product = x if isinstance(x, Pending) else (x, None)
        eps = self.spec.config.rms_norm_eps
        rows = residual.reshape(-1, residual.shape[-1])
        summed, terms = add_rms_norm(product, rows, self.weight, eps)
        return summed.reshape(residual.shape), terms


class Attention(nn.Module):
    """Computes norm, grouped-query attention and the residual's sum. Attention is causal over the
    call's own tokens, or, with a cache, over the layer's pages."""

    spec: ModelSpec

    @nn.compact
    def __call__(
        self, x: Array | Pending, norm: RMSNorm, positions: Array, cache: LayerCache | None
    ) -> tuple[Array | Pending, LayerCache | None]:
        config, hidden = self.spec.config, self.spec.config.hidden_size
        q_size, kv_size = (
            count * config.head_dim for count in (config.num_heads, config.num_kv_heads)
        )
        linear = partial(Linear, self.spec)
        projections = (
            linear(hidden, q_size, ("heads", "embed"), name="q_proj"),
            linear(hidden, kv_size, ("kv_heads", "embed"), name="k_proj"),
            linear(hidden, kv_size, ("kv_heads", "embed"), name="v_proj"),
        )
        o_proj = linear(q_size, hidden, ("embed", "heads"), name="o_proj")
        if self.is_initializing():
            norm(added(x))
            return declared(added(x), *projections, o_proj), cache
        batch, tokens = positions.shape
        rows, dtype = batch * tokens, residual_of(x).dtype
        qkv = Products.of(projections, rows, dtype)
        out = Products.of((o_proj,), rows, dtype, residual_of(x))
        leaves_sums = leave_sums(self.spec, residual_of(x), (qkv, out))
        if leaves_sums:
            residual, terms = norm.in_terms(x)
            projected = qkv.parts(terms, rows)
        else:
            residual = added(x)
            whole = qkv(norm(residual))
            projected = [Parts(y.reshape(1, rows, -1), None) for y in whole]
        if cache is None:
            q, k, v = (
                each.total().astype(residual.dtype).reshape(batch, tokens, -1, config.head_dim)
                for each in projected
            )
            frequencies = rope_frequencies(config)
            q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # [b, t, heads, head_dim]
        else:
            q, cache = _append(self.spec, projected, positions, cache)
            y = paged_attention(
                q, cache.k, cache.v, cache.page_table, cache.cached_lens, cache.kv_lens,
                k_scale=1.0 if cache.k_scale.ndim else cache.k_scale,
                v_scale=1.0 if cache.v_scale.ndim else cache.v_scale,
                is_batch_invariant=self.spec.is_batch_invariant,
                implementation=self.spec.of_attention,
            )  # fmt: skip
            y = per_head(y, _of_own_heads(cache.v_scale, cache.v.shape[2]))
        if leaves_sums:
            (product,) = out.parts(y.reshape(rows, q_size), rows)
            return Pending(residual, product), cache
        (choice,) = out.choices
        return o_proj(y.reshape(batch, tokens, q_size), residual, choice), cache


def _append(
    spec: ModelSpec, qkv: Sequence[Parts], positions: Array, cache: LayerCache
) -> tuple[Array, LayerCache]:
    """Rotate q and k, and write keys and values into the cache.

    qkv: the products, each [b * t, out].
    Returns q, ready for attention, [b, t, heads, head_dim], and the cache.
    """
    kv_heads, head_dim = cache.k.shape[2:]
    sums = (each.sums.reshape(*each.sums.shape[:2], -1, head_dim) for each in qkv)
    scales = [each.scale.reshape(-1, head_dim) for each in qkv if each.scale is not None]
    q, k, v = rope_and_cache(
        Projections(*sums), positions, rope_frequencies(spec.config),
        cache.k, cache.v, cache.page_table, cache.cached_lens, cache.kv_lens,
        weight_scales=Projections(*scales) if scales else None,
        k_scale=_of_own_heads(cache.k_scale, kv_heads),
        v_scale=_of_own_heads(cache.v_scale, kv_heads),
        dtype=jnp.dtype(spec.dtype),
        implementation=spec.of_attention,
    )  # fmt: skip
    return q, cache._replace(k=k, v=v)


def _of_own_heads(scale: Array, kv_heads: int) -> Array:
    """Slice scales per kv head down to those of this device's heads."""
    axis = divided_over("kv_heads")
    if scale.ndim == 0 or axis is None:
        return scale
    return lax.dynamic_slice_in_dim(scale, lax.axis_index(axis) * kv_heads, kv_heads)


class MLP(nn.Module):
    """Computes down(silu(gate(x)) * up(x)) + residual, where x is the norm of the residual."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, stream: Array | Pending, norm: RMSNorm) -> Array | Pending:
        hidden, inner = self.spec.config.hidden_size, self.spec.config.intermediate_size
        linear = partial(Linear, self.spec)
        gate = linear(hidden, inner, ("mlp", "embed"), name="gate_proj")
        up = linear(hidden, inner, ("mlp", "embed"), name="up_proj")
        down = linear(inner, hidden, ("embed", "mlp"), name="down_proj")
        if self.is_initializing():
            norm(added(stream))
            return declared(added(stream), gate, up, down)
        rows, dtype = residual_of(stream).size // hidden, residual_of(stream).dtype
        gate_up = Products.of((gate, up), rows, dtype)
        last = Products.of((down,), rows, dtype, residual_of(stream))
        if leave_sums(self.spec, residual_of(stream), (gate_up, last), inner):
            residual, terms = norm.in_terms(stream)
            inner_terms = silu_and_mul(*gate_up.parts(terms, rows))
            (product,) = last.parts(inner_terms, rows)
            return Pending(residual, product)
        residual = added(stream)
        x, (of_down,) = norm(residual), last.choices
        if fused := choose_swiglu(self.spec, rows, gate_up, last):
            codes, x_scale, matrix = gate.operands(x)
            with jax.named_scope(gate_up.name):
                codes, scale = swiglu(
                    codes, *matrix.quantized, *up.stored().quantized, x_scale=x_scale,
                    implementation=fused,
                )  # fmt: skip
            with jax.named_scope("down_proj"):
                operands = Operands(codes, scale, down.stored())
                return multiply(self.spec, operands, of_down, x, residual)
        g, u = gate_up(x)
        return down(nn.silu(g) * u, residual, of_down)


class Block(nn.Module):
    """One decoder layer: attention and MLP, each after a norm and added to the residual."""

    spec: ModelSpec

    @nn.compact
    def __call__(
        self, x: Array | Pending, positions: Array, cache: LayerCache | None
    ) -> tuple[Array | Pending, LayerCache | None]:
        norm = RMSNorm(self.spec, name="input_layernorm")
        x, cache = Attention(self.spec, name="self_attn")(x, norm, positions, cache)
        norm = RMSNorm(self.spec, name="post_attention_layernorm")
        return MLP(self.spec, name="mlp")(x, norm), cache


class Llama(nn.Module):
    """The whole model. Layers are unrolled: their weights may differ in format, and no layer's
    weights need to be sliced (copied) out of a stack."""

    spec: ModelSpec

    def setup(self) -> None:
        config = self.spec.config
        matrix = (self.spec, config.hidden_size, config.vocab_size, ("vocab", "embed"))
        self.embed_tokens = Embedding(*matrix)
        self.layers = [Block(self.spec) for _ in range(config.num_layers)]
        self.norm = RMSNorm(self.spec)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(*matrix)

    def __call__(self, tokens: Array) -> Array:
        """Compute float32 logits [b, t, vocab] of int [b, t] without a cache, for training and to
        check `extend`."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x: Array | Pending = self.embed_tokens.lookup(tokens)
        for layer in self.layers:
            x, _ = layer(x, positions, None)
        return self.unembed(self.norm(added(x)))

    def extend(
        self, tokens: Array, positions: Array, cache: KVCache, rows: Array, num_new_tokens: Array
    ) -> tuple[Array, KVCache]:
        """Append tokens to rows of the cache: the core of prefill and decode.

        tokens: int [b, t], num_new_tokens[b] of them real. positions: int [b, t], for rotary
        embedding.
        rows: int [b], which rows of the cache; an index past the end is padding, whose length must
        be 0.
        Returns the final hidden states [b, t, d], normed, and the cache.
        """
        cached_lens = jnp.take(cache.cached_lens, rows, mode="clip")
        page_table = jnp.take(cache.page_table, rows, axis=0, mode="clip")
        kv_lens = cached_lens + num_new_tokens
        x: Array | Pending = self.embed_tokens.lookup(tokens)
        written: list[Any] = []
        for i, layer in enumerate(self.layers):
            pages = LayerCache(
                cache.k[i], cache.v[i], cache.k_scale[i], cache.v_scale[i],
                page_table, cached_lens, kv_lens,
            )  # fmt: skip
            x, pages_after = layer(x, positions, pages)
            written.append(pages_after)
        cache = cache.replace(
            k=tuple(pages.k for pages in written),
            v=tuple(pages.v for pages in written),
            cached_lens=cache.cached_lens.at[rows].set(kv_lens, mode="drop"),
        )
        return self.norm(added(x)), cache

    def unembed(self, hidden: Array) -> Array:
        """Compute float32 logits [..., vocab] of the final hidden states [..., d]."""
        if not self.spec.config.tie_word_embeddings:
            return self.lm_head(hidden).astype(jnp.float32)
        return self.embed_tokens.logits(hidden)
