"""What is known of logits, by the CPU's kernel and in blocks, against float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import e4m3
from pallas_kernels.cpu import library
from pallas_kernels.fp8_matmul import choose, cpu, fp8_matmul
from pallas_kernels.fp8_matmul.dense import choose_dense
from pallas_kernels.fp8_matmul.logits import LogitStats, in_blocks, logit_stats, tokens_at_once
from tests.cpu_kernel import HERE, all_alike_in_threads, needs_cpu_kernel
from tests.test_cpu_fp8_matmul import exact, operands

FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
each_instructions = pytest.mark.parametrize("instructions", HERE)


def by_kernel(x, weight, scale, targets, instructions, logits_dtype=FLOAT32):
    found = cpu.logit_stats(x, weight, scale, targets, logits_dtype, instructions=instructions)
    return LogitStats(*map(np.asarray, found))


def targets_for(m, n):
    """Also the first token, the last, and some that are not in the vocabulary."""
    some = np.arange(m, dtype=np.int32) * 37 % n
    some[: min(m, 4)] = [n - 1, 0, n, -1][: min(m, 4)]
    return jnp.asarray(some)


def known_of(logits, targets):
    """The same of logits in float64."""
    logits, targets = np.asarray(logits, np.float64), np.asarray(targets)
    top = logits.max(axis=1)
    with np.errstate(over="ignore"):
        total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    is_there = (targets >= 0) & (targets < logits.shape[1])
    chosen = logits[np.arange(len(logits)), np.where(is_there, targets, 0)]
    return LogitStats(np.where(is_there, chosen, -np.inf), logits.argmax(axis=1), top, total)


def assert_close(found, expected, atol):
    for name in ("target_logits", "top_logits", "logsumexp"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=atol)


# Tokens: fewer than a vector of floats, one segment with a rest, and several segments, the last of
# which takes the rest. Rows as in test_cpu_fp8_matmul.py; columns that are not whole steps.
@needs_cpu_kernel
@each_instructions
@pytest.mark.parametrize(
    ("layout", "dtype"), [("row", "bfloat16"), ("block", "bfloat16"), ("block", "float32")]
)
def test_the_kernel_against_float64(layout, dtype, instructions):
    for n, k in ((9, 40), (601, 200), (1501, 130)):
        x, bits, scale = operands(70, n, k, layout)
        x, targets = x.astype(dtype), targets_for(70, n)
        logits = exact(x, bits, scale)
        expected = known_of(logits, targets)
        of_all = by_kernel(x, bits, scale, targets, instructions)
        # Sums of products stray by 1e-4 at most, see test_cpu_fp8_matmul.py; logsumexp by no more.
        assert_close(of_all, expected, atol=1e-4)
        two = np.sort(logits, axis=1)[:, -2:]
        is_clear = two[:, 1] - two[:, 0] > 2e-4
        assert is_clear.mean() > 0.9
        np.testing.assert_array_equal(of_all.top_ids[is_clear], expected.top_ids[is_clear])
        for m in (1, 3, 5, 8, 13, 17):  # bit for bit the same in any company
            for some, all_ in zip(
                by_kernel(x[-m:], bits, scale, targets[-m:], instructions), of_all, strict=True
            ):
                np.testing.assert_array_equal(some, all_[-m:])


@needs_cpu_kernel
@each_instructions
@pytest.mark.parametrize("size", [1e-4, 50.0, 1e4])
def test_logits_of_any_size(size, instructions):
    """Beyond what exp takes, too: a row's largest logit may be 10^5, or all may be alike."""
    x, bits, scale = operands(20, 601, 100)
    x, targets = x * size, targets_for(20, 601)
    found = by_kernel(x, bits, scale, targets, instructions)
    assert_close(found, known_of(exact(x, bits, scale), targets), atol=1e-4 * max(1, size))


@needs_cpu_kernel
@each_instructions
@pytest.mark.parametrize("m", [2, 20])
def test_rounded_logits_and_ties(m, instructions):
    """In bfloat16 many logits are equal: the first of the largest counts, wherever it lies."""
    x, bits, scale = operands(m, 1501, 64)
    x = x.astype(jnp.bfloat16)
    (y,) = cpu.fp8_matmuls(x, (bits,), (scale,), out_dtype=BFLOAT16, instructions=instructions)
    logits, targets = np.asarray(y, np.float64), targets_for(m, 1501)
    found = by_kernel(x, bits, scale, targets, instructions, BFLOAT16)
    expected = known_of(logits, targets)
    for name in ("target_logits", "top_ids", "top_logits"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.logsumexp, expected.logsumexp, rtol=1e-6)

    alike = by_kernel(x, bits * 0, scale, targets, instructions)
    np.testing.assert_array_equal(alike.top_ids, 0)
    np.testing.assert_allclose(alike.logsumexp, np.log(1501), rtol=1e-6)
    # The largest logit at two places: in the same lane, in another, and in another segment.
    one = e4m3.as_bits(e4m3.cast(jnp.ones(64)))
    for places in ((3, 19), (5, 8), (470, 490), (200, 1500)):
        at = jnp.array(places)
        top = by_kernel(
            abs(x), bits.at[at].set(one), (scale / 1e3).at[at].set(1), targets, instructions
        )
        np.testing.assert_array_equal(top.top_ids, places[0])


