import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec as P

from converters.pipeline import convert
from llama_jax.checkpoint.store import read_manifest
from llama_jax.model.params import abstract_params, param_shardings
from llama_jax.model.sharding import cache_shardings, make_mesh
from llama_jax.model.spec import ModelSpec
from tests import tiny as small
from tests import tiny_checkpoints as tiny

FOUR_DEVICES = """
import sys
from dataclasses import replace
import jax, jax.numpy as jnp, numpy as np
from llama_jax.checkpoint.store import load_params, read_manifest
from llama_jax.model.kv_cache import init_cache
from llama_jax.engine.memory import plan_memory
from llama_jax.model.forward import logit_stats, prefill, unembed
from llama_jax.model.sharding import cache_shardings, make_mesh
from pallas_kernels.fp8_matmul.logits import stats_of

assert jax.device_count() == 4
for directory, split in zip(sys.argv[1:], (make_mesh(4), make_mesh(2, data=2)), strict=True):
    manifest = read_manifest(directory)
    tokens = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)
    lengths = jnp.array([10, 7], jnp.int32)
    results = []
    for mesh in (None, split):
        spec = replace(manifest.spec("float32"), mesh=mesh)
        params = load_params(directory, spec, bits=True)
        cache = init_cache(spec.config, 2, 64, jnp.float32)
        cache = jax.device_put(cache, cache_shardings(spec.config, mesh))
        logits, cache = prefill(params, cache, tokens, lengths, spec=spec)
        results.append(np.asarray(logits))
        hidden = jax.random.normal(jax.random.key(0), (7, spec.config.hidden_size))
        targets = jnp.arange(7) * spec.config.vocab_size // 7  # of each device
        logits, stats = jax.jit(
            lambda *given: (unembed(*given[:2], spec=spec), logit_stats(*given, spec=spec))
        )(params, hidden, targets)
        of_logits = stats_of(logits, targets)
        np.testing.assert_array_equal(stats.top_ids, of_logits.top_ids)
        for found, expected in zip(stats, of_logits, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
        if mesh is not None:
            model = mesh.shape["model"]
            up = params["layers_0"]["mlp"]["up_proj"]["weight"]
            assert {s.data.shape for s in up.addressable_shards} == {(160 // model, 64)}
            down = params["layers_0"]["mlp"]["down_proj"]["weight"]
            assert {s.data.shape for s in down.addressable_shards} == {(64, 160 // model)}
            held = sum(
                leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params)
            )
            plan = plan_memory(spec, 2, 64, jnp.dtype(jnp.float32), 16)
            assert plan.weights == held, (plan.weights, held)
            assert plan.devices == mesh.size
    np.testing.assert_allclose(results[1], results[0], atol=1e-4, rtol=0)
"""


def run_with_devices(count: int, script: str, *arguments: Path) -> None:
    """Run Python source in a process of its own, which sees `count` CPU devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_four_devices_hold_the_parts_and_give_the_same_logits(tmp_path: Path) -> None:
    arrays = tiny.dense()
    del arrays["lm_head.weight"]
    tied = tiny.write(tmp_path / "tied", arrays, {"tie_word_embeddings": True})
    static = tiny.write(tmp_path / "static", tiny.friendli(), tiny.FRIENDLI_03)
    convert(tied, tmp_path / "a", quantize="block", quantize_lm_head=True, progress=False)
    convert(static, tmp_path / "b", progress=False)
    run_with_devices(4, FOUR_DEVICES, tmp_path / "a", tmp_path / "b")


def test_devices_sum_and_gather_what_they_must_and_no_more() -> None:
    """And a tied matrix in FP8 divides over two of them, nobody has to call `jax.jit`, and
    `batch_invariant` is refused."""
    checks = ("check_communication()", "check_tied()", "check_eager()", "check_refused()")
    run_with_devices(4, f"from tests.four_devices import *; {'; '.join(checks)}")


@pytest.mark.slow
def test_each_storage_format_divides_over_devices() -> None:
    run_with_devices(4, "from tests import four_devices; four_devices.check_formats()")


TWO_DEVICES_LLM = """
from llama_jax import LLM, SamplingParams, StructuredOutput
from llama_jax.engine.compile_cache import forbid_compile
from llama_jax.model.sharding import make_mesh

