"""The C++ kernel against float64, with every instruction set that this machine has."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.fp8 import quantize
from pallas_kernels import e4m3
from pallas_kernels.cpu import library
from pallas_kernels.fp8_matmul import (
    choose,
    cpu,
    fp8_matmul,
    fp8_matmuls,
    silu,
    swiglu,
    unquantized_swiglu,
)
from tests.cpu_kernel import HERE, all_alike_in_threads, needs_cpu_kernel

pytestmark = needs_cpu_kernel
each_instructions = pytest.mark.parametrize("instructions", HERE)


def operands(m, n, k, layout="row", seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    codes, scale = quantize(jax.random.normal(keys[0], (n, k)), layout)
    return jax.random.normal(keys[1], (m, k)), e4m3.as_bits(codes), scale


def exact(x, bits, scale):
    """The product in float64."""
    w = np.asarray(bits).view(e4m3.DTYPE).astype(np.float64)
    scale = np.asarray(scale, np.float64)
    if scale.ndim == 1:
        w = w * scale[:, None]
    elif scale.shape[0] == w.shape[0]:
        w = w * np.repeat(scale, w.shape[1] // scale.shape[1], axis=1)
    else:
        w = w * np.kron(scale, np.ones((128, 128)))[: w.shape[0], : w.shape[1]]
    return np.asarray(x, np.float64) @ w.T


def multiply(x, bits, scale, instructions):
    (y,) = cpu.fp8_matmuls(x, (bits,), (scale,), instructions=instructions)
    return np.asarray(y)


each_kind = pytest.mark.parametrize(
    ("layout", "dtype"), [("row", "bfloat16"), ("block", "bfloat16"), ("block", "float32")]
)


# Numbers of rows: fewer than tiles have, their multiples and not, and so many that they are taken
# by blocks, of which the last may be smaller than a tile (26 rows by blocks of 24). Columns: less
# than a step and more; rows of the weight that divide into no tiles.
@each_instructions
@each_kind
def test_against_float64(layout, dtype, instructions):
    for n, k, rows in ((8, 1, (1, 13, 70)), (601, 300, (1, 3, 5, 8, 13, 70)), (40, 1000, (26,))):
        x, bits, scale = operands(rows[-1], n, k, layout)
        x = x.astype(dtype)
        expected = exact(x, bits, scale)
        for m in rows:
            # Sums of 300 products reach 60: float32 sums stray by sqrt(300) * 2^-24 * 60 = 6e-5.
            # A weight off by one code would move them by 0.06.
            y = multiply(x[:m], bits, scale, instructions)
            np.testing.assert_allclose(y, expected[:m], atol=1e-4 * max(1, k / 300))


@each_instructions
def test_groups_of_columns_with_row_scales_of_their_own(instructions):
    x, bits, _ = operands(9, 40, 192)
    scale = jax.random.uniform(jax.random.key(7), (40, 3), minval=1e-3, maxval=1e-2)
    np.testing.assert_allclose(
        multiply(x, bits, scale, instructions), exact(x, bits, scale), atol=1e-4
    )


@each_instructions
@pytest.mark.parametrize("m", [1, 5, 70])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_code_is_exact(dtype, m, instructions):
    """Denormal ones too: each code alone in a row of the weight, times 1 and a power of two."""
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[codes & 0x7F != 0x7F]
    bits = np.zeros((len(codes), 100), np.uint8)
    place = np.arange(len(codes)) % 100
    bits[np.arange(len(codes)), place] = codes
    bits = jnp.asarray(bits.view(np.int8))
    x = jnp.asarray(2.0 ** np.arange(m)[:, None] * np.ones((m, 100)), dtype)
    y = multiply(x, bits, jnp.ones(len(codes)), instructions)
    values = codes.view(e4m3.DTYPE).astype(np.float64)
    np.testing.assert_array_equal(y, 2.0 ** np.arange(m)[:, None] * values)


@each_instructions
@each_kind
def test_a_row_does_not_depend_on_its_company(layout, dtype, instructions):
    """Bit for bit, at every number of rows that goes another way."""
    x, bits, scale = operands(40, 300, 1000, layout)
    x = x.astype(dtype)
    of_all = multiply(x, bits, scale, instructions)
    for m in (1, 3, 4, 5, 8, 9, 17):
        np.testing.assert_array_equal(multiply(x[-m:], bits, scale, instructions), of_all[-m:])


@each_instructions
@each_kind
def test_swiglu(layout, dtype, instructions):
    """At numbers of rows that go different ways; large gates leave exp's range."""
    x, gate, gate_scale = operands(40, 300, 200, layout)
    up, up_scale = operands(1, 300, 200, layout, seed=1)[1:]
    x = x.at[3].mul(100).astype(dtype)
    weights, scales = (gate, up), (gate_scale, up_scale)
    g, u = (exact(x, *each) for each in zip(weights, scales, strict=True))
    silu_of_g = g / (1 + np.exp(np.clip(-g, None, 700)))
    # As in test_against_float64, sums stray by 1e-4, and those of the large row by 1e-2.
    strays = np.where(np.arange(40) == 3, 1e-2, 1e-4)[:, None]
    bound = strays * (1.1 * np.abs(u) + np.abs(silu_of_g)) + 1e-6 * np.abs(silu_of_g * u) + 1e-6
    for m in (1, 4, 9, 40):
        y = cpu.swiglu(
            x[:m], gate, gate_scale, up, up_scale, jnp.float32, instructions=instructions
        )
        assert (np.abs(np.asarray(y) - silu_of_g[:m] * u[:m]) < bound[:m]).all()
        rounded = cpu.swiglu(
            x[:m], gate, gate_scale, up, up_scale, jnp.bfloat16, instructions=instructions
        )
        parts = cpu.fp8_matmuls(
            x[:m], weights, scales, out_dtype=jnp.bfloat16, instructions=instructions
        )
        by_parts = np.asarray(silu(parts[0]) * parts[1], np.float64)
        rounded = np.asarray(rounded, np.float64)
        # The same roundings, but where the two exp differ at a tie.
        np.testing.assert_allclose(rounded, by_parts, rtol=2**-7, atol=1e-30)
        assert (rounded == by_parts).mean() > 0.99


