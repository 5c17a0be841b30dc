import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import e4m3
from pallas_kernels.paged_attention import paged_attention as unjitted
from pallas_kernels.rope_and_cache.xla import write_pages
from tests.pairs import every_pair

paged_attention = jax.jit(unjitted, static_argnames="implementation")

PAGE = 16


def case(batch, tokens, heads, kv_heads, lengths, pages_each, dtype=jnp.float32, head_dim=8):
    """Random pages in a shuffled table, and queries for each row's last `tokens` positions."""
    keys = jax.random.split(jax.random.key(len(lengths) + tokens), 4)
    num_pages = batch * pages_each + 3
    pool = (num_pages, PAGE, kv_heads, head_dim)
    k, v = (jax.random.normal(key, pool) for key in keys[:2])
    if dtype == jnp.int8:
        k, v = (e4m3.as_bits(e4m3.cast(a)) for a in (k, v))
    table = jax.random.permutation(keys[2], num_pages)[: batch * pages_each]
    lengths = jnp.array(lengths, jnp.int32)
    q = jax.random.normal(keys[3], (batch, tokens, heads, head_dim))
    starts = jnp.maximum(lengths - tokens, 0)
    return q, k.astype(dtype), v.astype(dtype), table.reshape(batch, -1), starts, lengths


def exact(q, k_pages, v_pages, table, starts, lengths, k_scale=1.0, v_scale=1.0):
    """One query at a time in float64 numpy."""
    q = np.asarray(q, np.float64)
    table, starts, lengths = map(np.asarray, (table, starts, lengths))
    k_pages, v_pages = (
        np.asarray(e4m3.load(a) if a.dtype == jnp.int8 else a, np.float64)
        for a in (k_pages, v_pages)
    )
    out = np.zeros_like(q)
    batch, tokens, heads, head_dim = q.shape
    group = heads // k_pages.shape[2]
    for b in range(batch):
        k = np.concatenate([k_pages[p] for p in table[b]]) * k_scale
        v = np.concatenate([v_pages[p] for p in table[b]]) * v_scale
        for t in range(tokens):
            seen = min(int(starts[b]) + t + 1, int(lengths[b]))
            for h in range(heads):
                scores = k[:seen, h // group] @ q[b, t, h] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ v[:seen, h // group] / weights.sum()
    return out


@pytest.mark.parametrize(
    ("implementation", "heads", "dtype", "rows"),
    every_pair(
        ("reference", "xla"), ((4, 4), (8, 2), (8, 1)), (jnp.float32, jnp.bfloat16, jnp.int8),
        ((1, [600, 1, 16], 40), (5, [5, 16, 300], 20)),
    ),
)  # fmt: skip
def test_against_float64(implementation, heads, dtype, rows):
    tokens, lengths, pages = rows
    arrays = case(len(lengths), tokens, *heads, lengths, pages, dtype)
    y = paged_attention(*arrays, implementation=implementation)
    np.testing.assert_allclose(y, exact(*arrays), atol=2e-6)


def test_scales_of_fp8_pages():
    arrays = case(2, 3, 4, 2, [30, 3], 4, jnp.int8)
    y = paged_attention(*arrays, k_scale=0.25, v_scale=3.0)
    np.testing.assert_allclose(y, exact(*arrays, 0.25, 3.0), atol=1e-5)


def test_large_scores_do_not_overflow():
    q, k, v, *where = case(2, 2, 4, 2, [40, 7], 4)
    arrays = (q * 1e4, k, v, *where)
    np.testing.assert_allclose(paged_attention(*arrays), exact(*arrays), atol=1e-4)


def test_a_row_is_bit_equal_next_to_a_longer_one():
    q, k, v, table, starts, lengths = case(2, 1, 4, 2, [70, 1200], 80)
    alone = lengths.at[1].set(1), starts.at[1].set(0)
    together = paged_attention(q, k, v, table, starts, lengths)
    short = paged_attention(q, k, v, table, alone[1], alone[0])
    np.testing.assert_array_equal(together[0], short[0])


def test_empty_rows_stay_finite():
    q, k, v, table, starts, _ = case(2, 3, 4, 2, [3, 3], 2)
    y = paged_attention(q, k, v, table, starts * 0, jnp.array([0, 3]))
    assert bool(jnp.isfinite(y).all())


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, *where = case(2, 1, 4, 2, [3, 3], 2)
    with pytest.raises(ValueError, match="does not fit pages"):
        paged_attention(q[:, :, :3], k, v, *where)
    with pytest.raises(ValueError, match="must have 2 rows"):
        paged_attention(q, k, v, where[0][:1], *where[1:])


def test_writing_drops_padding_and_keeps_the_rest():
    pages = jnp.zeros((6, PAGE, 1, 2))
    table = jnp.array([[5, 0], [2, 3]])
    new = jnp.arange(2 * 4 * 2, dtype=jnp.float32).reshape(2, 4, 1, 2) + 1
    starts, lengths = jnp.array([14, 0]), jnp.array([17, 0])
    written = write_pages(pages, new, table, starts, lengths, 1.0)
    expected = np.zeros_like(pages)
    expected[5, 14:16] = new[0, :2]
    expected[0, 0] = new[0, 2]
    np.testing.assert_array_equal(written, expected)


def test_fp8_pages_saturate():
    pages = jnp.zeros((1, PAGE, 1, 2), jnp.int8)
    new = jnp.array([1000.0, -3.0]).reshape(1, 1, 1, 2)
    written = write_pages(pages, new, jnp.array([[0]]), jnp.array([0]), jnp.array([1]), 2.0)
    np.testing.assert_array_equal(e4m3.load(written)[0, 0, 0], [448.0, -1.5])
