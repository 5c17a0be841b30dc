"""Llama 3.1's forward pass in Flax linen, read from top to bottom.

Source: meta-llama/llama-models (`models/llama3/model.py`); layouts as Hugging Face stores them:
matrices (out, in), rotary pairs (j, j + head_dim / 2).

Every parameter is declared once, in `_parameter`, with its shape, its dtype and the logical names
of its axes; initialisation, sharding and the restore target of a checkpoint all come from there
(`abstract_params`, `logical_axes`). Shapes in comments: b batch, t tokens, d hidden_size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict
from jax import Array, lax

from llama_jax.config import LlamaConfig
from llama_jax.fp8 import WeightFormat, quantize_per_token, scale_shape
from llama_jax.kv_cache import KVCache, write_pages
from pallas_kernels import e4m3
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul.xla import MIN_ROWS_FOR_BF16, by_row_blocks, dot
from pallas_kernels.paged_attention import paged_attention

Activations = Literal["bf16", "dynamic", "static"]
Params = Mapping[str, Any]


@dataclass(frozen=True)
class ModelSpec:
    """Everything that shapes the compiled program besides its arguments.

    formats: how each parameter is stored, by module path ("layers_0/self_attn/q_proj"); those not
        named are unquantised, of the config's dtype.
    dtype: "bfloat16" or "float32", of the activations and the residual stream.
    activations: what FP8 weights are multiplied with: "bf16" (activations as they are, in
        `dtype`), "dynamic" (e4m3fn, a scale per token) or "static" (e4m3fn, the checkpoint's
        input scale).
    """

    config: LlamaConfig
    formats: Mapping[str, WeightFormat] = field(default_factory=FrozenDict)
    dtype: str = "bfloat16"
    activations: Activations = "bf16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", FrozenDict(self.formats))
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be 'bfloat16' or 'float32', got {self.dtype!r}")
        if self.activations not in ("bf16", "dynamic", "static"):
            raise ValueError(
                f"activations must be 'bf16', 'dynamic' or 'static', got {self.activations!r}"
            )
        lacking = [
            path for path, stored in self.formats.items() if stored.scale and not stored.input_scale
        ]
        if self.activations == "static" and lacking:
            raise ValueError(
                f"activations='static' needs an input scale for each FP8 matrix; {lacking[0]} and "
                f"{len(lacking) - 1} more have none. Use 'dynamic' or 'bf16'."
            )

    def format_of(self, path: tuple[str, ...]) -> WeightFormat:
        return self.formats.get("/".join(path), WeightFormat(self.config.dtype))


class LayerCache(NamedTuple):
    """One layer's pages and where the batch's rows stand in them."""

    k: Array
    v: Array
    k_scale: Array
    v_scale: Array
    page_table: Array
    starts: Array
    lengths: Array


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angular frequencies of the rotary pairs, float32 [head_dim / 2], scaled as Llama 3.1 does.

    Source: `apply_scaling` in llama-models; its formula with the config's constants.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.float64(config.rope_theta) ** exponents.astype(np.float64)
    inv = np.float32(1.0) / powers.astype(np.float32)  # as torch rounds it, bit for bit
    scaling = config.rope_scaling
    if scaling is None:
        return inv
    wavelength = np.float32(2 * np.pi) / inv
    turns = np.float32(scaling.original_max_position_embeddings) / wavelength
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    smooth = (turns - low) / (high - low)
    factor = np.float32(scaling.factor)
    blended = (np.float32(1.0) - smooth) * inv / factor + smooth * inv
    return np.where(turns < low, inv / factor, np.where(turns > high, inv, blended))


def apply_rope(x: Array, positions: Array, frequencies: np.ndarray) -> Array:
    """Rotate pairs (j, j + head_dim / 2) of x [batch, tokens, heads, head_dim] by float32 angles.

    positions: int32 [batch, tokens].
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _parameter(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str
) -> Array:
    def initial(key: Array) -> Array:
        if name != "weight" or len(shape) == 1:
            return jnp.full(shape, _INITIAL_SCALE if name == "weight_scale" else 1.0, dtype)
        if dtype == "float8_e4m3fn":
            return e4m3.cast(jax.random.normal(key, shape) * (0.02 / _INITIAL_SCALE))
        return (jax.random.normal(key, shape) * 0.02).astype(dtype)

    parameter: Array = module.param(name, nn.with_logical_partitioning(initial, axes))  # type: ignore[assignment]
    return parameter


_INITIAL_SCALE = 0.02 / 64