def test_unquantized_swiglu_is_the_same_by_every_kernel():
    x, gate, gate_scale = operands(5, 128, 256)
    up, up_scale = operands(1, 128, 256, seed=1)[1:]
    found = {
        name: np.asarray(
            unquantized_swiglu(x, gate, gate_scale, up, up_scale, implementation=name), np.float64
        )
        for name in (None, "cpu", "xla", "reference")
    }
    np.testing.assert_array_equal(found[None], found["cpu"])
    for name in ("xla", "reference"):
        # Sums stray by 1e-4 each (test_against_float64), and are multiplied by up to 60.
        np.testing.assert_allclose(found["cpu"], found[name], atol=2e-2)
    with pytest.raises(ValueError, match="must have the same shapes"):
        unquantized_swiglu(x, gate, gate_scale, up[:64], up_scale[:64])


@each_instructions
@pytest.mark.parametrize("m", [1, 20])
def test_results_in_bfloat16_are_rounded_sums(m, instructions):
    """Also where results end within a vector, and not a number stays one."""
    x, bits, scale = operands(m, 75, 130)
    x = x.astype(jnp.bfloat16).at[0].set(jnp.nan)
    (y,) = cpu.fp8_matmuls(x, (bits,), (scale,), out_dtype=jnp.bfloat16, instructions=instructions)
    expected = jnp.asarray(multiply(x, bits, scale, instructions)).astype(jnp.bfloat16)
    y, expected = np.asarray(y, np.float32), np.asarray(expected, np.float32)
    assert np.isnan(y[0]).all()
    np.testing.assert_array_equal(y, expected)


@each_instructions
@each_kind
def test_a_residual_is_added_before_rounding(layout, dtype, instructions):
    """At numbers of rows that go different ways, also where results end within a vector."""
    x, bits, scale = operands(20, 75, 300, layout)
    x, residual = x.astype(dtype), 50 * jax.random.normal(jax.random.key(5), (20, 75))
    sums = multiply(x, bits, scale, instructions)
    for out_dtype in (jnp.bfloat16, jnp.float32):
        added = residual.astype(out_dtype)
        expected = (jnp.asarray(sums) + added.astype(jnp.float32)).astype(out_dtype)
        for m in (1, 5, 20):
            (y,) = cpu.fp8_matmuls(
                x[:m], (bits,), (scale,), out_dtype=out_dtype, residual=added[:m],
                instructions=instructions,
            )  # fmt: skip
            np.testing.assert_array_equal(np.float32(y), np.float32(expected[:m]))


