"""The Hopper attention kernels as the compiler makes them, for the heads of Llama 3.1 models."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import e4m3
from pallas_kernels.dev import sm90
from pallas_kernels.dev.shapes import heads
from pallas_kernels.hopper import SHARED_MEMORY_BYTES
from pallas_kernels.paged_attention import hopper, paged_attention

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sm90.unavailable() is not None, reason=str(sm90.unavailable())),
]

HEADS = {
    f"{each.model}-tp{each.tensor_parallel}": (each.num_heads, each.num_kv_heads, each.head_dim)
    for each in heads()
}
KV_DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, e4m3.DTYPE], ids=["bf16", "fp8"])


def arguments(heads, kv_heads, head_dim, dtype, *, batch=1, tokens=1, capacity=8192):
    struct = jax.ShapeDtypeStruct
    pages = capacity // 64
    pool = struct((batch * pages, 64, kv_heads, head_dim), dtype)
    q = struct((batch, tokens, heads, head_dim), jnp.bfloat16)
    row, scale = struct((batch,), jnp.int32), struct((), jnp.float32)
    return q, pool, pool, struct((batch, pages), jnp.int32), row, row, scale, scale


def check(kernel):
    if "combine" not in kernel.name:
        assert kernel.count("HGMMA") and kernel.count("UTMALDG")
    assert not kernel.count("HMMA")
    assert kernel.spill_bytes == kernel.count("LDL") == kernel.count("STL") == 0
    assert kernel.shared_bytes <= SHARED_MEMORY_BYTES
    assert not kernel.losses


@KV_DTYPES
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS.keys())
def test_prefill_is_on_tensor_cores_without_spills(shape, dtype):
    (kernel,) = sm90.kernels(hopper.paged_attention, *arguments(*shape, dtype, tokens=2048))
    assert "paged_attention_prefill" in kernel.name
    check(kernel)


@KV_DTYPES
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS.keys())
def test_decode_is_on_tensor_cores_and_two_share_an_sm(shape, dtype):
    attend, combine = sm90.kernels(hopper.paged_attention, *arguments(*shape, dtype))
    assert "paged_attention_decode" in attend.name and "paged_attention_combine" in combine.name
    check(attend)
    check(combine)
    assert 2 * 256 * attend.registers <= 65_536
    assert 2 * (attend.shared_bytes + 1024) <= 233_472


@KV_DTYPES
@pytest.mark.parametrize(("name", "tokens"), [("8B-tp1", 5), ("405B-tp8", 3), ("405B-tp8", 8)])
def test_several_tokens_for_each_sequence(name, tokens, dtype):
    arrays = arguments(*HEADS[name], dtype, batch=32, tokens=tokens)
    for kernel in sm90.kernels(hopper.paged_attention, *arrays):
        check(kernel)


@KV_DTYPES
def test_the_best_implementation_is_the_kernel_and_reads_the_pool_in_place(dtype):
    arrays = arguments(*HEADS["8B-tp1"], dtype, batch=16)

    def attend(q, k, v, table, starts, lengths, k_scale, v_scale):
        return paged_attention(
            q, k, v, table, starts, lengths, k_scale=k_scale, v_scale=v_scale
        )  # fmt: skip

    compiled = sm90.compile(attend, *arrays)
    assert "mosaic_gpu" in compiled.as_text()
    pool = arrays[1].size * arrays[1].dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < pool / 100


@pytest.mark.parametrize("is_batch_invariant", [False, True], ids=["", "invariant"])
def test_a_decode_step_takes_two_launches(is_batch_invariant):
    """The parts, and their sum."""
    arrays = arguments(*HEADS["8B-tp1"], jnp.bfloat16, capacity=32_768)
    run = partial(hopper.paged_attention, is_batch_invariant=is_batch_invariant)
    text = sm90.compile(run, *arrays).as_text()
    launches = re.findall(r"= \S.* (?:fusion|custom-call|copy)\(", text[text.index("ENTRY") :])
    assert len(launches) == 2
