"""benchmarks/h200.sh, as far as it goes without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels import bench

ROOT = Path(__file__).parents[1]
STAGES = ["check", "matmul", "weight_only", "attention", "elementwise", "model", "throughput"]


def run(out, *arguments, python=sys.executable):
    return subprocess.run(
        [ROOT / "benchmarks/h200.sh", *arguments],
        env={**os.environ, "OUT": str(out), "PYTHON": python},
        capture_output=True,
        text=True,
    )


def test_a_stage_that_fails_stops_no_other(tmp_path):
    done = run(tmp_path, "check", "nonsense", "model", python="false")
    assert done.returncode == 1
    assert "no stage 'nonsense'" in done.stderr
    assert done.stderr.splitlines()[-1] == "FAILED: check nonsense model"
    assert [line for line in done.stdout.splitlines() if line.endswith(" s")]


@pytest.mark.slow
def test_every_stage_at_tiny_sizes(tmp_path):
    done = run(tmp_path, "--simulate", *STAGES, "tune")
    assert done.returncode == 0, done.stderr
    checked = (tmp_path / "simulated_check.txt").read_text().splitlines()
    names = [" ".join(line.rsplit(maxsplit=1)[0].split()) for line in checked]
    assert names == [f"{case.kernel} {case.name}" for case in bench.tiny_cases()]
    assert "configurations are right" in (tmp_path / "simulated_tune.txt").read_text()
    for stage in ("elementwise", "model", "throughput"):
        assert json.loads((tmp_path / f"simulated_{stage}.json").read_text())
