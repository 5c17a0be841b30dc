"""The Hopper attention kernels in JAX's GPU simulator, against float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import e4m3
from pallas_kernels.paged_attention import (
    choose,
    hopper,
    hopper_decode,
    hopper_decode_config,
    hopper_prefill,
    paged_attention,
)
from tests.hopper import simulate
from tests.test_paged_attention import exact

PAGE = 64
SMALL_PREFILL = hopper_prefill.PrefillConfig(keys=64, stages=2)
BF16, FP8 = jnp.bfloat16, e4m3.DTYPE
HEAD_SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype"),
    [
        pytest.param(1, 1, 128, BF16, id="1-1-128-bf16", marks=pytest.mark.slow),
        pytest.param(4, 1, 64, FP8, id="4-1-64-fp8"),
        pytest.param(6, 2, 64, BF16, id="6-2-64-bf16", marks=pytest.mark.slow),
        pytest.param(8, 1, 128, FP8, id="8-1-128-fp8", marks=pytest.mark.slow),
        pytest.param(16, 1, 64, BF16, id="16-1-64-bf16", marks=pytest.mark.slow),
    ],
)


def case(heads, kv_heads, tokens, starts, lengths, *, dtype=BF16, head_dim=64, magnitude=1.0):
    """Random queries, and a pool whose pages are dealt out in no order.

    Pages that hold no key of a sequence are NaN.
    """
    rng = np.random.default_rng(heads + tokens)
    batch, pages = len(lengths), -(-max(lengths) // PAGE) + 1
    num_pages = batch * pages + 2
    table = rng.permutation(num_pages)[: batch * pages].reshape(batch, pages)
    k, v = np.full((2, num_pages, PAGE, kv_heads, head_dim), np.nan, np.float32)
    for row, length in zip(table, lengths, strict=True):
        used = row[: -(-length // PAGE)]
        k[used], v[used] = rng.standard_normal((2, len(used), *k.shape[1:]))
    q = rng.standard_normal((batch, tokens, heads, head_dim)) * magnitude
    arrays = q.astype(BF16), k.astype(dtype), v.astype(dtype)
    return *map(jnp.asarray, arrays), *(jnp.array(a, jnp.int32) for a in (table, starts, lengths))


def pool(dtype):
    return jax.ShapeDtypeStruct((8, PAGE, 8, 128), dtype)


def check(y, arrays, k_scale=1.0, v_scale=1.0):
    """Against float64, where a query is a token of its sequence.

    Weights are rounded to 16 bits before they meet the values, and so is the mean of the values:
    at most 2^-9 of the largest value, twice.
    """
    q, k, v, table, starts, lengths = map(np.asarray, arrays)
    y = np.asarray(y, np.float32)
    assert np.isfinite(y).all()
    rows = lengths > 0
    expected = exact(q[rows], k, v, table[rows], starts[rows], lengths[rows], k_scale, v_scale)
    is_token = (starts[:, None] + np.arange(q.shape[1]) < lengths[:, None])[rows]
    bound = 2**-8 * np.nanmax(np.abs(v.astype(np.float32))) * v_scale
    np.testing.assert_allclose(y[rows][is_token], expected[is_token], atol=bound, rtol=0)


def prefill(arrays, k_scale=1.0, v_scale=1.0, config=SMALL_PREFILL, in_fp8=None):
    in_fp8 = arrays[1].dtype == FP8 if in_fp8 is None else in_fp8
    config = replace(config, in_fp8=in_fp8)
    return simulate(hopper_prefill.paged_attention, *arrays, k_scale, v_scale, config=config)


def decode(
    arrays, k_scale=1.0, v_scale=1.0, splits=2, keys_per_split=None, keys=64, in_fp8=None,
    in_cluster=False,
):  # fmt: skip
    in_fp8 = arrays[1].dtype == FP8 if in_fp8 is None else in_fp8
    config = hopper_decode_config.DecodeConfig(
        splits, keys_per_split, 2, keys, in_fp8, in_cluster
    )  # fmt: skip
    return simulate(hopper_decode.paged_attention, *arrays, k_scale, v_scale, config=config)


@pytest.mark.slow
@HEAD_SHAPES
def test_prefill_of_every_head_shape(heads, kv_heads, head_dim, dtype):
    arrays = case(heads, kv_heads, 20, [50], [70], dtype=dtype, head_dim=head_dim)
    check(prefill(arrays, 0.5, 2.0), arrays, 0.5, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "keys", "stages"),
    [(BF16, 128, 2), pytest.param(FP8, 64, 3, marks=pytest.mark.slow), (FP8, 128, 3)],
)
def test_prefill_in_tiles_of_several_blocks(dtype, keys, stages):
    arrays = case(4, 1, 70, [330, 0], [400, 70], dtype=dtype)
    config = hopper_prefill.PrefillConfig(keys, stages)
    check(prefill(arrays, 0.5, 2.0, config=config), arrays, 0.5, 2.0)


@pytest.mark.slow
def test_prefill_with_keys_upcast():
    arrays = case(4, 1, 20, [130, 0], [150, 20], dtype=FP8)
    check(prefill(arrays, 0.5, 2.0, in_fp8=False), arrays, 0.5, 2.0)


@pytest.mark.parametrize(
    "dtype", [BF16, pytest.param(FP8, marks=pytest.mark.slow)], ids=["bf16", "fp8"]
)
def test_prefill_at_the_edges_of_pages(dtype):
    lengths = [0, 1, 63, 64, 65, 200]
    starts = [0, 0, 54, 0, 60, 190]
    arrays = case(8, 1, 10, starts, lengths, dtype=dtype)
    check(prefill(arrays, v_scale=8.0), arrays, v_scale=8.0)


@HEAD_SHAPES
def test_decode_of_every_head_shape(heads, kv_heads, head_dim, dtype):
    arrays = case(heads, kv_heads, 1, [299], [300], dtype=dtype, head_dim=head_dim)
    check(decode(arrays, 0.5, 2.0), arrays, 0.5, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "tokens"),
    [pytest.param(4, 5, marks=pytest.mark.slow), (16, 5)],
    ids=["one-tile-of-24", "two-tiles-of-40"],
)
def test_decode_of_several_tokens(heads, tokens):
    lengths = [200, 129, tokens]
    arrays = case(heads, 1, tokens, [n - tokens for n in lengths], lengths)
    check(decode(arrays), arrays)


@pytest.mark.parametrize(
    ("dtype", "keys_per_split", "keys"),
    [
        pytest.param(BF16, None, 64, marks=pytest.mark.slow),
        pytest.param(BF16, None, 128, marks=pytest.mark.slow),
        pytest.param(FP8, None, 64, marks=pytest.mark.slow),
        (FP8, 128, 128),
    ],
    ids=["bf16-even", "bf16-even-two-pages", "fp8-even", "fp8-fixed-two-pages"],
)
def test_decode_at_the_edges_of_pages_and_splits(dtype, keys_per_split, keys):
    lengths = [0, 1, 63, 64, 65, 128, 129, 257]
    arrays = case(4, 1, 1, [max(n - 1, 0) for n in lengths], lengths, dtype=dtype)
    check(decode(arrays, splits=3, keys_per_split=keys_per_split, keys=keys), arrays)


@pytest.mark.parametrize("dtype", [pytest.param(BF16, marks=pytest.mark.slow), FP8], ids=str)
@pytest.mark.parametrize("tokens", [1, pytest.param(13, marks=pytest.mark.slow)])
def test_decode_in_one_launch(dtype, tokens):
    """Of keys that are not split."""
    lengths = [200, tokens, 0]
    arrays = case(4, 1, tokens, [max(n - tokens, 0) for n in lengths], lengths, dtype=dtype)
    check(decode(arrays, 0.5, 8.0, splits=1), arrays, 0.5, 8.0)


@pytest.mark.parametrize(
    ("heads", "tokens", "dtype", "splits"),
    [
        (4, 1, FP8, 3),
        pytest.param(4, 1, BF16, 4, marks=pytest.mark.slow),
        pytest.param(16, 5, BF16, 2, marks=pytest.mark.slow),
        pytest.param(8, 2, FP8, 2, marks=pytest.mark.slow),
    ],
)
def test_a_cluster_adds_its_parts_as_a_second_launch_does(heads, tokens, dtype, splits):
    """With as few keys as leave some blocks of the cluster without any."""
    lengths = [200, tokens, 0]
    arrays = case(heads, 1, tokens, [max(n - tokens, 0) for n in lengths], lengths, dtype=dtype)
    y = decode(arrays, 0.5, 8.0, splits, in_cluster=True)
    check(y, arrays, 0.5, 8.0)
    np.testing.assert_array_equal(y[:2], decode(arrays, 0.5, 8.0, splits)[:2])


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 2])
def test_decode_with_keys_upcast(splits):
    arrays = case(4, 1, 2, [299], [301], dtype=FP8)
    check(decode(arrays, 0.5, 2.0, splits=splits, in_fp8=False), arrays, 0.5, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("run", [prefill, decode])
def test_extreme_scores_do_not_overflow(run):
    arrays = case(4, 1, 2, [126, 0], [128, 2], magnitude=1e6)
    check(run(arrays), arrays)


@pytest.mark.slow
@pytest.mark.parametrize("run", [prefill, decode])
def test_equal_scores_make_an_exact_mean(run):
    _, k, v, *where = case(4, 1, 1, [63], [64])
    v = jnp.round(jnp.nan_to_num(v) * 4)
    mean = jnp.mean(v[where[0][0, 0], :, 0].astype(jnp.float32), axis=0)
    y = run((jnp.zeros((1, 1, 4, 64), BF16), k, v, *where))
    np.testing.assert_array_equal(y[0, 0], jnp.tile(mean.astype(BF16), (4, 1)))


def test_batch_invariant_rows_are_bit_equal_alone():
    arrays = case(4, 1, 1, [299, 10, 120], [300, 11, 121])
    q, k, v, *where = arrays

    def run(rows):
        return simulate(
            hopper.paged_attention, q[rows], k, v, *(a[rows] for a in where), 1.0, 1.0,
            is_batch_invariant=True,
        )  # fmt: skip

    np.testing.assert_array_equal(run(slice(0, 1))[0], run(slice(0, 3))[0])


@pytest.mark.slow
def test_prefill_rows_are_bit_equal_alone():
    q, k, v, *where = case(4, 1, 9, [120, 1, 55], [129, 10, 64])
    together = prefill((q, k, v, *where))
    alone = prefill((q[:1], k, v, *(a[:1] for a in where)))
    np.testing.assert_array_equal(together[0], alone[0])


@pytest.mark.parametrize(("tokens", "kernel"), [(8, "decode"), (9, "prefill")])
def test_the_number_of_tokens_picks_the_kernel(tokens, kernel):
    arrays = case(4, 1, tokens, [0], [tokens])
    run = jax.make_jaxpr(lambda *a: hopper.paged_attention(*a, 1.0, 1.0))
    assert f"paged_attention_{kernel}" in str(run(*arrays))


def test_heuristic_keeps_every_sm_busy():
    """Thread blocks in whole waves of two for each of 132 SMs, or nearly."""
    for batch in range(1, 65):
        q = jax.ShapeDtypeStruct((batch, 1, 32, 128), BF16)
        config = hopper_decode_config.heuristic(q, pool(BF16), 32_768, False)
        blocks = batch * 8 * config.splits
        assert blocks / (264 * -(-blocks // 264)) > 0.8, batch
        assert config.splits <= hopper_decode_config.MAX_SPLITS


@pytest.mark.parametrize("dtype", [BF16, FP8], ids=["bf16", "fp8"])
def test_invariant_splits_depend_on_the_capacity_alone(dtype):
    for capacity in (64, 1024, 1088, 131_072):
        configs = {
            hopper_decode_config.heuristic(
                jax.ShapeDtypeStruct((batch, 1, 32, 128), BF16), pool(dtype), capacity, True
            )
            for batch in range(1, 65)
        }
        (config,) = configs
        assert config.splits * config.keys_per_split >= capacity
        assert config.splits <= hopper_decode_config.MAX_SPLITS


def test_what_has_no_kernel_is_named():
    q, k, *_ = case(4, 1, 1, [3], [4])
    refused = {
        "q must be bfloat16, got float32": (q.astype(jnp.float32), k),
        "pages must be bfloat16 or float8_e4m3fn, got int8": (q, k.astype(jnp.int8)),
        "head_dim must be 64 or 128, got 32": (q[..., :32], k[..., :32]),
        "pages must hold 64 tokens, got 32": (q, k[:, :32]),
    }
    for reason, arrays in refused.items():
        assert hopper.refusal(*arrays) == reason


def test_without_a_hopper_gpu_another_kernel_runs_and_hopper_says_why():
    q, k, v, *where = case(4, 1, 1, [3], [4])
    choice = choose(q, k)
    assert choice.kernel.name in ("cpu", "xla")
    assert choice.refusals[0] == ("hopper", "JAX runs on cpu, not on a GPU")
    with pytest.raises(ValueError, match="JAX runs on cpu, not on a GPU"):
        paged_attention(q, k, v, *where, implementation="hopper")
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        paged_attention(q, k, v, *where, implementation="triton")


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [((12, 6, 85), False), ((12, 8, 61), True), ((12, 9, 41), True), ((12, 9, 86), False)],
)
def test_a_ptxas_that_miscompiles_is_refused(monkeypatch, version, is_refused):
    monkeypatch.setattr(hopper, "_ptxas_version", lambda: version)
    q, k, v, *where = case(4, 1, 1, [3], [4])
    h200 = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=h200)):
        assert choose(q, k).kernel.name == ("xla" if is_refused else "hopper")
        if is_refused:
            with pytest.raises(ValueError, match="miscompiles it: update CUDA"):
                paged_attention(q, k, v, *where, implementation="hopper")
