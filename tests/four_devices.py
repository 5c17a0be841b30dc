"""Checks of a model on four devices, for a process that has them: sharded heads, features and
vocabulary give the logits of one device, with the planned number of reductions."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from llama_jax.engine.scheduling import EngineOptions
from llama_jax.loading import Stored, plan
from llama_jax.model.config import LlamaConfig
from llama_jax.model.forward import (
    decode,
    device_spec,
    extend,
    last_hidden,
    prefill,
    unembed,
)
from llama_jax.model.fp8 import WeightFormat, quantize_per_token
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.params import abstract_params, init_params, param_shardings
from llama_jax.model.sharding import cache_shardings, make_mesh
from llama_jax.model.spec import ModelSpec, Params

LAYERS = 2
CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=256, intermediate_size=1024, num_layers=LAYERS, num_heads=8,
    num_kv_heads=4, head_dim=128, rope_theta=10_000.0, rope_scaling=None,
    max_position_embeddings=256,
)  # fmt: skip
TIED = replace(CONFIG, tie_word_embeddings=True)  # and in FP8, see `spec_of`
ROW = WeightFormat("float8_e4m3fn", "row", input_scale=True)
BLOCK = WeightFormat("float8_e4m3fn", "block")
CASES = {
    "plain": ({}, "bf16", "float32"),
    "row": (dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), ROW), "bf16", "float32"),
    "dynamic": (dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), ROW), "dynamic", "int8"),
    "static": (dict.fromkeys(("q", "o", "up", "down"), ROW), "static", "float32"),
    "block": (dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), BLOCK), "bf16", "float32"),
    # One group of columns on each device, as Meta divides 405B; and two.
    "groups": (
        {"down": replace(ROW, column_groups=4), "o": replace(ROW, column_groups=8)},
        "bf16",
        "float32",
    ),
}


def spec_of(name: str, config: LlamaConfig = CONFIG) -> tuple[ModelSpec, str]:
    stored, activations, cache_dtype = CASES[name]
    formats = {
        f"layers_{i}/{'mlp' if each in ('gate', 'up', 'down') else 'self_attn'}/{each}_proj": format
        for i in range(config.num_layers)
        for each, format in stored.items()
    }
    if config.tie_word_embeddings:
        formats["embed_tokens"] = ROW
    return ModelSpec(config, formats, "float32", activations), cache_dtype


def random_params(spec: ModelSpec) -> Params:
    """Return parameters with different scales, so that a scale in a wrong place is noticed."""
    random = np.random.default_rng(0)

    def varied(path: tuple, leaf: jax.Array) -> jax.Array:
        if path[-1].key == "weight_scale":
            return leaf * random.uniform(0.5, 2, leaf.shape).astype(np.float32)
        return leaf * 0.02 if path[-1].key == "input_scale" else leaf

    return jax.tree_util.tree_map_with_path(varied, init_params(spec))


def logits(spec: ModelSpec, cache_dtype: str, params: Params) -> np.ndarray:
    """Return logits after prompts of different lengths in two slots, and after one more token."""
    cache = init_cache(spec.config, 2, 64, cache_dtype)
    if spec.mesh:
        cache = jax.device_put(cache, cache_shardings(spec.config, spec.mesh))
        params = jax.device_put(params, param_shardings(spec))
    tokens = jnp.arange(20, dtype=jnp.int32).reshape(2, 10) * 12 + 3
    first, cache = prefill(params, cache, tokens, jnp.array([10, 7], jnp.int32), spec=spec)
    second, _ = decode(params, cache, jnp.array([255, 128], jnp.int32), spec=spec)
    return np.stack([first, second])


def check(name: str, config: LlamaConfig = CONFIG, mesh: Mesh | None = None) -> None:
    spec, cache_dtype = spec_of(name, config)
    params = random_params(spec)
    alone = logits(spec, cache_dtype, params)
    assert np.abs(alone).max() > 0.1
    if mesh:
        meshes = (mesh,)
    else:
        meshes = (make_mesh(2, data=2), make_mesh(1)) if name == "static" else (make_mesh(4),)
    for mesh in meshes:
        on_mesh = replace(spec, mesh=mesh)
        assert device_spec(on_mesh)
        error = logits(on_mesh, cache_dtype, params) - alone
        if spec.activations == "bf16":  # float32 sums of 1024 products in another order
            assert np.abs(error).max() < 2e-5, (name, mesh, np.abs(error).max())
        else:  # some activations are rounded to a neighbour, a sixteenth away
            assert error.std() < 0.1 * alone.std(), (name, mesh, error.std(), alone.std())


def check_communication() -> None:
    """Check that embedding, attention and MLP are summed, logits are gathered, and nothing else is
    sent. Scales of activations are those of whole tokens."""
    spec, cache_dtype = spec_of("row", TIED)
    spec = replace(spec, mesh=make_mesh(4))
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (abstract_params(spec), jax.eval_shape(lambda: init_cache(CONFIG, 2, 64, cache_dtype))),
        (param_shardings(spec), cache_shardings(CONFIG, spec.mesh)),
    )
    text = decode.lower(*placed, jnp.zeros(2, jnp.int32), spec=spec).compile().as_text()
    assert text.count(" all-reduce(") == 1 + 2 * LAYERS, text.count(" all-reduce(")
    assert text.count(" all-gather(") == 1, text.count(" all-gather(")
    assert not any(other in text for other in (" all-to-all(", " collective-permute("))

    x = jax.random.normal(jax.random.key(0), (5, 64))
    by_feature = PartitionSpec(None, "model")
    mapped = jax.shard_map(
        partial(quantize_per_token, divided_over="model"),
        mesh=make_mesh(4), in_specs=by_feature, out_specs=(by_feature, PartitionSpec()),
    )  # fmt: skip
    for found, expected in zip(mapped(x), quantize_per_token(x), strict=True):
        np.testing.assert_array_equal(found, expected)


def check_formats() -> None:
    for name in CASES:
        check(name)


def check_eager() -> None:
    """Check that what a user calls without `jax.jit` gives the logits of `prefill`."""
    spec, cache_dtype = spec_of("row", replace(CONFIG, num_layers=1))
    spec = replace(spec, mesh=make_mesh(4))
    params = jax.device_put(random_params(spec), param_shardings(spec))
    cache = init_cache(spec.config, 2, 64, cache_dtype)
    cache = jax.device_put(cache, cache_shardings(spec.config, spec.mesh))
    args = jnp.arange(20, dtype=jnp.int32).reshape(2, 10), jnp.array([10, 7], jnp.int32)
    hidden, _ = extend(params, cache, *args, spec=spec, phase="prefill")
    found = unembed(params, last_hidden(hidden, args[1]), spec=spec)
    expected, _ = prefill(params, cache, *args, spec=spec)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def check_refused() -> None:
    """Check that no invariance is promised that sums over devices do not have."""
    model = Stored("a model", Path(), None, replace(spec_of("row")[0], mesh=make_mesh(4)))
    with pytest.raises(ValueError, match=r"batch_invariant is for one device, .* shards over 4"):
        plan(model, None, EngineOptions(batch_invariant=True), "bf16")


def check_tied() -> None:
    check("row", replace(TIED, num_layers=1), make_mesh(2))
