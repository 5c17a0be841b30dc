"""The weight-only Hopper matmul in JAX's GPU simulator, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import e4m3
from pallas_kernels.dev import shapes
from pallas_kernels.fp8_matmul import (
    hopper_weight_only,
    hopper_weight_only_config,
    hopper_weight_only_loop,
    weight_only_cases,
)
from pallas_kernels.fp8_matmul.hopper_weight_only_config import WeightOnlyConfig
from pallas_kernels.fp8_matmul.reference import expand_scale
from pallas_kernels.fp8_matmul.terms import two_terms
from tests.hopper import simulate

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
ROW, BLOCK = "row", "block"


def scale_shape(kind, n, k):
    return (n,) if kind == ROW else (-(-n // 128), -(-k // 128))


def exact(x, weight, scale):
    x, weight, scale = (np.asarray(each, np.float64) for each in (x, weight, scale))
    return x @ (weight * np.asarray(expand_scale(scale, weight.shape), np.float64)).T


def simulated(x, weights, scales, config, **options):
    y = simulate(hopper_weight_only.fp8_matmuls, x, weights, scales, F32, config=config, **options)
    return [np.asarray(each) for each in y]


@pytest.mark.parametrize(
    ("m", "ns", "k", "kind", "config"),
    [
        pytest.param(
            1, (128,), 512, ROW, WeightOnlyConfig(splits=2, stages=2), marks=pytest.mark.slow
        ),
        (7, (192, 32), 512, BLOCK, WeightOnlyConfig(splits=2, stages=3)),
        pytest.param(
            64, (160,), 384, ROW, WeightOnlyConfig(splits=2, stages=2), marks=pytest.mark.slow
        ),
        (64, (96, 128, 64), 256, ROW, WeightOnlyConfig(splits=1, stages=2, cluster=2)),
        pytest.param(
            33,
            (288, 128),
            384,
            BLOCK,
            WeightOnlyConfig(splits=2, stages=2, cluster=2),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            1,
            (128,),
            512,
            ROW,
            WeightOnlyConfig(splits=2, stages=2, in_fp8=True),
            marks=pytest.mark.slow,
        ),
        (9, (192, 32), 384, BLOCK, WeightOnlyConfig(splits=2, stages=3, in_fp8=True)),
        pytest.param(
            33,
            (288, 128),
            256,
            ROW,
            WeightOnlyConfig(splits=1, stages=2, cluster=2, in_fp8=True),
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "1-row",
        "7-block-ragged",
        "64-row",
        "64-row-pairs-ragged",
        "33-block-pairs",
        "1-row-in-fp8",
        "9-block-in-fp8-ragged",
        "33-row-in-fp8-pairs",
    ],
)
def test_small_integers_are_exact(m, ns, k, kind, config, monkeypatch):
    """With fewer SMs than tiles, so that the ring goes on from one to the next."""
    monkeypatch.setattr(hopper_weight_only_loop, "num_sms", lambda: 2)
    rng = np.random.default_rng(m)
    x = jnp.asarray(rng.integers(-8, 9, (m, k)), BF16)
    weights = [jnp.asarray(rng.integers(-8, 9, (n, k)), e4m3.DTYPE) for n in ns]
    scales = [jnp.asarray(2.0 ** rng.integers(-2, 3, scale_shape(kind, n, k)), F32) for n in ns]
    for y, weight, scale in zip(
        simulated(x, weights, scales, config), weights, scales, strict=True
    ):
        np.testing.assert_array_equal(y, exact(x, weight, scale))


@pytest.mark.parametrize("in_fp8", [False, True])
def test_every_code_times_any_bfloat16_is_exact(in_fp8):
    """Products with powers of two that float16 does not have, from code to result."""
    codes = np.arange(256, dtype=np.uint8).view(e4m3.DTYPE)
    codes = np.where(np.isnan(codes.astype(np.float32)), 0, codes.astype(np.float32))
    weight = jnp.asarray(np.tile(codes.reshape(4, 64), (8, 2)), e4m3.DTYPE)
    powers = 2.0 ** np.linspace(-100, 100, 64).round()
    x = jnp.asarray(np.concatenate([np.diag(powers), np.zeros((64, 64))], axis=1), BF16)
    config = WeightOnlyConfig(splits=1, stages=2, in_fp8=in_fp8)
    (y,) = simulated(x, [weight], [jnp.ones(32)], config)
    np.testing.assert_array_equal(y, exact(x, weight, np.ones(32)))


def test_two_terms_lose_less_than_a_bfloat16_product_rounds():
    """Exact down to 2^-13 of a row's largest; below, off by less than 2^-21 of it. Compiled, too,
    where a cast there and back must not be taken for nothing."""
    rng = np.random.default_rng(0)
    sizes = [1, 1e-38, 2e38, 0, 2.0**-120, 3]
    x = rng.standard_normal((6, 512)) * 2.0 ** rng.integers(-30, 1, (6, 512))
    x = jnp.asarray(np.clip(x, -1.5, 1.5) * np.array(sizes)[:, None], BF16)
    for run in (two_terms, jax.jit(two_terms)):
        codes, units, mean_squares = run(x)
        assert mean_squares is None
        a, b = (each[: len(x)] for each in np.split(np.asarray(codes, np.float64), 2))
        assert np.isfinite(a).all() and np.isfinite(b).all()
        wide, unit = np.asarray(x, np.float64), np.asarray(units, np.float64).T[: len(x)]
        lost = np.abs(unit * (a + b / 16) - wide)
        largest = np.abs(wide).max(axis=1, keepdims=True)
        # Of smaller ones float32 has no unit, and its numbers below 2^-126 are zero to a GPU.
        normal = largest > 2**-118
        assert np.all(lost[(np.abs(wide) >= largest * 2**-13) & normal] == 0)
        assert np.all(lost <= np.where(normal, largest * 2**-21, 2.0**-126))
    codes = two_terms(jnp.asarray([[np.inf, 1], [np.nan, 1]], BF16)).codes
    assert np.isnan(np.asarray(codes, np.float32)).any(axis=1)[:2].all()


def test_in_fp8_what_is_lost_of_x_does_not_show():
    """Numbers of many sizes in a row, against float64: off by less than bfloat16's rounding of the
    result, 2^-9, would be."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((7, 512)) * np.exp(2 * rng.standard_normal((7, 512))), BF16)
    weight = e4m3.cast(jnp.asarray(rng.standard_normal((160, 512)) * 100, F32))
    scale = rng.uniform(0.5, 2, 160).astype(np.float32)
    config = WeightOnlyConfig(splits=2, stages=2, in_fp8=True)
    (y,) = simulated(x, [weight], [jnp.asarray(scale)], config)
    expected = exact(x, weight, scale)
    assert np.linalg.norm(y - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", [ROW, BLOCK])
def test_extreme_scales(kind):
    """Against float64, in units of the absolute products' sum: float32's additions are all that
    rounds."""
    n, k = 192, 384
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, k)), BF16)
    weight = e4m3.cast(jnp.asarray(rng.standard_normal((n, k)) * 100, F32))
    scale = np.float32(10.0 ** rng.uniform(-30, 30, scale_shape(kind, n, k)))
    (y,) = simulated(x, [weight], [jnp.asarray(scale)], WeightOnlyConfig(splits=2, stages=2))
    size = exact(np.abs(x), np.abs(np.asarray(weight, np.float32)), scale)
    assert np.isfinite(y).all()
    assert (np.abs(y - exact(x, weight, scale)) <= 1e-6 * size).all()