@each_instructions
def test_extreme_scales(instructions):
    x, bits, _ = operands(3, 64, 128)
    for size in (1e-30, 1e30):
        scale = jnp.full(64, size)
        np.testing.assert_allclose(
            multiply(x, bits, scale, instructions), exact(x, bits, scale), rtol=1e-3,
            atol=3e-3 * size,
        )  # fmt: skip


@each_instructions
@each_kind
def test_rows_of_extreme_size(layout, dtype, instructions):
    """Each as exact as if it were alone. (AVX-512 reads denormal products in bfloat16 as 0.)"""
    x, bits, scale = operands(19, 64, 300, layout)
    sizes = 2.0 ** np.array([-100, -110, -70, -8, -7, -6, 0, 1, 60, 100, 110, -90, 3, 20, -20])
    sizes = np.concatenate([sizes, [0, 1, 1e-30, 1e30]])[:, None].astype(np.float32)
    x = (np.clip(np.asarray(x), -4, 4) * sizes).astype(dtype)
    x[-3, :2] = np.inf, 1
    y = multiply(jnp.asarray(x), bits, scale, instructions)
    assert not np.isfinite(y[-3]).any()
    others = [i for i in range(19) if i != 16]
    # Sums in float32 of 300 products, beside the largest operand.
    x = x[others]
    bound = 3e-4 * np.abs(x.astype(np.float64)).max(axis=1, keepdims=True)
    assert (np.abs(y[others] - exact(x, bits, scale)) <= bound).all()


@each_instructions
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_in_bfloat16_without_scales(dtype, instructions, monkeypatch):
    name = library.target(library.MATMUL, instructions)
    monkeypatch.setattr(library, "target", lambda *_: name)
    keys = jax.random.split(jax.random.key(3), 2)
    x = jax.random.normal(keys[0], (20, 130)).astype(dtype)
    weight = jax.random.normal(keys[1], (75, 130)).astype(jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    y = np.asarray(cpu.dense(x, weight))
    np.testing.assert_allclose(y, expected, atol=1e-4)
    for m in (1, 5, 8):  # a row depends neither on the others nor on how the weight is read
        np.testing.assert_array_equal(cpu.dense(x[:m], weight), y[:m])


def test_the_contract():
    """By the name and by itself: float8 codes and bits, float8 x, a residual, several weights."""
    x, bits, scale = operands(5, 128, 256)
    codes = jax.device_put(np.asarray(bits).view(e4m3.DTYPE))
    expected = exact(x, bits, scale)
    for weight in (bits, codes):
        assert choose(x, weight, scale, jnp.dtype(jnp.float32)).kernel.name == "cpu"
        for implementation in (None, "cpu"):
            y = fp8_matmul(x, weight, scale, implementation=implementation)
            np.testing.assert_allclose(y, expected, atol=1e-4)
    y = fp8_matmul(x, bits, scale, residual=x[:, :128], out_dtype=jnp.bfloat16)
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected + np.asarray(x)[:, :128], rtol=2**-8, atol=1e-4
    )
    first, second = fp8_matmuls(x, (bits, bits[:100]), (scale, scale[:100]), implementation="cpu")
    np.testing.assert_array_equal(first[:, :100], second)
    x_codes, x_scale = e4m3.cast(x), jnp.full((5, 1), 0.5)
    y = fp8_matmul(x_codes, bits, scale, x_scale=x_scale)
    np.testing.assert_allclose(y, exact(x_codes, bits, scale) * 0.5, atol=1e-4)
    of_xla = swiglu(x, bits, scale, bits, scale, implementation="xla")
    y_codes, y_scale = swiglu(x, bits, scale, bits, scale)
    np.testing.assert_allclose(y_scale, of_xla[1], rtol=1e-5)
    assert (y_codes == of_xla[0]).mean() > 0.98


def test_derivatives_are_those_of_xla():
    x, bits, scale = operands(3, 64, 128)

    def loss(x, residual, implementation):
        y = fp8_matmul(x, bits, scale, residual=residual, implementation=implementation)
        return jnp.sum(jnp.sin(y))

    for residual in (None, x[:, :64]):
        places = 0 if residual is None else (0, 1)
        found, expected = (
            jax.grad(loss, places)(x, residual, name) for name in ("cpu", "reference")
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)