settings = {"max_batch_size": 2, "max_seq_len": 256, "prefill_chunk": 64, "verbose": False}
messages = [{"role": "user", "content": "What is 47 + 85?"}]
sampling = SamplingParams(temperature=0, logprobs=0)
alone, split = (LLM.load(mesh=mesh, **settings) for mesh in (None, make_mesh(model=2)))
split.warmup(structured=True)
regex = "[0-9]{1,3} or [0-9]{1,3}"
numbers = SamplingParams(temperature=0, structured=StructuredOutput(regex=regex))
with forbid_compile():
    two = split.chat([messages, messages], sampling)[1]
    split.chat([messages] * 3, sampling)
    either, answer = split.chat([messages, messages], [numbers, sampling])
assert either.text == alone.chat(messages, numbers).text and " or " in either.text, either.text
assert answer.text == "132", answer.text
one = alone.chat([messages, messages], sampling)[1]
assert one.text == two.text == "132", (one.text, two.text)
for a, b in zip(one.logprobs, two.logprobs, strict=True):
    assert abs(a.logprob - b.logprob) < 0.02, (a, b)  # bfloat16 activations
"""


@pytest.mark.slow
def test_a_sharded_llm_gives_the_same_answers_without_compiling_again() -> None:
    run_with_devices(2, TWO_DEVICES_LLM)


def test_rules(tmp_path: Path) -> None:
    convert(tiny.write(tmp_path / "s", tiny.dense()), tmp_path / "o", quantize="block",
            progress=False)  # fmt: skip
    spec = read_manifest(tmp_path / "o").spec()
    devices = jax.devices() * 4  # the rules look at the mesh's shape alone
    shardings = param_shardings(replace(spec, mesh=make_mesh(4, devices=devices)))
    layer = shardings["layers_1"]
    assert layer["self_attn"]["q_proj"]["weight"].spec == P("model", None)
    assert layer["self_attn"]["o_proj"]["weight"].spec == P(None, "model")
    assert layer["mlp"]["down_proj"]["weight"].spec == P(None, "model")
    assert layer["input_layernorm"]["weight"].spec == P(None)
    assert shardings["embed_tokens"]["weight"].spec == P("model", None)
    assert layer["mlp"]["up_proj"]["weight_scale"].spec == P(None, None)  # 2 blocks, 4 devices
    assert cache_shardings(spec.config, make_mesh(4, devices=devices)).k[0].spec == P(
        None,
        None,
        None,
        None,  # 2 kv heads, 4 devices
    )
    two = cache_shardings(spec.config, make_mesh(2, devices=devices))
    assert two.k[0].spec == P(None, None, "model", None) and two.cached_lens.spec == P()


def test_without_a_mesh_everything_is_on_one_device(tmp_path: Path) -> None:
    convert(tiny.write(tmp_path / "s", tiny.dense()), tmp_path / "o", progress=False)
    spec = read_manifest(tmp_path / "o").spec()
    shardings = param_shardings(spec)
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract_params(spec))
    assert {s.device_set == {jax.devices()[0]} for s in jax.tree.leaves(shardings)} == {True}


def test_a_mesh_of_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data=2 x model=3 needs 6 devices, there are 1"):
        make_mesh(3, data=2, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="model=0"):
        make_mesh(0)


def test_a_number_is_no_mesh() -> None:
    with pytest.raises(TypeError, match=r"mesh: expected a Mesh, such as make_mesh\(4\), got 4"):
        ModelSpec(small.CONFIG, mesh=4)  # type: ignore[arg-type]
