"""The forward pass as functions of parameters and cache, on one device or on a mesh.

On a mesh each device runs the model inside shard_map on its own heads, intermediate features and
part of the vocabulary (`device_spec`), because XLA cannot partition a Pallas kernel. The model sums
over devices after the embedding, attention and the MLP; logits are gathered here.
"""

import math
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array, lax
from jax.sharding import PartitionSpec

from llama_jax.model.kv_cache import KVCache
from llama_jax.model.llama import Llama
from llama_jax.model.params import abstract_params, logical_axes, param_shardings
from llama_jax.model.sharding import (
    RULES,
    cache_shardings,
    default_sharding,
    make_mesh,
    replicated_on,
)
from llama_jax.model.spec import Activations, ModelSpec, Params, Phase
from pallas_kernels import device
from pallas_kernels.fp8_matmul.limits import MAX_WEIGHT_ONLY_ROWS
from pallas_kernels.fp8_matmul.logits import LogitStats
from pallas_kernels.fp8_matmul.reference import BLOCK


@partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def prefill(
    params: Params,
    cache: KVCache,
    tokens: Array,
    num_new_tokens: Array,
    slots: Array | None = None,
    *,
    spec: ModelSpec,
) -> tuple[Array, KVCache]:
    """Append a chunk of each prompt to the cache.

    A long prompt takes several calls, each of which continues where the last one ended. The cache
    is donated.

    tokens: int32 [b, t]; num_new_tokens: int32 [b], how many of them are real (0 leaves a sequence
        as it is).
    slots: int32 [b], the slots of the cache they belong to; None for all in order.
    Returns float32 logits [b, vocab] after each sequence's last real token, and the cache.
    """
    hidden, cache = extend(params, cache, tokens, num_new_tokens, slots, spec=spec, phase="prefill")
    return unembed(params, last_hidden(hidden, num_new_tokens), spec=spec), cache


@partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def decode(
    params: Params,
    cache: KVCache,
    tokens: Array,
    active: Array | None = None,
    *,
    spec: ModelSpec,
) -> tuple[Array, KVCache]:
    """Append one token to each active sequence of the cache, which is donated.

    tokens: int32 [batch]; active: bool [batch], None for all.
    Returns float32 logits [batch, vocab] and the cache.
    """
    num_new_tokens = jnp.ones_like(tokens) if active is None else active.astype(jnp.int32)
    hidden, cache = extend(
        params, cache, tokens[:, None], num_new_tokens, spec=spec, phase="decode"
    )
    return unembed(params, hidden[:, 0], spec=spec), cache


def extend(
    params: Params,
    cache: KVCache,
    tokens: Array,
    num_new_tokens: Array,
    slots: Array | None = None,
    *,
    spec: ModelSpec,
    phase: Phase,
) -> tuple[Array, KVCache]:
    """Append tokens to the cache, with the arguments of `prefill`.

    phase: decides what "auto" activations are.
    Returns the hidden states [b, t, d] of all tokens, and the cache.
    """
    spec = replace(spec, activations=activations_in(phase, tokens.size, spec))
    slots = jnp.arange(tokens.shape[0]) if slots is None else slots
    cached_lens = jnp.take(cache.cached_lens, slots, mode="clip")
    positions = cached_lens[:, None] + jnp.arange(tokens.shape[1])
    spec, replicated = _placed(spec), PartitionSpec()
    pages = spec.mesh and _specs(cache_shardings(spec.config, spec.mesh))
    extended: Any = _apply(
        spec, "extend", params, (tokens, positions, cache, slots, num_new_tokens),
        in_specs=(replicated, replicated, pages, replicated, replicated),
        out_specs=(replicated, pages),
    )  # fmt: skip
    return extended


def activations_in(phase: Phase, rows: int, spec: ModelSpec) -> Activations:
    """Return the activations of `spec`, with "auto" resolved.

    "auto" is "dynamic" where FP8 tensor cores are used: in prefill, and in decode steps of more
    rows than the weight-only kernel takes. Otherwise it is "bf16".

    rows: what the call is compiled for; the result never depends on what a batch holds.
    """
    if spec.activations != "auto":
        return spec.activations
    computes = phase == "prefill" or rows > MAX_WEIGHT_ONLY_ROWS
    in_fp8 = spec.dtype == "bfloat16" and computes and device.has_fp8_tensor_cores()
    return "dynamic" if in_fp8 else "bf16"


def last_hidden(hidden: Array, num_new_tokens: Array) -> Array:
    """Pick the state of each sequence's last real token: [b, t, d] and int32 [b] to [b, d]."""
    last = jnp.maximum(num_new_tokens - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, last, axis=1)[:, 0]