class Embedding(nn.Module):
    """Token embeddings, [vocab_size, d]; also the output matrix where the two are tied."""

    spec: ModelSpec

    def setup(self) -> None:
        config = self.spec.config
        shape = (config.vocab_size, config.hidden_size)
        dtype = self.spec.format_of(self.path).dtype
        self.weight = _parameter(self, "weight", shape, ("vocab", "embed"), dtype)

    def __call__(self, tokens: Array) -> Array:
        return jnp.take(self.weight, tokens, axis=0, mode="clip").astype(self.spec.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, then cast, then times the weight, as Hugging Face orders it."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x: Array) -> Array:
        dtype = self.spec.format_of(self.path).dtype
        weight = _parameter(self, "weight", (x.shape[-1],), ("embed",), dtype)
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * lax.rsqrt(mean_square + self.spec.config.rms_norm_eps)
        return normed.astype(x.dtype) * weight.astype(x.dtype)


class Linear(nn.Module):
    """x [..., in] @ weight [out, in].T, the weight in whatever format it is stored."""

    spec: ModelSpec
    out_features: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.out_features, x.shape[-1])
        stored = self.spec.format_of(self.path)
        weight = _parameter(self, "weight", shape, self.axes, stored.dtype)
        rows = x.reshape(-1, x.shape[-1])
        if stored.scale is None:
            y = dense(rows, weight)
        else:
            scales = scale_shape(shape, stored.scale, stored.column_groups)
            axes = self.axes[: len(scales)]
            scale = _parameter(self, "weight_scale", scales, axes, "float32")
            x_scale = None
            if stored.input_scale:
                input_scale = _parameter(self, "input_scale", (), (), "float32")
            if self.spec.activations == "dynamic":
                rows, x_scale = quantize_per_token(rows, stored.activation_scale_ub)
            elif self.spec.activations == "static":
                rows, x_scale = e4m3.cast(rows.astype(jnp.float32) / input_scale), input_scale
            y = fp8_matmul(rows, weight, scale, x_scale=x_scale)
        return y.astype(x.dtype).reshape(*x.shape[:-1], self.out_features)


