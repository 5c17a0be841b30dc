"""Rotary embedding, the write into the cache and decode attention in one launch on Hopper, in JAX's
GPU simulator: against float64, and bit for bit against two launches."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuned
from pallas_kernels.dev import sm90
from pallas_kernels.paged_attention import hopper_decode
from pallas_kernels.paged_attention.hopper_decode_config import DecodeConfig
from pallas_kernels.rope_and_attention import hopper, why_not
from pallas_kernels.rope_and_cache import hopper as rope
from tests import test_hopper_attention, test_hopper_rope_and_cache
from tests.hopper import simulate
from tests.test_hopper_rope_and_cache import BF16, FP8, FP32, PAGE, exact, frequencies

# At the first and last place of a page, at position 0, of a page or two more, and in no slot.
STARTS, LENGTHS = [0, 63, 64, 130, 70], [1, 64, 65, 131, 70]


def case(heads, kv_heads, starts, lengths, **options):
    """Arguments as of `rope_and_cache`, where the places of new tokens are NaN before."""
    arguments = list(
        test_hopper_rope_and_cache.case(heads, kv_heads, 128, starts, lengths, 1, **options)
    )
    _, places, _ = exact(*arguments)
    index = tuple(np.array(places, int).reshape(-1, 2).T)
    arguments[2:4] = (each.at[index].set(jnp.nan) for each in arguments[2:4])
    return tuple(arguments)


def config_of(arguments, splits=2, keys=64, keys_per_split=None):
    return DecodeConfig(splits, keys_per_split, 2, keys, arguments[2].dtype == FP8)


def in_one(arguments, **config):
    return simulate(
        hopper.rope_and_attention, *arguments, frequencies=frequencies(128), dtype=BF16,
        config=config_of(arguments, **config),
    )  # fmt: skip


def in_two(arguments, **config):
    *_, k_scale, v_scale = arguments
    q, k, v = simulate(
        rope.rope_and_cache, *arguments, frequencies=frequencies(128), dtype=BF16
    )  # fmt: skip
    y = simulate(
        hopper_decode.paged_attention, q, k, v, *arguments[4:7],
        k_scale, v_scale, config=config_of(arguments, **config),
    )  # fmt: skip
    return y, k, v


def check(found, arguments):
    """The pages as `rope_and_cache` leaves them, and attention over them, against float64."""
    y, k_pages, v_pages = found
    *_, table, starts, lengths, _, k_scale, v_scale = arguments
    q = jnp.asarray(exact(*arguments)[0], BF16)
    test_hopper_rope_and_cache.check((q, k_pages, v_pages), arguments)
    arrays = q, k_pages, v_pages, table, starts, lengths
    test_hopper_attention.check(y, arrays, float(k_scale), float(v_scale))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "pages", "config"),
    [
        pytest.param(4, 1, FP8, {"keys": 128}, id="4-1-fp8"),
        pytest.param(8, 1, BF16, {}, id="8-1-bf16"),
        pytest.param(8, 2, BF16, {"splits": 1}, id="8-2-bf16", marks=pytest.mark.slow),
        pytest.param(8, 1, FP8, {"splits": 1, "keys": 128}, id="8-1-fp8", marks=pytest.mark.slow),
        pytest.param(16, 1, FP8, {}, id="16-1-fp8", marks=pytest.mark.slow),
        pytest.param(16, 1, BF16, {}, id="16-1-bf16", marks=pytest.mark.slow),
        pytest.param(32, 8, FP8, {}, id="32-8-fp8", marks=pytest.mark.slow),
        pytest.param(
            4, 1, FP8, {"splits": 3, "keys_per_split": 64}, id="4-1-fp8-invariant",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_one_launch_is_bit_equal_to_two(heads, kv_heads, pages, config):
    arguments = case(heads, kv_heads, STARTS, LENGTHS, pages=pages, rotated_by=8192)
    found = in_one(arguments, **config)
    check(found, arguments)
    active = np.array(STARTS) < np.array(LENGTHS)
    for one, two in zip(found, in_two(arguments, **config), strict=True):
        one, two = (np.asarray(each[active] if each.shape[1] == 1 else each) for each in (one, two))
        bits = f"u{one.dtype.itemsize}"
        np.testing.assert_array_equal(one.view(bits), two.view(bits))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 64])
def test_other_batches(batch):
    starts = np.random.default_rng(batch).integers(0, 140, batch)
    arguments = case(4, 1, starts.tolist(), (starts + 1).tolist(), more_rows=2)
    check(in_one(arguments), arguments)


@pytest.mark.slow
def test_bfloat16_products():
    arguments = case(8, 2, [70, 3], [71, 4], parts=1, sums=BF16, is_scaled=False)
    check(in_one(arguments), arguments)


def test_what_the_kernel_refuses():
    parts, _, pages, *_ = case(8, 2, [0], [1])

    def of(parts=parts, pages=pages, tokens=1, dtype=BF16):
        return hopper.refusal(parts, pages, tokens, dtype)

    assert of() is None
    assert of(tokens=2) == "each sequence must have one new token, got 2"
    assert "q must be bfloat16" in of(dtype=FP32)
    assert "pages must be bfloat16 or float8_e4m3fn" in of(pages=pages.astype(FP32))
    narrow = type(parts)(*(each[..., :64] for each in parts))
    assert of(narrow, pages[..., :64]) == "head_dim must be 128, got 64"
    few = parts._replace(q=parts.q[:, :, :6])
    assert of(few) == "4 heads, or a multiple of 8 up to 48, must share keys, got 3"


def test_it_is_taken_only_where_it_was_measured_to_be_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "read", cache(tuned.read.__wrapped__))
    parts, _, pages, _, table, *_ = case(8, 2, [0], [1])
    operands = parts, pages, table, 1, BF16
    assert why_not(*operands) == "JAX runs on cpu, not on a GPU"
    problem = f"heads=8/2x128 float8_e4m3fn tokens=1 batch<=1 capacity<={PAGE}"
    with jax.sharding.use_abstract_mesh(sm90.H200):
        for in_one, expected in (
            (None, "one launch has not been measured to be faster than two"),
            (False, "one launch has not been measured to be faster than two"),
            (True, None),
        ):
            if in_one is not None:
                tuned.write("NVIDIA H200", hopper.NAME, problem, {"config": {"in_one": in_one}})
            assert why_not(*operands) == expected
