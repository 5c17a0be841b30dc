"""The kernels' benchmark and tuner, as far as they go without a GPU."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import device_trace, tuned
from pallas_kernels.dev import bench, report, sm90, tune
from pallas_kernels.dev.shapes import Heads, Launch, Linear
from pallas_kernels.device_trace import Event
from pallas_kernels.fp8_matmul import (
    cases,
    hopper_config,
    hopper_weight_only,
    hopper_weight_only_config,
    weight_only_cases,
)
from pallas_kernels.fp8_matmul.hopper_config import Config
from pallas_kernels.paged_attention import cases as attention_cases
from pallas_kernels.paged_attention import hopper_decode_config, hopper_prefill
from pallas_kernels.paged_attention.hopper_decode_config import DecodeConfig

HEADS = Heads("8B", 1, 32, 8, 128)
TINY = Linear("tiny", 1, "linear", 256, 384)
FAST, SLOW = Config(64, 64, 4), Config(64, 128, 4)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An empty folder of tuned tables; the path of the H200's."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    tuned.read.cache_clear()
    yield tuned.path_of("NVIDIA H200")
    tuned.read.cache_clear()


@pytest.fixture
def few_inputs(monkeypatch):
    monkeypatch.setattr(bench, "MAX_INPUTS", 2)


def on_cpu(case, **changes):
    """The case with XLA's path in place of the kernel, whatever the configuration."""
    return replace(case, run=lambda *a, config=None: case.baselines["xla"](*a), **changes)


