"""The C++ kernels for ARM against float64, on any machine: cross-compiled and run in an emulator.

`cpu_driver.cpp` calls them. On an ARM machine the other tests of the kernels run with NEON, too.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import e4m3
from pallas_kernels.cpu import compiler
from pallas_kernels.fp8_matmul.logits import LogitStats
from tests.test_cpu_fp8_matmul import exact, operands
from tests.test_logit_stats import assert_close, known_of, targets_for
from tests.test_paged_attention import case
from tests.test_paged_attention import exact as exact_attention

COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and EMULATOR),
        reason=f"code for ARM needs {COMPILER} and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, "
        "qemu-user-static)",
    ),
]
PRODUCT, ATTENTION, LOGIT_STATS = 0, 1, 2
# As XLA's c_api.h numbers them.
DTYPES = {"int8": 2, "int32": 4, "float32": 11, "bfloat16": 16, "float8_e4m3fn": 20}


@pytest.fixture(scope="module", params=["portable", "neon"])
def driver(request, tmp_path_factory):
    """The path of the program, which has one instruction set."""
    path = tmp_path_factory.mktemp("driver") / "driver"
    number = 1 + get_args(compiler.Instructions).index(request.param)
    flags = [flag for flag in compiler._FLAGS if flag != "-shared"]
    flags += [f"-DINSTRUCTIONS={number}", "-static", "-pthread", "-I", jax.ffi.include_dir()]
    source = Path(__file__).with_name("cpu_driver.cpp")
    subprocess.run([COMPILER, *flags, source, "-o", path], check=True)
    return path


def run(driver: Path, calls: Sequence[bytes]) -> bytes:
    """The results of calls, one behind the other."""
    assert EMULATOR
    done = subprocess.run([EMULATOR, driver], input=b"".join(calls), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def call(kind, arrays, shape, dtype="float32", scales=(1, 1)) -> bytes:
    """A call as the driver reads it. shape, dtype: of the result. scales: rows and columns that
    share one."""
    parts = [np.int64([kind, *scales, len(arrays)]).tobytes()]
    for array in map(np.asarray, arrays):
        head = [DTYPES[array.dtype.name], array.ndim, *array.shape, array.nbytes]
        parts += [np.int64(head).tobytes(), array.tobytes()]
    parts.append(np.int64([DTYPES[dtype], len(shape), *shape, 0]).tobytes())
    return b"".join(parts)


def multiply(driver, x, sizes, weight, scale, scales=None):
    """The products of the first rows of x, for each number of them in `sizes`."""
    scales = scales or (1, x.shape[1])
    calls = [call(PRODUCT, (x[:m], weight, scale), (m, len(weight)), scales=scales) for m in sizes]
    found = np.frombuffer(run(driver, calls), np.float32).reshape(-1, len(weight))
    return np.split(found, np.cumsum(sizes)[:-1])


# Columns: less than a step and more. Rows of the weight that divide into no tiles.
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["row", "block"])
def test_products(layout, dtype, driver):
    sizes = (1, 3, 4, 8, 16, 17)
    for n, k in ((8, 1), (149, 300)):
        x, weight, scale = operands(17, n, k, layout)
        x = x.astype(dtype)
        scales = (128, min(k, 128)) if layout == "block" else None
        *some, y = multiply(driver, x, sizes, weight, scale, scales)
        # As in test_cpu_fp8_matmul.py.
        np.testing.assert_allclose(y, exact(x, weight, scale), atol=1e-4)
        for each in some:  # a row does not depend on its company
            np.testing.assert_array_equal(each, y[: len(each)])


def test_groups_of_columns_with_row_scales_of_their_own(driver):
    x, weight, _ = operands(9, 40, 192)
    scale = jax.random.uniform(jax.random.key(7), (40, 3), minval=1e-3, maxval=1e-2)
    (y,) = multiply(driver, x, [9], weight, scale, (1, 64))
    np.testing.assert_allclose(y, exact(x, weight, scale), atol=1e-4)


def test_weights_in_bfloat16_without_scales(driver):
    keys = jax.random.split(jax.random.key(3), 2)
    x, weight = jax.random.normal(keys[0], (17, 130)), jax.random.normal(keys[1], (75, 130))
    weight = weight.astype(jnp.bfloat16)
    *some, y = multiply(driver, x, (1, 5, 8, 17), weight, jnp.zeros(0))
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(y, expected, atol=1e-4)
    for each in some:
        np.testing.assert_array_equal(each, y[: len(each)])


def test_every_code_is_exact(driver):
    """Denormal ones too, and results that are denormal numbers of float32, though XLA's threads
    flush these."""
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[codes & 0x7F != 0x7F]
    weight = np.zeros((len(codes), 100), np.uint8)
    place = np.arange(len(codes)) % 100
    weight[np.arange(len(codes)), place] = codes
    factors = np.float32([2.0**-120, *2.0 ** np.arange(16)])[:, None]
    x = factors * np.ones((17, 100), np.float32)
    ones = np.ones(len(codes), np.float32)
    found = multiply(driver, x, (1, 5, 8, 17), weight.view(np.int8), ones)
    values = codes.view(e4m3.DTYPE).astype(np.float64)
    for y in found:
        np.testing.assert_array_equal(y, factors[: len(y)] * values)


def test_swiglu(driver):
    """In float32, and rounded to bfloat16 after each operation."""
    x, gate, gate_scale = operands(17, 75, 200)
    up, up_scale = operands(1, 75, 200, seed=1)[1:]
    arrays = (gate, gate_scale, up, up_scale)
    calls = [
        call(PRODUCT, (x[:m], *arrays), (m, 75), dtype, (1, 200))
        for dtype in ("float32", "bfloat16")
        for m in (1, 8, 17)
    ]
    found, rows = run(driver, calls), 1 + 8 + 17
    y = np.frombuffer(found[: rows * 75 * 4], np.float32).reshape(rows, 75)
    rounded = np.frombuffer(found[rows * 75 * 4 :], jnp.bfloat16).reshape(rows, 75)
    g, u = exact(x, gate, gate_scale), exact(x, up, up_scale)
    order = [0, *range(8), *range(17)]
    # Sums stray by 1e-4, as in test_products, and are multiplied by up to 60.
    np.testing.assert_allclose(y, (g / (1 + np.exp(-g)) * u)[order], rtol=1e-5, atol=6e-3)
    g, u = round_to_bfloat16(g), round_to_bfloat16(u)
    expected = round_to_bfloat16(round_to_bfloat16(g / (1 + np.exp(-g))) * u)[order]
    assert (rounded == expected).mean() > 0.98  # others are rounded elsewhere at a tie


def round_to_bfloat16(values):
    return values.astype(jnp.bfloat16).astype(np.float64)


def test_what_is_known_of_logits(driver):
    x, weight, scale = operands(17, 601, 100)
    targets = targets_for(17, 601)
    calls = [
        call(LOGIT_STATS, (x[:m], weight, scale, targets[:m]), (4, m), scales=(1, 100))
        for m in (3, 17)
    ]
    some, found = np.split(np.frombuffer(run(driver, calls), np.float32), [4 * 3])
    some, found = some.reshape(4, 3), found.reshape(4, 17)
    np.testing.assert_array_equal(some, found[:, :3])
    stats = LogitStats(found[0], found[1].view(np.int32), found[2], found[3])
    expected = known_of(exact(x, weight, scale), targets)
    assert_close(stats, expected, atol=1e-4)
    assert (stats.top_ids == expected.top_ids).mean() > 0.9  # others are as large within 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_attention(dtype, driver):
    """Fewer keys and queries than a block has, and more; a sequence that is shorter than the call's
    tokens."""
    for tokens, *heads, lengths, head_dim in (
        (1, 8, 2, [1, 48, 49], 64),
        (17, 4, 1, [40, 9], 80),
    ):
        arrays = case(len(lengths), tokens, *heads, lengths, 4, dtype, head_dim)
        scales = np.float32([0.5]), np.float32([2.0])
        q = arrays[0]
        result = run(driver, [call(ATTENTION, (*arrays, *scales), q.shape)])
        y = np.frombuffer(result, np.float32).reshape(q.shape)
        expected = exact_attention(*arrays, 0.5, 2.0)
        for row, length in enumerate(lengths):
            real = min(tokens, length)  # the others have no meaning
            np.testing.assert_allclose(y[row, :real], expected[row, :real], atol=4e-6)
        assert np.isfinite(y).all()


def test_queries_in_bfloat16_are_rounded_once(driver):
    q, *others = case(2, 3, 8, 2, [70, 3], 6, jnp.bfloat16, 64)
    arrays = (q.astype(jnp.bfloat16), *others)
    ones = np.ones((2, 1), np.float32)
    result = run(driver, [call(ATTENTION, (*arrays, *ones), q.shape, "bfloat16")])
    y = np.frombuffer(result, jnp.bfloat16).reshape(q.shape).astype(np.float64)
    np.testing.assert_allclose(y, exact_attention(*arrays), rtol=2**-8, atol=2e-6)
