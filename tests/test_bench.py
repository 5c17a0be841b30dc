from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import bench
from llama_jax.bench import Workload
from llama_jax.engine import compile_cache
from llama_jax.model.forward import prefill
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.params import abstract_params
from pallas_kernels import device_trace, e4m3
from pallas_kernels.device_trace import Event
from tests.tiny import config, fp8_formats, fp8_spec

ONE_LAYER = config(num_layers=1)
WORKLOADS = (Workload(2, 5, 3), Workload(2, 7, 4))


@pytest.fixture(scope="module")
def report():
    spec = fp8_spec(config=ONE_LAYER)
    shown = []
    result = bench.bench(
        bench.random_params(spec), spec, WORKLOADS, kv_dtype=jnp.dtype("int8"),
        copy_bytes_per_second=2e9, prefill_chunk=8, repeats=2, on_finished=shown.append,
    )  # fmt: skip
    assert tuple(shown) == result.measurements
    return result


def test_report_is_complete_and_consistent(report):
    assert tuple(m.workload for m in report.measurements) == WORKLOADS
    for m in report.measurements:
        batch_size, prompt_len = m.workload.batch_size, m.workload.prompt_len
        assert m.first_token_seconds > m.prefill_seconds > 0
        assert m.prefill_tokens_per_second * m.prefill_seconds == pytest.approx(
            batch_size * prompt_len
        )
        assert m.decode_tokens_per_second * m.decode_step_seconds == pytest.approx(batch_size)
        assert m.decode_bytes_per_second * m.decode_step_seconds == pytest.approx(
            m.weight_bytes + m.kv_bytes
        )
        assert report.fraction_of_copy(m) == pytest.approx(m.decode_bytes_per_second / 2e9)
    assert report.compile.compiled + report.compile.from_cache > 0
    assert report.compile.seconds > 0
    assert report.peak_memory.kind == "process"
    assert report.peak_memory.bytes > 50e6
    assert report.environment.platform == "cpu"
    assert all(vars(report.environment).values())


class Clock:
    """Time passes only where a test says so."""

    now = 0.0

    def perf_counter(self):
        return self.now


class FakeEngine:
    """Takes 2 s for settings, 3 s for a prompt and, as an engine that overlaps its rounds, hands
    over the first token only with the step after; 0.5 s for each step."""

    def __init__(self, clock):
        self.clock, self.spec, self.lengths = clock, fp8_spec(config=ONE_LAYER), []

    def run(self, requests):
        length = requests[0].params.max_new_tokens
        self.lengths.append(length)
        self.clock.now += 2
        for request in requests:
            request.admitted_at = self.clock.now
        self.clock.now += 3
        if length > 1:
            self.clock.now += 0.5
        for request in requests:
            request.first_token_at = self.clock.now
        self.clock.now += 0.5 * max(0, length - 2)
        yield requests[0]


def test_a_step_is_the_difference_of_two_lengths_and_the_first_token_is_timed_alone(monkeypatch):
    clock = Clock()
    engine = FakeEngine(clock)
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(bench, "make_engine", lambda *_: engine)
    workload = Workload(2, 5, 9)
    m = bench.measure(None, engine.spec, workload, jnp.dtype("int8"), 8, repeats=3)
    assert (m.prefill_seconds, m.first_token_seconds, m.decode_step_seconds) == (3, 5, 0.5)
    assert (m.device, m.idle_share) == (None, None)
    assert set(engine.lengths) == {1, 4, 9}


def test_a_device_that_keeps_a_record_says_what_a_step_is_made_of(monkeypatch):
    """A prompt of one matmul; a step of two matmuls, an attention, and a gap."""
    clock = Clock()
    engine = FakeEngine(clock)
    monkeypatch.setattr(bench, "time", clock)
    monkeypatch.setattr(bench, "make_engine", lambda *_: engine)

    def record(run):
        run()
        events = [Event("matmul", 0.0, 1.0)]
        for i in range(engine.lengths[-1] - 1):
            start = 1.0 + 0.5 * i
            events += [Event("matmul", start, 0.125), Event("matmul", start + 0.125, 0.125)]
            events.append(Event("attention", start + 0.25, 0.125))
        return events

    monkeypatch.setattr(device_trace, "record", record)
    monkeypatch.setattr(device_trace, "is_kept", lambda: True)
    m = bench.measure(None, engine.spec, Workload(2, 5, 9), jnp.dtype("int8"), 8, repeats=1)
    assert m.device.busy_seconds == pytest.approx(0.375)
    assert m.idle_share == pytest.approx(0.25)
    assert [(k.name, k.count, k.seconds) for k in m.device.kernels] == [
        ("matmul", pytest.approx(2), pytest.approx(0.25)),
        ("attention", pytest.approx(1), pytest.approx(0.125)),
    ]