def unembed(params: Params, hidden: Array, *, spec: ModelSpec) -> Array:
    """Compute float32 logits [..., vocab] of the hidden states [..., d] of `extend`."""
    spec, replicated = _placed(spec), PartitionSpec()
    over_vocab = PartitionSpec(*(None,) * (hidden.ndim - 1), RULES["vocab"])
    logits: Array = _apply(
        spec, "unembed", params, (hidden,), in_specs=(replicated,), out_specs=over_vocab
    )
    return lax.with_sharding_constraint(logits, replicated_on(spec.mesh)) if spec.mesh else logits


def logit_stats(params: Params, hidden: Array, targets: Array, *, spec: ModelSpec) -> LogitStats:
    """Compute what is known of the logits of hidden states [m, d], without keeping them.

    targets: int32 [m], a token for each.
    """
    spec, replicated = _placed(spec), PartitionSpec()
    found: LogitStats = _apply(
        spec, "logit_stats", params, (hidden, targets), in_specs=(replicated, replicated),
        out_specs=replicated,
    )  # fmt: skip
    return lax.with_sharding_constraint(found, replicated_on(spec.mesh)) if spec.mesh else found


@cache
def device_spec(spec: ModelSpec) -> ModelSpec | None:
    """Return the smaller model that each device of `spec.mesh` runs.

    Returns None if heads, intermediate features or the vocabulary do not divide evenly, or if a
    block or a group of scales would straddle two devices. XLA then partitions the program itself,
    and no kernel runs.
    """
    parts = spec.mesh.shape["model"] if spec.mesh else 1
    if parts == 1:
        return replace(spec, mesh=None)
    names = ("vocab_size", "num_heads", "num_kv_heads", "intermediate_size")
    sizes = {name: getattr(spec.config, name) for name in names}
    if any(size % parts for size in sizes.values()):
        return None
    config = replace(spec.config, **{name: size // parts for name, size in sizes.items()})
    axes = traverse_util.flatten_dict(logical_axes(spec), sep="/")
    formats = {
        path: replace(stored, column_groups=max(1, stored.column_groups // parts))
        if axes[f"{path}/weight"][-1] in RULES
        else stored
        for path, stored in spec.formats.items()
    }
    own = replace(spec, config=config, formats=formats, mesh=None)
    shapes = traverse_util.flatten_dict(abstract_params(own), sep="/")
    is_aligned = all(
        size % BLOCK == 0
        for path, stored in formats.items()
        for i, size in enumerate(shapes[f"{path}/weight"].shape)
        if axes[f"{path}/weight"][i] in RULES
        and (stored.scale == "block" or (stored.activation_group and i == 1))
    )
    held = jax.tree.map(
        lambda leaf, sharding, of_own: math.prod(sharding.shard_shape(leaf.shape)) == of_own.size,
        abstract_params(spec), param_shardings(spec), abstract_params(own),
    )  # fmt: skip
    return own if is_aligned and all(jax.tree.leaves(held)) else None


def _apply(
    spec: ModelSpec,
    method: str,
    params: Params,
    args: tuple[Any, ...],
    in_specs: tuple[Any, ...],
    out_specs: Any,
) -> Any:
    """Call a method of the model, inside shard_map if there is a mesh and `device_spec` allows
    it."""
    own = device_spec(spec)
    if spec.mesh is None or own is None:
        return Llama(spec).apply({"params": params}, *args, method=method)

    def on_device(params: Params, *args: Any) -> Any:
        # A device that holds a single group of columns drops that axis.
        params = jax.tree.map(lambda a, own: a.reshape(own.shape), params, abstract_params(own))
        return Llama(own).apply({"params": params}, *args, method=method)

    in_specs = (_specs(param_shardings(spec)), *in_specs)
    # check_vma would refuse loops whose carries begin as zeros, which are the same on all devices.
    mapped = jax.shard_map(
        on_device, mesh=spec.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
    # An eager shard_map crashes XLA's CPU compiler on the FFI calls of our kernels (jax 0.11.2). So
    # an eager call compiles, each time: callers are expected to be under jax.jit.
    return jax.jit(mapped, inline=True)(params, *args)


def _placed(spec: ModelSpec) -> ModelSpec:
    """Give the spec a mesh of the default device if there are several, to pin arrays to it."""
    if spec.mesh or jax.device_count() == 1:
        return spec
    return replace(spec, mesh=make_mesh(1, devices=list(default_sharding().device_set)))


def _specs(shardings: Any) -> Any:
    return jax.tree.map(lambda sharding: sharding.spec, shardings)
