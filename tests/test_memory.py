import io
import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from llama_jax.config import PRESETS
from llama_jax.fp8 import WeightFormat
from llama_jax.kv_cache import bytes_per_token, init_cache
from llama_jax.memory import DoesNotFitError, MemoryPlan, device_memory_bytes, plan_memory
from llama_jax.model import ModelSpec, Params, abstract_params, prefill
from llama_jax.sampling import init_sampling
from llama_jax.steps import DecodeState, decode_step, prefill_step, score_step
from pallas_kernels import e4m3

CONFIG_8B = PRESETS["llama-3.1-8b"]
BF16 = jnp.dtype(jnp.bfloat16)


def fp8_formats(num_layers: int) -> dict[str, WeightFormat]:
    attention = [f"self_attn/{name}_proj" for name in "qkvo"]
    mlp = [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    return {
        f"layers_{layer}/{name}": WeightFormat("float8_e4m3fn", "row")
        for layer in range(num_layers)
        for name in attention + mlp
    }


def test_the_plan_of_an_8b_model_is_what_one_computes_by_hand() -> None:
    dense = plan_memory(ModelSpec(CONFIG_8B), 8, 4096, BF16, 512)
    assert dense.weights == 8_030_261_248 * 2  # the published number of parameters
    assert dense.kv_cache - 8 * 4096 * bytes_per_token(CONFIG_8B, BF16) < 10_000  # tables, scales
    assert bytes_per_token(CONFIG_8B, BF16) == 131072


def test_fp8_halves_what_it_stores() -> None:
    config = replace(CONFIG_8B, num_layers=1)
    dense = plan_memory(ModelSpec(config), 8, 4096, BF16, 512)
    fp8 = plan_memory(ModelSpec(config, fp8_formats(1)), 8, 4096, jnp.dtype(e4m3.DTYPE), 512)
    matrices = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    scales = 4 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    assert dense.weights - fp8.weights == matrices - scales
    assert abs(fp8.kv_cache - dense.kv_cache / 2) < 10_000


def plan(**changes: int) -> MemoryPlan:
    sizes = {"weights": 9 * 10**9, "kv_cache": 4 * 10**9, "workspace": 10**9, "limit": 16 * 10**9}
    return MemoryPlan(**(sizes | changes), max_batch_size=8, max_seq_len=4096, prefill_chunk=512)


def test_what_does_not_fit_is_refused_with_sizes_and_advice() -> None:
    plan().check()
    plan(limit=14 * 10**9).check()
    with pytest.raises(DoesNotFitError) as error:
        plan(limit=14 * 10**9 - 1).check()
    message = str(error.value)
    for part in ("14.0 GB needed", "9.0 GB", "4.0 GB", "max_batch_size (8)", "max_seq_len (4096)"):
        assert part in message
    assert isinstance(error.value, MemoryError)
    with pytest.raises(DoesNotFitError, match=r"lower prefill_chunk \(512\)"):
        plan(workspace=10**12).check()
    with pytest.raises(DoesNotFitError, match="shard over more devices"):
        plan(weights=10**12, kv_cache=0).check()


def test_the_table_shows_every_part() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(plan())
    text = console.export_text()
    for part in ("9.0 GB", "4.0 GB", "1.0 GB", "14.0 GB", "16.0 GB", "8 x 4096 tokens"):
        assert part in text


def test_a_cpu_device_has_a_part_of_the_memory_that_is_available() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < device_memory_bytes() <= total


def small_8b(is_fp8: bool) -> ModelSpec:
    config = replace(
        CONFIG_8B, num_layers=6, hidden_size=1024, intermediate_size=3584, num_heads=8,
        num_kv_heads=2, vocab_size=16384,
    )  # fmt: skip
    return ModelSpec(config, fp8_formats(config.num_layers) if is_fp8 else {})


def stored(spec: ModelSpec) -> Params:
    """The parameters as they lie on a CPU."""
    return jax.tree.map(
        lambda leaf: ints(leaf.shape, jnp.int8) if leaf.dtype == e4m3.DTYPE else leaf,
        abstract_params(spec),
    )


@pytest.mark.parametrize("is_fp8", [True, False])
def test_the_workspace_holds_what_compiled_prefill_needs(is_fp8: bool) -> None:
    spec, batch, chunk, length = small_8b(is_fp8), 4, 256, 1024
    cache = jax.eval_shape(lambda: init_cache(spec.config, batch, length))
    step = prefill.lower(stored(spec), cache, ints((batch, chunk)), ints((batch,)), spec=spec)
    needed = step.compile().memory_analysis().temp_size_in_bytes
    estimate = plan_memory(spec, batch, length, BF16, chunk).workspace
    assert needed <= estimate <= 5 * needed


@pytest.mark.slow
@pytest.mark.parametrize("is_fp8", [True, False])
@pytest.mark.parametrize(("batch", "chunk"), [(4, 256), (16, 1)])
def test_the_workspace_holds_what_the_steps_and_the_sampler_need(
    is_fp8: bool, batch: int, chunk: int
) -> None:
    spec, length = small_8b(is_fp8), 1024
    vocab = spec.config.vocab_size
    state = jax.eval_shape(
        lambda: DecodeState(
            init_cache(spec.config, batch, length),
            init_sampling(batch, vocab),
            jnp.zeros(batch, jnp.int32),
        )
    )
    params = stored(spec)
    tokens, rows, flags = ints((batch, chunk)), ints((batch,)), ints((batch,), jnp.bool_)
    lowered = (
        prefill_step.lower(params, state, tokens, rows, rows, flags, spec=spec),
        decode_step.lower(params, state, flags, spec=spec),
        score_step.lower(params, state, tokens, tokens, rows, rows, spec=spec),
    )
    needed = max(step.compile().memory_analysis().temp_size_in_bytes for step in lowered)
    needed += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.sampling))
    assert plan_memory(spec, batch, length, BF16, chunk).workspace >= needed


def ints(shape: tuple[int, ...], dtype: jnp.dtype = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
