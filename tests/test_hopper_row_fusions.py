"""Residual with RMSNorm, and SwiGLU, as Hopper kernels in JAX's GPU simulator, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import row_fusions
from pallas_kernels.fp8_matmul import hopper_weight_only
from pallas_kernels.fp8_matmul.terms import Parts, Terms, padded_rows, two_terms
from pallas_kernels.row_fusions import hopper
from tests.hopper import simulate

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
EPS = 1e-5


def product(rng, splits, m, n, *, has_scale=True, size=1.0):
    sums = jnp.asarray(rng.standard_normal((splits, m, n)) * size, F32)
    return Parts(sums, jnp.asarray(rng.uniform(0.5, 2, n), F32) if has_scale else None)


def total(parts):
    y = np.asarray(parts.sums, np.float64).sum(axis=0)
    return y if parts.scale is None else y * np.asarray(parts.scale, np.float64)


def values(terms, m):
    return np.asarray(terms.values(m), np.float64)


def within_a_rounding(found, expected):
    """Off by what a rounding to bfloat16 does, and by what float32 does before it, which moves a
    few numbers to the other side of a tie."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=scale * 2**-20)


@pytest.mark.parametrize(
    ("m", "d", "splits", "has_scale"),
    [
        (1, 1024, 3, True),
        pytest.param(17, 512, 1, False, marks=pytest.mark.slow),
        pytest.param(9, 512, 2, True, marks=pytest.mark.slow),
        (3, 640, None, True),
    ],
    ids=["1-row", "17-rows-scaled-sums", "9-rows", "nothing-to-add-groups-of-128"],
)
def test_add_rms_norm(m, d, splits, has_scale):
    rng = np.random.default_rng(m)
    added = None if splits is None else product(rng, splits, m, d, has_scale=has_scale)
    residual = jnp.asarray(rng.standard_normal((m, d)) * 10.0 ** rng.integers(-3, 4, (m, 1)), BF16)
    weight = jnp.asarray(rng.uniform(0.1, 3, d), BF16)
    x, terms = simulate(hopper.add_rms_norm, added, residual, weight, EPS)
    expected = np.asarray(residual, np.float64) + (0 if added is None else total(added))
    assert x.dtype == BF16 and terms.codes.shape == (2 * padded_rows(m), d)
    within_a_rounding(np.asarray(x, np.float64), expected)
    x = np.asarray(x, np.float64)
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * np.asarray(weight, np.float64)
    within_a_rounding(values(terms, m), normed)


@pytest.mark.parametrize(
    ("m", "n", "splits", "has_scale"),
    [(1, 1024, 2, True), pytest.param(17, 384, 1, False, marks=pytest.mark.slow)],
    ids=["1-row", "17-rows-of-128"],
)
def test_silu_and_mul(m, n, splits, has_scale):
    rng = np.random.default_rng(m)
    gate, up = (product(rng, splits, m, n, has_scale=has_scale, size=4) for _ in range(2))
    terms = simulate(hopper.silu_and_mul, gate, up)
    g, u = total(gate), total(up)
    expected = g / (1 + np.exp(-g)) * u
    assert terms.units.shape[0] == n // (512 if n % 512 == 0 else 128)
    # The exponential is the GPU's approximation, 2^-22 of it, and sums of float32 cancel.
    within_a_rounding(values(terms, m), expected)


def test_extreme_and_broken_rows():
    """Zeros stay zeros, sizes near float32's ends stay finite, and what is no number stays one."""
    sums = np.zeros((1, 4, 512), np.float32)
    sums[0, 1], sums[0, 2, 7], sums[0, 3, 9] = 1e18, np.nan, np.inf
    ones = Parts(jnp.ones((1, 4, 512), F32), None)
    terms = simulate(hopper.silu_and_mul, Parts(jnp.asarray(sums), None), ones)
    found = values(terms, 4)
    assert np.all(found[0] == 0)
    np.testing.assert_allclose(found[1], 1e18, rtol=2**-8)
    assert np.isnan(found[2]).any() and not np.isfinite(found[3]).all()


@pytest.mark.slow
@pytest.mark.parametrize("m", [2, pytest.param(17, marks=pytest.mark.slow)])
def test_a_product_takes_units_of_groups(m):
    """Groups of 256 columns of very different size, against float64; and one unit for a row, with
    and without mean squares."""
    rng = np.random.default_rng(m)
    k, n, groups = 512, 160, 2
    x = jnp.asarray(rng.integers(-128, 129, (m, k)), BF16)  # 8 bits: exact in two terms
    size = 2.0 ** rng.integers(-20, 20, (groups, m))
    one = [two_terms(part) for part in jnp.split(x, groups, axis=1)]
    rows = padded_rows(m)
    units = np.stack([np.asarray(each.units[0]) for each in one])
    units[:, :m] *= size
    codes = jnp.concatenate([each.codes for each in one], axis=1)
    terms = Terms(codes, jnp.asarray(units[:, :rows], F32))
    weight = jnp.asarray(rng.integers(-8, 9, (n, k)), jnp.float8_e4m3fn)
    scale = jnp.asarray(rng.uniform(0.5, 2, n), F32)
    squares = rng.uniform(0.1, 9, (3, rows))
    exact = np.asarray(x, np.float64)
    for given, wide in (
        (terms, exact * np.repeat(size.T, k // groups, axis=1)),
        (two_terms(x), exact),
        (
            two_terms(x)._replace(mean_squares=jnp.asarray(squares, F32)),
            exact / np.sqrt(squares.sum(axis=0)[:m, None]),
        ),
    ):
        (found,) = simulate(hopper_weight_only.parts, given, [weight], [scale], m=m)
        expected = wide @ (np.asarray(weight, np.float64).T * np.asarray(scale, np.float64))
        np.testing.assert_allclose(
            np.asarray(found.total()), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
        )


@pytest.mark.parametrize(
    ("dtype", "hidden", "inner", "reason"),
    [
        (F32, 512, 256, "must be bfloat16"),
        (BF16, 576, 256, "hidden size 576 must be a multiple of 128"),
        (BF16, 512, 192, "intermediate size 192 must be a multiple of 128"),
        (BF16, 4096, 14_336, None),
        (BF16, 3072, 8192, None),
    ],
)
def test_refusals(dtype, hidden, inner, reason):
    found = row_fusions.refusal(jax.ShapeDtypeStruct((1, hidden), dtype), inner)
    assert found is None if reason is None else reason in found
