import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.fp8 import dequantize, quantize, quantize_per_token
from pallas_kernels import e4m3
from pallas_kernels.fp8_matmul import fp8_matmul, xla
from pallas_kernels.fp8_matmul.xla import block_rows
from tests.pairs import every_pair

TWO_BLOCKS_AND_A_TAIL = 2 * block_rows(300) + 136


def operands(m, n, k, layout="row", seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    codes, scale = quantize(jax.random.normal(keys[0], (n, k)), layout)
    return jax.random.normal(keys[1], (m, k)), codes, scale


def exact(x, codes, scale):
    """The product in float64."""
    w = np.asarray(codes, np.float64)
    if scale.ndim == 1:
        w = w * np.asarray(scale, np.float64)[:, None]
    else:
        w = w * np.kron(scale, np.ones((128, 128)))[: w.shape[0], : w.shape[1]]
    return np.asarray(x, np.float64) @ w.T


@pytest.mark.parametrize(
    ("implementation", "n", "m", "layout", "stored_as"),
    every_pair(
        ("reference", "xla"), (1, 80, TWO_BLOCKS_AND_A_TAIL), (1, 7, 129), ("row", "block"),
        ("float8", "bits"),
    ),
)  # fmt: skip
def test_against_float64(implementation, n, m, layout, stored_as):
    x, codes, scale = operands(m, n, 300, layout)
    weight = e4m3.as_bits(codes) if stored_as == "bits" else codes
    y = fp8_matmul(x, weight, scale, implementation=implementation)
    # Sums of 300 products reach 60: float32 sums stray by sqrt(300) * 2^-24 * 60 = 6e-5. A weight
    # off by one code would move them by 0.06.
    np.testing.assert_allclose(y, exact(x, codes, scale), atol=1e-4)


@pytest.mark.parametrize("layout", ["row", "block"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_bfloat16_codes(implementation, layout):
    x, codes, scale = operands(9, TWO_BLOCKS_AND_A_TAIL, 300, layout)
    codes = codes.astype(jnp.bfloat16) + jnp.bfloat16(2**-10)  # half of e4m3fn's smallest step
    y = fp8_matmul(x, codes, scale, implementation=implementation)
    np.testing.assert_allclose(y, exact(x, codes, scale), atol=1e-4)


@pytest.mark.parametrize(
    ("implementation", "n", "dtype"),
    every_pair(
        ("reference", "xla"), (1, 80, TWO_BLOCKS_AND_A_TAIL),
        (jnp.float32, jnp.bfloat16, e4m3.DTYPE),
    ),
    ids=str,
)  # fmt: skip
def test_groups_of_columns_with_row_scales_of_their_own(implementation, n, dtype):
    """Each group is a product of its own; nothing is rounded on the way."""
    x, codes, _ = operands(17, n, 320)
    x = e4m3.cast(x) if dtype == e4m3.DTYPE else x.astype(dtype)
    x_scale = jnp.float32(0.5) if dtype == e4m3.DTYPE else None
    scale = jax.random.uniform(jax.random.key(7), (n, 4), minval=1e-3, maxval=1e-2)
    groups = zip(np.split(x, 4, axis=1), np.split(codes, 4, axis=1), scale.T, strict=True)
    expected = sum(exact(*group) for group in groups) * (1 if x_scale is None else 0.5)
    np.testing.assert_allclose(
        dequantize(codes, scale), codes.astype(np.float32) * np.repeat(scale, 80, axis=1), rtol=1e-7
    )
    for weight in (codes, e4m3.as_bits(codes)):
        y = fp8_matmul(x, weight, scale, x_scale=x_scale, implementation=implementation)
        np.testing.assert_allclose(y, expected, atol=1e-4)


@pytest.mark.parametrize("m", [1, 8, 16, 64, 129])
def test_bfloat16_activations_lose_nothing_with_row_scales(m):
    x, codes, scale = operands(m, 600, 256)
    x = x.astype(jnp.bfloat16)
    y = fp8_matmul(x, e4m3.as_bits(codes), scale)
    np.testing.assert_allclose(y, exact(x, codes, scale), atol=1e-4)


def test_block_scales_in_bfloat16_round_the_weight_to_bfloat16():
    x, codes, scale = operands(16, 600, 256, "block")
    x = x.astype(jnp.bfloat16)
    y = fp8_matmul(x, e4m3.as_bits(codes), scale)
    assert np.all(np.abs(y - exact(x, codes, scale)) < rounded_weights(x, codes, scale))


@pytest.mark.parametrize("m", [3, 300])
@pytest.mark.parametrize("n", [80, TWO_BLOCKS_AND_A_TAIL])
def test_block_scales_and_fp8_activations_as_on_a_gpu(m, n, monkeypatch):
    """In bfloat16, for which there are tensor cores, not in float32."""
    x, codes, scale = operands(m, n, 300, "block")
    x, x_scale = quantize_per_token(x)
    monkeypatch.setattr(xla.device, "platform", lambda: "gpu")
    y = fp8_matmul(x, codes, scale, x_scale=x_scale)
    wide = np.asarray(x, np.float64) * np.asarray(x_scale)
    bound = rounded_weights(wide, codes, scale) + 1e-4
    assert np.all(np.abs(y - exact(wide, codes, scale)) < bound)


def rounded_weights(x, codes, scale):
    """How far results stray if each weight moves by 2^-9 of itself."""
    w = np.abs(np.asarray(dequantize(codes, scale), np.float64))
    return np.abs(np.asarray(x, np.float64)) @ w.T * 2**-9


@pytest.mark.parametrize("weight_bits", [False, True])
@pytest.mark.parametrize("layout", ["row", "block"])
def test_fp8_activations(layout, weight_bits):
    x, codes, scale = operands(9, 520, 256, layout)
    x_codes, x_scale = quantize_per_token(x)
    weight = e4m3.as_bits(codes) if weight_bits else codes
    expected = exact(np.asarray(x_codes, np.float64) * np.asarray(x_scale), codes, scale)
    y = fp8_matmul(x_codes, weight, scale, x_scale=x_scale)
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_small_integers_are_exact():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-8, 9, (16, 512)), jnp.bfloat16)
    w = rng.integers(-8, 9, (1030, 512)).astype(np.float32)
    codes = e4m3.cast(jnp.asarray(w))
    expected = np.asarray(x, np.float64) @ w.T
    for weight in (codes, e4m3.as_bits(codes)):
        np.testing.assert_array_equal(fp8_matmul(x, weight, jnp.ones(1030)), expected)


def test_extreme_scales():
    x, codes, _ = operands(3, 64, 128)
    for size in (1e-30, 1e30):
        scale = jnp.full(64, size)
        np.testing.assert_allclose(
            fp8_matmul(x, e4m3.as_bits(codes), scale), exact(x, codes, scale), rtol=1e-3,
            atol=3e-3 * size,
        )  # fmt: skip


def test_no_more_than_a_block_is_upcast():
    n, k = 32 * block_rows(256), 256
    for dtype in (jnp.float32, jnp.bfloat16):
        for m in (1, 32):
            lowered = jax.jit(lambda x, w, s: fp8_matmul(x, w, s)).lower(
                jax.ShapeDtypeStruct((m, k), dtype),
                jax.ShapeDtypeStruct((n, k), jnp.int8),
                jax.ShapeDtypeStruct((n,), jnp.float32),
            )
            temp = lowered.compile().memory_analysis().temp_size_in_bytes
            outputs, upcast = 2 * m * n * 4, n * k * 2
            assert temp - outputs < upcast / 2


def test_what_does_not_fit_is_refused():
    x, codes, scale = operands(2, 64, 128)
    with pytest.raises(ValueError, match="weight_scale must be"):
        fp8_matmul(x, codes, scale[:3])
    with pytest.raises(ValueError, match="x_scale is required with"):
        fp8_matmul(e4m3.cast(x), codes, scale)
    with pytest.raises(ValueError, match="int8 bits"):
        fp8_matmul(x, codes.astype(jnp.float16), scale)
    with pytest.raises(ValueError, match=r"need x \[m, in\]"):
        fp8_matmul(x[:, :3], codes, scale)