def test_residual_and_rounding():
    rng = np.random.default_rng(0)
    x, residual = (jnp.asarray(rng.standard_normal((3, n)), BF16) for n in (256, 64))
    weight, scale = e4m3.cast(jnp.asarray(rng.standard_normal((64, 256)))), jnp.full(64, 0.1)
    y = simulate(hopper_weight_only.fp8_matmul, x, weight, scale, BF16, residual)
    assert y.dtype == BF16
    expected = exact(x, weight, scale) + np.asarray(residual, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ROW, BLOCK])
def test_a_row_is_bit_equal_alone_and_in_a_batch(kind):
    """Beside 32 others two thread blocks share the loads of x; the order of sums stays. Sums of 128
    are exact, since the simulator's own order hangs on shapes; those of such sums are not."""
    rng = np.random.default_rng(0)
    sizes = np.repeat(2.0 ** np.array([0, 13, 26, 7, 20]), 128)
    x = jnp.asarray(rng.integers(-8, 9, (33, 640)) * sizes, BF16)
    weight = jnp.asarray(rng.integers(-8, 9, (160, 640)), e4m3.DTYPE)
    scale = jnp.asarray(rng.uniform(0.5, 2, scale_shape(kind, 160, 640)), F32)
    (alone,), (together,) = (
        simulated(rows, [weight], [scale], None, is_batch_invariant=True) for rows in (x[-1:], x)
    )
    np.testing.assert_array_equal(together[-1:], alone)
    (split,) = simulated(x[-1:], [weight], [scale], WeightOnlyConfig(splits=2, stages=2))
    assert np.any(split != alone)  # another order gives other numbers


