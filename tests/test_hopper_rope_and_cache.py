"""The Hopper kernel of `rope_and_cache` in JAX's GPU simulator, and XLA's path, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import e4m3
from pallas_kernels.rope_and_cache import hopper, rope_and_cache
from pallas_kernels.rope_and_cache.projections import Projections
from tests.hopper import simulate

PAGE = 64
BF16, FP32, FP8 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32), jnp.dtype(e4m3.DTYPE)


def case(
    heads, kv_heads, head_dim, starts, lengths, tokens, *, pages=FP8, parts=2, sums=FP32,
    more_rows=0, rotated_by=0, is_scaled=True, per_head=False, magnitude=1.0,
):  # fmt: skip
    """Arguments of `hopper.rope_and_cache`: pages in no order, full of random numbers."""
    rng = np.random.default_rng(heads + tokens + len(starts))
    batch, pages_each = len(starts), -(-(max(starts) + tokens) // PAGE)
    num_pages, rows = batch * pages_each + 2, batch * tokens + more_rows
    counts = Projections(heads, kv_heads, kv_heads)

    def of_each(make):
        return Projections(*map(make, counts))

    products = of_each(
        lambda n: jnp.asarray(
            rng.standard_normal((parts, rows, n, head_dim)) * magnitude, jnp.float32
        ).astype(sums)
    )
    weight_scales = of_each(lambda n: jnp.asarray(rng.uniform(0.5, 2, (n, head_dim)), jnp.float32))
    pool = rng.standard_normal((2, num_pages, PAGE, kv_heads, head_dim)).astype(pages)
    table = rng.permutation(num_pages)[: batch * pages_each].reshape(batch, pages_each)
    positions = np.array(starts)[:, None] + np.arange(tokens) + rotated_by
    scale = rng.uniform(0.25, 1, (2, kv_heads)) if per_head else np.array([0.5, 0.375])
    return (
        products, jnp.asarray(positions, jnp.int32), jnp.asarray(pool[0]), jnp.asarray(pool[1]),
        *(jnp.asarray(each, jnp.int32) for each in (table, starts, lengths)),
        weight_scales if is_scaled else None,
        *(jnp.asarray(each, jnp.float32) for each in scale),
    )  # fmt: skip


def frequencies(head_dim):
    return (500_000.0 ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def exact(parts, positions, k_pages, v_pages, table, starts, lengths, weight_scales,
          k_scale, v_scale):  # fmt: skip
    """In float64: q, and for both pools the places that are written with what they hold, not yet
    rounded."""
    batch, tokens = positions.shape
    head_dim = k_pages.shape[3]
    # Angles are float32's, as the model has them.
    angles = np.asarray(positions, np.float32)[..., None] * frequencies(head_dim)
    turns = np.exp(1j * angles.astype(np.float64))[:, :, None]

    def product(part, weight_scale):
        y = np.asarray(part, np.float64).sum(axis=0)
        y = y if weight_scale is None else y * np.asarray(weight_scale, np.float64)
        return y[: batch * tokens].reshape(batch, tokens, *part.shape[2:])

    def rotated(x):
        pairs = (x[..., : head_dim // 2] + 1j * x[..., head_dim // 2 :]) * turns
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    scales = weight_scales or (None,) * 3
    q, k, v = (product(*each) for each in zip(parts, scales, strict=True))
    q, k = rotated(q), rotated(k)
    if k_scale.ndim:
        q = q * np.repeat(np.asarray(k_scale, np.float64), q.shape[2] // len(k_scale))[:, None]
    places = {}
    for row in range(batch):
        for token in range(tokens):
            position = int(starts[row]) + token
            page = int(table[row, min(position // PAGE, table.shape[1] - 1)])
            if position < lengths[row] and page < k_pages.shape[0]:
                places[page, position % PAGE] = row, token
    divisors = [
        np.asarray(each, np.float64)[..., None] if k_pages.dtype == FP8 else 1.0
        for each in (k_scale, v_scale)
    ]
    new = [
        np.array([x[at] / by for at in places.values()])
        for x, by in zip((k, v), divisors, strict=True)
    ]
    return q, list(places), new


# Half a unit in the last place, of a number and, where numbers are subnormal, in itself.
ROUNDED = {FP8: (2.0**-4, 2.0**-10), BF16: (2.0**-8, 0.0), FP32: (2.0**-24, 0.0)}


def check(found, arguments, *, more=0.0):
    """Each number is rounded to its type, and saturated if that is float8_e4m3fn. Sums and
    rotations in float32 lose 2^-20 of the largest number, and products that are rounded on the way
    `more` of it. All other bytes of the pools stay as they were."""
    q, places, new = exact(*arguments)
    pools = arguments[2:4]
    index = tuple(np.array(places, int).reshape(-1, 2).T)

    def is_close(y, expected):
        relative, absolute = ROUNDED[y.dtype]
        lost = (2.0**-20 + more) * np.abs(expected).max(initial=0)
        expected = np.clip(expected, *((-e4m3.MAX, e4m3.MAX) if y.dtype == FP8 else (None, None)))
        np.testing.assert_allclose(
            y.astype(np.float64), expected, rtol=relative, atol=absolute + lost * (1 + relative)
        )

    is_close(np.asarray(found[0]), q)
    for pages, before, values in zip(found[1:], pools, new, strict=True):
        stored, old = np.array(pages), np.array(before)
        assert stored.dtype == old.dtype
        is_close(stored[index], values.reshape(-1, *old.shape[2:]))
        stored[index] = old[index] = 0
        bits = f"u{old.dtype.itemsize}"
        np.testing.assert_array_equal(stored.view(bits), old.view(bits))


def run(arguments, config=None):
    return simulate(
        hopper.rope_and_cache, *arguments,
        frequencies=frequencies(arguments[2].shape[3]), dtype=BF16, config=config,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "pages"),
    [
        pytest.param(8, 8, 128, FP8, id="8-8-128-fp8"),
        pytest.param(4, 2, 64, BF16, id="4-2-64-bf16"),
        pytest.param(4, 1, 128, FP32, id="4-1-128-fp32"),
        pytest.param(4, 1, 64, FP8, id="4-1-64-fp8"),
        pytest.param(16, 4, 64, FP8, id="16-4-64-fp8", marks=pytest.mark.slow),
        pytest.param(6, 2, 128, BF16, id="6-2-128-bf16", marks=pytest.mark.slow),
        pytest.param(32, 8, 128, FP8, id="32-8-128-fp8", marks=pytest.mark.slow),
        pytest.param(32, 8, 64, BF16, id="32-8-64-bf16", marks=pytest.mark.slow),
    ],
)
def test_a_token_of_each_sequence(heads, kv_heads, head_dim, pages):
    """At the first and last place of a page, beyond 8192, and one that is dropped."""
    starts = [0, 63, 64, 127, 70]
    arguments = case(heads, kv_heads, head_dim, starts, [1, 64, 65, 128, 70], 1, pages=pages,
                     rotated_by=8192)  # fmt: skip
    check(run(arguments), arguments)


@pytest.mark.slow
@pytest.mark.parametrize("pages", [BF16, pytest.param(FP8, marks=pytest.mark.slow)])
def test_several_tokens_across_pages_of_which_some_are_dropped(pages):
    arguments = case(4, 2, 64, [62, 0, 126, 5], [66, 3, 127, 5], 4, pages=pages, parts=1)
    check(run(arguments), arguments)


@pytest.mark.slow
def test_each_head_has_its_own_scale():
    """Two heads of q for each of keys, in one tile; more rows than tokens."""
    arguments = case(8, 4, 64, [3, 9], [4, 10], 1, per_head=True, more_rows=3)
    check(run(arguments), arguments)


@pytest.mark.slow
def test_one_kv_head_with_its_own_scale():
    arguments = case(4, 1, 128, [3], [4], 1, per_head=True, parts=3)
    check(run(arguments), arguments)


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_a_chunk_of_a_prompt(head_dim):
    """A thread block has all heads of a token: more tiles than are read at once."""
    arguments = case(8, 2, head_dim, [60], [65], 7, parts=1, sums=BF16, is_scaled=False)
    check(run(arguments, hopper.Config(heads=1, is_by_token=True)), arguments)


@pytest.mark.slow
def test_large_keys_saturate():
    arguments = case(2, 1, 64, [1], [2], 1, parts=1, magnitude=1000.0)
    found = run(arguments)
    check(found, arguments)
    assert np.abs(np.asarray(found[1], np.float32)).max() == e4m3.MAX


def test_pages_that_the_pool_lacks_are_not_written():
    arguments = list(case(2, 1, 64, [1, 64], [2, 65], 1, parts=1))
    num_pages = arguments[2].shape[0]
    arguments[4] = arguments[4].at[0].set(num_pages)
    check(run(arguments), arguments)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("pages", [FP8, BF16, FP32])
def test_others_agree_with_float64(implementation, pages):
    arguments = case(4, 2, 64, [62, 0, 126], [66, 3, 127], 4, pages=pages, per_head=pages == FP8,
                     more_rows=1)  # fmt: skip
    *arrays, weight_scales, k_scale, v_scale = arguments
    for dtype, more in ((BF16, 2.0**-6), (FP32, 0.0)):
        found = rope_and_cache(
            arrays[0], arrays[1], frequencies(64), *arrays[2:], weight_scales=weight_scales,
            k_scale=k_scale, v_scale=v_scale, dtype=dtype,
            implementation=implementation,
        )  # fmt: skip
        assert found[0].dtype == dtype
        check(found, arguments, more=more)


def test_what_does_not_fit_is_refused():
    parts, positions, *arrays, weight_scales, _, _ = case(4, 2, 64, [0, 1], [1, 2], 1)
    fine = {"weight_scales": weight_scales, "dtype": BF16}
    table, starts = arrays[2], arrays[3]
    few = parts._replace(k=parts.k[:, :1])
    with pytest.raises(ValueError, match=r"k \(2, 1, 2, 64\) must be \[parts, 2 or more rows"):
        rope_and_cache(few, positions, frequencies(64), *arrays, **fine)
    with pytest.raises(ValueError, match=r"frequencies must be \[32\], got \(64,\)"):
        rope_and_cache(parts, positions, frequencies(128), *arrays, **fine)
    with pytest.raises(ValueError, match="must have 2 rows"):
        rope_and_cache(
            parts, positions, frequencies(64), *arrays[:2], table[:1], starts, arrays[4], **fine
        )
    with pytest.raises(ValueError, match="must be alike"):
        rope_and_cache(
            parts, positions, frequencies(64), arrays[0], arrays[1][1:], *arrays[2:], **fine
        )
    with pytest.raises(ValueError, match=r"rope_and_cache: .*'hopper' cannot run: JAX runs on cpu"):
        rope_and_cache(parts, positions, frequencies(64), *arrays, **fine, implementation="hopper")
    with pytest.raises(ValueError, match="no implementation 'pallas'"):
        rope_and_cache(parts, positions, frequencies(64), *arrays, **fine, implementation="pallas")


def test_what_the_kernel_refuses():
    parts, _, pages, *_ = case(4, 2, 64, [0], [1], 1)
    assert hopper.refusal(parts, pages, BF16) is None
    assert "q must be bfloat16" in hopper.refusal(parts, pages, FP32)
    assert "got int8" in hopper.refusal(parts, pages.view(jnp.int8), BF16)
    assert "head_dim must be 64 or 128, got 32" in hopper.refusal(parts, pages[..., :32], BF16)
    half = parts._replace(v=parts.v.astype(jnp.float16))
    assert "got float16" in hopper.refusal(half, pages, BF16)


def test_configurations():
    def of(rows, kv_heads, parts=1):
        shape = (parts, rows, 4 * kv_heads, 128)
        q = jax.ShapeDtypeStruct(shape, BF16)
        k = jax.ShapeDtypeStruct((*shape[:2], kv_heads, 128), BF16)
        return hopper.configure(Projections(q, k, k), rows)

    assert of(1, 8, parts=11) == hopper.Config(heads=4, is_by_token=False)
    assert of(64, 8, parts=11) == hopper.Config(heads=8, is_by_token=False)
    assert of(2048, 8) == hopper.Config(heads=8, is_by_token=True)
    assert of(2048, 1) == hopper.Config(heads=1, is_by_token=True)
    parts, *_ = case(4, 2, 64, [0], [1], 1)
    assert "divide 2, got 4" in hopper.unfit(hopper.Config(4, False), parts)
