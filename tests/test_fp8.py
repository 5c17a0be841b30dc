import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.model.fp8 import (
    WeightFormat,
    dequantize,
    quantize,
    quantize_per_group,
    quantize_per_token,
    scale_shape,
)
from llama_jax.model.linear import Linear
from llama_jax.model.spec import ModelSpec
from pallas_kernels import e4m3
from tests import tiny

ALL_CODES = np.arange(256, dtype=np.uint8)
FINITE = ALL_CODES[(ALL_CODES & 0x7F) != 0x7F]


def test_bits_read_as_ml_dtypes_reads_them():
    expected = FINITE.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    bits = jnp.asarray(FINITE.view(np.int8))
    np.testing.assert_array_equal(e4m3.from_bits(bits) * e4m3.BITS_SCALE, expected)
    np.testing.assert_array_equal(e4m3.load(bits), expected)
    np.testing.assert_array_equal(e4m3.load(jnp.asarray(FINITE.view(e4m3.DTYPE))), expected)


@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=50))
def test_cast_rounds_as_ml_dtypes_and_saturates(values):
    x = np.array(values, np.float32)
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(np.asarray(e4m3.cast(jnp.asarray(x))).view(np.uint8), expected)


def test_cast_saturates_where_jax_gives_nan():
    huge = jnp.array([465.0, 1e30, jnp.inf, -jnp.inf])
    assert jnp.isnan(huge[0].astype(e4m3.DTYPE))
    np.testing.assert_array_equal(e4m3.load(e4m3.cast(huge)), [448, 448, 448, -448])


def test_as_bits_is_the_same_memory():
    codes = e4m3.cast(jax.random.normal(jax.random.key(0), (256, 512)))
    bits = e4m3.as_bits(codes)
    assert bits.dtype == jnp.int8
    assert bits.unsafe_buffer_pointer() == codes.unsafe_buffer_pointer()


@pytest.mark.parametrize("layout", ["row", "block"])
@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (1, 7)])
@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_quantisation_error_is_half_a_step(layout, shape, magnitude):
    weight = jax.random.normal(jax.random.key(1), shape) * magnitude
    codes, scale = quantize(weight, layout)
    assert codes.dtype == e4m3.DTYPE
    assert scale.shape == scale_shape(shape, layout)
    # Three mantissa bits: a relative step of 2^-3, half of it by rounding; subnormals below 2^-6.
    error = jnp.abs(dequantize(codes, scale) - weight)
    bound = jnp.maximum(jnp.abs(weight) * 2**-4, scale.max() * 2**-10) * 1.0001
    assert bool(jnp.all(error <= bound))


def test_zero_rows_stay_zero():
    codes, scale = quantize(jnp.zeros((4, 8)), "row")
    np.testing.assert_array_equal(scale, np.ones(4))
    np.testing.assert_array_equal(dequantize(codes, scale), np.zeros((4, 8)))


def test_each_token_has_its_own_scale():
    x = jnp.array([[1.0, -2.0], [0.0, 0.0], [1e-20, 3e-20]])
    codes, scale = quantize_per_token(x)
    np.testing.assert_allclose(scale[:, 0], [2 / 448, 1, 3e-20 / 448], rtol=1e-6)
    np.testing.assert_allclose(codes.astype(jnp.float32) * scale, x, rtol=2**-4)


def test_a_bounded_token_is_clipped_and_its_scale_has_a_floor():
    x = jnp.array([[1.0, -2.0], [0.0, 0.0], [1e-20, 3e-20], [3000.0, -600.0]])
    codes, scale = quantize_per_token(x, 1200.0)
    floor = 1 / (448 * 512)
    np.testing.assert_allclose(scale[:, 0], [2 / 448, 1, floor, 1200 / 448], rtol=1e-6)
    np.testing.assert_allclose(
        codes.astype(jnp.float32) * scale, [[1, -2], [0, 0], [0, 0], [1200, -600]], rtol=2**-4
    )


def by_groups(x):
    """Codes and scales of DeepSeek's formula, absmax / 448 of each 128 features, in float64."""
    features = x.shape[1]
    wide = np.pad(np.asarray(x, np.float64), ((0, 0), (0, -features % 128)))
    groups = wide.reshape(len(x), -1, 128)
    absmax = np.abs(groups).max(axis=2)
    scale = np.where(absmax == 0, 1.0, absmax / 448)
    quotients = (groups / scale[:, :, None]).reshape(wide.shape)[:, :features]
    return np.clip(quotients, -448, 448).astype(ml_dtypes.float8_e4m3fn), scale


@pytest.mark.parametrize("features", [7, 128, 384, 300])
@pytest.mark.parametrize("jitted", [False, True])
def test_each_group_has_its_own_scale(features, jitted):
    rng = np.random.default_rng(features)
    x = rng.normal(0, 1, (65, features)) * 10.0 ** rng.integers(-8, 8, (65, 1))
    x[3], x[4, :100] = 0, 0
    x = x.astype(np.float32)
    codes, scale = (jax.jit(quantize_per_group) if jitted else quantize_per_group)(jnp.asarray(x))
    expected_codes, expected = by_groups(x)
    np.testing.assert_allclose(scale, expected, rtol=2**-23)
    # A float32 quotient may fall to the other side of the middle between two codes.
    assert (np.asarray(codes) != expected_codes).mean() < 1e-4
    np.testing.assert_allclose(
        codes.astype(np.float32), expected_codes.astype(np.float32), rtol=2**-3, atol=2**-9
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("layout", ["row", "block"])
def test_a_matrix_whose_format_has_groups_multiplies_with_them(layout, implementation):
    """As DeepSeek's fp8_gemm: sums over the groups of codes times both scales; here in float64."""
    stored = WeightFormat("float8_e4m3fn", layout, activation_group=128)
    spec = ModelSpec(tiny.CONFIG, {"": stored}, "float32", "dynamic", implementation)
    x = np.random.default_rng(0).normal(0, 1, (9, 300)).astype(np.float32)
    x[:, 128:256] *= 100  # one scale per token would leave the rest few bits
    weight, scale = quantize(jax.random.normal(jax.random.key(0), (200, 300)), layout)
    linear = Linear(spec, 300, 200, ("embed", "mlp"))
    y = linear.apply({"params": {"weight": weight, "weight_scale": scale}}, jnp.asarray(x))
    codes, x_scale = by_groups(x)
    a = codes.astype(np.float64) * np.repeat(x_scale, 128, axis=1)[:, :300]
    expected = a @ np.asarray(dequantize(weight, scale), np.float64).T
    # Sums of 300 products, the large ones of which reach 3000: sqrt(300) * 2^-24 * 3000 = 3e-3.
    np.testing.assert_allclose(y, expected, atol=3e-3)


def test_groups_go_with_codes_and_without_a_bound():
    with pytest.raises(ValueError, match="activation_group must be 128 or None"):
        WeightFormat("float8_e4m3fn", "block", activation_group=64)
    with pytest.raises(ValueError, match="goes without a bound"):
        WeightFormat("float8_e4m3fn", "row", False, 1200.0, activation_group=128)


def test_formats_that_contradict_themselves():
    for arguments in (
        ("float16", "row"),
        ("float8_e4m3fn",),
        ("float32", None, True),
        ("bfloat16", None, False, 1200.0),
        ("bfloat16", None, False, None, 2),
        ("bfloat16", None, False, None, 1, 128),
        ("float8_e4m3fn", "block", False, None, 2),
    ):
        with pytest.raises(ValueError, match=r"only codes .* may have scales"):
            WeightFormat(*arguments)