def ns_of(linear):
    return (linear.n, linear.n) if linear.name == "gate_proj" else (linear.n,)


@pytest.mark.parametrize("linear", list(shapes.linears()), ids=str)
@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_every_configuration_fits_and_splits_can_be_the_same_for_any_batch(
    linear, is_batch_invariant
):
    configs = {
        m: hopper_weight_only_config.configure(m, ns_of(linear), linear.k, is_batch_invariant)
        for m in range(1, 65)
    }
    assert not is_batch_invariant or len({config.splits for config in configs.values()}) == 1
    for m, config in configs.items():
        assert hopper_weight_only_config.unfit(config, m, linear.k) is None
        assert config.stages >= 4


def test_many_rows_take_fewer_splits():
    """What an H200 was fastest with, of those tried (benchmarks/results/h200.md)."""
    for ns, k, at_1, at_64 in (
        ((4096, 1024, 1024), 4096, 8, 2),
        ((4096,), 4096, 4, 4),
        ((14_336, 14_336), 4096, 4, 1),
        ((4096,), 14_336, 4, 4),
    ):
        splits = [hopper_weight_only_config.configure(m, ns, k).splits for m in (1, 64)]
        assert splits == [at_1, at_64]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (WeightOnlyConfig(splits=0, stages=4), "splits must be 1 to 3, got 0"),
        (WeightOnlyConfig(splits=4, stages=4), "splits must be 1 to 3, got 4"),
        (WeightOnlyConfig(splits=1, stages=1), "at least 2 stages are needed, got 1"),
        (WeightOnlyConfig(splits=1, stages=4, cluster=3), "cluster must be 1 or 2, got 3"),
        (WeightOnlyConfig(splits=1, stages=7), "bytes of shared memory, of 232448"),
    ],
    ids=str,
)
def test_configurations_that_cannot_work(config, reason):
    x, weight = jnp.zeros((64, 384), BF16), jnp.zeros((64, 384), e4m3.DTYPE)
    with pytest.raises(ValueError, match=reason):
        hopper_weight_only.fp8_matmul(x, weight, jnp.ones(64), BF16, config=config)


