"""The Hopper FP8 x FP8 kernels in JAX's GPU simulator, against float64."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxprs_in_params

from llama_jax.model.fp8 import dequantize, quantize
from pallas_kernels import device, e4m3
from pallas_kernels.dev import shapes, sm90
from pallas_kernels.fp8_matmul import (
    fp8_matmul,
    fp8_matmuls,
    hopper,
    hopper_config,
    hopper_weight_only,
    reference,
    swiglu,
)
from pallas_kernels.fp8_matmul.hopper_config import Config
from pallas_kernels.hopper import SHARED_MEMORY_BYTES
from tests.hopper import simulate

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
SIMULATED = {"interpret": plgpu.InterpretGPUParams(detect_races=True)}
WIDE = Config(tile_m=128, tile_n=128, stages=2)
NARROW = Config(tile_m=64, tile_n=64, stages=2)
PAIRED = Config(tile_m=128, tile_n=64, stages=2, cluster=2, band=2)


def integers(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(-8, 9, shape), jnp.float32).astype(e4m3.DTYPE)


def scales(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32)


def operands(m, n, k, x_layout="row", weight_layout="row", seed=0):
    """Random codes and scales: x, weight, weight_scale, x_scale."""
    rng = np.random.default_rng(seed)
    x = e4m3.cast(jnp.asarray(rng.standard_normal((m, k)) * 40, jnp.float32))
    codes, scale = quantize(jnp.asarray(rng.standard_normal((n, k)), jnp.float32), weight_layout)
    x_scale = {"static": (), "row": (m, 1), "grouped": (m, k // 128)}[x_layout]
    return x, codes, scale * scales(*scale.shape), scales(*x_scale, seed=seed) / 40


def exact(x, weight, weight_scale, x_scale):
    """The product in float64."""
    x = np.asarray(reference.dequantize_activations(x, x_scale), np.float64)
    return x @ np.asarray(dequantize(weight, weight_scale), np.float64).T


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (1, 64, 128, NARROW),
        pytest.param(7, 72, 384, NARROW, marks=pytest.mark.slow),
        pytest.param(64, 256, 256, Config(tile_m=64, tile_n=256, stages=4), marks=pytest.mark.slow),
        (65, 136, 256, WIDE),
        pytest.param(
            130, 264, 128, Config(tile_m=128, tile_n=256, stages=2), marks=pytest.mark.slow
        ),
        pytest.param(200, 200, 384, PAIRED, marks=pytest.mark.slow),
        pytest.param(
            129,
            128,
            256,
            Config(tile_m=128, tile_n=128, stages=2, promote=True),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda each: f"{each.tile_m}x{each.tile_n}" if isinstance(each, Config) else str(each),
)
def test_small_integers_are_exact(m, n, k, config):
    """Rows and columns that no tile divides are masked."""
    x, weight = integers(m, k), integers(n, k, seed=1)
    y = simulate(
        hopper.fp8_matmul, x, weight, jnp.full(n, 0.5), jnp.full((m, 1), 4.0), F32, config=config
    )
    np.testing.assert_array_equal(y, 2 * np.asarray(x, np.float64) @ np.asarray(weight).T)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [pytest.param(WIDE, marks=pytest.mark.slow), PAIRED], ids=["alone", "in pairs"]
)
def test_blocks_go_on_to_further_tiles(monkeypatch, config):
    """Two SMs, tiles for many: the ring of tiles wraps around in the middle of one."""
    monkeypatch.setattr(hopper, "num_sms", lambda: 2)
    x, weight = integers(300, 384), integers(272, 384, seed=1)
    y = simulate(
        hopper.fp8_matmul, x, weight, jnp.ones(272), jnp.ones((300, 1)), BF16, config=config
    )
    expected = np.asarray(x, np.float32) @ np.asarray(weight, np.float32).T
    np.testing.assert_array_equal(y, expected.astype(BF16))


@pytest.mark.parametrize(
    ("x_layout", "weight_layout"),
    [
        ("static", "row"),
        pytest.param("row", "block", marks=pytest.mark.slow),
        ("grouped", "row"),
        pytest.param("static", "block", marks=pytest.mark.slow),
        pytest.param("row", "row", marks=pytest.mark.slow),
        pytest.param("grouped", "block", marks=pytest.mark.slow),
    ],
)
def test_scales(x_layout, weight_layout):
    arrays = operands(70, 256, 256, x_layout, weight_layout)
    y = simulate(hopper.fp8_matmul, *arrays, F32, config=WIDE)
    # Sums of 256 products of order 1: float32 strays by 1e-5, a scale of the wrong block by 1.
    np.testing.assert_allclose(y, exact(*arrays), atol=1e-4)


def test_scales_of_x_pass_through_the_ring_again():
    arrays = operands(70, 64, 512, "grouped")
    y = simulate(hopper.fp8_matmul, *arrays, F32, config=NARROW)
    np.testing.assert_allclose(y, exact(*arrays), atol=1e-4)


@pytest.mark.slow
def test_a_long_ring_leaves_room_for_one_part_of_the_result():
    """128 x 64 float32 are stored in two parts, each after the residual was loaded there."""
    arrays = operands(70, 128, 1152, "grouped")
    config = Config(tile_m=128, tile_n=64, stages=8)
    residual = scales(70, 128)
    y = simulate(hopper.fp8_matmul, *arrays, F32, residual, config=config)
    np.testing.assert_allclose(y, exact(*arrays) + residual, atol=1e-3)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_scales(size):
    x, weight, weight_scale, x_scale = operands(7, 64, 128)
    arrays = x, weight, weight_scale * size, x_scale
    y = simulate(hopper.fp8_matmul, *arrays, F32, config=NARROW)
    np.testing.assert_allclose(np.asarray(y) / size, exact(*arrays) / size, atol=1e-4)


@pytest.mark.parametrize("dtype", [pytest.param(BF16, marks=pytest.mark.slow), F32], ids=str)
def test_the_residual_is_added_before_rounding(dtype):
    x, weight, weight_scale, x_scale = operands(65, 144, 256, "row")
    rng = np.random.default_rng(5)
    residual = jnp.asarray(rng.standard_normal((65, 144)) * 10, dtype)
    y = simulate(hopper.fp8_matmul, x, weight, weight_scale, x_scale, dtype, residual, config=WIDE)
    expected = exact(x, weight, weight_scale, x_scale) + np.asarray(residual, np.float64)
    rounding = 2**-8 if dtype == BF16 else 2**-22
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize(
    ("m", "x_layout", "weight_layout"),
    [
        (1, "row", "row"),
        (65, "grouped", "block"),
        pytest.param(130, "row", "block", marks=pytest.mark.slow),
    ],
)
def test_swiglu(m, x_layout, weight_layout):
    x, gate, gate_scale, x_scale = operands(m, 256, 256, x_layout, weight_layout)
    _, up, up_scale, _ = operands(m, 256, 256, x_layout, weight_layout, seed=1)
    x = x.at[0, :].set(0)
    cluster = 2 if m > 128 else 1
    codes, scale = simulate(hopper.swiglu, x, gate, gate_scale, up, up_scale, x_scale,
        config=Config(tile_m=128, tile_n=128, stages=2, cluster=cluster))  # fmt: skip
    assert codes.shape == (m, 256) and codes.dtype == e4m3.DTYPE and scale.shape == (m, 2)
    g, u = exact(x, gate, gate_scale, x_scale), exact(x, up, up_scale, x_scale)
    h = (g / (1 + np.exp(-g)) * u).reshape(m, 2, 128)
    absmax = np.abs(h).max(axis=2)
    np.testing.assert_allclose(scale, np.where(absmax == 0, 1, absmax / e4m3.MAX), rtol=1e-4)
    np.testing.assert_array_equal(codes[0].astype(F32), 0)
    # Half a step of e4m3fn: 2^-4 of a value, or 2^-10 of the scale for its smallest numbers.
    dequantized = np.asarray(reference.dequantize_activations(codes, scale)).reshape(h.shape)
    bound = np.maximum(np.abs(h) * 2**-4, np.asarray(scale)[:, :, None] * 2**-10) * 1.001
    assert np.all(np.abs(dequantized - h) <= bound)


@pytest.mark.slow
def test_swiglu_where_results_are_too_small_to_divide_by():
    x, gate, gate_scale, x_scale = operands(3, 128, 128)
    arguments = x, gate, gate_scale * 1e-22, gate, gate_scale * 1e-22, x_scale
    config = Config(tile_m=128, tile_n=128, stages=2)
    for codes, scale in (
        simulate(hopper.swiglu, *arguments, config=config),
        reference.swiglu(*arguments),
    ):
        assert np.isfinite(codes.astype(F32)).all() and np.all(np.asarray(scale) > 0)


@pytest.mark.slow
def test_swiglu_then_down_is_the_mlp():
    m, hidden, inner = 65, 128, 256
    x, gate, gate_scale, x_scale = operands(m, inner, hidden)
    _, up, up_scale, _ = operands(m, inner, hidden, seed=1)
    _, down, down_scale, _ = operands(m, hidden, inner, seed=2)
    codes, scale = simulate(hopper.swiglu, x, gate, gate_scale, up, up_scale, x_scale, config=WIDE)
    y = simulate(hopper.fp8_matmul, codes, down, down_scale, scale, F32, config=WIDE)
    product = exact(codes, down, down_scale, scale)
    np.testing.assert_allclose(y, product, atol=1e-6 * np.abs(product).max())
    g, u = exact(x, gate, gate_scale, x_scale), exact(x, up, up_scale, x_scale)
    expected = g / (1 + np.exp(-g)) * u @ np.asarray(dequantize(down, down_scale), np.float64).T
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert error < 0.04  # e4m3fn's rounding, 2^-4 at most and a third of that on average


def rounding_along_k(m, n, seed=0):
    """Codes of x [m, 512] and of a weight [n, 512] whose sums over 128 columns are exact in
    float32, in any order, so that the order in which the host adds up within a step of the
    simulator cannot be seen; the sum of those four is rounded, and shows the kernel's own order.
    """
    sizes = np.repeat(2.0 ** np.array([5, -6, 0, 3]), 128)
    codes = (
        jnp.asarray(np.asarray(integers(rows, 512, seed=each), np.float32) * sizes, e4m3.DTYPE)
        for rows, each in ((m, seed), (n, seed + 1))
    )
    return *codes, scales(n, seed=seed), scales(m, 1, seed=seed)


def steps_reversed(x, weight, weight_scale, x_scale):
    return (
        *(jnp.concatenate(jnp.split(a, 4, axis=1)[::-1], 1) for a in (x, weight)),
        weight_scale,
        x_scale,
    )


@pytest.mark.parametrize("promote", [False, True])
def test_a_row_is_bit_equal_alone_and_in_any_tiling(promote):
    arrays = x, weight, weight_scale, x_scale = rounding_along_k(65, 128)

    def run(config, *arrays):
        config = replace(config, promote=promote)
        return np.asarray(simulate(hopper.fp8_matmul, *arrays, F32, config=config))[-1]

    together = run(WIDE, *arrays)
    np.testing.assert_array_equal(together, run(NARROW, x[64:], weight, weight_scale, x_scale[64:]))
    assert np.any(together != run(WIDE, *steps_reversed(*arrays)))  # another order, other numbers


@pytest.mark.parametrize(
    ("x_layout", "weight_layout", "config"),
    [
        ("row", "row", PAIRED),
        pytest.param("grouped", "block", WIDE, marks=pytest.mark.slow),
        pytest.param("static", "row", NARROW, marks=pytest.mark.slow),
    ],
)
def test_several_weights_in_one_launch_are_bit_equal_to_one_each(x_layout, weight_layout, config):
    """Widths that end within a tile, so that the next weight begins with another one."""
    m, k, ns = (60, 256, (96, 64, 160)) if config is NARROW else (200, 256, (144, 64, 208))
    x, _, _, x_scale = operands(m, 8, k, x_layout)
    weights, weight_scales = zip(
        *(operands(1, n, k, weight_layout=weight_layout, seed=n)[1:3] for n in ns), strict=True
    )
    ys = simulate(hopper.fp8_matmuls, x, weights, weight_scales, x_scale, BF16, config=config)
    for y, weight, weight_scale in zip(ys, weights, weight_scales, strict=True):
        alone = simulate(hopper.fp8_matmul, x, weight, weight_scale, x_scale, BF16, config=config)
        np.testing.assert_array_equal(np.asarray(y), np.asarray(alone))
        expected = exact(x, weight, weight_scale, x_scale)
        np.testing.assert_allclose(
            np.asarray(y, np.float64), expected, rtol=2**-8, atol=2**-8 * np.abs(expected).max()
        )


@pytest.mark.slow
def test_a_row_of_swiglu_is_bit_equal_alone_and_in_a_batch():
    x, gate, gate_scale, x_scale = rounding_along_k(130, 128)
    _, up, up_scale, _ = rounding_along_k(130, 128, seed=2)

    def run(rows):
        # Scaled so that silu is not at its ends.
        arguments = x[rows], gate, gate_scale * 2**-18, up, up_scale, x_scale[rows]
        codes, scale = simulate(hopper.swiglu, *arguments)
        return codes.astype(F32)[-1], scale[-1]

    for together, alone in zip(run(slice(0, 130)), run(slice(129, 130)), strict=True):
        np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("promote", [False, True])
@pytest.mark.parametrize("m", [1, 64, 65, 512, 2048, 8192])
def test_the_heuristic_fits_an_sm(m, promote):
    for linear in shapes.linears():
        for weights in (1, 2):
            config = hopper_config.heuristic(m, (linear.n,), promote=promote, weights=weights)
            assert hopper_config.unfit(config, promote=promote, weights=weights) is None
            tiles = config.tile_m + weights * config.tile_n
            bytes_in_flight = config.stages * tiles * hopper_config.TILE_K
            assert 64 * 1024 <= bytes_in_flight < SHARED_MEMORY_BYTES, (linear, config)


def test_configurations_that_cannot_work_are_refused():
    arrays = operands(2, 256, 256, "row", "block")
    refused = {
        "tile_m must be 64 or 128": Config(32, 128, 2),
        "tile_n must be 64, 128 or 256": Config(128, 96, 2),
        "cluster must be 1 or 2": Config(128, 128, 2, cluster=4),
        "at least 2 stages": Config(128, 128, 1),
        "bytes of shared memory": Config(128, 128, 16),
        "128 columns for a warpgroup": Config(128, 256, 2),
    }
    for message, config in refused.items():
        with pytest.raises(ValueError, match=message):
            simulate(hopper.fp8_matmul, *arrays, F32, config=config)
    x, weight, weight_scale, x_scale = arrays
    with pytest.raises(ValueError, match="128 columns for each of two warpgroups"):
        simulate(
            hopper.swiglu, x, weight, weight_scale, weight, weight_scale, x_scale, config=NARROW
        )


def test_what_has_no_kernel_is_named():
    x, weight, scale, _ = operands(2, 64, 256)
    refused = {
        "x and weight must be float8_e4m3fn, got bfloat16": (x.astype(BF16), weight, scale, F32),
        "got float8_e4m3fn and int8": (x, e4m3.as_bits(weight), scale, F32),
        "x has no rows": (x[:0], weight, scale, F32),
        "in = 200 must be a multiple of 128": (x[:, :200], weight[:, :200], scale, F32),
        "out = 63 must be a multiple of 8": (x, weight[:63], scale[:63], F32),
        "out = 56 must be a multiple of 16": (x, weight[:56], scale[:56], BF16),
        "out = 64 must be a multiple of 128": (x, weight, scale, None),
        "neither per row nor per 128x128 block": (x, weight, jnp.ones((64, 4)), F32),
        "out_dtype must be bfloat16 or float32, got float16": (
            x, weight, scale, jnp.dtype(jnp.float16),
        ),
    }  # fmt: skip
    for reason, arguments in refused.items():
        assert reason in str(hopper.refusal(*arguments))
    residual = jnp.ones((2, 64), BF16)
    assert "residual must be float32" in str(hopper.refusal(x, weight, scale, F32, residual))
    assert hopper.refusal(x, weight, scale, BF16, residual) is None


def test_without_a_hopper_gpu_xla_runs_and_hopper_says_why():
    x, weight, scale, x_scale = operands(2, 128, 256)
    with pytest.raises(ValueError, match="JAX runs on cpu, not on a GPU"):
        fp8_matmul(x, weight, scale, x_scale=x_scale, implementation="hopper")
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        fp8_matmul(x, weight, scale, x_scale=x_scale, implementation="triton")
    with pytest.raises(ValueError, match="must have the same shapes"):
        swiglu(x, weight, scale, weight[:64], scale[:64], x_scale=x_scale)
    with pytest.raises(ValueError, match="out = 64 must be a multiple of 128"):
        swiglu(x, weight[:64], scale[:64], weight[:64], scale[:64], x_scale=x_scale)


def launched(jaxpr):
    """The kernels' names, in order."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "mpmd_map":
            yield eqn.params["name"]
        else:
            for body in jaxprs_in_params(eqn.params):
                yield from launched(body)


