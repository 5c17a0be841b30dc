"""The kernels' benchmark and tuner, as far as they go without a GPU."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bench, sm90, tune, tuned
from pallas_kernels.fp8_matmul import cases, hopper
from pallas_kernels.fp8_matmul.hopper import Config
from pallas_kernels.shapes import Linear

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
    monkeypatch.setattr(bench, "MIN_INPUTS", 2)
    monkeypatch.setattr(bench, "MAX_INPUTS", 2)


def on_cpu(case, **changes):
    """The case with XLA's path in place of the kernel, whatever the configuration."""
    return replace(case, run=lambda *a, config=None: case.xla(*a), **changes)


def test_the_simulator_gives_right_results(capsys):
    bench.main(["--simulate"])
    names = [line.rsplit(maxsplit=1)[0] for line in capsys.readouterr().out.splitlines()]
    expected = [" ".join((case.kernel, case.name)) for case in bench.tiny_cases()]
    assert [" ".join(name.split()) for name in names] == expected


@pytest.mark.parametrize("main", [bench.main, tune.main], ids=["bench", "tune"])
def test_without_a_gpu_it_says_so(main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "JAX runs on cpu, not on a GPU" in capsys.readouterr().err


def test_a_measurement_is_checked_and_put_beside_the_floor(few_inputs):
    case = on_cpu(cases.matmul(TINY, 64, "row"))
    result = bench.run(case, bytes_per_second=1e9)
    assert result.seconds > 0 and result.xla_seconds > 0
    assert result.error < 0.01
    assert result.floor_seconds == case.bytes / 1e9  # few operations
    assert len(str(result)) == len(bench.HEADER)


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_wrong_kernel_is_not_timed(few_inputs, factor):
    case = cases.matmul(TINY, 64, "row")
    wrong = replace(case, run=lambda *a: case.xla(*a) * jnp.bfloat16(factor))
    with pytest.raises(ValueError, match="fp8_matmul is wrong for tiny TP1 linear 256x384 m=64"):
        bench.run(wrong, bytes_per_second=1e9)


def test_the_least_work_of_a_case():
    m, n, k = 64, 256, 384
    matmul, both = cases.matmul(TINY, m, "row"), cases.swiglu(TINY, m, "block")
    assert matmul.operations == 2 * m * n * k
    assert matmul.bytes == m * k + n * k + 4 * n + 4 * m + 2 * m * n
    assert both.operations == 4 * m * n * k
    assert both.bytes == m * k + 2 * (n * k + 4 * 2 * 3) + 4 * m + m * n + 4 * 2 * m
    assert matmul.floor(1e30) == matmul.operations / 1_979e12


@pytest.mark.parametrize("m", [1, 64, 65, 2048])
def test_the_heuristic_is_among_what_is_tried(m):
    for linear in (TINY, Linear("8B", 1, "gate_proj", 14_336, 4096)):
        for case, promote, weights in (
            (cases.matmul(linear, m, "row"), False, 1),
            (cases.matmul(linear, m, "block"), True, 1),
            (cases.swiglu(linear, m, "row"), False, 2),
        ):
            assert hopper.heuristic(m, linear.n, promote=promote, weights=weights) in case.configs


def test_cases_are_chosen_by_name():
    chosen = list(bench.cases([64], "8B TP1"))
    kernels = {case.kernel for case in chosen}
    assert kernels == {"fp8_matmul", "fp8_swiglu", "fp8_matmul_weight_only"}
    assert all(case.name.startswith("8B TP1 ") for case in chosen)
    assert len(chosen) < len(list(bench.cases([64])))


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
    configure = partial(hopper.configure, 64, TINY.n, TINY.k)
    heuristic = hopper.heuristic(64, TINY.n, promote=False)
    with jax.sharding.use_abstract_mesh(sm90.H200):
        assert configure(promote=False) == heuristic != FAST
        tune.main([])
        tune.main([])
        assert measured == [case.name]  # the second time it is in the table
        assert configure(promote=False) == FAST
        assert hopper.configure(1, TINY.n, TINY.k, promote=False) == FAST  # up to 64 rows
        assert configure(promote=True) == hopper.heuristic(64, TINY.n, promote=True)
        tune.main(["--again"])
        assert measured == [case.name] * 2
    assert configure(promote=False) == heuristic  # no H200
    (entry,) = json.loads(table.read_text())["fp8_matmul"].values()
    assert entry["microseconds"] == 1 and entry["slowest_microseconds"] == 2


def test_a_configuration_with_wrong_results_stops_the_tuner(few_inputs):
    case = cases.matmul(TINY, 64, "row")
    wrong = replace(case, run=lambda *a, config: case.xla(*a) * (1 + (config == SLOW)),
                    configs=[FAST, SLOW])  # fmt: skip
    with pytest.raises(ValueError, match="fp8_matmul is wrong"):
        tune.tune(wrong)
