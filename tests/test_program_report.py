"""What a GPU program launches, as XLA lists it: no step of decode waits for the host."""

from dataclasses import replace

import pytest

from llama_jax.bench import preset_spec
from llama_jax.engine import program_report
from llama_jax.engine.program_report import Thunk, host_round_trips, report, thunks
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.model.config import PRESETS
from llama_jax.model.spec import ModelSpec
from pallas_kernels.dev import sm90

LISTING = """\
000: kCommandBuffer [source       | next=008 (1)]
    001: kCustomKernel [source | sink] loop_broadcast_fusion_4 grid: [10, 1, 1] threads: [128, 1, 1]
    007: kCopy         [source | sink] kCopy
008: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    009: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer [source | sink]
        013: kCustomCall   [prev=012 (1) | next=014 (1)] kCustomCall
        081: kConditional  [prev=035 (1) | next=082 (1)]
          false_branch:
            038: kCopy         [source       | next=039 (1)] kCopy
090: kConditional  [prev=035 (1) | next=082 (1)]
"""
METADATA = """\
thunk_metadata {
  thunk_info {
    profile_annotation: "while.1"
    thunk_id: 8
  }
  thunk_kind: "kWhile"
}
"""
HLO = "  %while.1 = (s32[]) while(%tuple), condition=%c, body=%b, backend_config={{{}}}\n"


def test_the_list_is_read() -> None:
    listed = list(thunks(LISTING))
    assert [each.number for each in listed] == [0, 1, 7, 8, 9, 0, 13, 81, 38, 90]
    graph = ("kWhile", "kCommandBuffer")
    assert listed[6] == Thunk(13, "kCustomCall", graph)
    assert listed[8] == Thunk(38, "kCopy", (*graph, "kConditional"))
    assert listed[9].within == ()


@pytest.mark.parametrize(
    ("hlo", "trips"),
    [(HLO.format('"known_trip_count":{"n":"8"}'), 1), (HLO.format(""), 2), ("f32[2]{0:S(5)}", 3)],
)
def test_round_trips_are_counted(hlo: str, trips: int) -> None:
    """A condition outside of a graph, a loop whose trips are not known, an array on the host."""
    assert host_round_trips(list(thunks(LISTING)), METADATA, hlo) == trips


CONFIG = PRESETS["llama-3.1-8b"]
OPTIONS = EngineOptions(max_batch_size=8, max_seq_len=8192, prefill_chunk=2048)
compiles = [
    pytest.mark.slow,
    pytest.mark.skipif(sm90.unavailable() is not None, reason=str(sm90.unavailable())),
]


def spec(num_layers: int = 2) -> ModelSpec:
    made = preset_spec(replace(CONFIG, num_layers=num_layers))
    return ModelSpec(made.config, made.formats, "bfloat16", "auto")


@pytest.mark.parametrize("phase", [pytest.param(p, marks=compiles) for p in ("prefill", "decode")])
def test_no_launch_waits_for_the_host(phase: program_report.Phase) -> None:
    found = report(spec(), OPTIONS, "fp8", phase)
    print(f"\n{phase}: {found}")
    assert found.host_round_trips == 0 and found.cache_aliased
    # One graph for a call of prefill; for decode one to begin with and one for each step.
    assert found.graphs == (1 if phase == "prefill" else 2)
    assert found.layer.kernels == (6 if phase == "prefill" else 10)
    logits = OPTIONS.max_batch_size * CONFIG.vocab_size * 4
    if phase == "decode":
        assert found.temporary_bytes < 3 * logits


@pytest.mark.parametrize(
    ("kind", "steps", "graphs"),
    [
        pytest.param(*each, marks=compiles)
        for each in (("greedy", 1, 1), ("sampled", 8, 2), ("everything", 8, 3))
    ],
)
def test_neither_does_any_kind_of_draw(kind, steps: int, graphs: int) -> None:
    options = replace(OPTIONS, max_steps=steps)
    program = program_report._program(spec(1), options, "bf16", "decode", kind)
    _, listed, trips = program_report.compiled(program)
    kinds = [each.kind for each in listed]
    assert trips == 0 and kinds.count("kCommandBuffer") == graphs
    assert ("kConditional" in kinds) == (kind == "everything")
    assert ("kWhile" in kinds) == (steps > 1)


@pytest.mark.parametrize("steps", [pytest.param(8, marks=compiles)])
def test_a_loop_that_may_stop_early_would_wait(steps: int, monkeypatch) -> None:
    monkeypatch.setattr("llama_jax.engine.paths.has_free_conditions", lambda: True)
    options = replace(OPTIONS, max_steps=steps)
    program = program_report._program(spec(1), options, "bf16", "decode", "greedy")
    assert program_report.compiled(program)[2] == 1