@needs_cpu_kernel
@each_instructions
def test_not_a_number_stays_in_its_row(instructions):
    x, bits, scale = operands(20, 601, 64)
    found = by_kernel(x.at[7].set(jnp.nan), bits, scale, targets_for(20, 601), instructions)
    np.testing.assert_array_equal(np.isnan(found.logsumexp), np.arange(20) == 7)
    assert (found.top_ids >= 0).all() and (found.top_ids < 601).all()


@needs_cpu_kernel
@each_instructions
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_matrices_in_bfloat16_without_scales(dtype, instructions):
    keys = jax.random.split(jax.random.key(3), 2)
    x = jax.random.normal(keys[0], (20, 130)).astype(dtype)
    weight = jax.random.normal(keys[1], (499, 130)).astype(jnp.bfloat16)
    targets = targets_for(20, 499)
    logits = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert_close(by_kernel(x, weight, None, targets, instructions), known_of(logits, targets), 1e-4)


@needs_cpu_kernel
def test_two_threads_at_once():
    """Each of them many times, with other shapes than the other's."""
    cases = [(*operands(m, 1000, k, seed=m), targets_for(m, 1000)) for m, k in ((2, 256), (40, 64))]
    run = jax.jit(partial(cpu.logit_stats, logits_dtype=FLOAT32))
    assert all_alike_in_threads(run, cases, 100)


def test_every_implementation_and_format():
    """In one piece and in blocks of tokens, the last of which is not full."""
    m, n = tokens_at_once() + 5, 256
    x, bits, scale = operands(m, n, 128)
    targets = targets_for(m, n)
    expected = known_of(exact(x, bits, scale), targets)
    for name in (None, "xla", "reference"):
        assert_close(logit_stats(x, bits, scale, targets, implementation=name), expected, 1e-4)
    by_groups = jnp.ones((n, 1)) * scale[:, None]  # a single group of columns
    assert_close(logit_stats(x, bits, by_groups, targets), expected, 1e-4)
    codes = e4m3.cast(x)
    for x_scale in (jnp.float32(0.5), jnp.linspace(0.1, 2, m)[:, None]):
        logits = exact(codes, bits, scale) * np.asarray(x_scale, np.float64)
        found = logit_stats(codes, bits, scale, targets, x_scale=x_scale)
        assert_close(found, known_of(logits, targets), 1e-4)
    wide = jax.random.normal(jax.random.key(5), (n, 128))
    found = logit_stats(x, wide, None, targets)
    logits = np.asarray(x, np.float64) @ np.asarray(wide, np.float64).T
    assert_close(found, known_of(logits, targets), 1e-4)
    rounded = logit_stats(x, bits, scale, targets, logits_dtype=jnp.bfloat16, implementation="xla")
    y = fp8_matmul(x, bits, scale, out_dtype=jnp.bfloat16, implementation="xla")
    np.testing.assert_array_equal(rounded.top_ids, np.asarray(y, np.float32).argmax(axis=1))
    with pytest.raises(ValueError, match=r"targets must be \(\d+,\), a token for each row, got"):
        logit_stats(x, bits, scale, targets[:-1])


@needs_cpu_kernel
def test_the_kernel_is_taken_where_products_are(monkeypatch):
    x, bits, scale = operands(20, 64, 128)
    targets = targets_for(20, 64)
    weight = bits.astype(jnp.bfloat16)
    taken = partial(jax.make_jaxpr(lambda *each: logit_stats(*each)))
    is_here = cpu.slower_than_xla(20) is None
    assert choose(x, bits, scale, FLOAT32).kernel.name == ("cpu" if is_here else "xla")
    assert choose_dense(x, weight).kernel.name == ("cpu" if is_here else "xla")
    assert (library.LOGIT_STATS in str(taken(x, bits, scale, targets))) == is_here
    assert (library.LOGIT_STATS in str(taken(x, weight, None, targets))) == is_here
    monkeypatch.setattr(library, "why_not", lambda: "there is no C++ compiler")
    jax.clear_caches()
    assert library.LOGIT_STATS not in str(taken(x, bits, scale, targets))


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64])
def test_blocks_are_put_together(count):
    rows = jnp.arange(3.0 * count).reshape(count, 3)
    doubled, sums = in_blocks(lambda a, _, b: (2 * a, a.sum(-1) + b), rows, None, rows[:, 0])
    np.testing.assert_array_equal(doubled, 2 * rows)
    np.testing.assert_array_equal(sums, rows.sum(-1) + rows[:, 0])
