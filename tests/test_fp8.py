import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.fp8 import WeightFormat, dequantize, quantize, quantize_per_token, scale_shape
from pallas_kernels import e4m3

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


def test_formats_that_contradict_themselves():
    for arguments in (
        ("float16", "row"),
        ("float8_e4m3fn",),
        ("float32", None, True),
        ("bfloat16", None, False, 1200.0),
        ("bfloat16", None, False, None, 2),
        ("float8_e4m3fn", "block", False, None, 2),
    ):
        with pytest.raises(ValueError, match="scales go with"):
            WeightFormat(*arguments)