def test_lowering_for_an_h200_takes_the_kernel_where_there_is_one():
    x, weight, scale, x_scale = operands(65, 128, 256)

    def kernels_in(function, *arguments, **options):
        with jax.sharding.use_abstract_mesh(sm90.H200):
            return list(launched(jax.make_jaxpr(partial(function, **options))(*arguments).jaxpr))

    assert kernels_in(fp8_matmul, x, weight, scale, x_scale=x_scale) == ["fp8_matmul"]
    assert kernels_in(fp8_matmul, x, weight, scale[:, None], x_scale=x_scale) == ["fp8_matmul"]
    assert kernels_in(swiglu, x, weight, scale, weight, scale, x_scale=x_scale) == ["fp8_swiglu"]
    several = (weight, weight), (scale, scale)
    assert kernels_in(fp8_matmuls, x, *several, x_scale=x_scale) == ["fp8_matmul"]
    few = {"x_scale": x_scale[:64]}
    assert kernels_in(fp8_matmul, x[:64], weight, scale, **few) == ["fp8_matmul_weight_only"]
    assert kernels_in(fp8_matmuls, x[:64], *several, **few) == ["fp8_matmul_weight_only"]
    gate_up = weight, scale, weight, scale
    assert kernels_in(swiglu, x[:64], *gate_up, **few) == ["fp8_matmul_weight_only"]
    named = {"implementation": "hopper_fp8", **few}
    assert kernels_in(fp8_matmul, x[:64], weight, scale, **named) == ["fp8_matmul"]
    best = {"implementation": "hopper", **few}
    assert kernels_in(fp8_matmul, x[:64], weight, scale, **best) == ["fp8_matmul_weight_only"]
    with pytest.raises(ValueError, match=r"cannot run: x must have 1 to 64 rows, got 65; x and"):
        kernels_in(fp8_matmul, x.astype(BF16), weight, scale, implementation="hopper")
    wide = x[:64].astype(BF16)
    assert kernels_in(fp8_matmul, wide, weight, scale) == ["fp8_matmul_weight_only"]
    assert kernels_in(fp8_matmuls, wide, *several) == ["fp8_matmul_weight_only"]
    mixed = (weight, weight), (scale, jnp.ones((1, 2)))
    assert kernels_in(fp8_matmuls, wide, *mixed) == ["fp8_matmul_weight_only"] * 2
    assert not kernels_in(fp8_matmul, x, weight, jnp.ones((128, 4)), x_scale=x_scale)
    assert not kernels_in(fp8_matmul, x, weight, scale, x_scale=x_scale, implementation="xla")
    for m, dtype in ((65, BF16), (64, F32)):
        assert not kernels_in(fp8_matmul, jnp.ones((m, 256), dtype), weight, scale)
        assert not kernels_in(swiglu, jnp.ones((m, 256), dtype), *gate_up)