def test_nothing_compiles_while_a_known_workload_is_measured(report):
    spec = fp8_spec(config=ONE_LAYER)
    params = bench.random_params(spec)
    arguments = (params, spec, report.measurements[0].workload, jnp.dtype("int8"), 8, 1)
    assert report.compile.compiled + report.compile.from_cache > 0
    # The one thing is what makes a new engine's state.
    only = r"^1 compiled while none should be: jit\(build\)$"
    with pytest.raises(RuntimeError, match=only), compile_cache.forbid_compile():
        bench.measure(*arguments)


def test_bytes_of_a_decode_step():
    # 2 layers: q 64x64, k and v 32x64, o 64x64, gate, up and down 160x64, each row with a float32
    # scale and each matrix with a float32 input scale; two norms of 64 float32.
    matrices = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 160 * 64
    scales = 4 * (64 + 32 + 32 + 64 + 160 + 160 + 64) + 4 * 7
    layers = 2 * (matrices + scales + 2 * 64 * 4)
    norm, head, row = 64 * 4, 320 * 64 * 4, 64 * 4
    assert bench.decode_weight_bytes(fp8_spec(), 3) == layers + norm + head + 3 * row
    tied = fp8_spec(config=config(tie_word_embeddings=True))
    assert bench.decode_weight_bytes(tied, 3) == layers + norm + head
    # keys and values of 2 layers with 2 heads of 16; 10 + (2 + 4) / 2 tokens in each of 3 rows
    workload = Workload(3, 10, 4)
    assert bench.kv_bytes(config(), jnp.dtype("int8"), workload) == 3 * 13 * 2 * 2 * 2 * 16
    assert bench.kv_bytes(config(), jnp.dtype("bfloat16"), workload) == 3 * 13 * 2 * 2 * 2 * 16 * 2


@pytest.mark.parametrize("scale", ["row", "block"])
def test_random_params_belong_to_the_spec_and_give_finite_logits(scale):
    spec = fp8_spec(scale, ONE_LAYER)
    params = bench.random_params(spec)
    expected = jax.tree.map(
        lambda leaf: (leaf.shape, jnp.dtype("int8") if leaf.dtype == e4m3.DTYPE else leaf.dtype),
        abstract_params(spec),
    )
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == expected
    gate = np.asarray(params["layers_0"]["mlp"]["gate_proj"]["weight"])
    assert not (gate & 0x7F == 0x7F).any()
    weight = gate.view(e4m3.DTYPE).astype(np.float32)
    scales = np.asarray(params["layers_0"]["mlp"]["gate_proj"]["weight_scale"])
    assert np.std(weight * scales.flat[0]) == pytest.approx(0.02, rel=0.1)
    cache = init_cache(spec.config, 1, 64, "float32")
    tokens = jnp.arange(8)[None]
    logits, _ = prefill(params, cache, tokens, jnp.array([8]), spec=spec)
    assert np.isfinite(logits).all() and np.std(logits) > 0


def test_preset_spec_quantises_the_layers_matrices_alone():
    spec = bench.preset_spec(config(dtype="float16"))
    assert set(spec.formats) == set(fp8_formats(config()))
    assert {(f.dtype, f.scale, f.input_scale) for f in spec.formats.values()} == {
        ("float8_e4m3fn", "row", False)
    }
    leaves = jax.tree.leaves(abstract_params(spec))
    assert {leaf.dtype.name for leaf in leaves} == {"float8_e4m3fn", "bfloat16", "float32"}


@pytest.mark.parametrize("tied", [False, True])
def test_preset_spec_quantises_the_output_matrix_where_asked(tied):
    one = config(tie_word_embeddings=tied)
    spec = bench.preset_spec(one, quantize_lm_head=True)
    added = "embed_tokens" if tied else "lm_head"
    assert spec.formats.keys() - bench.preset_spec(one).formats.keys() == {added}
    assert spec.formats[added] == WeightFormat("float8_e4m3fn", "row")
    # 320 rows of 64 codes with a scale each, in place of bfloat16
    fewer = bench.decode_weight_bytes(bench.preset_spec(one), 1)
    fewer -= bench.decode_weight_bytes(spec, 1)
    assert fewer == 320 * 64 - 320 * 4


def test_plan_covers_all_workloads():
    spec = bench.preset_spec(ONE_LAYER)
    workloads = (Workload(8, 4000, 96), Workload(1, 128, 64))
    largest = bench.plan(spec, workloads, jnp.dtype("bfloat16"))
    assert (largest.max_batch_size, largest.max_seq_len) == (8, 4096)


def test_copy_bandwidth_counts_reads_and_writes(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock) / 2)
    assert bench.copy_bandwidth(1 << 20, repeats=3) == 2 * (1 << 20) / 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"prompt_len": 0}, "prompt_len must be at least 1, got 0"),
        ({"new_tokens": 1}, "new_tokens must be at least 2, got 1"),
    ],
)
def test_workloads_that_measure_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(WORKLOADS[0], **change)
