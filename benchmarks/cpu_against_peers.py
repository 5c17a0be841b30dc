"""Compares CPU engines on Llama's shape: python benchmarks/cpu_against_peers.py

The engines of `cpu_peers.py` have the same random weights, two threads and a process each: this one
with all matrices in FP8 (the embedding too, which llama.cpp and OpenVINO hold in int8),
transformers in bfloat16 and float32, llama.cpp with Q8_0 and BF16 (in huge pages), and OpenVINO
with int8 weights. After a round to compile and warm up, the engines take turns with each workload,
so that a change in the machine's speed affects all of them; rounds continue as long as time
remains. Figures are medians, and a ratio is the median of those of each round. Reading memory alone
takes turns, too: the bytes of the weights divided by its speed are the floor of a decode step. The
peak is the largest resident set of a process. The correlation of a prompt's logprobs with those of
transformers in float32 shows that the models are the same.

An engine that is not installed, fails, or has too little memory is listed with the reason, and the
others go on. llama-cpp-python compiles llama.cpp if there is no wheel for the machine.
`--instructions avx2` keeps all engines from AVX-512, as on a machine without it; llama.cpp has to
be compiled so (CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON").

    pip install -e ".[peers]"
    python benchmarks/cpu_against_peers.py --save benchmarks/results/cpu_against_peers
"""

import argparse
import importlib.util
import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import IO, Any

import cpu_peers
import numpy as np
import tables

from llama_jax.model.config import PRESETS

OURS = "llama-jax"
TRANSFORMERS = ("transformers bf16", "transformers f32")
LLAMA_CPP = ("llama.cpp Q8_0", "llama.cpp BF16")
OPENVINO = "OpenVINO int8"
READING = "reading"  # reading memory alone


@dataclass(frozen=True)
class Peer:
    """An engine to compare.

    load: makes the engine from a directory.
    modules: required packages.
    gigabytes: the most memory that it takes with the weights of Llama 3.2 1B, including its files.
    weight_bytes: what each further weight takes.
    write: makes its files.
    """

    load: Callable[[Path], cpu_peers.Engine]
    modules: Sequence[str]
    gigabytes: float
    weight_bytes: float
    write: Callable[[Path], None] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def _llama_cpp(kind: str, gigabytes: float, weight_bytes: float) -> Peer:
    return Peer(
        partial(cpu_peers.LlamaCpp, file=f"{kind}.gguf"), ("llama_cpp", "gguf"), gigabytes,
        weight_bytes, partial(cpu_peers.write_gguf, file=f"{kind}.gguf"),
        {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    )  # fmt: skip


def _write_openvino(directory: Path) -> None:
    import cpu_openvino  # which needs OpenVINO

    cpu_openvino.write(directory)


PEERS: Mapping[str, Peer] = {
    OURS: Peer(cpu_peers.LlamaJax, (), 2.5, 1.1),
    TRANSFORMERS[0]: Peer(
        partial(cpu_peers.Transformers, dtype="bfloat16"), ("torch", "transformers"), 4.0, 2
    ),
    TRANSFORMERS[1]: Peer(
        partial(cpu_peers.Transformers, dtype="float32"), ("torch", "transformers"), 7.0, 4
    ),
    LLAMA_CPP[0]: _llama_cpp("Q8_0", 3.0, 1.1),
    LLAMA_CPP[1]: _llama_cpp("BF16", 5.0, 2),
    OPENVINO: Peer(cpu_peers.OpenVINO, ("openvino",), 4.0, 3, _write_openvino),
}
WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    "decode, batch 1": {"kind": "decode", "batch": 1, "steps": 12},
    "decode, batch 8": {"kind": "decode", "batch": 8, "steps": 8},
    "prefill, 512 tokens": {"kind": "prefill"},
    "scoring, 512 tokens": {"kind": "score"},
}
# For each workload, the least ratio to the best of some engines.
TARGETS: Sequence[tuple[str, Sequence[str], float]] = (
    ("decode, batch 1", LLAMA_CPP[:1], 1.1),
    ("decode, batch 8", (*LLAMA_CPP, OPENVINO), 1.0),
    ("prefill, 512 tokens", TRANSFORMERS, 1.0),
    ("prefill, 512 tokens", (OPENVINO,), 0.9),
    ("scoring, 512 tokens", TRANSFORMERS, 1.0),
    ("scoring, 512 tokens", (OPENVINO,), 0.9),
)
TARGETS_OF_LARGER: Sequence[tuple[str, Sequence[str], float]] = (
    ("decode, batch 1", LLAMA_CPP[:1], 0.9),
)
MOST_GIGABYTES = 1.8
# What keeps XLA, torch, MKL, and oneDNN in torch and OpenVINO from AVX-512. XLA's library YNN asks
# the processor alone, so it is left out: with its code for AVX2 our prompts might be faster.
AVX2_ALONE = {
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2 --xla_cpu_experimental_ynn_fusion_type=",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2",
}  # fmt: skip
SECONDS_TO_ANSWER = 300.0