@pytest.fixture
def simulated_weight_only(monkeypatch):
    """The kernel of that name runs in the simulator, as if on a Hopper GPU."""
    simulated = partial(hopper_weight_only.fp8_matmuls, **SIMULATED)
    monkeypatch.setattr(hopper_weight_only, "fp8_matmuls", simulated)
    monkeypatch.setattr(device, "not_hopper", lambda: None)


@pytest.mark.parametrize("x_layout", ["static", "row", "grouped"])
def test_few_rows_of_fp8_activations_go_through_the_weight_only_kernel(
    x_layout, simulated_weight_only
):
    arrays = *weights, x_scale = operands(3, 64, 256, x_layout)
    residual = jnp.asarray(np.random.default_rng(3).standard_normal((3, 64)), F32)
    y = fp8_matmul(
        *weights, x_scale=x_scale, residual=residual, implementation="hopper_weight_only"
    )
    error = np.abs(y - (exact(*arrays) + np.asarray(residual)))
    if x_layout == "grouped":  # code * scale is rounded to bfloat16, by 2^-9 of it at most
        x, weight, weight_scale = (np.abs(each.astype(F32)) for each in weights)
        assert np.all(error < 1e-4 + 2**-9 * exact(x, weight, weight_scale, x_scale))
    else:
        assert error.max() < 1e-4


