"""What the simulator does not see: whether Mosaic GPU takes the kernels' tiles for an H200."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from llama_jax.engine.paths import programs
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.model.spec import ModelSpec
from pallas_kernels import e4m3
from pallas_kernels.dev import sm90
from pallas_kernels.fp8_matmul import hopper, hopper_weight_only, hopper_weight_only_config
from pallas_kernels.paged_attention import hopper as attention
from tests import tiny
from tests.hopper import lower

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
ROWS = (1, 7, 9, 25, 64, 65, 130)
# Of the weight, [n, k], what kernels take at least, and what no tile divides.
NARROWEST, RAGGED = (16, 128), (144, 384)
ODD = EngineOptions(max_batch_size=3, max_seq_len=100)
# Shapes that the kernels take.
FITTING = tiny.config(hidden_size=256, intermediate_size=384, num_layers=1, num_heads=4,
                      num_kv_heads=2, head_dim=64, vocab_size=512, dtype="bfloat16")  # fmt: skip


def arrays(m, n, k, *, blocks=False, x_grouped=False):
    """x, weight, weight_scale, x_scale."""
    struct = jax.ShapeDtypeStruct
    weight_scale = (-(-n // 128), k // 128) if blocks else (n,)
    x_scale = (m, k // 128) if x_grouped else (m, 1)
    codes = struct((m, k), e4m3.DTYPE), struct((n, k), e4m3.DTYPE)
    return *codes, struct(weight_scale, F32), struct(x_scale, F32)


def of_matmul(m, n, k, **scales):
    residual = jax.ShapeDtypeStruct((m, n), BF16)
    operands = *arrays(m, n, k, **scales), residual
    assert hopper.refusal(*operands[:3], BF16, residual) is None
    return lambda *a: hopper.fp8_matmul(*a[:4], BF16, a[4]), operands


def of_logits(m, n, k):
    operands = arrays(m, n, k)
    assert hopper.refusal(*operands[:3], F32) is None
    return lambda *a: hopper.fp8_matmul(*a, F32), operands


def of_swiglu(m, n, k, **scales):
    x, weight, scale, x_scale = arrays(m, n, k, **scales)
    assert hopper.refusal(x, weight, scale, None) is None
    return hopper.swiglu, (x, weight, scale, weight, scale, x_scale)


def of_weight_only(m, n, k, **scales):
    _, weight, scale, _ = arrays(m, n, k, **scales)
    x = jax.ShapeDtypeStruct((m, k), BF16)
    assert hopper_weight_only.refusal(x, weight, scale, BF16) is None
    config = replace(hopper_weight_only_config.configure(m, (n, n), k), in_fp8=m % 2 == 1)
    run = partial(hopper_weight_only.fp8_matmuls, out_dtype=BF16, config=config)
    return lambda x, w, s: run(x, (w, w), (s, s)), (x, weight, scale)


def of_attention(tokens, heads, kv_heads, head_dim, dtype):
    struct = jax.ShapeDtypeStruct
    pool, q = struct((8, 64, kv_heads, head_dim), dtype), struct((3, tokens, heads, head_dim), BF16)
    assert attention.refusal(q, pool) is None
    row, scale = struct((3,), jnp.int32), struct((), F32)
    run = attention.paged_attention
    return run, (q, pool, pool, struct((3, 2), jnp.int32), row, row, scale, scale)


CASES = {
    **{f"matmul-{m}": of_matmul(m, *RAGGED, blocks=m % 2 == 0, x_grouped=m > 60) for m in ROWS},
    "matmul-narrowest": of_matmul(9, *NARROWEST),
    "logits-narrowest": of_logits(9, 8, 128),
    **{f"swiglu-{m}": of_swiglu(m, 256, 384, x_grouped=m > 60) for m in ROWS},
    "swiglu-narrowest": of_swiglu(9, 128, 128, blocks=True),
    **{f"weight-only-{m}": of_weight_only(m, 160, 384, blocks=m > 60) for m in ROWS if m <= 64},
    "weight-only-narrowest": of_weight_only(9, 32, 128),
    **{
        f"attention-{tokens}-{heads}-{kv_heads}-{head_dim}-{jnp.dtype(dtype).name}": of_attention(
            tokens, heads, kv_heads, head_dim, dtype
        )
        for tokens in (1, 20, 65)
        for heads, kv_heads, head_dim, dtype in ((4, 2, 64, e4m3.DTYPE), (6, 2, 128, BF16))
    },
}
EVERY_CASE = pytest.mark.parametrize(("run", "operands"), CASES.values(), ids=CASES.keys())


@EVERY_CASE
def test_a_kernel_is_lowered(run, operands):
    lower(run, *operands)


@pytest.mark.slow
@pytest.mark.skipif(sm90.unavailable() is not None, reason=str(sm90.unavailable()))
@EVERY_CASE
def test_a_kernel_is_compiled_without_spills(run, operands):
    found = sm90.kernels(run, *operands)
    assert found and all(kernel.spill_bytes == 0 and not kernel.losses for kernel in found)


def lower_programs(call_shapes, activations):
    """Prefill of so many prompts and tokens, and decode, of the engine with odd sizes."""
    spec = ModelSpec(FITTING, tiny.fp8_formats(FITTING, input_scale=False), "bfloat16", activations)
    with jax.sharding.use_abstract_mesh(sm90.H200):
        steps = [
            programs(spec, replace(ODD, prefill_chunk=tokens), "fp8", prompts)[0]
            for prompts, tokens in call_shapes
        ]
        steps.append(programs(spec, ODD, "fp8")[1])
    for step in steps:
        assert "mosaic_gpu" in lower(step.function, *step.arguments).as_text()


@pytest.mark.slow
def test_an_engine_of_odd_sizes_is_lowered():
    assert (3, 25) in ODD.call_shapes
    lower_programs([(3, 25)], "dynamic")


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["dynamic", "bf16"])
def test_every_program_of_an_engine_of_odd_sizes_is_lowered(activations):
    lower_programs(ODD.call_shapes, activations)
