"""Llama 3.1's forward pass in Flax linen, to be read from top to bottom.

Shapes in comments: b batch, t tokens, d hidden_size. Layouts are Hugging Face's: matrices
(out, in), rotary pairs (j, j + head_dim / 2). A layer's x may be `Pending`: then the product before
it left its sums to the next launch (see `fused`).

Source: meta-llama/llama-models (`models/llama3/model.py`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from llama_jax.model.cached_attention import LayerCache, cached_attention
from llama_jax.model.fp8 import dequantize_rows
from llama_jax.model.fused import (
    Pending,
    add_rms_norm,
    added,
    choose_swiglu,
    leave_sums,
    quantized_swiglu,
    residual_of,
)
from llama_jax.model.kv_cache import KVCache
from llama_jax.model.linear import Linear, Operands, Products, declared, multiply, parameter
from llama_jax.model.rope import rope_frequencies
from llama_jax.model.sharding import divided_over
from llama_jax.model.spec import ModelSpec
from pallas_kernels.fp8_matmul.logits import LogitStats
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.fp8_matmul.terms import Parts, Terms
from pallas_kernels.rms_norm import KERNELS as NORM_KERNELS
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rope_and_cache.xla import apply_rope
from pallas_kernels.row_fusions import silu_and_mul


class Embedding(Linear):
    """Looks up token embeddings in a matrix [vocab_size, d], which tied models use for their output
    too."""

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


class RMSNorm(nn.Module):
    """Computes x / rms(x) in float32, then casts, then multiplies by the weight, as Hugging Face
    orders it."""

    spec: ModelSpec

    def setup(self) -> None:
        dtype = self.spec.format_of(self.path).dtype
        shape = (self.spec.config.hidden_size,)
        self.weight = parameter(self, "weight", shape, ("embed",), dtype)

    def __call__(self, x: Array) -> Array:
        return rms_norm(
            x, self.weight, self.spec.config.rms_norm_eps,
            implementation=self.spec.implementation_of(NORM_KERNELS),
        )  # fmt: skip

    def fused(self, x: Array | Pending) -> tuple[Array, Terms]:
        """Add a pending product and normalise the sum in one launch; return both."""
        return add_rms_norm(x, self.weight, self.spec.config.rms_norm_eps)


class Attention(nn.Module):
    """Computes grouped-query attention of norm(x), plus x.

    Attention is causal over the call's own tokens, or, with a cache, over the layer's pages.
    """

    spec: ModelSpec

    @nn.compact
    def __call__(
        self, x: Array | Pending, norm: RMSNorm, positions: Array, cache: LayerCache | None
    ) -> tuple[Array | Pending, LayerCache | None]:
        config, hidden = self.spec.config, self.spec.config.hidden_size
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        linear = partial(Linear, self.spec)
        q_proj = linear(hidden, q_size, ("heads", "embed"), name="q_proj")
        k_proj = linear(hidden, kv_size, ("kv_heads", "embed"), name="k_proj")
        v_proj = linear(hidden, kv_size, ("kv_heads", "embed"), name="v_proj")
        o_proj = linear(q_size, hidden, ("embed", "heads"), name="o_proj")
        if self.is_initializing():
            norm(added(x))
            return declared(added(x), q_proj, k_proj, v_proj, o_proj), cache

        batch, t = positions.shape
        rows, dtype = batch * t, residual_of(x).dtype
        into = Products.of((q_proj, k_proj, v_proj), rows, dtype)
        out = Products.of((o_proj,), rows, dtype, residual_of(x))
        leaves_sums = leave_sums(self.spec, residual_of(x), (into, out))
        if leaves_sums:
            residual, terms = norm.fused(x)
            qkv = into.parts(terms, rows)  # each [b * t, heads * head_dim]
        else:
            residual = added(x)
            qkv = [Parts(y.reshape(1, rows, -1), None) for y in into(norm(residual))]

        if cache is None:
            q, k, v = (
                each.total().astype(dtype).reshape(batch, t, -1, config.head_dim) for each in qkv
            )  # [b, t, heads, head_dim]
            frequencies = rope_frequencies(config)
            q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        else:
            y, cache = cached_attention(self.spec, qkv, positions, cache)

        if leaves_sums:
            (product,) = out.parts(y.reshape(rows, q_size), rows)
            return Pending(residual, product), cache
        (choice,) = out.choices
        return o_proj(y.reshape(batch, t, q_size), residual, choice), cache  # [b, t, d]


class MLP(nn.Module):
    """Computes down(silu(gate(norm(x))) * up(norm(x))) + x."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x: Array | Pending, norm: RMSNorm) -> Array | Pending:
        hidden, intermediate = self.spec.config.hidden_size, self.spec.config.intermediate_size
        linear = partial(Linear, self.spec)
        gate = linear(hidden, intermediate, ("mlp", "embed"), name="gate_proj")
        up = linear(hidden, intermediate, ("mlp", "embed"), name="up_proj")
        down = linear(intermediate, hidden, ("embed", "mlp"), name="down_proj")
        if self.is_initializing():
            norm(added(x))
            return declared(added(x), gate, up, down)

        rows, dtype = residual_of(x).size // hidden, residual_of(x).dtype
        gate_up = Products.of((gate, up), rows, dtype)
        last = Products.of((down,), rows, dtype, residual_of(x))
        if leave_sums(self.spec, residual_of(x), (gate_up, last), intermediate):
            residual, terms = norm.fused(x)
            activated = silu_and_mul(*gate_up.parts(terms, rows))  # [b * t, intermediate]
            (product,) = last.parts(activated, rows)
            return Pending(residual, product)

        residual = added(x)
        normed, (choice,) = norm(residual), last.choices
        if fused := choose_swiglu(self.spec, rows, gate_up, last):
            codes, scale = quantized_swiglu(gate_up, normed, fused)  # [b * t, intermediate]
            with jax.named_scope("down_proj"):
                operands = Operands(codes, scale, down.stored())
                return multiply(self.spec, operands, choice, normed, residual)
        return down(gate_up.swiglu(normed), residual, choice)  # [b, t, d]


