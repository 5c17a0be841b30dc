"""Llama 3.1 8B's `prefill_step` and `decode_steps` as they are compiled for an H200."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import launches
from llama_jax.bench import Workload, preset_spec
from llama_jax.engine.memory import plan_memory
from llama_jax.engine.paths import Program, calls, programs
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.model.config import PRESETS
from llama_jax.model.kv_cache import KVDtype
from llama_jax.model.spec import Activations, ModelSpec
from pallas_kernels import tuned
from pallas_kernels.dev import sm90

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sm90.unavailable() is not None, reason=str(sm90.unavailable())),
]

CONFIG = PRESETS["llama-3.1-8b"]
OPTIONS = EngineOptions(max_batch_size=8, max_seq_len=8192, prefill_chunk=2048)
# q, k and v, rotary and cache, attention, o, gate and up, down. Few rows: q, k and v in one launch,
# attention in two; with bfloat16 activations also two norms and SwiGLU.
LAUNCHES = {("prefill", "auto"): 6, ("decode", "auto"): 10, ("decode", "dynamic"): 7}
MOST_OF_XLA = {("prefill", "auto"): 8, ("decode", "auto"): 1, ("decode", "dynamic"): 13}
GRAPHS = [("prefill", "auto"), ("decode", "auto"), ("decode", "dynamic")]
WHOLE = GRAPHS[:2]  # which are compiled with all layers, too
# A graph's tests follow each other, so that they run in one process and share what is `compiled`.
PER_GRAPH = pytest.mark.parametrize(("phase", "activations"), GRAPHS, scope="module")


def program(
    phase: str, activations: Activations, kv_dtype: KVDtype, num_layers: int
) -> tuple[ModelSpec, Program]:
    formats = preset_spec(replace(CONFIG, num_layers=num_layers))
    spec = ModelSpec(formats.config, formats.formats, "bfloat16", activations)
    with jax.sharding.use_abstract_mesh(sm90.H200):
        (found,) = (each for each in programs(spec, OPTIONS, kv_dtype) if each.phase == phase)
    return spec, found


@cache
def compiled(
    phase: str, activations: Activations, kv_dtype: KVDtype, num_layers: int
) -> tuple[Any, str]:
    """Memory and text."""
    _, found = program(phase, activations, kv_dtype, num_layers)
    executable = sm90.compile(found.function, *found.arguments, donate_argnums=1)
    return executable.memory_analysis(), executable.as_text()


def most_temporaries(phase: str) -> int:
    """Prefill, per token: the MLP's codes with their scales, and three bfloat16 arrays like the
    residual. Decode: six float32 arrays of all logits, which the sampler sorts."""
    if phase == "decode":
        return 6 * OPTIONS.max_batch_size * CONFIG.vocab_size * 4
    codes = CONFIG.intermediate_size + CONFIG.intermediate_size // 128 * 4
    return OPTIONS.prefill_chunk * (codes + 3 * CONFIG.hidden_size * 2)


PASSED_ON = "parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"


def results(text: str) -> Iterator[tuple[str, str]]:
    """Types of what instructions make, and their names: what exists in memory."""
    fused = set(re.findall(r" fusion\(.*calls=%([\w.\-]+)", text))
    for computation in re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", text):
        name = re.match(r"(?:ENTRY )?%([\w.\-]+) \(", computation)
        if name and name.group(1) not in fused:
            for line in computation.splitlines():
                made = re.match(r"\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(", line)
                if made and made.group(2) not in PASSED_ON:
                    yield made.group(1), made.group(2)


@pytest.mark.parametrize("kv_dtype", ["bf16", "fp8"])
@PER_GRAPH
def test_weights_and_cache_stay_where_they_are(
    phase: str, activations: Activations, kv_dtype: KVDtype
) -> None:
    num_layers = 2
    _, found = program(phase, activations, kv_dtype, num_layers)
    memory, text = compiled(phase, activations, kv_dtype, num_layers)

    params, state = found.arguments[:2]
    donated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    table = state.cache.page_table  # given anew with each call
    assert memory.alias_size_in_bytes >= donated - table.size * 4
    assert memory.temp_size_in_bytes < most_temporaries(phase)

    # Nothing is made in the shape of a matrix or its transpose, in whatever type; and the cache is
    # only written in place, by the kernel that stores new keys and values.
    made = list(results(text))
    shapes = {leaf.shape for leaf in jax.tree.leaves(params) if len(leaf.shape) == 2}
    for shape in shapes | {shape[::-1] for shape in shapes}:
        assert not [each for each in made if f"[{shape[0]},{shape[1]}]" in each[0]]
    pages = str(list(state.cache.k[0].shape)).replace(" ", "")
    assert [kind for each, kind in made if pages in each] == ["custom-call"] * num_layers
    logits = OPTIONS.max_batch_size * CONFIG.vocab_size
    copied = [re.search(r"\[([\d,]*)\]", each) for each, kind in made if kind.startswith("copy")]
    for dims in filter(None, copied):
        assert math.prod(int(size) for size in dims.group(1).split(",") if size) <= logits


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_tied_matrix_in_fp8_is_dequantised_in_no_form_and_goes_to_the_kernel(phase: str) -> None:
    """Llama 3.2 1B's 128,256 words, of which a lookup reads the tokens' rows alone."""
    config = replace(PRESETS["llama-3.2-1b"], num_layers=1)
    formats = preset_spec(config, quantize_lm_head=True)
    spec = ModelSpec(formats.config, formats.formats, "bfloat16", "auto")
    with jax.sharding.use_abstract_mesh(sm90.H200):
        (found,) = (each for each in programs(spec, OPTIONS, "bf16") if each.phase == phase)
        (product,) = (call for call in calls(found) if "embed_tokens" in call.matrices)
    assert product.choice and product.choice.kernel.name == "hopper_weight_only"
    executable = sm90.compile(found.function, *found.arguments, donate_argnums=1)
    words, width = config.vocab_size, config.hidden_size
    text = executable.as_text()
    assert f"f8e4m3fn[{words},{width}]" in text
    made = [each for each, _ in results(text)]
    for shape in (f"[{words},{width}]", f"[{width},{words}]"):
        assert not [each for each in made if shape in each]


@PER_GRAPH
def test_kernel_launches_of_a_layer(phase: str, activations: Activations) -> None:
    """As traced, as compiled, and as wanted; and what XLA launches beside them."""
    launches, others = [], []
    few, many = (2, CONFIG.num_layers) if (phase, activations) in WHOLE else (1, 2)
    for num_layers in (few, many):
        _, found = program(phase, activations, "fp8", num_layers)
        with jax.sharding.use_abstract_mesh(sm90.H200):
            traced = [call for call in calls(found) if call.path != "xla"]
        _, text = compiled(phase, activations, "fp8", num_layers)
        launches.append(text.count('custom_call_target="mosaic_gpu'))
        others.append(sum(kind in ("fusion", "copy") for _, kind in results(text)))
        assert launches[-1] == len(traced) == LAUNCHES[phase, activations] * num_layers
    xla, rest = divmod(others[1] - others[0], many - few)
    assert not rest
    ours = LAUNCHES[phase, activations]
    print(f"\n{phase}, {activations}: {ours} kernels a layer, {xla} launches of XLA")
    assert xla <= MOST_OF_XLA[phase, activations]


@pytest.mark.parametrize("way", launches.WAYS, ids=str)
def test_fewer_launches_of_a_layer(
    way: launches.Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way that benchmarks/launches.py times is taken in the benchmark's decode step, and does
    not copy the cache."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "read", cache(tuned.read.__wrapped__))
    length = Workload(way.batch, launches.PROMPT, launches.NEW_TOKENS).max_seq_len
    spec = preset_spec(replace(CONFIG, num_layers=1))
    with jax.sharding.use_abstract_mesh(sm90.H200):
        launches.take(way)
        _, found = programs(spec, EngineOptions(way.batch, length), "fp8", kind="greedy")
    jax.clear_caches()
    text = sm90.compile(found.function, *found.arguments, donate_argnums=1).as_text()
    # With 64 sequences, keys are not split and so there are no parts to add.
    fewer = way.in_one + (way.in_cluster or way.batch > 1)
    expected = LAUNCHES["decode", "auto"] - fewer
    assert text.count('custom_call_target="mosaic_gpu') == expected
    pages = str(list(found.arguments[1].cache.k[0].shape)).replace(" ", "")
    assert [kind for each, kind in results(text) if pages in each] == ["custom-call"]


@pytest.mark.parametrize(("phase", "activations"), WHOLE, scope="module")
def test_the_whole_model_takes_no_more_than_was_planned(
    phase: str, activations: Activations
) -> None:
    spec, found = program(phase, activations, "fp8", CONFIG.num_layers)
    memory, _ = compiled(phase, activations, "fp8", CONFIG.num_layers)
    rows, length, chunk = OPTIONS.max_batch_size, OPTIONS.max_seq_len, OPTIONS.prefill_chunk
    plan = plan_memory(spec, rows, length, found.arguments[1].cache.k[0].dtype, chunk, limit=1)
    print(f"\n{found.name}: {memory.argument_size_in_bytes / 1e9:.2f} GB of arguments, "
          f"{memory.temp_size_in_bytes / 1e6:.1f} MB of temporaries")  # fmt: skip
    assert memory.temp_size_in_bytes < most_temporaries(phase)
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    taken += memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert plan.weights + plan.kv_cache < taken < plan.total
