"""Times decode steps of 8B with ten launches a layer, and with the fewer that its kernels can take.

    python benchmarks/launches.py --json h200_launches.json    on a Hopper GPU
    python benchmarks/launches.py --tiny                       the same calls with the shipped model

`in_one`: rotary embedding, the cache's write and attention are one launch (`rope_and_attention`).
`in_cluster`: a cluster of thread blocks adds the parts of split keys, instead of a second launch.
A step is that of `llama-jax bench`, each time in a new process. All programs are compiled first,
side by side, and the kernels of each way are compared with a reference; a way that is wrong or does
not end is not timed. The fastest so far goes into the table of `pallas_kernels.tuned`, for each
number of sequences, and all times into the file, after each measurement.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device, tuned
from pallas_kernels.dev.shapes import heads
from pallas_kernels.paged_attention import hopper_decode_config as decode
from pallas_kernels.paged_attention.cases import KV_DTYPES
from pallas_kernels.paged_attention.hopper_loop import PAGE_SIZE
from pallas_kernels.rope_and_attention import hopper
from pallas_kernels.rope_and_attention.cases import CONTEXT

PROMPT, NEW_TOKENS = 1024, 129
WORKLOAD = "--preset", "llama-3.1-8b", "--kv-dtype", "fp8", "--prompt-len", str(PROMPT)
TINY = "--prompt-len", "16"
CLUSTER = 8
# A process that takes longer than this hangs, as a kernel may whose barriers do not match.
PREPARATION_SECONDS, MEASUREMENT_SECONDS = 110, 45
BENCH, CHECK = "llama_jax.cli", "pallas_kernels.dev.bench"
# Runs one of these modules with tuned configurations from another folder.
START = (
    "import sys, pathlib; from pallas_kernels import tuned; "
    "tuned.FOLDER = pathlib.Path(sys.argv[1]); module = sys.argv[2]; del sys.argv[1:3]; "
    "import importlib; importlib.import_module(module).main()"
)


@dataclass(frozen=True)
class Way:
    """The launches of a layer's attention, with `batch` sequences."""

    batch: int
    in_one: bool
    in_cluster: bool


# Those that tell most come first. With 64 sequences keys are not split.
WAYS = (
    Way(1, False, False), Way(1, True, True), Way(64, False, False), Way(64, True, False),
    Way(1, True, False), Way(1, False, True),
)  # fmt: skip


def take(way: Way) -> None:
    """Write a way into the table of the GPU in use, for this workload."""
    (shape,) = (each for each in heads() if (each.model, each.tensor_parallel) == ("8B", 1))
    q: Any = jax.ShapeDtypeStruct((way.batch, 1, shape.num_heads, shape.head_dim), jnp.bfloat16)
    pool: Any = jax.ShapeDtypeStruct(
        (1, PAGE_SIZE, shape.num_kv_heads, shape.head_dim), KV_DTYPES["fp8"]
    )
    capacity = PROMPT + NEW_TOKENS
    config = decode.heuristic(q, pool, capacity, False)
    if way.in_cluster:
        config = replace(config, splits=CLUSTER, in_cluster=True)
    kind, problem = device.kind(), decode.tuned_as(q, pool, capacity)
    assert kind is not None
    tuned.write(kind, decode.NAME, problem, {"config": asdict(config)})
    tuned.write(kind, hopper.NAME, problem, {"config": asdict(hopper.Config(way.in_one))})


@contextlib.contextmanager
def tables_in(folder: Path) -> Iterator[None]:
    """Read and write tuned configurations in `folder`, which begins with those in use."""
    before = tuned.FOLDER
    if before.exists():
        shutil.copytree(before, folder, dirs_exist_ok=True)
    tuned.FOLDER = folder
    tuned.read.cache_clear()
    try:
        yield
    finally:
        tuned.FOLDER = before
        tuned.read.cache_clear()