class Attention(nn.Module):
    """Grouped-query attention; causal over its own tokens, or against a layer's cached pages."""

    spec: ModelSpec

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        config, heads = self.spec.config, (-1, self.spec.config.head_dim)
        q_size, kv_size = (
            count * config.head_dim for count in (config.num_heads, config.num_kv_heads)
        )
        linear = partial(Linear, self.spec)
        q = linear(q_size, ("heads", "embed"), name="q_proj")(x).reshape(*x.shape[:2], *heads)
        k = linear(kv_size, ("kv_heads", "embed"), name="k_proj")(x).reshape(*x.shape[:2], *heads)
        v = linear(kv_size, ("kv_heads", "embed"), name="v_proj")(x).reshape(*x.shape[:2], *heads)
        frequencies = rope_frequencies(config)
        q, k = apply_rope(q, positions, frequencies), apply_rope(k, positions, frequencies)

        if cache is None:
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # [b, t, heads, head_dim]
        else:
            where = (cache.page_table, cache.starts, cache.lengths)
            cache = cache._replace(
                k=write_pages(cache.k, k, *where, cache.k_scale),
                v=write_pages(cache.v, v, *where, cache.v_scale),
            )
            y = paged_attention(
                q, cache.k, cache.v, *where, k_scale=cache.k_scale, v_scale=cache.v_scale
            )
        y = y.reshape(*x.shape[:2], q_size)
        return linear(config.hidden_size, ("embed", "heads"), name="o_proj")(y), cache


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    spec: ModelSpec

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.spec.config
        linear = partial(Linear, self.spec)
        gate = linear(config.intermediate_size, ("mlp", "embed"), name="gate_proj")(x)
        up = linear(config.intermediate_size, ("mlp", "embed"), name="up_proj")(x)
        return linear(config.hidden_size, ("embed", "mlp"), name="down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One decoder layer: attention and MLP, each behind a norm and added to the residual."""

    spec: ModelSpec

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        normed = RMSNorm(self.spec, name="input_layernorm")(x)
        y, cache = Attention(self.spec, name="self_attn")(normed, positions, cache)
        x = x + y
        normed = RMSNorm(self.spec, name="post_attention_layernorm")(x)
        return x + MLP(self.spec, name="mlp")(normed), cache


class Llama(nn.Module):
    """The whole model. Layers are unrolled: their weights may differ in format, and no layer's
    weights need to be sliced (copied) out of a stack."""

    spec: ModelSpec

    def setup(self) -> None:
        config = self.spec.config
        self.embed_tokens = Embedding(self.spec)
        self.layers = [Block(self.spec) for _ in range(config.num_layers)]
        self.norm = RMSNorm(self.spec)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(self.spec, config.vocab_size, ("vocab", "embed"))

    def __call__(self, tokens: Array) -> Array:
        """Without a cache, for training and as a second opinion: int [b, t] -> float32 logits
        [b, t, vocab], full causal attention."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x, _ = layer(x, positions, None)
        return self.unembed(self.norm(x))

    def extend(
        self, tokens: Array, positions: Array, cache: KVCache, rows: Array, lengths: Array
    ) -> tuple[Array, KVCache]:
        """Append tokens to rows of the cache: the core of prefill and decode.

        tokens: int [b, t], lengths[b] of them real. positions: int [b, t], rotary positions. rows:
        int [b], cache rows; an index past the end is padding, its lengths must be 0.
        Returns the final hidden states [b, t, d], normed, and the cache.
        """
        starts = jnp.take(cache.lengths, rows, mode="clip")
        page_table = jnp.take(cache.page_table, rows, axis=0, mode="clip")
        new_lengths = starts + lengths
        x = self.embed_tokens(tokens)
        written: list[Any] = []
        for i, layer in enumerate(self.layers):
            pages = LayerCache(
                cache.k[i], cache.v[i], cache.k_scale[i], cache.v_scale[i],
                page_table, starts, new_lengths,
            )  # fmt: skip
            x, pages_after = layer(x, positions, pages)
            written.append(pages_after)
        cache = cache.replace(
            k=tuple(pages.k for pages in written),
            v=tuple(pages.v for pages in written),
            lengths=cache.lengths.at[rows].set(new_lengths, mode="drop"),
        )
        return self.norm(x), cache

    def unembed(self, hidden: Array) -> Array:
        """Final hidden states [..., d] to float32 logits [..., vocab]."""
        if not self.spec.config.tie_word_embeddings:
            return self.lm_head(hidden).astype(jnp.float32)
        logits = dense(hidden.reshape(-1, hidden.shape[-1]), self.embed_tokens.weight)
        return logits.reshape(*hidden.shape[:-1], -1)


def dense(x: Array, weight: Array) -> Array:
    """x [m, in] @ weight [out, in].T in float32 sums, for unquantised weights.

    A weight of another dtype than x, or few bfloat16 rows on a CPU, go by blocks of the weight's
    rows: XLA would otherwise write out a copy of the whole weight.
    """

    def direct(x: Array, weight: Array) -> Array:
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return lax.dot_general(
            x, weight, (((1,), (1,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    by_blocks = partial(by_row_blocks, weight_scale=None)
    if x.dtype != weight.dtype:
        return by_blocks(x, weight)
    if x.dtype == jnp.float32:
        return direct(x, weight)
    on_cpu = by_blocks if x.shape[0] < MIN_ROWS_FOR_BF16 else dot
    return lax.platform_dependent(x, weight, cpu=on_cpu, default=direct)


def abstract_params(spec: ModelSpec) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s, nested by module name."""
    return nn.unbox(_boxed_params(spec))


def logical_axes(spec: ModelSpec) -> Params:
    """The parameter tree with a `PartitionSpec` of logical axis names in place of each array."""
    return nn.get_partition_spec(_boxed_params(spec))


def init_params(spec: ModelSpec, seed: int = 0) -> Params:
    """Random parameters in the formats of `spec`, for tests, benchmarks and training."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return nn.unbox(jax.jit(Llama(spec).init)(jax.random.key(seed), tokens)["params"])


@cache
def _boxed_params(spec: ModelSpec) -> Params:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Llama(spec).init, jax.random.key(0), tokens)["params"]


@partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def prefill(
    params: Params,
    cache: KVCache,
    tokens: Array,
    lengths: Array,
    rows: Array | None = None,
    *,
    spec: ModelSpec,
) -> tuple[Array, KVCache]:
    """Append a chunk of each prompt to the cache.

    tokens: int32 [b, t]; lengths: int32 [b], how many of them are real (0 leaves a row alone);
    rows: int32 [b], the cache rows they belong to, all in order when None. Long prompts go through
    in chunks: each call continues where the row stands. The cache is donated.
    Returns float32 logits [b, vocab] after each row's last real token, and the cache.
    """
    hidden, cache = extend(params, cache, tokens, lengths, rows, spec=spec)
    return unembed(params, last_hidden(hidden, lengths), spec=spec), cache


@partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def decode(
    params: Params,
    cache: KVCache,
    tokens: Array,
    active: Array | None = None,
    *,
    spec: ModelSpec,
) -> tuple[Array, KVCache]:
    """Append one token to each active row of the cache.

    tokens: int32 [batch]; active: bool [batch], all when None. The cache is donated.
    Returns float32 logits [batch, vocab] and the cache.
    """
    lengths = jnp.ones_like(tokens) if active is None else active.astype(jnp.int32)
    hidden, cache = extend(params, cache, tokens[:, None], lengths, spec=spec)
    return unembed(params, hidden[:, 0], spec=spec), cache


def extend(
    params: Params,
    cache: KVCache,
    tokens: Array,
    lengths: Array,
    rows: Array | None = None,
    *,
    spec: ModelSpec,
) -> tuple[Array, KVCache]:
    """What `prefill` and `decode` share; returns hidden states [b, t, d] of every token."""
    rows = jnp.arange(tokens.shape[0]) if rows is None else rows
    starts = jnp.take(cache.lengths, rows, mode="clip")
    positions = starts[:, None] + jnp.arange(tokens.shape[1])
    extended: Any = Llama(spec).apply(
        {"params": params}, tokens, positions, cache, rows, lengths, method="extend"
    )
    return extended


def last_hidden(hidden: Array, lengths: Array) -> Array:
    """The state of each row's last real token: [b, t, d] and int32 [b] to [b, d]."""
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0]


def unembed(params: Params, hidden: Array, *, spec: ModelSpec) -> Array:
    """Hidden states [..., d] of `extend` to float32 logits [..., vocab]."""
    logits: Array = Llama(spec).apply({"params": params}, hidden, method="unembed")  # type: ignore[assignment]
    return logits