@pytest.mark.parametrize("main", [bench.main, tune.main], ids=["bench", "tune"])
def test_without_a_gpu_it_says_so(main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "JAX runs on cpu, not on a GPU" in capsys.readouterr().err


def test_a_wrong_result_fails_the_check(monkeypatch, capsys):
    case = cases.matmul(TINY, 64, "row")
    wrong = replace(case, run=lambda *a, interpret: case.baselines["xla"](*a) * 2)
    monkeypatch.setattr(bench, "tiny_cases", lambda only: [on_cpu(case, name="right"), wrong])
    monkeypatch.setattr(bench, "on_simulator", lambda case: replace(case, run=partial(
        case.run, **({} if case.name == "right" else {"interpret": None}))))  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--simulate"])
    assert stopped.value.code == 1
    printed = capsys.readouterr().out.splitlines()
    assert "right" in printed[0] and "fp8_matmul is wrong for tiny" in printed[1]


def test_a_measurement_is_checked_and_put_beside_the_floor(few_inputs):
    case = on_cpu(cases.matmul(TINY, 64, "row"))
    result = bench.run(bench.prepare(case, with_baselines=True), bytes_per_second=1e9)
    assert result.timing.seconds > 0 and result.baselines["xla"].seconds > 0
    assert result.timing.launches == ()  # a CPU keeps no record of what it launches
    assert result.timing.kernel_seconds == result.timing.seconds
    assert result.error < 0.01
    assert result.floor_seconds == case.bytes / 1e9  # few operations
    assert len(str(result)) == len(bench.HEADER)
    alone = bench.run(bench.prepare(case, with_baselines=False), bytes_per_second=1e9)
    assert not alone.baselines and len(str(alone)) == len(bench.HEADER)


def test_what_cannot_run_is_not_put_beside_it(few_inputs, capsys):
    case = attention_cases.prefill(Heads("tiny", 1, 4, 1, 64), "bf16", 40)
    prepared = bench.prepare(on_cpu(case), with_baselines=True)  # cuDNN needs a GPU
    result = bench.run(prepared, bytes_per_second=1e9)
    assert list(result.baselines) == ["xla"]
    assert capsys.readouterr().err.startswith("cudnn does not run: ")
    assert len(str(result)) == len(bench.HEADER)


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_wrong_kernel_is_not_timed(few_inputs, factor):
    case = cases.matmul(TINY, 64, "row")
    wrong = replace(case, run=lambda *a: case.baselines["xla"](*a) * jnp.bfloat16(factor))
    prepared = bench.prepare(wrong, with_baselines=False)
    with pytest.raises(ValueError, match="fp8_matmul is wrong for tiny TP1 linear 256x384 m=64"):
        bench.run(prepared, bytes_per_second=1e9)


def test_a_call_takes_what_the_device_records_of_its_kernels(monkeypatch):
    """Each call: a kernel of 30 us, but once of 300 us, and two fusions of 5 us around it."""
    called = []

    def record(calls):
        calls()
        events = []
        for i in range(len(called)):
            events += [Event("fusion", i, 5e-6), Event("fusion", i, 5e-6)]
            events.append(Event("matmul", i, 300e-6 if i == 3 else 30e-6))
        return events

    monkeypatch.setattr(device_trace, "is_kept", lambda: True)
    monkeypatch.setattr(device_trace, "record", lambda calls: called.clear() or record(calls))
    timing = bench.timed(lambda x: called.append(x) or x, [(1,), (2,), (3,)])
    assert len(called) >= 6 and set(called) == {1, 2, 3}
    assert [(each.name, each.count) for each in timing.launches] == [("matmul", 1), ("fusion", 2)]
    assert timing.kernel_seconds == pytest.approx(30e-6)
    assert timing.seconds == pytest.approx(40e-6)


def test_all_programs_are_compiled_before_any_is_timed(few_inputs, tmp_path, monkeypatch, capsys):
    done = []
    prepare, run = bench.prepare, bench.run
    matmul = cases.matmul(TINY, 64, "row")
    chosen = [on_cpu(matmul, name=name) for name in ("first", "second", "third")]
    chosen[1] = replace(chosen[1], run=lambda *a: matmul.baselines["xla"](*a) * 2)

    def prepared(case, with_baselines):
        done.append(f"{case.name} compiled")
        return prepare(case, with_baselines)

    def timed(prepared, bandwidth):
        done.append(f"{prepared.case.name} timed")
        return run(prepared, bandwidth)

    monkeypatch.setattr(bench, "prepare", prepared)
    monkeypatch.setattr(bench, "run", timed)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1e9)
    path = tmp_path / "results.json"
    failures = bench.measure_all(chosen, "third", 1e9, path)
    assert sorted(done[:3]) == ["first compiled", "second compiled", "third compiled"]
    assert done[3:] == ["first timed", "second timed", "third timed"]
    assert len(failures) == 1 and failures[0].startswith("second: fp8_matmul is wrong")
    first, third = json.loads(path.read_text())["results"]
    assert (first["name"], first["baselines"]) == ("first", {}) and list(third["baselines"]) == [
        "xla"
    ]
    assert "3 cases compiled in" in capsys.readouterr().out
    done.clear()
    assert bench.measure_all(chosen, None, 0, None) == []
    assert "0 seconds are over: skipping cases from first on" in capsys.readouterr().out
    assert not any("timed" in each for each in done)


REPORT = Path(__file__).parents[1] / "benchmarks/results/kernels_sm90a.json"