# --- A worker: one engine, which reads workloads from stdin and replies on the original stdout.


def work(name: str, directory: Path) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: cpu_peers.THREADS])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines may print to stdout
    engine = PEERS[name].load(directory)
    prompt = cpu_peers.prompts(1, cpu_peers.PROMPT)[0]
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        workload = WORKLOADS[line.strip()]
        answer: dict[str, Any] = {}
        if workload["kind"] == "decode":
            batch = workload["batch"]
            answer["rate"] = batch / engine.decode(batch, workload["steps"])
        elif workload["kind"] == "prefill":
            answer["rate"] = len(prompt) / engine.prefill(prompt)
        else:
            seconds, logprobs = engine.score(prompt)
            answer |= {"rate": len(prompt) / seconds, "logprobs": logprobs.tolist()}
        # getrusage's peak would begin with that of the parent process.
        answer["peak"] = _kilobytes(Path("/proc/self/status"), "VmHWM") * 1024
        print(json.dumps(answer), file=answers, flush=True)


class Failed(Exception):
    """Raised with an engine's last words, or with what is missing."""


class Worker:
    def __init__(self, name: str, directory: Path) -> None:
        self.name, self.log = name, directory / f"{name}.log"
        peer = PEERS[name]
        if missing := [each for each in peer.modules if not importlib.util.find_spec(each)]:
            raise Failed(f"{', '.join(missing)} is not installed")
        more = cpu_peers.num_weights() - cpu_peers.num_weights(cpu_peers.SMALL)
        needed = peer.gigabytes + more * peer.weight_bytes / 1e9
        if (free := _free_gigabytes()) < needed:
            raise Failed(f"it may take {needed:.1f} GB of memory, and {free:.1f} are free")
        if peer.write:
            self._write(directory)
        self._process = self._start("--worker", directory)
        self.ask(None)

    def _start(self, role: str, directory: Path) -> subprocess.Popen[str]:
        with self.log.open("w") as log:
            return subprocess.Popen(
                [
                    sys.executable, __file__, role, self.name, "--directory", str(directory),
                    "--preset", cpu_peers.preset(),
                ],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=os.environ
                | {"OMP_NUM_THREADS": str(cpu_peers.THREADS), "JAX_PLATFORMS": "cpu"}
                | PEERS[self.name].environment,
            )  # fmt: skip

    def _write(self, directory: Path) -> None:
        """Write the engine's files in another process, whose memory does not count."""
        writing = self._start("--write", directory)
        try:
            status = writing.wait(SECONDS_TO_ANSWER)
        except subprocess.TimeoutExpired:
            writing.kill()
            status = writing.wait()
        if status:
            raise Failed(f"its files were not written: {self._last_words()}")

    def ask(self, workload: str | None) -> dict[str, Any]:
        """Run a workload and return its result; None waits until the engine is loaded."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        try:
            if workload:
                print(workload, file=stdin, flush=True)
            answer = _line(stdout, SECONDS_TO_ANSWER)
        except OSError:
            answer = ""
        if answer:
            found: dict[str, Any] = json.loads(answer)
            return found
        is_alive = self._process.poll() is None
        self.close()
        if is_alive:
            raise Failed(f"no answer to {workload or 'loading'} in {SECONDS_TO_ANSWER:.0f} s")
        raise Failed(f"it ended: {self._last_words()}")

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "without a word"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _line(stream: IO[str], seconds: float) -> str:
    """Return the next line; empty at the end of the stream or after the time limit."""
    ready, _, _ = select.select([stream], [], [], seconds)
    return stream.readline() if ready else ""


def _free_gigabytes() -> float:
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024 / 1e9


def _kilobytes(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{file} does not say {name}")


# --- All of them in turn.


@dataclass
class Found:
    """The measurements.

    rates: {engine: {workload: tokens/s of each round}}; of `READING` in bytes/s.
    missing: the reason why an engine is missing.
    """

    rates: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    load: float = 0.0


def compare(
    engines: Sequence[str], workloads: Sequence[str], directory: Path, deadline: float
) -> Found:
    found, workers, logprobs = Found(), {}, {}
    for name in engines:
        print(f"{name}: loading", file=sys.stderr)
        try:
            workers[name] = Worker(name, directory)
        except Failed as error:
            found.missing[name] = str(error)
    read = _reader()
    rounds, began, longest = 0, time.monotonic(), 0.0
    while rounds < 2 or began + longest < deadline:
        for workload in workloads:
            for name, worker in list(workers.items()):
                if not rounds and workload.startswith("scoring") and name != OURS:
                    continue  # it needs no programs beyond those of prefill
                try:
                    answer = worker.ask(workload)
                except Failed as error:
                    found.missing[name] = str(error)
                    del workers[name]
                    continue
                print(f"{rounds} {workload:20} {name:18} {answer['rate']:7.1f}", file=sys.stderr)
                found.peaks[name] = answer["peak"]
                logprobs[name] = answer.get("logprobs", logprobs.get(name))
                if rounds:
                    found.rates.setdefault(name, {}).setdefault(workload, []).append(answer["rate"])
            if rounds:
                found.rates.setdefault(READING, {}).setdefault(workload, []).append(read())
        rounds, ended = rounds + 1, time.monotonic()
        # The first round compiles, so its duration does not predict the others.
        longest, began = max(longest, ended - began) if rounds > 1 else 0.0, ended
    found.load = os.getloadavg()[0]
    for worker in workers.values():
        worker.close()
    for name in found.missing:
        found.rates.pop(name, None)
    if (yardstick := logprobs.get(TRANSFORMERS[1]) or logprobs.get(TRANSFORMERS[0])) is not None:
        for name in found.rates.keys() & logprobs.keys():
            found.agreement[name] = float(np.corrcoef(yardstick, logprobs[name])[0, 1])
    return found


def _reader() -> Callable[[], float]:
    """Return a function that measures reading 512 MiB in huge pages, in bytes/s, the best of
    three."""
    from cpu_fp8_matmul import read

    from llama_jax.checkpoint.huge_pages import Room

    memory = Room([1 << 29]).empty((1 << 29,), np.dtype(np.int8))
    memory[:] = 1
    run = read(memory, cpu_peers.THREADS)

    def rate() -> float:
        began = time.perf_counter()
        run()
        return memory.nbytes / (time.perf_counter() - began)

    return lambda: max(rate() for _ in range(3))


# --- The table.


def ratios(found: Found, workload: str, others: Sequence[str]) -> list[float]:
    """Return the ratio of our rate to the best of the others in each round; empty if one is
    missing."""
    rates = [found.rates[name][workload] for name in others if name in found.rates]
    if OURS not in found.rates or not rates:
        return []
    best = [max(each) for each in zip(*rates, strict=True)]
    return [a / b for a, b in zip(found.rates[OURS][workload], best, strict=True)]


def to_markdown(result: Mapping[str, Any]) -> str:
    found, about = Found(**result["found"]), result["environment"]
    names = [name for name in PEERS if name in found.rates]
    rounds = len(next(iter(found.rates[READING].values())))
    reading = statistics.median(chain.from_iterable(found.rates[READING].values()))
    lines = [
        f"`{result['command']}`",
        "",
        f"Random weights in the shape of {about['preset']}, {cpu_peers.THREADS} threads of "
        f"{about['device']} ({', '.join(about['instructions'])}; our kernel took "
        f"{about['kernel']}); {f'medians of {rounds} rounds' if rounds > 1 else 'one round'}; "
        f"load of the machine {found.load:.1f}. "
        + ", ".join(f"{name} {each}" for name, each in about["versions"].items())
        + ".",
        "",
        f"| tokens/s | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    workloads = list(found.rates[READING])
    for workload in workloads:
        cells = [f"{statistics.median(found.rates[name][workload]):.1f}" for name in names]
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    lines.append(
        f"| peak memory, GB | {' | '.join(f'{found.peaks[name] / 1e9:.2f}' for name in names)} |"
    )
    cells = [f"{found.agreement[n]:.3f}" if n in found.agreement else "-" for n in names]
    lines += [f"| correlation of logprobs | {' | '.join(cells)} |", ""]
    lines += ["| llama-jax over the best of | measured | target |", "|---|---|---|"]
    is_small = about["preset"] == "llama-3.2-1b"
    for workload, others, target in TARGETS if is_small else TARGETS_OF_LARGER:
        if workload not in workloads:
            continue
        present = [name for name in others if name in names]
        each = ratios(found, workload, present)
        measured = f"{statistics.median(each):.2f}" if each else "not measured"
        if missing := [name for name in others if name not in names]:
            measured += f" (without {', '.join(missing)})"
        lines.append(f"| {workload}: {', '.join(others)} | {measured} | {target} |")
    if OURS in names:
        peak = found.peaks[OURS] / 1e9
        if is_small:
            lines.append(f"| peak memory, GB | {peak:.2f} | at most {MOST_GIGABYTES} |")
        floor = reading / about["weight_bytes"]
        share = statistics.median(found.rates[OURS]["decode, batch 1"]) / floor
        lines += [
            "",
            f"Reading alone reaches {reading / 1e9:.1f} GB/s. A token reads "
            f"{about['weight_bytes'] / 1e9:.2f} GB of our weights, so {floor:.1f} tokens/s are the "
            f"most at batch 1; decoding reaches {share:.0%} of it. The output matrix is in FP8, "
            "as Q8_0 and int8 have theirs in 8 bits.",
        ]
    lines += [""] + [f"- {name} is missing: {why}" for name, why in found.missing.items()]
    return "\n".join(lines).rstrip() + "\n"


def environment(best: str | None) -> dict[str, Any]:
    """Describe the machine. To be called after measuring, because it loads JAX.

    best: the best instructions that engines might use; None if it was theirs to choose.
    """
    from start import INSTRUCTIONS

    from llama_jax import bench
    from pallas_kernels.cpu import library

    flags = Path("/proc/cpuinfo").read_text().split()
    versions = {}
    for name in ("jax", "torch", "transformers", "llama-cpp-python", "openvino"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device": bench.environment().device,
        "instructions": [best] if best else [each for each in INSTRUCTIONS if each in flags],
        "kernel": library.why_not() or library.best(),
        "weight_bytes": bench.decode_weight_bytes(cpu_peers.our_spec(), 1),
        "versions": {"python": sys.version.split()[0]} | versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.5, help="total time, if two rounds fit")
    parser.add_argument("--preset", choices=PRESETS, default="llama-3.2-1b", help="shape")
    parser.add_argument("--engines", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--instructions", choices=["avx2"], help="the best to use, on all machines")
    parser.add_argument("--save", type=Path, help="writes PATH.json and PATH.md")
    parser.add_argument("--directory", type=Path, help="for 5 GB of files; by default a new one")
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--write", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cpu_peers.use(options.preset)
    if options.instructions:
        os.environ.update(AVX2_ALONE)
    if options.worker:
        work(options.worker, options.directory)
        return
    if options.write:
        write = PEERS[options.write].write
        assert write
        write(options.directory)
        return
    deadline = time.monotonic() + 60 * options.minutes
    directory = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        found = compare(options.engines, options.workloads, directory, deadline)
    finally:
        shutil.rmtree(directory)
    result = {
        "command": f"python {' '.join(sys.argv)}",
        "environment": environment(options.instructions) | {"preset": options.preset},
        "found": vars(found),
    }
    print(to_markdown(result))
    if options.save:
        tables.save(options.save, to_markdown(result), result)


if __name__ == "__main__":
    main()
