"""The C++ kernels for AMX against float64, on any machine with AVX-512: with emulated tiles.

Where there is AMX, the other tests of the kernels run with it, too.
"""

import ctypes
import os
import subprocess
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import e4m3
from pallas_kernels.cpu import compiler, library
from pallas_kernels.fp8_matmul import cpu
from tests import test_cpu_attention as attention
from tests import test_logit_stats as stats
from tests.cpu_kernel import HERE, needs_cpu_kernel
from tests.pairs import every_pair
from tests.test_cpu_fp8_matmul import exact, multiply, operands
from tests.test_paged_attention import case
from tests.test_paged_attention import exact as exact_attention


def lacks() -> str | None:
    if "avx512_bf16" not in HERE:
        return "no AVX-512 with BF16"
    command = [compiler._compiler(), "-mamx-bf16", "-E", "-x", "c++", os.devnull]
    if subprocess.run(command, capture_output=True).returncode:
        return "the compiler does not know AMX"
    return None if "__GFNI__" in compiler._predefined(command[0]) else "no GFNI"


pytestmark = [needs_cpu_kernel, pytest.mark.skipif(bool(lacks()), reason=str(lacks()))]
EMULATED = "emulated"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Compile the kernels with the tiles of emulated_tiles.h, and have XLA know them."""
    header = Path(__file__).with_name("emulated_tiles.h")
    directory = tmp_path_factory.mktemp("emulated")
    for kernel, names in library._TARGETS_OF.items():
        path = compiler.build(directory, kernel, "amx", ["-include", str(header)])
        loaded = ctypes.CDLL(str(path))
        for name in names:
            capsule = jax.ffi.pycapsule(loaded[name])
            jax.ffi.register_ffi_target(f"{name}_{EMULATED}", capsule, platform="cpu")


@pytest.fixture(autouse=True)
def emulated_targets(emulated, monkeypatch):
    known = library.target

    def target(name, instructions):
        return f"{name}_{EMULATED}" if instructions == EMULATED else known(name, instructions)

    monkeypatch.setattr(library, "target", target)


def random_operands(m, n, k, layout):
    x, bits, scale = operands(m, n, k, layout)
    return x.astype(jnp.bfloat16), bits, scale


# Columns of several panels (2,048 each) and of parts of one (256), rows of several chunks and of
# half a tile, and more of x than pass by at a time (512).
@pytest.mark.parametrize("layout", ["row", "block"])
@pytest.mark.parametrize(
    ("n", "k", "rows"),
    [(8, 1, (1, 17)), (601, 300, (1, 3, 16, 17, 33)), (70, 4500, (2, 40)), (40, 300, (530,))],
)
def test_against_float64(layout, n, k, rows):
    x, bits, scale = random_operands(rows[-1], n, k, layout)
    expected = exact(x, bits, scale)
    of_all = multiply(x, bits, scale, EMULATED)
    for m in rows:
        y = multiply(x[:m], bits, scale, EMULATED)
        np.testing.assert_allclose(y, expected[:m], atol=1e-4 * max(1, k / 300))
        np.testing.assert_array_equal(y, of_all[:m])  # whatever its company


@pytest.mark.parametrize("m", [2, 40])
def test_groups_of_columns_wider_than_a_panel(m):
    x, bits, _ = random_operands(m, 40, 3 * 2112, "row")
    scale = jax.random.uniform(jax.random.key(7), (40, 3), minval=1e-3, maxval=1e-2)
    y = multiply(x, bits, scale, EMULATED)
    # As in test_cpu_fp8_matmul.py, for results of 213: sqrt(6336) * 2^-24 * 213 is 1e-3.
    np.testing.assert_allclose(y, exact(x, bits, scale), atol=1e-3)


def test_every_code_is_exact():
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[codes & 0x7F != 0x7F]
    bits = jnp.asarray(np.diag(codes).view(np.int8))
    for m in (1, 20):
        y = multiply(jnp.ones((m, len(codes)), jnp.bfloat16), bits, jnp.ones(len(codes)), EMULATED)
        np.testing.assert_array_equal(y[0], codes.view(e4m3.DTYPE).astype(np.float32))


@pytest.mark.parametrize("m", [1, 9, 40])
def test_swiglu_is_that_of_its_parts(m):
    x, gate, gate_scale = random_operands(m, 300, 200, "row")
    up, up_scale = operands(1, 300, 200, "row", seed=1)[1:]
    run = partial(cpu.swiglu, x, gate, gate_scale, up, up_scale, jnp.float32)
    g, u = (exact(x, *each) for each in ((gate, gate_scale), (up, up_scale)))
    np.testing.assert_allclose(run(instructions=EMULATED), g / (1 + np.exp(-g)) * u, atol=1e-2)


@pytest.mark.parametrize("m", [3, 40])
def test_what_is_known_of_logits(m):
    x, bits, scale = random_operands(m, 1000, 130, "row")
    targets = stats.targets_for(m, 1000)
    in_bfloat16 = jax.random.normal(jax.random.key(1), bits.shape).astype(jnp.bfloat16)
    for weight, of_weight in ((bits, scale), (in_bfloat16, None)):
        found = stats.by_kernel(x, weight, of_weight, targets, EMULATED)
        if of_weight is None:
            logits = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        else:
            logits = exact(x, weight, of_weight)
        stats.assert_close(found, stats.known_of(logits, targets), atol=1e-4)


def attention_case(heads, head_dim, dtype, tokens, lengths, pages):
    """Queries in bfloat16: others are computed without tiles."""
    q, *others = case(len(lengths), tokens, *heads, lengths, pages, dtype, head_dim)
    return q.astype(jnp.bfloat16), *others


# Blocks of 64 keys and 64 queries, whose tiles have 16: fewer, whole ones, and one more. One to
# four queries in all go another way.
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "rows"),
    every_pair(
        ((4, 4), (8, 2), (8, 1)), (16, 64, 80, 128), (jnp.bfloat16, jnp.int8),
        (
            (1, (1, 64, 65, 300), 20), (4, (64, 33), 8), (5, (5, 3, 129), 10),
            (17, (40, 17, 81), 8),
        ),
    ),
)  # fmt: skip
def test_attention_against_float64(heads, head_dim, dtype, rows):
    tokens, lengths, _ = rows
    arrays = attention_case(heads, head_dim, dtype, *rows)
    y, expected = attention.attend(arrays, EMULATED, 0.5, 2.0), exact_attention(*arrays, 0.5, 2.0)
    for row, length in enumerate(lengths):
        real = min(tokens, length)  # the others have no meaning
        # Rounded to bfloat16. Weights, as sums of two bfloat16 numbers, stray by 2^-17 of them.
        np.testing.assert_allclose(y[row, :real], expected[row, :real], rtol=2**-8, atol=1e-5)
    assert np.isfinite(y).all()


# Groups of 4: few queries are arranged otherwise.
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)])
def test_a_token_has_the_same_bits_alone_and_in_a_prompt(heads, dtype):
    q, k, v, table, starts, lengths = attention_case(heads, 80, dtype, 33, [33, 200], 15)
    # Values of one, times what is midway between two bfloat16 numbers: there the last bit of a sum
    # in float32 decides how a result is rounded.
    ones = jnp.full_like(v, 0x38 if dtype == jnp.int8 else 1)
    for values, v_scale in ((v, 1.0), (ones, 1 + 2**-8)):
        run = partial(attention.attend, instructions=EMULATED, v_scale=v_scale)
        together = run((q, k, values, table, starts, lengths))
        for row, token in ((0, 0), (0, 15), (0, 16), (0, 32), (1, 0), (1, 23), (1, 24), (1, 32)):
            position = starts[row : row + 1] + token
            query = q[row : row + 1, token : token + 1]
            alone = run((query, k, values, table[row : row + 1], position, position + 1))
            np.testing.assert_array_equal(alone[0, 0], together[row, token])


@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_to_extreme_scores(tokens):
    q, *others = attention_case((8, 2), 16, jnp.bfloat16, tokens, [140, 7], 10)
    for factor in (1e4, 1e-30, 0.0):
        scaled = (q * jnp.bfloat16(factor), *others)
        y = attention.attend(scaled, EMULATED)
        np.testing.assert_allclose(y, exact_attention(*scaled), rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3])
def test_attention_of_odd_sequences(tokens):
    """An empty one, pages that do not exist, and a query that is not a number."""
    q, k, v, table, starts, _ = attention_case((8, 2), 16, jnp.bfloat16, tokens, [3, 3], 2)
    where = jnp.full_like(table, 1000), starts * 0, jnp.array([0, 3])
    y = attention.attend((q, k, v, *where), EMULATED)
    assert not y[0].any() and np.isfinite(y).all()
    y = attention.attend((q.at[1].set(jnp.nan), k, v, *where), EMULATED)
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


@pytest.mark.skipif("amx" not in HERE, reason="no AMX")
def test_the_emulation_is_what_the_processor_does():
    """Bit for bit, but for products that are denormal."""
    for layout in ("row", "block"):
        x, bits, scale = random_operands(40, 300, 700, layout)
        emulated = multiply(x, bits, scale, EMULATED)
        np.testing.assert_array_equal(emulated, multiply(x, bits, scale, "amx"))
    for tokens, dtype in ((1, jnp.int8), (9, jnp.bfloat16)):
        arrays = attention_case((8, 2), 80, dtype, tokens, [70, 200], 15)
        found, expected = (attention.attend(arrays, each) for each in (EMULATED, "amx"))
        np.testing.assert_array_equal(found, expected)
