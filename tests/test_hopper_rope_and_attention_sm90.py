"""Decode attention in fewer launches, as the compiler makes it for the heads of Llama 3.1."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import e4m3
from pallas_kernels.dev import sm90
from pallas_kernels.paged_attention import hopper_decode, hopper_decode_config
from pallas_kernels.rope_and_attention import hopper
from pallas_kernels.rope_and_cache.projections import Projections
from tests.test_hopper_attention_sm90 import HEADS, arguments, check
from tests.test_hopper_rope_and_attention import BF16, frequencies

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sm90.unavailable() is not None, reason=str(sm90.unavailable())),
]
KV_DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, e4m3.DTYPE], ids=["bf16", "fp8"])
NAMES = pytest.mark.parametrize("name", ["8B-tp1", "70B-tp1", "405B-tp8"])


def in_one(name, dtype, config=None):
    heads, kv_heads, head_dim = HEADS[name]
    _, pool, _, *where, scale, _ = arguments(heads, kv_heads, head_dim, dtype)
    counts = Projections(heads, kv_heads, kv_heads)
    struct = jax.ShapeDtypeStruct
    parts = Projections(*(struct((11, 1, n, head_dim), jnp.float32) for n in counts))
    scales = Projections(*(struct((n, head_dim), jnp.float32) for n in counts))
    positions = struct((1, 1), jnp.int32)
    run = partial(
        hopper.rope_and_attention, frequencies=frequencies(128), dtype=BF16, config=config
    )
    return sm90.kernels(run, parts, positions, pool, pool, *where, scales, scale, scale)


@KV_DTYPES
@NAMES
def test_with_rotary_embedding(name, dtype):
    kernel, combine = in_one(name, dtype)
    assert hopper.NAME in kernel.name and "combine" in combine.name
    check(kernel)
    print(kernel.name, kernel.registers, kernel.shared_bytes)
    if name != "405B-tp8":  # 16 heads share keys there
        assert 2 * 256 * kernel.registers <= 65_536
        assert 2 * (kernel.shared_bytes + 1024) <= 233_472


def in_cluster(dtype):
    stages = 2
    keys = 128 if dtype == e4m3.DTYPE else 64
    return hopper_decode_config.DecodeConfig(8, None, stages, keys, dtype == e4m3.DTYPE, True)


@KV_DTYPES
@NAMES
def test_in_a_cluster(name, dtype):
    """The parts' sum takes more registers than the loop, but no second launch."""
    arrays = arguments(*HEADS[name], dtype)
    run = partial(hopper_decode.paged_attention, config=in_cluster(dtype))
    for kernel in (*sm90.kernels(run, *arrays), *in_one(name, dtype, in_cluster(dtype))):
        assert "combine" not in kernel.name and "fence.acq_rel.gpu" in kernel.ptx
        check(kernel)
        print(kernel.name, kernel.registers, kernel.shared_bytes)
