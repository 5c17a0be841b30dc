"""The forward pass against itself and against float32 dequantised weights.

Independent references are in test_parity.py; here: every way through the cache gives one answer.
Tolerance 2e-5 where only the order of float32 sums differs (logits are of order 0.1 to 5).
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError
from jax.sharding import PartitionSpec

from llama_jax.model.forward import decode, prefill
from llama_jax.model.fp8 import dequantize
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.llama import Llama
from llama_jax.model.params import abstract_params, init_params, logical_axes
from llama_jax.model.rope import rope_frequencies
from llama_jax.model.spec import ModelSpec
from pallas_kernels import e4m3
from pallas_kernels.fp8_matmul.dense import dense
from pallas_kernels.rope_and_cache.xla import apply_rope
from tests.tiny import CONFIG, config, fp8_formats, fp8_spec, tokens

SPEC = ModelSpec(CONFIG, dtype="float32")
CLOSE = {"atol": 2e-5}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda a: a * 6 if a.ndim == 2 else a, init_params(SPEC))


@cache
def forward(spec):
    return jax.jit(Llama(spec).apply)


def without_cache(spec, params, ids):
    """Padded below and behind, which changes no token before: one program serves most tests."""
    rows, length = ids.shape
    padded = np.pad(ids, ((0, 4 - rows), (0, -length % 64)))
    return np.asarray(forward(spec)({"params": params}, padded))[:rows, :length]


def test_prefill_is_the_forward_pass(params):
    ids = tokens(2, 20)
    logits, cache = prefill(
        params, init_cache(CONFIG, 2, 64, "float32"), ids, jnp.array([20, 20]), spec=SPEC
    )
    np.testing.assert_allclose(logits, without_cache(SPEC, params, ids)[:, -1], **CLOSE)
    np.testing.assert_array_equal(cache.cached_lens, [20, 20])


@pytest.mark.parametrize("chunk", [1, 7, pytest.param(16, marks=pytest.mark.slow), 64])
def test_chunks_equal_one_piece(params, chunk):
    ids = tokens(1, 100)
    cache = init_cache(CONFIG, 1, 128, "float32")
    for start in range(0, 100, chunk):
        part = ids[:, start : start + chunk]
        padded = np.pad(part, ((0, 0), (0, chunk - part.shape[1])))
        logits, cache = prefill(params, cache, padded, jnp.array([part.shape[1]]), spec=SPEC)
    np.testing.assert_allclose(logits, without_cache(SPEC, params, ids)[:, -1], **CLOSE)


def test_decode_equals_prefill_to_the_last_slot(params):
    ids = tokens(2, 64)
    expected = without_cache(SPEC, params, ids)
    cache = init_cache(CONFIG, 2, 64, "float32")
    _, cache = prefill(params, cache, ids[:, :60], jnp.array([60, 60]), spec=SPEC)
    for position in range(60, 64):
        logits, cache = decode(params, cache, ids[:, position], spec=SPEC)
        np.testing.assert_allclose(logits, expected[:, position], **CLOSE)
    assert cache.capacity == 64


def test_a_row_alone_equals_the_row_in_a_ragged_batch(params):
    lengths = [1, 33, 9, 0]
    ids = tokens(4, 33)
    together, cache = prefill(
        params, init_cache(CONFIG, 4, 64, "float32"), ids, jnp.array(lengths), spec=SPEC
    )
    step, _ = decode(params, cache, ids[:, 0], jnp.array([True, True, True, False]), spec=SPEC)
    for row, length in enumerate(lengths[:3]):
        alone = np.concatenate([ids[row : row + 1, :length], ids[row : row + 1, :1]], axis=1)
        expected = without_cache(SPEC, params, alone)[0]
        np.testing.assert_allclose(together[row], expected[-2], **CLOSE)
        np.testing.assert_allclose(step[row], expected[-1], **CLOSE)


def test_rows_can_be_filled_in_any_order_and_padded(params):
    ids = tokens(2, 8)
    cache = init_cache(CONFIG, 4, 64, "float32")
    rows = jnp.array([3, 1, 4, 4])
    padded = np.pad(ids, ((0, 2), (0, 0)))
    logits, cache = prefill(params, cache, padded, jnp.array([8, 5, 0, 0]), rows, spec=SPEC)
    np.testing.assert_array_equal(cache.cached_lens, [0, 5, 0, 8])
    expected = without_cache(SPEC, params, ids)
    np.testing.assert_allclose(logits[:2], [expected[0, 7], expected[1, 4]], **CLOSE)


def test_idle_rows_are_left_alone(params):
    cache = init_cache(CONFIG, 2, 64, "float32")
    _, cache = prefill(params, cache, tokens(2, 5), jnp.array([5, 3]), spec=SPEC)
    before = jax.tree.map(np.array, cache)
    _, cache = decode(params, cache, tokens(2), jnp.array([False, False]), spec=SPEC)
    jax.tree.map(np.testing.assert_array_equal, before, cache)


@pytest.mark.parametrize(
    ("scale", "tied"),
    [
        ("row", True),
        ("block", False),
        pytest.param("row", False, marks=pytest.mark.slow),
        pytest.param("block", True, marks=pytest.mark.slow),
    ],
)
def test_fp8_weights_mean_code_times_scale(scale, tied):
    spec = fp8_spec(scale, config(tie_word_embeddings=tied, hidden_size=192))
    params = init_params(spec)

    def widen(node):
        if "weight_scale" in node:
            return {"weight": dequantize(node["weight"], node["weight_scale"])}
        return {k: widen(v) if isinstance(v, dict) else v for k, v in node.items()}

    ids = tokens(2, 9)
    expected = without_cache(ModelSpec(spec.config, dtype="float32"), widen(params), ids)
    np.testing.assert_allclose(without_cache(spec, params, ids), expected, **CLOSE)


def test_bits_and_float8_are_the_same_weights():
    spec = fp8_spec()
    params = init_params(spec)
    bits = jax.tree.map(lambda a: e4m3.as_bits(a) if a.dtype == e4m3.DTYPE else a, params)
    ids = tokens(2, 9)
    np.testing.assert_array_equal(without_cache(spec, bits, ids), without_cache(spec, params, ids))


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_activations_are_rounded_where_fp8_weights_are(activations):
    spec = fp8_spec(activations=activations)
    params = init_params(spec)
    for layer in range(CONFIG.num_layers):
        for group in ("self_attn", "mlp"):
            for linear in params[f"layers_{layer}"][group].values():
                linear["input_scale"] = jnp.float32(0.01)
    ids = tokens(1, 9)
    rounded = without_cache(spec, params, ids)
    exact = without_cache(fp8_spec(), params, ids)
    assert not np.allclose(rounded, exact, atol=1e-4)
    np.testing.assert_allclose(rounded, exact, atol=0.1 * np.abs(exact).max())


def test_static_activations_need_input_scales():
    with pytest.raises(ValueError, match="input scale"):
        ModelSpec(CONFIG, fp8_formats(CONFIG, input_scale=False), activations="static")


@pytest.mark.parametrize(("field", "value"), [("dtype", "float16"), ("activations", "int8")])
def test_settings_that_do_not_exist(field, value):
    with pytest.raises(ValueError, match=field):
        ModelSpec(CONFIG, **{field: value})


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_narrow_caches_stay_close(params, dtype):
    ids = tokens(1, 40)
    cache = init_cache(CONFIG, 1, 64, dtype, jnp.full((2, 2), 0.02))
    _, cache = prefill(params, cache, ids[:, :39], jnp.array([39]), spec=SPEC)
    logits, cache = decode(params, cache, ids[:, 39], spec=SPEC)
    exact = without_cache(SPEC, params, ids)[0, -1]
    error = np.abs(logits[0] - exact).max() / np.abs(exact).max()
    # Keys and values rounded to 8 and 4 bits of significand.
    assert 1e-5 < error < (0.01 if dtype == "bfloat16" else 0.1)


def test_an_fp8_cache_may_have_a_scale_for_each_head(params):
    """Against weights that make keys and values smaller by the same powers of two, which is exact,
    and queries and what is made of values as much larger."""
    scales = 2.0 ** np.random.default_rng(0).integers(-7, 2, (2, 2, CONFIG.num_kv_heads))
    other = jax.tree.map(np.array, params)
    for layer, (k, v) in enumerate(scales):
        attention = other[f"layers_{layer}"]["self_attn"]
        k, v = np.repeat(k, CONFIG.head_dim), np.repeat(v, CONFIG.head_dim)
        attention["k_proj"]["weight"] /= k[:, None]
        attention["v_proj"]["weight"] /= v[:, None]
        of_queries = (
            np.repeat(each.reshape(CONFIG.num_kv_heads, 1, -1), 2, axis=1).reshape(-1)
            for each in (k, v)
        )
        attention["q_proj"]["weight"] *= next(of_queries)[:, None]
        attention["o_proj"]["weight"] *= next(of_queries)
    ids, lengths = tokens(2, 20), jnp.array([20, 20])
    with_scales = init_cache(CONFIG, 2, 20, "int8", jnp.asarray(scales, jnp.float32))
    ours, cache = prefill(params, with_scales, ids, lengths, spec=SPEC)
    theirs, expected = prefill(other, init_cache(CONFIG, 2, 20, "int8"), ids, lengths, spec=SPEC)
    np.testing.assert_allclose(ours, theirs, **CLOSE)
    same = [
        (np.asarray(a) == np.asarray(b)).mean()
        for a, b in zip((*cache.k, *cache.v), (*expected.k, *expected.v), strict=True)
    ]
    assert min(same) > 0.999  # all but ties that another order of sums moves


def test_rope_keeps_pairs_and_lengths_at_far_positions():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, CONFIG.head_dim))
    positions = np.array([[0, 8191, 8192, 32768, 131071]])
    frequencies = rope_frequencies(CONFIG)
    rotated = np.asarray(apply_rope(x, positions, frequencies))
    half = CONFIG.head_dim // 2
    pairs = np.asarray(x[..., :half]) + 1j * np.asarray(x[..., half:])
    # Angles as float32 has them: a float64 product would be another model at position 131071.
    angles = (positions[..., None].astype(np.float32) * frequencies).astype(np.float64)
    expected = pairs * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(rotated[..., :half], expected.real, atol=1e-6)
    np.testing.assert_allclose(rotated[..., half:], expected.imag, atol=1e-6)


def test_parameters_that_are_given_are_not_traced_as_initial_ones(params, monkeypatch):
    """Which would be a quarter of tracing a program."""
    monkeypatch.setattr(jax.random, "normal", None)
    ids = tokens(1, 4)
    jax.eval_shape(Llama(SPEC).apply, {"params": params}, ids)
    other = jax.tree.map(lambda a: a[:-1] if a.ndim == 2 else a, params)
    monkeypatch.undo()
    with pytest.raises(ScopeParamShapeError, match="expected to generate shape"):
        jax.eval_shape(Llama(SPEC).apply, {"params": other}, ids)


def test_one_declaration_gives_shapes_axes_and_values():
    spec = fp8_spec("block")
    shapes, axes, values = abstract_params(spec), logical_axes(spec), init_params(spec)
    assert jax.tree.structure(shapes) == jax.tree.structure(values)
    jax.tree.map(lambda s, v: np.testing.assert_equal((s.shape, s.dtype), (v.shape, v.dtype)),
                 shapes, values)  # fmt: skip
    assert jax.tree.structure(
        jax.tree.map(lambda _: 0, axes, is_leaf=lambda a: isinstance(a, PartitionSpec))
    ) == jax.tree.structure(jax.tree.map(lambda _: 0, shapes))
    assert axes["layers_0"]["mlp"]["down_proj"]["weight"] == PartitionSpec("embed", "mlp")


@pytest.mark.parametrize("m", [1, 8, 16, 64, 129])
def test_unquantised_bfloat16_products_lose_nothing(m):
    x, weight = (
        jax.random.normal(jax.random.key(rows), (rows, 256), jnp.bfloat16) for rows in (m, 600)
    )
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    # Sums of 256 products reach 60; a product rounded to bfloat16 would move them by 0.01.
    np.testing.assert_allclose(jax.jit(dense)(x, weight), expected, atol=1e-4)