@dataclass(frozen=True)
class Setup:
    """A way's processes. folder: of its tuned configurations."""

    way: Way
    folder: Path
    is_tiny: bool

    def start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", START, str(self.folder), module, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def bench(self) -> subprocess.Popen[str]:
        """Start `llama-jax bench`."""
        workload = (*TINY, "--new-tokens", "4") if self.is_tiny else WORKLOAD
        if not self.is_tiny:
            workload = (*workload, "--new-tokens", str(NEW_TOKENS))
        return self.start(BENCH, "bench", "--batch", str(self.way.batch), *workload, "--json")

    def check(self) -> subprocess.Popen[str]:
        """Start a comparison of the kernels with a reference."""
        name = "rope, cache and attention" + " in one" * self.way.in_one + "$"
        if self.is_tiny:
            return self.start(CHECK, "--simulate", "--only", f"^tiny .* {name}")
        size = f"^8B TP1 .* B={self.way.batch} S={CONTEXT} fp8 {name}"
        return self.start(CHECK, "--rows", "1", "--only", size)


def output_of(process: subprocess.Popen[str], end: float) -> str | None:
    """Return what a process prints; None if it fails, or has not ended at `end` and is killed.

    end: by `time.monotonic`.
    """
    try:
        output, _ = process.communicate(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    if process.returncode == 0:
        return output
    print(output, end="", flush=True)
    return None


def prepare(setups: Sequence[Setup]) -> list[str | None]:
    """Compile what is to be timed, side by side. Returns what is wrong with each way, if
    anything."""
    # The GPU's memory is for all of them.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    checks = [setup.check() for setup in setups]
    benches = [setup.bench() for setup in setups]
    end = time.monotonic() + PREPARATION_SECONDS
    outputs = [output_of(process, end) for process in (*checks, *benches)]
    return [
        None if output is not None else "wrong, failed, or not done in time"
        for output in outputs[: len(setups)]
    ]


def step_seconds(setup: Setup) -> float | None:
    """Return the seconds of a decode step, as `llama-jax bench` measures them; None if it fails."""
    output = output_of(setup.bench(), time.monotonic() + MEASUREMENT_SECONDS)
    if output is None:
        return None
    (measured,) = json.loads(output)["measurements"]
    return float(measured["decode_step_seconds"])


def measure(setups: Sequence[Setup], path: Path | None) -> bool:
    """Prepare and time all ways, keep the fastest, and write the times to a file. Returns whether
    all could be timed."""
    found: list[dict[str, Any]] = []
    fastest: dict[int, float] = {}
    for setup, problem in zip(setups, prepare(setups), strict=True):
        way = setup.way
        seconds = None if problem else step_seconds(setup)
        if seconds is None:
            problem = problem or "its step could not be timed"
            print(f"{way}: {problem}", flush=True)
        else:
            print(f"{way}: {seconds * 1e3:.3f} ms a step", flush=True)
            if seconds < fastest.get(way.batch, float("inf")):
                fastest[way.batch] = seconds
                if not setup.is_tiny:
                    take(way)
        found.append({**asdict(way), "step_seconds": seconds, "problem": problem})
        if path:
            document = {"device": device.kind(), "prompt": PROMPT, "results": found}
            path.write_text(json.dumps(document, indent=1) + "\n")
    return all(each["step_seconds"] is not None for each in found)


def main() -> None:
    options = argparse.ArgumentParser(description="Time decode steps with more and fewer launches.")
    options.add_argument("--tiny", action="store_true", help="the shipped model, on any machine")
    options.add_argument("--json", type=Path, help="also write the times to this file")
    chosen = options.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if not chosen.tiny and (reason := device.not_hopper()):
        options.error(f"needs a Hopper GPU: {reason}. --tiny runs on any machine.")
    ways = [Way(1, in_one, False) for in_one in (False, True)] if chosen.tiny else WAYS
    with tempfile.TemporaryDirectory() as root:
        setups = []
        for i, way in enumerate(ways):
            setups.append(Setup(way, Path(root, str(i)), chosen.tiny))
            with tables_in(setups[-1].folder):
                if not chosen.tiny:
                    take(way)
        if not measure(setups, chosen.json):
            sys.exit(1)


if __name__ == "__main__":
    main()