def test_swiglu_of_few_rows(simulated_weight_only):
    x, gate, gate_scale, x_scale = operands(3, 128, 128)
    _, up, up_scale, _ = operands(3, 128, 128, seed=1)
    arguments = x, gate, gate_scale, up, up_scale
    codes, scale = swiglu(*arguments, x_scale=x_scale, implementation="hopper_weight_only")
    expected, expected_scale = reference.swiglu(*arguments, x_scale)
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-5)
    # Sums in another order may be rounded to the next code.
    steps = np.abs(np.asarray(codes, np.float32) - np.asarray(expected, np.float32))
    assert np.all(steps <= np.maximum(np.abs(np.asarray(expected, np.float32)) / 8, 2**-9))
    assert np.mean(steps > 0) < 0.01


@pytest.mark.parametrize("x_layout", ["static", "row", None])
def test_several_weights_are_several_matmuls(x_layout):
    x, q, q_scale, x_scale = operands(3, 128, 256, x_layout or "row")
    _, k, k_scale, _ = operands(3, 64, 256, weight_layout="block", seed=1)
    x, x_scale = (x, x_scale) if x_layout else (x.astype(BF16), None)
    together = fp8_matmuls(x, (q, k), (q_scale, k_scale), x_scale=x_scale)
    for y, (weight, scale) in zip(together, ((q, q_scale), (k, k_scale)), strict=True):
        np.testing.assert_array_equal(y, fp8_matmul(x, weight, scale, x_scale=x_scale))
