"""The C++ attention against float64, with every instruction set that this machine has."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cpu import library
from pallas_kernels.paged_attention import choose, cpu, paged_attention
from tests import cpu_kernel
from tests.cpu_kernel import needs_cpu_kernel
from tests.pairs import every_pair
from tests.test_paged_attention import case, exact

pytestmark = needs_cpu_kernel
# What attention does not use anything of is left out.
HERE = tuple(each for each in cpu_kernel.HERE if each not in ("avx2_amd", "avx512_bf16"))
each_instructions = pytest.mark.parametrize("instructions", HERE)


def attend(arrays, instructions=None, k_scale=1.0, v_scale=1.0):
    return np.asarray(
        cpu.paged_attention(*arrays, k_scale, v_scale, instructions=instructions), np.float32
    )


@lru_cache(maxsize=1)  # tests of one case with several sets of instructions follow each other
def case_and_result(heads, head_dim, dtype, rows, q_dtype=jnp.float32):
    tokens, lengths, pages = rows
    q, *others = case(len(lengths), tokens, *heads, lengths, pages, dtype, head_dim)
    arrays = (q.astype(q_dtype), *others)
    return arrays, exact(*arrays)


# Blocks of 48 keys and 64 queries: fewer, whole ones, and one more. Sequences of different lengths,
# one of them shorter than the call's tokens.
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "rows", "instructions"),
    every_pair(
        ((4, 4), (6, 2), (32, 8), (8, 1)), (16, 64, 80, 128),
        (jnp.float32, jnp.bfloat16, jnp.int8),
        ((1, (1, 48, 49, 600), 40), (5, (5, 3, 300), 20), (17, (40, 17, 97), 8)), HERE,
    ),
)  # fmt: skip
def test_against_float64(heads, head_dim, dtype, rows, instructions):
    tokens, lengths, _ = rows
    arrays, expected = case_and_result(heads, head_dim, dtype, rows)
    y = attend(arrays, instructions)
    for row, length in enumerate(lengths):
        real = min(tokens, length)  # the others have no meaning
        np.testing.assert_allclose(y[row, :real], expected[row, :real], atol=2e-6)
    assert np.isfinite(y).all()


# With AMX these have a kernel of their own, of blocks of 64 keys, in which at most four queries of
# a kv head go another way.
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "rows", "instructions"),
    every_pair(
        ((4, 4), (6, 2), (32, 8), (8, 1)), (16, 64, 80, 128),
        (jnp.float32, jnp.bfloat16, jnp.int8),
        ((1, (1, 64, 65, 600), 40), (5, (5, 3, 300), 20), (17, (40, 17, 97), 8)), HERE,
    ),
)  # fmt: skip
def test_queries_in_bfloat16_are_rounded_once(heads, head_dim, dtype, rows, instructions):
    """By 2^-8 at most. AMX takes weights as sums of two bfloat16 numbers, and so loses another
    2^-17 of each, of values up to 4."""
    tokens, lengths, _ = rows
    arrays, expected = case_and_result(heads, head_dim, dtype, rows, jnp.bfloat16)
    y, atol = attend(arrays, instructions), 1e-5 if instructions == "amx" else 2e-6
    assert cpu.paged_attention(*arrays, 1.0, 1.0).dtype == jnp.bfloat16
    for row, length in enumerate(lengths):
        real = min(tokens, length)  # the others have no meaning
        np.testing.assert_allclose(y[row, :real], expected[row, :real], rtol=2**-8, atol=atol)
    assert np.isfinite(y).all()


@each_instructions
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_a_token_has_the_same_bits_alone_and_in_a_prompt(instructions, dtype, kv_heads):
    """Whatever the number of tokens in the call, and whoever else is in the batch."""
    q, *others = case(2, 70, 8, kv_heads, [70, 1200], 80, jnp.bfloat16, 64)
    q, (k, v, table, starts, lengths) = q.astype(dtype), others
    together = attend((q, k, v, table, starts, lengths), instructions)
    for row, token in ((0, 0), (0, 47), (0, 48), (0, 69), (1, 0), (1, 31), (1, 69)):
        position = starts[row : row + 1] + token
        alone = attend(
            (
                q[row : row + 1, token : token + 1],
                k,
                v,
                table[row : row + 1],
                position,
                position + 1,
            ),
            instructions,
        )
        np.testing.assert_array_equal(alone[0, 0], together[row, token])


@each_instructions
def test_scales_and_extreme_scores(instructions):
    q, *others = case(2, 3, 4, 2, [30, 3], 4, jnp.int8, 32)
    for dtype, rtol in ((jnp.float32, 1e-7), (jnp.bfloat16, 2**-8)):
        arrays = (q.astype(dtype), *others)
        y = attend(arrays, instructions, 0.25, 3.0)
        np.testing.assert_allclose(y, exact(*arrays, 0.25, 3.0), rtol=rtol, atol=1e-5)
    q, *others = case(2, 2, 4, 2, [140, 7], 10, jnp.bfloat16, 16)
    for factor in (1e4, 1e-30, 0.0):
        for dtype, rtol in ((jnp.float32, 1e-7), (jnp.bfloat16, 2**-8)):
            scaled = ((q * factor).astype(dtype), *others)
            y = attend(scaled, instructions)
            np.testing.assert_allclose(y, exact(*scaled), rtol=rtol, atol=1e-4)


@each_instructions
def test_equal_scores_share_the_weight(instructions):
    """With keys of zeros the result is the mean of the values seen."""
    q, k, v, table, starts, lengths = case(1, 5, 4, 2, [101], 8, head_dim=16)
    y = attend((q, k * 0, v, table, starts, lengths), instructions)
    values = np.concatenate([np.asarray(v[p], np.float64) for p in table[0]])
    for token in range(5):
        mean = values[: 97 + token].mean(0).repeat(2, 0)
        np.testing.assert_allclose(y[0, token], mean, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_empty_sequences_and_pages_that_do_not_exist_stay_finite(dtype):
    q, k, v, table, starts, _ = case(2, 3, 4, 2, [3, 3], 2, jnp.bfloat16, 16)
    where = jnp.full_like(table, 1000), starts * 0, jnp.array([0, 3])
    assert np.isfinite(attend((q.astype(dtype), k, v, *where))).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_not_a_number_stays_one(dtype):
    q, *others = case(2, 1, 4, 2, [30, 5], 4, jnp.bfloat16, 16)
    y = attend((q.at[0].set(jnp.nan).astype(dtype), *others))
    assert np.isnan(y[0]).all() and np.isfinite(y[1]).all()


def test_it_is_chosen_and_refuses_by_name():
    q, k, v, *where = case(1, 1, 4, 2, [3], 2, head_dim=16)
    assert choose(q, k).kernel.name == "cpu"
    odd = case(1, 1, 4, 2, [3], 2, head_dim=8)
    assert choose(*odd[:2]).kernel.name == "xla"
    with pytest.raises(
        ValueError, match=r"head_dim must be a multiple of 16, got q \(1, 1, 4, 8\)"
    ):
        paged_attention(*odd, implementation="cpu")
    with pytest.raises(ValueError, match="q must be bfloat16 or float32, got float16"):
        paged_attention(q.astype(jnp.float16), k, v, *where, implementation="cpu")
    with pytest.raises(ValueError, match="pages must be float8_e4m3fn, bfloat16 or float32"):
        paged_attention(
            q, k.astype(jnp.float16), v.astype(jnp.float16), *where, implementation="cpu"
        )


def test_other_operands_are_refused_unread():
    arrays = [*case(2, 3, 4, 2, [3, 9], 2, head_dim=16), jnp.ones(1), jnp.ones(1)]
    q = arrays[0]

    def refused(place, array, shape=q.shape):
        given = [*arrays[:place], array, *arrays[place + 1 :]]
        call = jax.jit(jax.ffi.ffi_call(library.ATTENTION, jax.ShapeDtypeStruct(shape, q.dtype)))
        with pytest.raises(jax.errors.JaxRuntimeError, match="operands are not understood here"):
            jax.block_until_ready(call(*given))

    refused(0, q[0])
    refused(0, q[:, :, :3])
    refused(0, q, shape=(2, 3, 4, 8))
    refused(1, arrays[1].astype(jnp.float16))
    refused(2, arrays[2][:1])
    refused(3, arrays[3].astype(jnp.float32))
    refused(4, arrays[4][:1])
    refused(5, jnp.zeros(3, jnp.int32))
    refused(7, jnp.ones(2))


def test_two_programs_at_a_time():
    q, *others = case(3, 9, 8, 2, [500, 9, 77], 40, jnp.bfloat16, 64)
    arrays = (q.astype(jnp.bfloat16), *others)
    call = jax.jit(partial(cpu.paged_attention, k_scale=1.0, v_scale=1.0))
    expected = np.asarray(call(*arrays))
    for y in [call(*arrays) for _ in range(20)]:
        np.testing.assert_array_equal(y, expected)
