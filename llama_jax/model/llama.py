"""Llama 3.1's forward pass in Flax linen, read from top to bottom.

Source: meta-llama/llama-models (`models/llama3/model.py`); layouts as Hugging Face stores them:
matrices (out, in), rotary pairs (j, j + head_dim / 2).

Every parameter is declared once, in `_parameter`, with its shape, its dtype and the logical names
of its axes; initialisation, sharding and the restore target of a checkpoint all come from there
(`abstract_params`, `logical_axes`). Shapes in comments: b batch, t tokens, d hidden_size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import FrozenDict
from jax import Array, lax
from jax.sharding import Mesh

from llama_jax.model.config import LlamaConfig
from llama_jax.model.fp8 import WeightFormat, quantize_per_group, quantize_per_token, scale_shape
from llama_jax.model.kv_cache import KVCache
from llama_jax.model.sharding import default_sharding, divided_over, sharding_of
from pallas_kernels import device, e4m3, row_fusions
from pallas_kernels.fp8_matmul import (
    chosen,
    cpu,
    fp8_matmul,
    fp8_matmul_parts,
    fp8_matmuls,
    swiglu,
)
from pallas_kernels.fp8_matmul.terms import Parts, Terms
from pallas_kernels.fp8_matmul.xla import MIN_ROWS_FOR_BF16, by_row_blocks, dot
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.rope_and_cache import rope_and_cache
from pallas_kernels.rope_and_cache.projections import Projections
from pallas_kernels.rope_and_cache.xla import apply_rope, per_head
from pallas_kernels.row_fusions import add_rms_norm, silu_and_mul

Activations = Literal["auto", "bf16", "dynamic", "static"]
Phase = Literal["prefill", "decode"]
Implementation = Literal["reference", "xla", "cpu", "hopper"]
Params = Mapping[str, Any]


@dataclass(frozen=True)
class ModelSpec:
    """Everything that shapes the compiled program besides its arguments.

    formats: how each parameter is stored, by module path ("layers_0/self_attn/q_proj"); those not
        named are unquantised, of the config's dtype.
    dtype: "bfloat16" or "float32", of the activations and the residual stream.
    activations: what FP8 weights are multiplied with: "bf16" (activations as they are, in
        `dtype`), "dynamic" (e4m3fn, a scale per token, or for each `WeightFormat.activation_group`
        of its features) or "static" (e4m3fn, the checkpoint's input scale); "auto" is for `extend`
        to decide, see `activations_in`.
    implementation: of attention and of products with FP8 weights, see `pallas_kernels`: None for
        the best that runs on what is lowered for, else "reference", "xla", or "cpu" or "hopper",
        which refuse what their kernels cannot take. For "cpu" attention is XLA's.
    is_batch_invariant: a row's numbers are bit-equal whatever the other rows of the same call are.
    mesh: the devices that share the work (`sharding.make_mesh`); None for the default device alone.
    """

    config: LlamaConfig
    formats: Mapping[str, WeightFormat] = field(default_factory=FrozenDict)
    dtype: str = "bfloat16"
    activations: Activations = "bf16"
    implementation: Implementation | None = None
    is_batch_invariant: bool = False
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", FrozenDict(self.formats))
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be 'bfloat16' or 'float32', got {self.dtype!r}")
        if self.activations not in get_args(Activations):
            raise ValueError(
                "activations must be 'auto', 'bf16', 'dynamic' or 'static', got "
                f"{self.activations!r}"
            )
        if self.implementation not in (None, *get_args(Implementation)):
            raise ValueError(
                "implementation must be 'reference', 'xla', 'cpu', 'hopper' or None, got "
                f"{self.implementation!r}"
            )
        lacking = [
            path for path, stored in self.formats.items() if stored.scale and not stored.input_scale
        ]
        if self.activations == "static" and lacking:
            raise ValueError(
                f"activations='static' needs an input scale for each FP8 matrix; {lacking[0]} and "
                f"{len(lacking) - 1} more have none. Use 'dynamic' or 'bf16'."
            )

    def check_runs(self) -> None:
        """Raise ValueError if the named implementation cannot run on what is lowered for."""
        reasons = {"hopper": device.not_hopper, "cpu": cpu.not_here}
        if self.implementation in reasons and (reason := reasons[self.implementation]()):
            raise ValueError(
                f"implementation={self.implementation!r} cannot run: {reason}. Leave it out for "
                "what can."
            )

    @property
    def of_attention(self) -> Literal["reference", "xla", "hopper"] | None:
        """The implementation of attention and of what is around it: no kernel there is for a CPU."""
        return None if self.implementation == "cpu" else self.implementation

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
    """Angular frequencies of the rotary pairs, float32 [head_dim / 2], stretched as configured.

    Source: `apply_scaling` in llama-models; its formula with the config's constants.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.float64(config.rope_theta) ** exponents.astype(np.float64)
    inv = np.float32(1.0) / powers.astype(np.float32)  # as torch rounds it, bit for bit
    scaling = config.rope_scaling
    if scaling is None:
        return inv / np.float32(config.rope_linear_factor)
    wavelength = np.float32(2 * np.pi) / inv
    turns = np.float32(scaling.original_max_position_embeddings) / wavelength
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    smooth = (turns - low) / (high - low)
    factor = np.float32(scaling.factor)
    blended = (np.float32(1.0) - smooth) * inv / factor + smooth * inv
    return np.where(turns < low, inv / factor, np.where(turns > high, inv, blended))


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
        axis = divided_over("vocab")
        if axis is None:
            return jnp.take(self.weight, tokens, axis=0, mode="clip").astype(self.spec.dtype)
        here = tokens - lax.axis_index(axis) * self.weight.shape[0]
        x = self.weight.at[here].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        return lax.psum(x.astype(self.spec.dtype), axis)


class Pending(NamedTuple):
    """A residual stream [b, t, d] and a product that is to be added to it by whatever reads it."""

    residual: Array
    product: Parts

    def added(self) -> Array:
        rows = self.residual.reshape(-1, self.residual.shape[-1]).astype(jnp.float32)
        return (
            (self.product.total() + rows).astype(self.residual.dtype).reshape(self.residual.shape)
        )


def added(x: Array | Pending) -> Array:
    return x.added() if isinstance(x, Pending) else x


class RMSNorm(nn.Module):
    """x / rms(x) in float32, then cast, then times the weight, as Hugging Face orders it."""

    spec: ModelSpec

    def setup(self) -> None:
        dtype = self.spec.format_of(self.path).dtype
        shape = (self.spec.config.hidden_size,)
        self.weight = _parameter(self, "weight", shape, ("embed",), dtype)

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * lax.rsqrt(mean_square + self.spec.config.rms_norm_eps)
        return normed.astype(x.dtype) * self.weight.astype(x.dtype)

    def in_terms(self, x: Array | Pending) -> tuple[Array, Terms]:
        """The residual stream with what was pending, and the norm of its rows, for few rows."""
        residual, product = x if isinstance(x, Pending) else (x, None)
        eps = self.spec.config.rms_norm_eps
        rows = residual.reshape(-1, residual.shape[-1])
        summed, terms = add_rms_norm(product, rows, self.weight, eps)
        return summed.reshape(residual.shape), terms


class Stored(NamedTuple):
    """A matrix [out, in] and, where it is quantised, its scales and perhaps that of its inputs.

    summed_over: the mesh axis whose devices have some columns each, so that products are sums.
    """

    weight: Array
    scale: Array | None = None
    input_scale: Array | None = None
    summed_over: str | None = None

    @property
    def quantized(self) -> tuple[Array, Array]:
        assert self.scale is not None
        return self.weight, self.scale


class Operands(NamedTuple):
    """Of a product x @ matrix.T. x: [rows, in]; x_scale: of FP8 codes, see `fp8_matmul`."""

    x: Array
    x_scale: Array | None
    matrix: Stored


class Linear(nn.Module):
    """x [..., in] @ weight [out, in].T + residual [..., out], the weight in whatever format it is
    stored."""

    spec: ModelSpec
    in_features: int
    out_features: int
    axes: tuple[str, str]

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        return multiply(self.spec, self.operands(x), x, residual)

    @nn.compact
    def stored(self) -> Stored:
        shape, stored = (self.out_features, self.in_features), self.format
        weight = _parameter(self, "weight", shape, self.axes, stored.dtype)
        matrix = Stored(weight, summed_over=divided_over(self.axes[1]))
        if stored.scale is None:
            return matrix
        scales = scale_shape(shape, stored.scale, stored.column_groups)
        scale = _parameter(self, "weight_scale", scales, self.axes[: len(scales)], "float32")
        matrix = matrix._replace(scale=scale)
        if not stored.input_scale:
            return matrix
        return matrix._replace(input_scale=_parameter(self, "input_scale", (), (), "float32"))

    def operands(self, x: Array) -> Operands:
        matrix, rows, x_scale = self.stored(), x.reshape(-1, self.in_features), None
        if matrix.scale is not None and self.spec.activations == "dynamic":
            if self.format.activation_group:
                # No group lies on two devices: `forward.device_spec` sees to it.
                rows, x_scale = quantize_per_group(rows)
            else:
                rows, x_scale = quantize_per_token(
                    rows, self.format.activation_scale_ub, matrix.summed_over
                )
        elif matrix.scale is not None and self.spec.activations == "static":
            assert matrix.input_scale is not None
            x_scale = matrix.input_scale
            rows = e4m3.cast(rows.astype(jnp.float32) / x_scale)
        return Operands(rows, x_scale, matrix)

    @property
    def format(self) -> WeightFormat:
        return self.spec.format_of(self.path)


def multiply(
    spec: ModelSpec, operands: Operands, like: Array, residual: Array | None = None
) -> Array:
    """The product, plus a residual, in the dtype and with the leading axes of `like`.

    A kernel adds the residual before it rounds; otherwise the product is rounded first, after it is
    summed over devices.
    """
    x, x_scale, (weight, scale, _, summed_over) = operands
    is_added = False
    if scale is None:
        y = dense(x, weight, spec.implementation)
    else:
        rows = None
        if residual is not None and not summed_over:
            rows = residual.reshape(-1, weight.shape[0])
        runs = chosen(x, weight, scale, like.dtype, rows, implementation=spec.implementation)
        is_added = rows is not None and runs.startswith("hopper")
        y = fp8_matmul(
            x, weight, scale, x_scale=x_scale, residual=rows if is_added else None,
            out_dtype=like.dtype, is_batch_invariant=spec.is_batch_invariant,
            implementation=spec.implementation,
        )  # fmt: skip
    if summed_over:
        y = lax.psum(y.astype(like.dtype), summed_over)
    y = y.astype(like.dtype).reshape(*like.shape[:-1], weight.shape[0])
    return y if residual is None or is_added else y + residual


def products(spec: ModelSpec, x: Array, linears: Sequence[Linear]) -> list[Array]:
    """x [..., in] through each, in one launch where a kernel does that."""
    operands = [linear.operands(x) for linear in linears]
    if not _is_one_launch(spec, [linear.format for linear in linears], operands, x.dtype):
        found = []
        for linear, each in zip(linears, operands, strict=True):
            with jax.named_scope(str(linear.name)):
                found.append(multiply(spec, each, x))
        return found
    weights, scales = zip(*(each.matrix.quantized for each in operands), strict=True)
    with jax.named_scope("+".join(str(linear.name) for linear in linears)):
        ys = fp8_matmuls(
            operands[0].x, weights, scales, x_scale=operands[0].x_scale, out_dtype=x.dtype,
            is_batch_invariant=spec.is_batch_invariant, implementation=spec.implementation,
        )  # fmt: skip
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def parts(spec: ModelSpec, x: Array | Terms, rows: int, linears: Sequence[Linear]) -> list[Parts]:
    """x, [rows, in], through each in one launch, where `_is_fused` says that this runs."""
    weights, scales = zip(*(linear.stored().quantized for linear in linears), strict=True)
    with jax.named_scope("+".join(str(linear.name) for linear in linears)):
        return fp8_matmul_parts(
            x, rows, weights, scales, is_batch_invariant=spec.is_batch_invariant
        )


def _is_fused(
    spec: ModelSpec, x: Array | Pending, groups: Sequence[Sequence[Linear]], inner: int = 0
) -> bool:
    """Whether products leave their sums to what follows, which is a launch of its own. That is for
    few rows on a Hopper GPU, all weights in FP8.

    groups: those that share a launch each. inner: columns of SwiGLU, if there is one.
    """
    residual = x.residual if isinstance(x, Pending) else x
    linears = [linear for group in groups for linear in group]
    if (
        spec.activations != "bf16"
        or spec.implementation not in (None, "hopper")
        or spec.mesh is not None
        or any(linear.format.scale is None for linear in linears)
        or any(len({linear.format.scale for linear in group}) > 1 for group in groups)
    ):
        return False
    rows = jax.ShapeDtypeStruct(
        (residual.size // residual.shape[-1], residual.shape[-1]), residual.dtype
    )
    if device.not_hopper() or row_fusions.refusal(rows, inner):
        return False

    def is_weight_only(linear: Linear) -> bool:
        operand = jax.ShapeDtypeStruct((rows.shape[0], linear.in_features), rows.dtype)
        which = chosen(operand, *linear.stored().quantized, rows.dtype)
        return which == "hopper_weight_only"

    return all(map(is_weight_only, linears))


def _declared(x: Array, *linears: Linear) -> Array:
    """x, once all parameters are declared: all that initialising needs, much sooner than products
    are traced."""
    for linear in linears:
        linear.stored()
    return x


def _is_one_launch(
    spec: ModelSpec,
    formats: Sequence[WeightFormat],
    operands: Sequence[Operands],
    dtype: jnp.dtype,
) -> bool:
    """Whether what is multiplied is the same for all, and one kernel takes it."""
    alike = {(x.scale, x.activation_scale_ub, x.activation_group) for x in formats}
    if formats[0].scale is None or len(alike) > 1 or spec.activations == "static":
        return False
    (which, *others) = {
        chosen(x, *matrix.quantized, dtype, implementation=spec.implementation)
        for x, _, matrix in operands
    }
    return not others and which in ("hopper_weight_only", "cpu")


class Attention(nn.Module):
    """The norm and grouped-query attention, plus the residual; causal over its own tokens, or
    against a layer's cached pages."""

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
            return _declared(added(x), *projections, o_proj), cache
        batch, tokens = positions.shape
        is_fused = _is_fused(self.spec, x, (projections, (o_proj,)))
        if is_fused:
            residual, terms = norm.in_terms(x)
            projected = parts(self.spec, terms, batch * tokens, projections)
        else:
            residual = added(x)
            whole = products(self.spec, norm(residual), projections)
            projected = [Parts(y.reshape(1, batch * tokens, -1), None) for y in whole]
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
                q, cache.k, cache.v, cache.page_table, cache.starts, cache.lengths,
                k_scale=1.0 if cache.k_scale.ndim else cache.k_scale,
                v_scale=1.0 if cache.v_scale.ndim else cache.v_scale,
                is_batch_invariant=self.spec.is_batch_invariant,
                implementation=self.spec.of_attention,
            )  # fmt: skip
            y = per_head(y, _of_own_heads(cache.v_scale, cache.v.shape[2]))
        if is_fused:
            rows = batch * tokens
            (product,) = parts(self.spec, y.reshape(rows, q_size), rows, (o_proj,))
            return Pending(residual, product), cache
        return o_proj(y.reshape(batch, tokens, q_size), residual), cache


def _append(
    spec: ModelSpec, qkv: Sequence[Parts], positions: Array, cache: LayerCache
) -> tuple[Array, LayerCache]:
    """q, rotated and ready for attention, [b, t, heads, head_dim], and the cache with the rotated
    keys and the values. qkv: the products, each [b * t, out]."""
    kv_heads, head_dim = cache.k.shape[2:]
    sums = (each.sums.reshape(*each.sums.shape[:2], -1, head_dim) for each in qkv)
    scales = [each.scale.reshape(-1, head_dim) for each in qkv if each.scale is not None]
    q, k, v = rope_and_cache(
        Projections(*sums), positions, rope_frequencies(spec.config),
        cache.k, cache.v, cache.page_table, cache.starts, cache.lengths,
        weight_scales=Projections(*scales) if scales else None,
        k_scale=_of_own_heads(cache.k_scale, kv_heads),
        v_scale=_of_own_heads(cache.v_scale, kv_heads),
        dtype=jnp.dtype(spec.dtype),
        implementation=spec.of_attention,
    )  # fmt: skip
    return q, cache._replace(k=k, v=v)


def _of_own_heads(scale: Array, kv_heads: int) -> Array:
    """Of scales per kv head, those of this device's heads."""
    axis = divided_over("kv_heads")
    if scale.ndim == 0 or axis is None:
        return scale
    return lax.dynamic_slice_in_dim(scale, lax.axis_index(axis) * kv_heads, kv_heads)


class MLP(nn.Module):
    """The norm and SwiGLU, plus the residual: down(silu(gate(x)) * up(x)) + residual."""

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
            return _declared(added(stream), gate, up, down)
        if _is_fused(self.spec, stream, ((gate, up), (down,)), inner):
            residual, terms = norm.in_terms(stream)
            count = residual.size // hidden
            inner_terms = silu_and_mul(*parts(self.spec, terms, count, (gate, up)))
            (product,) = parts(self.spec, inner_terms, count, (down,))
            return Pending(residual, product)
        residual = added(stream)
        x = norm(residual)
        if _is_swiglu_fused(self.spec, x, gate, up, down):
            rows, x_scale, matrix = gate.operands(x)
            with jax.named_scope("gate_proj+up_proj"):
                codes, scale = swiglu(
                    rows, *matrix.quantized, *up.stored().quantized, x_scale=x_scale,
                    implementation="hopper_fp8",
                )  # fmt: skip
            with jax.named_scope("down_proj"):
                return multiply(self.spec, Operands(codes, scale, down.stored()), x, residual)
        g, u = products(self.spec, x, (gate, up))
        return down(nn.silu(g) * u, residual)


def _is_swiglu_fused(spec: ModelSpec, x: Array, gate: Linear, up: Linear, down: Linear) -> bool:
    """Whether one kernel computes silu(gate(x)) * up(x) and quantises it for down_proj, with a
    scale per token and 128 columns, where otherwise it is one per token."""
    formats = [linear.format for linear in (gate, up, down)]
    if (
        spec.activations != "dynamic"
        or spec.implementation not in (None, "hopper")
        or any(each.scale is None or each.activation_scale_ub for each in formats)
        or formats[0].scale != formats[1].scale
    ):
        return False

    def runs_in_fp8(linear: Linear, out_dtype: jnp.dtype | None) -> bool:
        codes = jax.ShapeDtypeStruct((x.size // x.shape[-1], linear.in_features), e4m3.DTYPE)
        return chosen(codes, *linear.stored().quantized, out_dtype) == "hopper_fp8"

    return runs_in_fp8(gate, None) and runs_in_fp8(up, None) and runs_in_fp8(down, x.dtype)


class Block(nn.Module):
    """One decoder layer: attention and MLP, each behind a norm and added to the residual."""

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
        self.embed_tokens = Embedding(self.spec)
        self.layers = [Block(self.spec) for _ in range(config.num_layers)]
        self.norm = RMSNorm(self.spec)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                self.spec, config.hidden_size, config.vocab_size, ("vocab", "embed")
            )

    def __call__(self, tokens: Array) -> Array:
        """Without a cache, for training and as a second opinion: int [b, t] -> float32 logits
        [b, t, vocab], full causal attention."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x: Array | Pending = self.embed_tokens(tokens)
        for layer in self.layers:
            x, _ = layer(x, positions, None)
        return self.unembed(self.norm(added(x)))

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
        x: Array | Pending = self.embed_tokens(tokens)
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
        return self.norm(added(x)), cache

    def unembed(self, hidden: Array) -> Array:
        """Final hidden states [..., d] to float32 logits [..., vocab]."""
        if not self.spec.config.tie_word_embeddings:
            return self.lm_head(hidden).astype(jnp.float32)
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = dense(rows, self.embed_tokens.weight, self.spec.implementation)
        return logits.reshape(*hidden.shape[:-1], -1)


def dense(x: Array, weight: Array, implementation: Implementation | None = None) -> Array:
    """x [m, in] @ weight [out, in].T in float32 sums, for unquantised weights.

    On a CPU the kernel for FP8 weights takes those in bfloat16, too. Otherwise a weight of another
    dtype than x, or few bfloat16 rows on a CPU, go by blocks of the weight's rows: XLA would write
    out a copy of the whole weight.
    """
    if implementation in (None, "cpu") and _runs_on_cpu(x, weight):
        return cpu.dense(x, weight)

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
    without_kernel = by_blocks if x.shape[0] < MIN_ROWS_FOR_BF16 else dot
    return lax.platform_dependent(x, weight, cpu=without_kernel, default=direct)


def _runs_on_cpu(x: Array, weight: Array) -> bool:
    reasons = (lambda: cpu.refusal(x, weight, None), device.not_local, cpu.slower_than_xla)
    return weight.dtype == jnp.bfloat16 and not any(reason() for reason in reasons)


def abstract_params(spec: ModelSpec) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s, nested by module name."""
    return nn.unbox(_boxed_params(_declaring(spec)))


def logical_axes(spec: ModelSpec) -> Params:
    """The parameter tree with a `PartitionSpec` of logical axis names in place of each array."""
    return nn.get_partition_spec(_boxed_params(_declaring(spec)))


def init_params(spec: ModelSpec, seed: int = 0) -> Params:
    """Random parameters in the formats of `spec`, for tests, benchmarks and training."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = jax.jit(Llama(_declaring(spec)).init)
    return nn.unbox(init(jax.random.key(seed), tokens)["params"])


def _declaring(spec: ModelSpec) -> ModelSpec:
    """What declares the same parameters on any device, whatever runs with them."""
    return replace(spec, implementation="xla", mesh=None)


def param_shardings(spec: ModelSpec) -> Params:
    """The tree `abstract_params(spec)` with a Sharding for each array.

    Without a mesh everything lies on the default device. A dimension that the mesh axis does not
    divide (block scales of a narrow matrix, a handful of kv heads over many devices) is not split:
    every device of that axis then holds all of it, which `memory.plan_memory` counts.
    """
    mesh, abstract = spec.mesh, abstract_params(spec)
    shardings: Params
    if mesh is None:
        shardings = jax.tree.map(lambda _: default_sharding(), abstract)
    else:
        shardings = jax.tree.map(
            lambda leaf, axes: sharding_of(mesh, tuple(axes), leaf.shape),
            abstract,
            logical_axes(spec),
        )
    return shardings


@cache
def _boxed_params(spec: ModelSpec) -> Params:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Llama(spec).init, jax.random.key(0), tokens)["params"]
