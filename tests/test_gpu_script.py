"""benchmarks/gpu.sh, as far as it goes without a GPU."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pallas_kernels.dev import bench

ROOT = Path(__file__).parents[1]


def run(out, *arguments, python=sys.executable, **env):
    return subprocess.run(
        [ROOT / "benchmarks/gpu.sh", *arguments],
        env={**os.environ, "OUT": str(out), "PYTHON": python, **env},
        capture_output=True,
        text=True,
    )


def test_a_stage_that_fails_stops_no_other(tmp_path):
    done = run(tmp_path, "kernels", "nonsense", "model", python="false")
    assert done.returncode == 1
    assert "no stage 'nonsense'" in done.stderr
    assert done.stderr.splitlines()[-1] == "FAILED: kernels nonsense model"
    assert [line for line in done.stdout.splitlines() if line.endswith(" s")]


def test_without_stages_it_explains_itself(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2
    assert "benchmarks/gpu.sh first" in done.stderr and "set -uo" not in done.stderr


@pytest.mark.slow
def test_a_process_that_cannot_be_terminated_is_killed(tmp_path):
    """Such as one that waits for a kernel whose barriers do not match."""
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/bash\ntrap '' TERM\nsleep 600\nsleep 600\n")
    hanging.chmod(0o755)
    began = time.monotonic()
    done = run(tmp_path, "tune", "elementwise", python=str(hanging), SECONDS_PER_STAGE="1")
    assert done.stderr.splitlines()[-1] == "FAILED: tune elementwise"
    assert time.monotonic() - began < 300


@pytest.mark.slow
def test_the_stage_of_kernels_names_cases_of_every_kernel():
    """What a GPU's first minutes are spent on is chosen by names: each part has to find some."""
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    (rows,) = (
        list(map(int, each.split())) for each in re.findall(r"--rows ([\d ]+) --only", script)
    )
    parts = [each.strip("|") for each in re.findall(r"cases\+?='(.+)'", script)]
    names = [case.name for case in bench.cases(rows)]
    for part in parts:
        assert any(re.search(part, name) for name in names), part
    found = list(bench.cases(rows, "|".join(parts)))
    assert {case.kernel for case in found} == {
        "fp8_matmul", "fp8_swiglu", "fp8_matmul_weight_only",
        "paged_attention_prefill", "paged_attention_decode", "rope_and_cache", "rope_and_attention",
        "add_rms_norm", "silu_and_mul",
    }  # fmt: skip
    assert 40 <= len(found) <= 55  # 60 took 115 s


@pytest.mark.slow
def test_every_stage_at_tiny_sizes(tmp_path):
    for call in ("first", "second", "launches", "tune", "elementwise"):
        env = {"SECONDS_PER_STAGE": "540"}  # a CPU's time
        done = run(tmp_path, "--simulate", call, **env)
        assert done.returncode == 0, done.stderr
    checked = (tmp_path / "simulated_kernels.txt").read_text().splitlines()
    names = [" ".join(line.rsplit(maxsplit=1)[0].split()) for line in checked]
    assert names == [f"{case.kernel} {case.name}" for case in bench.tiny_cases()]
    assert "configurations are right" in (tmp_path / "simulated_tune.txt").read_text()
    measured = "model_1x16", "model_2x16", "scoring"
    found = {
        stage: json.loads((tmp_path / f"simulated_{stage}.json").read_text())
        for stage in (*measured, "throughput", "launches", "elementwise")
    }
    # What is timed has been compiled before, by other processes with the same shapes.
    for stage in measured:
        assert found[stage]["compile"]["compiled"] == 0 < found[stage]["compile"]["from_cache"]
    assert [each["workload"]["output_tokens"] for each in found["scoring"]["results"]] == [0]
    ways = [(each["in_one"], each["problem"]) for each in found["launches"]["results"]]
    assert ways == [(False, None), (True, None)]