def test_what_it_cannot_take_is_refused_by_name():
    x, bits, scale = operands(2, 64, 128)
    for arguments, message in (
        ((x, bits[:7], scale[:7]), "out be at least 8, got 7"),
        ((x.astype(jnp.float16), bits, scale), "x must be bfloat16 or float32, got float16"),
        ((x, bits, jnp.ones((64, 4))), "must be a multiple of 64, got 32"),
    ):
        with pytest.raises(ValueError, match=f"'cpu' cannot run: .*{message}"):
            fp8_matmul(*arguments, implementation="cpu")
    with pytest.raises(ValueError, match="'hopper' cannot run: JAX runs on cpu"):
        fp8_matmul(x, bits, scale, implementation="hopper")


@pytest.mark.parametrize(
    ("best", "reason"),
    [
        ("portable", "without AVX2 or NEON XLA's code is faster"),
        ("avx2", None),
        ("neon", "more than 16 rows are XLA's until NEON has been timed"),
        ("avx512", None),
    ],
)
def test_which_rows_are_left_to_xla(best, reason, monkeypatch):
    monkeypatch.setattr(library, "best", lambda: best)
    assert cpu.slower_than_xla(17) == reason
    assert cpu.slower_than_xla(16) == (reason if best == "portable" else None)


def test_without_a_compiler_xla_multiplies(monkeypatch):
    x, bits, scale = operands(2, 64, 128)
    monkeypatch.setattr(library, "why_not", lambda: "there is no C++ compiler")
    assert choose(x, bits, scale, jnp.dtype(jnp.float32)).kernel.name == "xla"
    with pytest.raises(ValueError, match="'cpu' cannot run: there is no C\\+\\+ compiler"):
        fp8_matmul(x, bits, scale, implementation="cpu")


def test_two_threads_at_once():
    """Each of them many times, with other shapes than the other's."""
    cases = [operands(m, n, 512, seed=m) for m, n in ((1, 600), (20, 400))]
    run = jax.jit(fp8_matmul)
    assert all_alike_in_threads(run, cases, 200)


def test_other_operands_are_refused_unread():
    """`refusal` and shapes keep such calls from the kernel; it looks again."""
    x, bits, scale = operands(3, 64, 128)
    like = jax.ShapeDtypeStruct((3, 64), jnp.float32)
    whole = {"scale_rows": 1, "scale_columns": 128}

    def refused(*arrays, shape=like, target=library.MATMUL, **attributes):
        call = jax.jit(partial(jax.ffi.ffi_call(target, shape), **(whole | attributes)))
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"{target}: operands are not what"):
            jax.block_until_ready(call(*arrays))

    refused(x, bits)
    refused(x, bits, scale, scale)
    refused(x[0], bits, scale)
    refused(x.astype(jnp.float16), bits, scale)
    refused(x, bits[:, :64], scale)
    refused(x, bits.astype(jnp.int16), scale)
    refused(x, bits[:4], scale[:4], shape=jax.ShapeDtypeStruct((3, 4), jnp.float32))
    refused(x, bits, scale[:63])
    refused(x, bits, scale.astype(jnp.bfloat16))
    refused(x, bits, scale, shape=jax.ShapeDtypeStruct((2, 64), jnp.float32))
    refused(x, bits, scale, shape=jax.ShapeDtypeStruct((3, 64), jnp.float16))
    refused(x, bits, scale, jnp.ones((3, 63)), has_residual=True)
    refused(x, bits, scale, jnp.ones((3, 64), jnp.bfloat16), has_residual=True)
    refused(x, bits, scale, has_residual=True)
    refused(x, bits, scale, bits, scale, jnp.ones((3, 64)), has_residual=True)
    refused(x, bits, scale, scale_rows=3)
    refused(x, bits, scale, scale_columns=0)
    refused(x, bits, scale, scale_columns=np.int32(128))
    floats, ints = jax.ShapeDtypeStruct((3,), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    known = {"shape": (floats, ints, floats, floats), "target": library.LOGIT_STATS}
    refused(x, bits, scale, jnp.zeros(2, jnp.int32), **known)
    refused(x, bits, scale, jnp.zeros(3), **known)
    refused(x, bits, scale, **known)
    refused(x, bits, scale, jnp.zeros(3, jnp.int32), **known | {"shape": (floats,) * 4})