class Block(nn.Module):
    """One decoder layer: attention and an MLP, each on the norm of the residual stream and added
    to it."""

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
    """The whole model.

    Layers are unrolled, not stacked: their weights may differ in format, and slicing a layer's
    weights out of a stack would copy them.
    """

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
        """Compute float32 logits [b, t, vocab] of tokens int [b, t] without a cache, for training
        and to check `extend`."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x: Array | Pending = self.embed_tokens.lookup(tokens)
        for layer in self.layers:
            x, _ = layer(x, positions, None)
        return self.unembed(self.norm(added(x)))

    def extend(
        self, tokens: Array, positions: Array, cache: KVCache, slots: Array, num_new_tokens: Array
    ) -> tuple[Array, KVCache]:
        """Append tokens to sequences in the cache: the core of prefill and decode.

        tokens: int [b, t], of which num_new_tokens int [b] are real.
        positions: int [b, t], for rotary embedding.
        slots: int [b], the slots of the cache; one past the end is padding and must have no tokens.
        Returns the final hidden states [b, t, d], after the last norm, and the cache.
        """
        cached_lens = jnp.take(cache.cached_lens, slots, mode="clip")
        page_table = jnp.take(cache.page_table, slots, axis=0, mode="clip")
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
            cached_lens=cache.cached_lens.at[slots].set(kv_lens, mode="drop"),
        )
        return self.norm(added(x)), cache

    def unembed(self, hidden: Array) -> Array:
        """Compute float32 logits [..., vocab] of the final hidden states [..., d]."""
        if not self.spec.config.tie_word_embeddings:
            return self.lm_head(hidden).astype(jnp.float32)
        return self.embed_tokens.logits(hidden)

    def logit_stats(self, hidden: Array, targets: Array) -> LogitStats:
        """Compute what is known of the logits of `unembed`, without keeping them.

        hidden: [m, d]. targets: int32 [m], a token for each.
        """
        is_tied = self.spec.config.tie_word_embeddings
        head, dtype = (self.embed_tokens, jnp.float32) if is_tied else (self.lm_head, hidden.dtype)
        axis = divided_over("vocab")
        if axis is None:
            return head.logit_stats(hidden, targets, dtype)
        vocab_size = self.spec.config.vocab_size  # of this device's part
        first = lax.axis_index(axis) * vocab_size
        found = head.logit_stats(hidden, targets - first, dtype)
        top = lax.pmax(found.top_logits, axis)
        ids = jnp.where(found.top_logits == top, found.top_ids + first, jnp.iinfo(jnp.int32).max)
        total = lax.psum(jnp.exp(found.logsumexp - top), axis)
        return LogitStats(
            lax.pmax(found.target_logits, axis), lax.pmin(ids, axis), top, top + jnp.log(total)
        )