def test_tuned_splits_serve_as_many_rows_and_every_invariant_batch(monkeypatch):
    table = {
        "n=4096+1024+1024 k=4096 m<=16": {"splits": 5},
        "n=4096 k=14336 m<=64": {"splits": 7, "stages": 9, "cluster": 1, "in_fp8": True},
    }
    monkeypatch.setattr(
        hopper_weight_only_config.tuned, "find", lambda kernel, name: table.get(name)
    )
    for m in (1, 9, 16, 17, 64):
        assert hopper_weight_only_config.configure(m, (4096, 1024, 1024), 4096, True).splits == 5
    for m, splits in ((8, 8), (9, 5), (16, 5), (17, 2)):
        assert hopper_weight_only_config.configure(m, (4096, 1024, 1024), 4096).splits == splits
    for m, in_fp8 in ((32, False), (33, True), (64, True)):
        assert hopper_weight_only_config.configure(m, (4096,), 14_336).in_fp8 == in_fp8


@pytest.mark.parametrize(
    ("ns", "k"),
    [
        ((4096, 1024, 1024), 4096),
        ((4096,), 4096),
        ((14_336, 14_336), 4096),
        ((4096,), 14_336),
        ((128_256,), 4096),
    ],
    ids=["qkv", "o_proj", "gate_up", "down_proj", "lm_head"],
)
def test_few_sms_are_idle(ns, k):
    """Of an 8B's launches, the busiest thread block reads at most 6 % more than the mean."""
    tiles, steps = sum(-(-n // 128) for n in ns), k // 128
    splits = hopper_weight_only_config.configure(1, ns, k).splits
    busiest = -(-tiles * splits // 132) * -(-steps // splits)
    assert busiest <= 1.06 * tiles * steps / 132


@pytest.mark.parametrize(
    ("m", "n", "k", "scale", "dtypes", "reason"),
    [
        (1, 64, 256, (64,), (F32, e4m3.DTYPE, BF16), "x must be bfloat16"),
        (1, 64, 256, (64,), (BF16, jnp.int8, BF16), "weight float8_e4m3fn"),
        (0, 64, 256, (64,), (BF16, e4m3.DTYPE, BF16), "1 to 64 rows, got 0"),
        (65, 64, 256, (64,), (BF16, e4m3.DTYPE, BF16), "1 to 64 rows, got 65"),
        (1, 64, 192, (64,), (BF16, e4m3.DTYPE, BF16), "in = 192 must be a multiple of 128"),
        (1, 72, 256, (72,), (BF16, e4m3.DTYPE, BF16), "out = 72 must be a multiple of 32"),
        (1, 64, 256, (64, 4), (BF16, e4m3.DTYPE, BF16), "neither per row nor per 128x128 block"),
        (1, 64, 256, (64,), (BF16, e4m3.DTYPE, jnp.dtype(jnp.float16)), "out_dtype"),
        (64, 96, 384, (1, 3), (BF16, e4m3.DTYPE, F32), None),
    ],
    ids=[
        "float32-x",
        "int8-weight",
        "no-rows",
        "65-rows",
        "192-in",
        "72-out",
        "grouped",
        "float16",
        "taken",
    ],
)
def test_refusals(m, n, k, scale, dtypes, reason):
    x, weight = jnp.zeros((m, k), dtypes[0]), jnp.zeros((n, k), dtypes[1])
    given = hopper_weight_only.refusal(x, weight, jnp.ones(scale), dtypes[2])
    assert given is None if reason is None else reason in given


def test_the_tuner_tries_the_heuristics_choice_and_what_is_near_it():
    few = {case.name: case for case in weight_only_cases.cases((1, 16, 128))}
    assert not any("m=128" in name for name in few)
    case = few["8B TP1 o_proj 4096x4096 m=16 row weight-only"]
    assert hopper_weight_only_config.configure(16, (4096,), 4096) in case.configs
    assert case.bytes == 4096 * 4096 + 4 * 4096 + 2 * 2 * 16 * 4096
    assert case.operations == 2 * 16 * 4096 * 4096
    assert case.problem == "n=4096 k=4096 m<=16"