def test_the_committed_report_has_every_kernel_without_spills():
    document = json.loads(REPORT.read_text())
    assert document["versions"].keys() == set(report.PACKAGES)
    rows = document["kernels"]
    assert {row["kernel"] for row in rows} == {
        "fp8_matmul", "fp8_swiglu", "fp8_matmul_weight_only",
        "paged_attention_prefill", "paged_attention_decode", "paged_attention_combine",
        "rope_and_cache", "rope_and_attention", "add_rms_norm", "silu_and_mul",
    }  # fmt: skip
    assert all(row["spill_bytes"] == 0 and row["blocks"] >= 1 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(sm90.unavailable() is not None, reason=str(sm90.unavailable()))
def test_the_report_of_the_same_code_is_the_committed_one(tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    only = "8B TP1 (qkv_proj.* row weight-only|heads .*B=8 S=8192 tokens=1 bf16)"
    report.main(["--only", only, "--rows", "1", "--json", str(path)])
    found, committed = (json.loads(each.read_text()) for each in (path, REPORT))
    assert len(found["kernels"]) == 4
    assert len(capsys.readouterr().out.splitlines()) == 5
    if found["versions"] == committed["versions"]:
        names = {row["kernel"]: row for row in found["kernels"]}
        for row in committed["kernels"]:
            if row["case"] == names.get(row["kernel"], {}).get("case"):
                assert row == names[row["kernel"]], (
                    "run `python -m pallas_kernels.dev.report` again"
                )


def test_the_least_work_of_a_case():
    m, n, k = 64, 256, 384
    matmul, both = cases.matmul(TINY, m, "row"), cases.swiglu(TINY, m, "block")
    assert matmul.operations == 2 * m * n * k
    assert matmul.bytes == m * k + n * k + 4 * n + 4 * m + 2 * m * n
    assert both.operations == 4 * m * n * k
    assert both.bytes == m * k + 2 * (n * k + 4 * 2 * 3) + 4 * m + m * n + 4 * 2 * m
    assert matmul.floor(1e30) == matmul.operations / 1_979e12


def test_the_least_work_of_attention():
    whole = attention_cases.prefill(HEADS, "bf16", 4096)
    assert whole.operations == 4 * 32 * 128 * 4096 * 4097 // 2
    assert list(whole.baselines) == ["xla", "cudnn"]
    chunk = attention_cases.prefill(HEADS, "fp8", 64, start=128)
    assert chunk.operations == 4 * 32 * 128 * sum(range(129, 193))
    assert chunk.bytes == 2 * 192 * 8 * 128 + 2 * 64 * 32 * 128 * 2 + 4 * 3 + 8
    decode = attention_cases.decode(HEADS, "bf16", [100, 30], 2)
    assert decode.operations == 4 * 32 * 128 * (99 + 100 + 29 + 30)
    assert decode.bytes == 2 * 130 * 8 * 128 * 2 + 2 * 2 * 2 * 32 * 128 * 2 + 4 * 4 + 16


def test_the_reference_by_parts_is_the_reference():
    case = attention_cases.prefill(Heads("tiny", 1, 4, 2, 8), "bf16", 384, start=70)
    q, *rest = case.arguments(jax.random.key(0))
    whole = attention_cases.reference.paged_attention(q.astype(jnp.float32), *rest, 1.0, 1.0)
    assert jnp.abs(case.reference(q, *rest) - whole).max() < 1e-5  # sums in another order


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_is_tried_of_attention_fits_with_the_heuristic_among_it(head_dim, dtype):
    shape = Heads("8B", 1, 32, 8, head_dim)
    prefill = attention_cases.prefill(shape, dtype, 4096)
    q, pool, *_ = jax.eval_shape(prefill.arguments, jax.random.key(0))
    assert hopper_prefill.heuristic(pool) in prefill.configs
    decode = attention_cases.decode(shape, dtype, [8192] * 8, 1)
    q, pool, *_ = jax.eval_shape(decode.arguments, jax.random.key(0))
    assert hopper_decode_config.heuristic(q, pool, 8192, False) in decode.configs


@pytest.mark.parametrize("m", [1, 64, 65, 2048])
def test_the_heuristic_is_among_what_is_tried(m):
    for linear in (TINY, Linear("8B", 1, "gate_proj", 14_336, 4096)):
        for case, promote, weights in (
            (cases.matmul(linear, m, "row"), False, 1),
            (cases.matmul(linear, m, "block"), True, 1),
            (cases.swiglu(linear, m, "row"), False, 2),
        ):
            assert (
                hopper_config.heuristic(m, (linear.n,), promote=promote, weights=weights)
                in case.configs
            )


@pytest.mark.slow
def test_cases_are_chosen_by_name():
    chosen = list(bench.cases([64], "8B TP1"))
    kernels = {case.kernel for case in chosen}
    assert kernels == {
        "fp8_matmul", "fp8_swiglu", "fp8_matmul_weight_only",
        "paged_attention_prefill", "paged_attention_decode", "rope_and_cache", "rope_and_attention",
        "add_rms_norm", "silu_and_mul",
    }  # fmt: skip
    assert all(case.name.startswith("8B TP1 ") for case in chosen)
    assert len(chosen) < len(list(bench.cases([64])))
    assert all("T=" in case.name for case in bench.cases([64], "8B TP[12] .* prefill attention$"))


def test_a_failure_stops_nothing_and_time_runs_out(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 3.0, 6.0])
    # In the place of the module: the function itself is also JAX's.
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    case = cases.matmul(TINY, 1, "row")

    def do(case):
        if case.name == "second":
            raise ValueError("wrong")
        return case.name

    named = (replace(case, name=name) for name in ("first", "second", "third"))
    done, failures = bench.each(bench.in_time(named, 5), do)
    assert done == ["first"] and failures == ["second: wrong"]
    assert "5 seconds are over: skipping cases from third on" in capsys.readouterr().out


def test_tuned_configurations_are_taken_where_they_were_measured(few_inputs, table, monkeypatch):
    case = on_cpu(cases.matmul(TINY, 64, "row"), configs=[SLOW, FAST])
    measured = []

    def measure(functions, inputs):
        measured.append(case.name)
        return {config: 2e-6 if config == SLOW else 1e-6 for config in functions}

    monkeypatch.setattr(tune, "not_hopper", lambda: None)
    monkeypatch.setattr(tune, "kind", lambda: "NVIDIA H200")
    monkeypatch.setattr(tune, "tune", partial(tune.tune, measure=measure))
    monkeypatch.setattr(bench, "cases", lambda rows, only: iter([case, case]))
    configure = partial(hopper_config.configure, 64, (TINY.n,), TINY.k)
    heuristic = hopper_config.heuristic(64, (TINY.n,), promote=False)
    with jax.sharding.use_abstract_mesh(sm90.H200):
        assert configure(promote=False) == heuristic != FAST
        tune.main([])
        tune.main([])
        assert measured == [case.name]  # the second time it is in the table
        assert configure(promote=False) == FAST
        assert hopper_config.configure(1, (TINY.n,), TINY.k, promote=False) == FAST  # up to 64 rows
        assert configure(promote=True) == hopper_config.heuristic(64, (TINY.n,), promote=True)
        tune.main(["--again"])
        assert measured == [case.name] * 2
    assert configure(promote=False) == heuristic  # no H200
    (entry,) = json.loads(table.read_text())["fp8_matmul"].values()
    assert entry["microseconds"] == 1 and entry["slowest_microseconds"] == 2


def test_x_in_terms_is_tuned_apart_from_bfloat16_x(table, monkeypatch):
    launch = Launch("tiny", (160, 32), 384)
    makes = weight_only_cases.matmuls, weight_only_cases.in_terms
    cases = [make(launch, 9, "row") for make in makes]
    configure = partial(hopper_weight_only_config.configure, 9, launch.ns, launch.k)
    fastest = {cases[0].name: 3, cases[1].name: 2}

    def tuned_to(case):
        return {"config": {"splits": fastest[case.name], "in_fp8": False}}

    monkeypatch.setattr(tune, "not_hopper", lambda: None)
    monkeypatch.setattr(tune, "kind", lambda: "NVIDIA H200")
    monkeypatch.setattr(tune, "tune", tuned_to)
    monkeypatch.setattr(bench, "cases", lambda rows, only: iter(cases))
    with jax.sharding.use_abstract_mesh(sm90.H200):
        tune.main([])
        assert (configure().splits, configure(in_terms=True).splits) == (3, 2)
    assert len(json.loads(table.read_text())["fp8_matmul_weight_only"]) == 2


def test_a_table_that_does_not_tell_terms_from_bfloat16_is_read_for_both(table):
    entry = {"config": {"splits": 3, "in_fp8": True}}
    tuned.write("NVIDIA H200", "fp8_matmul_weight_only", "n=160+32 k=384 m<=16", entry)
    configure = partial(hopper_weight_only_config.configure, 9, (160, 32), 384)
    with jax.sharding.use_abstract_mesh(sm90.H200):
        assert configure() == configure(in_terms=True)
        assert configure().splits == 3


def test_the_kernel_looks_up_what_its_x_was_tuned_for(table):
    launch = Launch("tiny", (160,), 384)
    for problem, splits in (("n=160 k=384 m<=16", 3), ("n=160 k=384 m<=16 terms", 2)):
        tuned.write(
            "NVIDIA H200", "fp8_matmul_weight_only", problem, {"config": {"splits": splits}}
        )
    shapes = []
    for make in (weight_only_cases.matmuls, weight_only_cases.in_terms):
        case = make(launch, 9, "row")
        arguments = jax.eval_shape(case.arguments, jax.random.key(0))
        with jax.sharding.use_abstract_mesh(sm90.H200):
            parts = jax.eval_shape(partial(hopper_weight_only.parts, m=9), *arguments)
        shapes.append(parts[0].sums.shape)
    assert shapes == [(3, 9, 160), (2, 9, 160)]


def test_attention_takes_its_tuned_configurations(table):
    pool = jax.ShapeDtypeStruct((128, 64, 8, 128), jnp.bfloat16)
    q = jax.ShapeDtypeStruct((3, 1, 32, 128), jnp.bfloat16)
    entry = {"config": {"keys": 64, "stages": 3}}
    tuned.write("NVIDIA H200", "paged_attention_prefill", "head_dim=128 packed=4 bfloat16", entry)
    problem = "heads=32/8x128 bfloat16 tokens=1 batch<=4 capacity<=2048"
    entry = {"config": {"splits": 7, "keys_per_split": None, "stages": 4}}
    tuned.write("NVIDIA H200", "paged_attention_decode", problem, entry)
    with jax.sharding.use_abstract_mesh(sm90.H200):
        assert hopper_prefill.configure(32, pool) == hopper_prefill.PrefillConfig(64, 3)
        assert hopper_prefill.configure(8, pool) == hopper_prefill.heuristic(pool)
        decode = hopper_decode_config.configure(q, pool, 1088, False)
        assert decode == DecodeConfig(7, None, 4)
        invariant = hopper_decode_config.configure(q, pool, 1088, True)
        assert invariant == hopper_decode_config.heuristic(q, pool, 1088, True)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hopper_prefill.PrefillConfig(192, 2), "keys must be 64 or 128, got 192"),
        (hopper_prefill.PrefillConfig(128, 1), "at least 2 stages are needed, got 1"),
        (hopper_prefill.PrefillConfig(128, 4), "bytes of shared memory, of 232448"),
        (DecodeConfig(0, None, 2), "splits must be 1 to 32, got 0"),
        (
            DecodeConfig(2, 100, 2),
            "keys_per_split must be a multiple of 64, got 100",
        ),
        (DecodeConfig(2, 64, 2), "2 splits of 64 keys do not hold 192"),
        (DecodeConfig(2, None, 1), "at least 2 stages are needed, got 1"),
        (DecodeConfig(2, None, 8), "bytes of shared memory, of 232448"),
    ],
    ids=str,
)
def test_attention_refuses_configurations_that_cannot_work(config, reason):
    if isinstance(config, hopper_prefill.PrefillConfig):
        case = attention_cases.prefill(HEADS, "bf16", 64)
    else:
        case = attention_cases.decode(HEADS, "bf16", [192], 1)
    arguments = jax.eval_shape(case.arguments, jax.random.key(0))
    with pytest.raises(ValueError, match=re.escape(f"{config} cannot work: ") + f".*{reason}"):
        jax.eval_shape(partial(case.run, config=config), *arguments)


def test_a_configuration_with_wrong_results_stops_the_tuner(few_inputs):
    case = cases.matmul(TINY, 64, "row")
    wrong = replace(case, run=lambda *a, config: case.baselines["xla"](*a) * (1 + (config == SLOW)),
                    configs=[FAST, SLOW])  # fmt: skip
    with pytest.raises(ValueError, match="fp8_matmul is wrong"):
        tune.tune(wrong)
