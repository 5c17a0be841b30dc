"""The C++ kernels for ARM against float64, on any machine: cross-compiled and run in an emulator.

`cpu_driver.cpp` calls them. On an ARM machine the other tests of the kernels run with NEON, too.
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

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
# Kernels, as cpu_driver.cpp numbers them.
PRODUCT, LOGIT_STATS, ATTENTION, RMS_NORM, ROPE_AND_CACHE = range(5)
# As XLA's c_api.h numbers them.
DTYPES = {"int8": 2, "int32": 4, "float32": 11, "bfloat16": 16, "float8_e4m3fn": 20}


@dataclass(frozen=True)
class Result:
    """What a kernel returns.

    place: the number of the operand in whose memory it is; -1 for none.
    """

    shape: tuple[int, ...]
    dtype: Any = jnp.float32
    place: int = -1


@dataclass(frozen=True)
class Call:
    """A call of a kernel.

    scales: how many rows and columns of a weight share a scale.
    """

    kernel: int
    operands: Sequence[Any]
    results: Sequence[Result]
    scales: tuple[int, int] = (1, 1)
    has_residual: bool = False

    def written(self) -> bytes:
        """The call as the driver reads it."""
        counts = (len(self.operands), len(self.results))
        parts = [np.int64([self.kernel, *self.scales, self.has_residual, *counts]).tobytes()]
        for each in map(np.asarray, self.operands):
            parts += [head(each.dtype, each.shape, each.nbytes), each.tobytes()]
        parts += [head(each.dtype, each.shape, each.place) for each in self.results]
        return b"".join(parts)


def head(dtype, shape, last) -> bytes:
    return np.int64([DTYPES[jnp.dtype(dtype).name], len(shape), *shape, last]).tobytes()


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


def run(driver: Path, *calls: Call) -> list[list[np.ndarray]]:
    """The results of each call."""
    assert EMULATOR
    written = b"".join(call.written() for call in calls)
    done = subprocess.run([EMULATOR, driver], input=written, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    left = done.stdout

    def take(result: Result) -> np.ndarray:
        nonlocal left
        count = np.prod(result.shape, dtype=int)
        array = np.frombuffer(left, jnp.dtype(result.dtype), count).reshape(result.shape)
        left = left[array.nbytes :]
        return array

    found = [[take(result) for result in call.results] for call in calls]
    assert not left
    return found


def multiply(driver, x, sizes, weight, scale, scales=None):
    """The products of the first rows of x, for each number of them in `sizes`."""
    scales = scales or (1, x.shape[1])
    calls = [
        Call(PRODUCT, (x[:m], weight, scale), [Result((m, len(weight)))], scales) for m in sizes
    ]
    return [y for (y,) in run(driver, *calls)]


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
    arrays, sizes = (gate, gate_scale, up, up_scale), (1, 8, 17)
    calls = [
        Call(PRODUCT, (x[:m], *arrays), [Result((m, 75), dtype)], (1, 200))
        for dtype in (jnp.float32, jnp.bfloat16)
        for m in sizes
    ]
    found = [y for (y,) in run(driver, *calls)]
    y, rounded = np.concatenate(found[:3]), np.concatenate(found[3:])
    g, u = exact(x, gate, gate_scale), exact(x, up, up_scale)
    order = [0, *range(8), *range(17)]
    # Sums stray by 1e-4, as in test_products, and are multiplied by up to 60.
    np.testing.assert_allclose(y, (g / (1 + np.exp(-g)) * u)[order], rtol=1e-5, atol=6e-3)
    g, u = rounded_to(jnp.bfloat16, g), rounded_to(jnp.bfloat16, u)
    expected = rounded_to(jnp.bfloat16, rounded_to(jnp.bfloat16, g / (1 + np.exp(-g))) * u)[order]
    assert (rounded == expected).mean() > 0.98  # others are rounded elsewhere at a tie


def test_what_is_known_of_logits(driver):
    x, weight, scale = operands(17, 601, 100)
    targets = targets_for(17, 601)
    calls = [
        Call(
            LOGIT_STATS, (x[:m], weight, scale, targets[:m]),
            [Result((m,)), Result((m,), jnp.int32), Result((m,)), Result((m,))], (1, 100),
        )
        for m in (3, 17)
    ]  # fmt: skip
    some, found = run(driver, *calls)
    for few, all_rows in zip(some, found, strict=True):
        np.testing.assert_array_equal(few, all_rows[:3])
    stats = LogitStats(*found)
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
        [[y]] = run(driver, Call(ATTENTION, (*arrays, *scales), [Result(q.shape)]))
        expected = exact_attention(*arrays, 0.5, 2.0)
        for row, length in enumerate(lengths):
            real = min(tokens, length)  # the others have no meaning
            np.testing.assert_allclose(y[row, :real], expected[row, :real], atol=4e-6)
        assert np.isfinite(y).all()


def test_queries_in_bfloat16_are_rounded_once(driver):
    q, *others = case(2, 3, 8, 2, [70, 3], 6, jnp.bfloat16, 64)
    arrays = (q.astype(jnp.bfloat16), *others)
    ones = np.ones((2, 1), np.float32)
    [[y]] = run(driver, Call(ATTENTION, (*arrays, *ones), [Result(q.shape, jnp.bfloat16)]))
    y = y.astype(np.float64)
    np.testing.assert_allclose(y, exact_attention(*arrays), rtol=2**-8, atol=2e-6)


def test_residual(driver):
    """Added in float32, before the only rounding."""
    x, weight, scale = operands(17, 75, 200)
    residual = 30 * jax.random.normal(jax.random.key(5), (17, 75))
    for dtype, rtol in ((jnp.float32, 0), (jnp.bfloat16, 2**-8)):
        added = residual.astype(dtype)
        calls = [
            Call(
                PRODUCT, (x[:m], weight, scale, added[:m]), [Result((m, 75), dtype)], (1, 200),
                has_residual=True,
            )
            for m in (1, 17)
        ]  # fmt: skip
        [[one], [y]] = run(driver, *calls)
        expected = exact(x, weight, scale) + np.asarray(added, np.float64)
        np.testing.assert_allclose(y.astype(np.float64), expected, rtol=rtol, atol=1e-4)
        np.testing.assert_array_equal(one, y[:1])


# Fewer columns than registers have, several registers with some behind them, and rows of several
# parts of the work.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm(dtype, driver):
    for rows, columns in ((3, 1), (35, 37), (17, 256)):
        keys = jax.random.split(jax.random.key(columns), 2)
        x = (3 * jax.random.normal(keys[0], (rows, columns))).astype(dtype)
        weight = jax.random.normal(keys[1], (columns,)).astype(dtype)
        eps = np.float32(1e-3)
        [[y]] = run(driver, Call(RMS_NORM, (x, weight, eps), [Result(x.shape, dtype)]))
        wide = np.asarray(x, np.float64)
        normed = wide / np.sqrt((wide**2).mean(1, keepdims=True) + eps)
        expected = rounded_to(dtype, rounded_to(dtype, normed) * np.asarray(weight, np.float64))
        assert_rounded_alike(y, expected)


def rounded_to(dtype, values):
    return values.astype(dtype).astype(np.float64)


def assert_rounded_alike(found, expected):
    """Within errors of float32, by which bfloat16 numbers and codes are other ones near a tie."""
    distance = {"float32": 2e-6, "bfloat16": 2**-7, "float8_e4m3fn": 2**-3}[found.dtype.name]
    found = found.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=distance, atol=max(1e-6, distance / 64))
    if distance > 1e-5:
        assert (found == expected).mean() > 0.98


# Halves of a head that are no whole registers, and whole ones. Sequences whose last tokens are not
# stored: they are padding, or there is no page.
@pytest.mark.parametrize("has_own_scales", [False, True])
@pytest.mark.parametrize("pages_dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rope_and_cache(dtype, pages_dtype, has_own_scales, driver):
    batch, tokens, heads, kv_heads, page_size = 2, 9, 6, 2, 4
    table, cached, lengths = np.int32([[4, 1, 6], [0, 7, 3]]), np.int32([3, 0]), np.int32([11, 9])
    stored = [(0, t, (3 + t) // 4, (3 + t) % 4) for t in range(8)]
    stored += [(1, t, t // 4, t % 4) for t in (0, 1, 2, 3, 8)]  # there is no page 7
    scales = [np.float32([0.5, 0.25]), np.float32([2, 4])]
    if not has_own_scales:
        scales = [each[0] for each in scales]
    of_q, of_k, of_v = (np.broadcast_to(each, kv_heads)[:, None] for each in (scales[0], *scales))
    of_q = of_q.repeat(heads // kv_heads, 0) if has_own_scales else 1
    for head_dim in (20, 64):
        keys = jax.random.split(jax.random.key(head_dim), 6)
        each = (batch * tokens, heads, head_dim), *2 * [(batch * tokens, kv_heads, head_dim)]
        q, k, v = (jax.random.normal(*pair).astype(dtype) for pair in zip(keys, each, strict=False))
        angles = 9 * jax.random.normal(keys[3], (batch * tokens, head_dim // 2))
        cosines, sines = jnp.cos(angles), jnp.sin(angles)
        pool = (7, page_size, kv_heads, head_dim)
        pages = [jax.random.normal(key, pool).astype(e4m3.DTYPE) for key in keys[4:]]
        pages = [
            np.asarray(e4m3.as_bits(p) if pages_dtype == jnp.int8 else p.astype(pages_dtype))
            for p in pages
        ]
        arrays = (q, k, v, cosines, sines, table, cached, lengths, *scales, *pages)
        results = [
            Result(q.shape, dtype), Result(pool, pages_dtype, 10), Result(pool, pages_dtype, 11),
        ]  # fmt: skip
        [[found_q, *found_pages]] = run(driver, Call(ROPE_AND_CACHE, arrays, results))
        rotated_q, rotated_k = (rounded_to(dtype, rotated(x, cosines, sines)) for x in (q, k))
        assert_rounded_alike(found_q, rounded_to(dtype, rotated_q * of_q))
        news = (rotated_k, of_k), (np.asarray(v, np.float64), of_v)
        for before, after, (new, scale) in zip(pages, found_pages, news, strict=True):
            if pages_dtype == jnp.int8:
                before, after, new = before.view(e4m3.DTYPE), after.view(e4m3.DTYPE), new / scale
            expected = before.astype(np.float64)
            for row, token, column, offset in stored:
                values = new[row * tokens + token]
                expected[table[row, column], offset] = rounded_to(after.dtype, values)
            assert_rounded_alike(after, expected)
        untouched = np.ones(pool[:2], bool)
        for row, _, column, offset in stored:
            untouched[table[row, column], offset] = False
        for before, after in zip(pages, found_pages, strict=True):
            np.testing.assert_array_equal(after[untouched], before[untouched])


def rotated(x, cosines, sines):
    """Heads whose pairs, of numbers of both halves, are turned."""
    a, b = np.split(np.asarray(x, np.float64), 2, axis=-1)
    cosines, sines = (np.asarray(each, np.float64)[:, None] for each in (cosines, sines))
    return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1)
