"""RMSNorm, rotary embedding and the cache's pages in C++ against float64, with every instruction
set that this machine has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import e4m3
from pallas_kernels.cpu import library
from pallas_kernels.rms_norm import choose as choose_norm
from pallas_kernels.rms_norm import cpu as norm_cpu
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rope_and_cache import choose as choose_rope
from pallas_kernels.rope_and_cache import cpu as rope_cpu
from pallas_kernels.rope_and_cache import rope_and_cache
from tests import cpu_kernel
from tests import test_hopper_rope_and_cache as rope
from tests.cpu_kernel import all_alike_in_threads, needs_cpu_kernel

pytestmark = needs_cpu_kernel
# What these kernels do not use anything of is left out.
HERE = tuple(each for each in cpu_kernel.HERE if each not in ("avx2_amd", "avx512_bf16", "amx"))
each_instructions = pytest.mark.parametrize("instructions", HERE)
each_dtype = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
EPS = 1e-5


def norm(x, weight, instructions=None):
    return np.asarray(norm_cpu.rms_norm(x, weight, EPS, instructions), np.float32)


def exact_norm(x, weight):
    """In float64, not rounded."""
    wide = np.asarray(x, np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS) * np.asarray(weight, np.float64)


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


# Columns: one, less than a register has, and what is left behind several registers. Rows: one, some
# that one thread takes, and some for several.
@each_instructions
@each_dtype
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (16, 64), (17, 200), (70, 2048)])
def test_rms_norm_against_float64(rows, columns, dtype, instructions):
    """It is rounded twice, to bfloat16 by 2^-8 at most."""
    x, weight = normal(0, (rows, columns), dtype), normal(1, (columns,), dtype)
    for magnitude in (1, 1e-4, 1e4):
        y = norm(x * magnitude, weight, instructions)
        rtol = 2**-7 + 2**-15 if dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(y, exact_norm(x * magnitude, weight), rtol=rtol)


@each_instructions
@each_dtype
def test_a_normed_row_does_not_depend_on_its_company(dtype, instructions):
    x, weight = normal(0, (40, 300), dtype), normal(1, (300,), dtype)
    of_all = norm(x, weight, instructions)
    for rows in (1, 2, 16, 17):
        np.testing.assert_array_equal(norm(x[-rows:], weight, instructions), of_all[-rows:])


@each_dtype
def test_all_implementations_of_rms_norm_agree(dtype):
    x, weight = normal(0, (2, 3, 100), dtype), normal(1, (100,))
    assert choose_norm(x).kernel.name == "cpu"
    ys = {
        name: np.asarray(rms_norm(x, weight, EPS, implementation=name), np.float32)
        for name in ("cpu", "xla", "reference")
    }
    rtol = 2**-7 if dtype == jnp.bfloat16 else 1e-6
    for y in ys.values():  # half as exact as float64, since both are rounded
        np.testing.assert_allclose(y, ys["reference"], rtol=2 * rtol)


def test_rms_norm_of_zeros_and_of_what_is_no_number():
    x = jnp.zeros((3, 20)).at[1, 4].set(jnp.nan)
    y = norm(x, jnp.ones(20))
    assert not y[[0, 2]].any() and np.isnan(y[1]).all()


def test_rms_norm_has_xlas_derivative():
    x, weight, by = normal(0, (5, 40)), normal(1, (40,)), normal(2, (5, 40))

    def derivative(implementation):
        def loss(x, weight):
            return (rms_norm(x, weight, EPS, implementation=implementation) * by).sum()

        return jax.grad(loss, (0, 1))(x, weight)

    for found, expected in zip(derivative("cpu"), derivative("xla"), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_refuses_by_name():
    x = normal(0, (2, 8))
    with pytest.raises(ValueError, match="x must be bfloat16 or float32, got float16"):
        rms_norm(x.astype(jnp.float16), jnp.ones(8), EPS, implementation="cpu")
    with pytest.raises(ValueError, match="must not be empty"):
        rms_norm(x[:0], jnp.ones(8), EPS, implementation="cpu")
    with pytest.raises(ValueError, match=r"weight must be \[8\], got \[7\]"):
        rms_norm(x, jnp.ones(7), EPS)
    assert choose_norm(x.astype(jnp.float16)).kernel.name == "xla"


# Heads that registers do not divide, several per kv head, page edges, tokens that are not stored
# because they are padding or their page does not exist, and positions beyond 8192.
@each_instructions
@each_dtype
@pytest.mark.parametrize("pages", [jnp.float32, jnp.bfloat16, e4m3.DTYPE])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "starts", "lengths", "tokens", "per_head"),
    [
        (4, 2, 24, [63, 0], [64, 0], 1, False),
        (8, 2, 64, [60, 100, 0], [80, 103, 20], 20, True),
        (3, 3, 10, [9000], [9005], 7, False),
        (2, 1, 16, [5], [8], 3, True),
    ],
)
def test_rope_and_cache_against_float64(
    heads, kv_heads, head_dim, starts, lengths, tokens, per_head, pages, dtype, instructions
):
    arrays = rope.case(
        heads, kv_heads, head_dim, starts, lengths, tokens, pages=pages, parts=1, sums=dtype,
        is_scaled=False, per_head=per_head,
    )  # fmt: skip
    # What is stored, or scaled per head, has been rounded to bfloat16 before.
    rope.check(run(arrays, dtype, instructions), arrays, more=2**-8 * (dtype == jnp.bfloat16))


def run(arrays, dtype, instructions=None):
    found = rope_cpu.rope_and_cache(
        *arrays, frequencies=rope.frequencies(arrays[2].shape[3]), dtype=jnp.dtype(dtype),
        instructions=instructions,
    )  # fmt: skip
    return [np.asarray(each) for each in found]


@each_instructions
def test_every_number_becomes_the_code_that_jax_gives_it(instructions):
    """All of bfloat16, as values: denormal codes, ties, more than 448, infinities and NaN."""
    numbers = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16).reshape(1, -1, 4, 32)
    tokens = numbers.shape[1]
    v = jnp.asarray(numbers)
    parts = rope.Projections(v, v, v)
    pool = jnp.zeros((tokens // 64, 64, 4, 32), jnp.int8)
    found = run(
        (
            parts, jnp.zeros((1, tokens), jnp.int32), pool, pool, jnp.arange(tokens // 64)[None],
            jnp.zeros(1, jnp.int32), jnp.full(1, tokens), None, jnp.float32(1), jnp.float32(1),
        ),
        jnp.bfloat16, instructions,
    )[2]  # fmt: skip
    codes = found.view(np.uint8).reshape(-1)
    expected = np.asarray(e4m3.cast(v)).view(np.uint8).reshape(-1)
    is_nan = np.isnan(numbers.astype(np.float32).reshape(-1))
    np.testing.assert_array_equal(codes[~is_nan], expected[~is_nan])
    assert set(codes[is_nan] & 0x7F) == {0x7F}


def test_it_is_chosen_updates_pages_in_place_and_agrees_with_xla():
    arrays = rope.case(4, 2, 32, [0, 70], [6, 76], 6, parts=2, per_head=True)
    parts, positions, k, v, table, starts, lengths, scales, k_scale, v_scale = arrays
    assert choose_rope(parts, k, rope.BF16).kernel.name == "cpu"

    def call(k, v, implementation):
        return rope_and_cache(
            parts, positions, rope.frequencies(32), k, v, table, starts, lengths,
            weight_scales=scales, k_scale=k_scale, v_scale=v_scale, dtype=rope.BF16,
            implementation=implementation,
        )  # fmt: skip

    program = jax.jit(call, donate_argnums=(0, 1), static_argnums=2)
    compiled = program.lower(k, v, None).compile()
    assert "copy(" not in compiled.as_text()
    expected = jax.jit(call, static_argnums=2)(k, v, "xla")
    for found, other in zip(compiled(k + 0, v + 0), expected, strict=True):
        np.testing.assert_array_equal(np.float32(found), np.float32(other))


def test_rope_and_cache_refuses_by_name():
    arrays = rope.case(4, 2, 32, [0], [6], 6, parts=1)
    parts, _, k, *_ = arrays

    def refused(match, dtype=rope.BF16, pages=k, each=parts):
        with pytest.raises(ValueError, match=match):
            choose_rope(each, pages, jnp.dtype(dtype), "cpu")

    refused("q must be bfloat16 or float32, got float16", dtype=jnp.float16)
    refused("pages must be float8_e4m3fn, bfloat16 or float32, got float16", pages=k.astype("f2"))
    refused("must not be empty", pages=k[:0])
    refused("head_dim must be even, got 31", pages=k[..., :31])


def test_other_operands_are_refused_unread():
    x, weight, eps = jnp.ones((2, 8)), jnp.ones(8), jnp.float32(EPS)
    name = "rms_norm_cpu: operands are not understood"
    for given in ((x[0], weight, eps), (x, weight[:7], eps), (x, weight, jnp.ones(2)), (x, weight)):
        refuse(library.NORM, jax.ShapeDtypeStruct(x.shape, x.dtype), given, name)

    q, k = jnp.ones((6, 4, 8)), jnp.ones((6, 2, 8))
    turns, scale, pages = jnp.ones((6, 4)), jnp.ones(2), jnp.ones((3, 4, 2, 8))
    table, lens = jnp.zeros((2, 2), jnp.int32), jnp.zeros(2, jnp.int32)
    good = [q, k, k, turns, turns, table, lens, lens, scale, scale, pages, pages]
    results = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (q, pages, pages)]
    name = "rope_and_cache_cpu: operands are not understood"
    for place, odd in (
        (0, q[:5]), (0, q[0]), (1, k[:5]), (2, k.astype(jnp.bfloat16)), (3, turns[:5]),
        (4, turns[:, :3]), (5, table[0]), (5, table[:, :0]), (6, lens[:1]), (7, lens.astype("f4")),
        (8, jnp.ones(3)), (9, jnp.ones(2, jnp.int32)), (11, pages[:2]), (10, pages.astype("f2")),
    ):  # fmt: skip
        given = [*good[:place], odd, *good[place + 1 :]]
        refuse(library.ROPE, results, given, name, {10: 1, 11: 2} if place < 10 else {})
    refuse(library.ROPE, results, good, name, {})  # pages that are not updated in place


def refuse(target, results, given, match, aliases=None):
    call = jax.jit(jax.ffi.ffi_call(target, results, input_output_aliases=aliases or {}))
    with pytest.raises(jax.errors.JaxRuntimeError, match=match):
        jax.block_until_ready(call(*given))


def test_from_threads_at_a_time():
    weight = normal(1, (300,))
    cases = [(normal(seed, (rows, 300)), weight) for seed, rows in ((2, 90), (3, 40))]
    assert all_alike_in_threads(jax.jit(lambda *x: norm_cpu.rms_norm(*x, EPS)), cases, 30)
    arrays = [rope.case(8, 2, 64, [5], [75], 70, parts=1, sums=rope.BF16)]
    arrays.append(rope.case(8, 2, 64, [60, 0], [90, 30], 30, parts=1, sums=rope.BF16))
    assert all_alike_in_threads(lambda *each: run(each, rope.BF16), arrays, 10)
