"""benchmarks/launches.py: what it keeps, also when ways fail, hang, or its time is over."""

import json
import subprocess
import sys
import time
from functools import cache

import jax
import pytest

from benchmarks import launches
from benchmarks.launches import Setup, Way
from llama_jax.bench import Workload
from llama_jax.engine.scheduling import EngineOptions
from pallas_kernels import tuned
from pallas_kernels.dev import sm90
from pallas_kernels.rope_and_attention import hopper


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The table of an H200, for which everything is lowered."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(tuned, "read", cache(tuned.read.__wrapped__))
    with jax.sharding.use_abstract_mesh(sm90.H200):
        yield lambda: tuned.read("NVIDIA H200")


def setups(tmp_path):
    return [Setup(way, tmp_path / str(way), is_tiny=False) for way in launches.WAYS]


def test_the_fastest_that_is_right_is_kept_for_each_batch(table, tmp_path, monkeypatch):
    problems = {Way(1, True, True): "wrong"}
    times = {
        Way(1, False, False): 4.0, Way(1, True, False): 2.0, Way(1, False, True): 3.0,
        Way(64, False, False): 5.0, Way(64, True, False): None,
    }  # fmt: skip
    monkeypatch.setattr(launches, "prepare", lambda each: [problems.get(s.way) for s in each])
    monkeypatch.setattr(launches, "step_seconds", lambda setup: times[setup.way])
    path = tmp_path / "times.json"
    assert not launches.measure(setups(tmp_path), path)
    assert [config["config"] for config in table()[hopper.NAME].values()] == [
        {"in_one": True}, {"in_one": False},
    ]  # fmt: skip
    assert len(table()["paged_attention_decode"]) == 2
    results = json.loads(path.read_text())["results"]
    assert [each["step_seconds"] for each in results] == [4.0, None, 5.0, None, 2.0, 3.0]
    assert [each["problem"] for each in results][1:4] == [
        "wrong", None, "its step could not be timed",
    ]  # fmt: skip


def test_what_was_measured_is_there_when_the_time_is_over(table, tmp_path, monkeypatch):
    def step_seconds(setup):
        if setup.way.batch > 1:
            raise KeyboardInterrupt
        return 1.0 if setup.way.in_one else 2.0

    monkeypatch.setattr(launches, "prepare", lambda each: [None] * len(each))
    monkeypatch.setattr(launches, "step_seconds", step_seconds)
    path = tmp_path / "times.json"
    with pytest.raises(KeyboardInterrupt):
        launches.measure(setups(tmp_path), path)
    (config,) = table()[hopper.NAME].values()
    assert config["config"] == {"in_one": True}
    assert len(json.loads(path.read_text())["results"]) == 2


def test_tables_in_another_folder_begin_with_those_in_use(table, tmp_path):
    tuned.write("NVIDIA H200", "a", "problem", {"config": {"size": 1}})
    with launches.tables_in(tmp_path / "other"):
        tuned.write("NVIDIA H200", "b", "problem", {"config": {"size": 2}})
        assert table().keys() == {"a", "b"}
    assert table().keys() == {"a"}


def test_a_process_that_hangs_is_killed_and_one_that_fails_shows_its_output(capsys):
    def start(code):
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    assert launches.output_of(start("print(1)"), time.monotonic() + 60) == "1\n"
    assert launches.output_of(start("print(2); 1 / 0"), time.monotonic() + 60) is None
    hanging = start("import time; time.sleep(600)")
    assert launches.output_of(hanging, time.monotonic()) is None
    assert hanging.returncode is not None
    assert capsys.readouterr().out == "2\n"


def test_the_table_names_the_problem_of_the_benchmark(table):
    """`llama-jax bench` has room for whole pages."""
    launches.take(Way(64, True, False))
    length = Workload(64, launches.PROMPT, launches.NEW_TOKENS).max_seq_len
    capacity = EngineOptions(64, length).pages_per_slot * launches.PAGE_SIZE
    shape = jax.ShapeDtypeStruct
    q = shape((64, 1, 32, 128), "bfloat16")
    pool = shape((1, launches.PAGE_SIZE, 8, 128), launches.KV_DTYPES["fp8"])
    assert hopper.is_faster(q, pool, capacity)
