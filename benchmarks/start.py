"""Measures how long commands take to start: python benchmarks/start.py

Every start is a process of its own, on two cores. The commands take turns, so that a change in the
machine's speed affects all of them, and figures are medians. A "first" start has no cache, so it
converts and compiles; a "second" one finds the cache of the first. Python's bytecode exists before
anything is measured, as after installing with pip. transformers reads the same small model in
bfloat16 and replies to the same message in eager mode. llama-cli needs a GGUF file of it (--gguf),
and is left out with a remark if it is not on the PATH.

first token: seconds until something appears on stdout. end: seconds until the process has ended.
CPU: user and system time of all its threads, which hardly depends on what else runs on the machine.

    pip install -e ".[parity]"
    python benchmarks/start.py --save benchmarks/results/start
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tables

CORES = 2
# The most tokens of a reply; the model's has fewer.
TOKENS = 16
ROOT = Path(__file__).parents[1]
BF16 = ROOT / "llama_jax" / "abacus" / "checkpoint_bf16"
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_tile")
LIBRARIES = ("jax", "jaxlib", "flax", "torch", "transformers")
# The most seconds until the end, on two idle cores.
TARGETS = {"inspect /nonexistent": 1.0, "chat -m hi, first": 8.0, "chat -m hi, second": 3.5}

# A program as in transformers' documentation.
TRANSFORMERS = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
torch.set_num_threads({CORES})
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
messages = [{{"role": "user", "content": "hi"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
model.generate(
    **inputs, max_new_tokens={TOKENS}, do_sample=False,
    streamer=TextStreamer(tokenizer, skip_prompt=True),
)
"""


@dataclass(frozen=True)
class Start:
    """One start of a command: seconds to its first output (None without any) and to its end, and
    CPU seconds."""

    first_output: float | None
    end: float
    cpu: float


def start(command: Sequence[str], environment: Mapping[str, str], expected: int = 0) -> Start:
    """Run a command to its end. Raises RuntimeError for an unexpected exit status."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, preexec_fn=_two_cores,
    )  # fmt: skip
    assert process.stdout and process.stderr
    first = process.stdout.read(1)
    first_output = time.perf_counter() - began if first else None
    process.stdout.read()
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expected:
        raise RuntimeError(f"{command} ended with {process.returncode}: {error.decode()}")
    return Start(first_output, time.perf_counter() - began, usage.ru_utime + usage.ru_stime)


def _two_cores() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


@contextmanager
def commands(gguf: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the commands by name, each with a function that starts it once."""
    with tempfile.TemporaryDirectory() as directory:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JAX_", "XLA_", "LLAMA_JAX_"))
            and name != "PYTHONDONTWRITEBYTECODE"
        }
        common = inherited | {
            "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(CORES),
            "PYTHONPYCACHEPREFIX": f"{directory}/bytecode", "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        ours = [sys.executable, "-m", "llama_jax.cli"]
        chat = [*ours, "chat", "-m", "hi"]
        cache = {"LLAMA_JAX_CACHE": f"{directory}/cache"}

        def first_chat() -> Start:
            shutil.rmtree(cache["LLAMA_JAX_CACHE"], ignore_errors=True)
            return start(chat, common | cache)

        found = {
            "--help": lambda: start([*ours, "--help"], common),
            "inspect /nonexistent": lambda: start([*ours, "inspect", "/nonexistent"], common, 2),
            "chat -m hi, first": first_chat,
            "chat -m hi, second": lambda: start(chat, common | cache),
        }
        try:
            version("transformers"), version("torch")
        except ModuleNotFoundError:
            print("without transformers and torch (extra `parity`)", file=sys.stderr)
        else:
            script = [sys.executable, "-c", TRANSFORMERS, str(BF16)]
            found["transformers"] = lambda: start(script, common)
        llama_cli = shutil.which("llama-cli")
        if llama_cli is None or gguf is None:
            print("without llama-cli: it is not on the PATH, or no --gguf", file=sys.stderr)
        else:
            words = [
                llama_cli, "-m", str(gguf), "-p", "hi", "-n", str(TOKENS), "-t", str(CORES),
                "-no-cnv",
            ]  # fmt: skip
            found["llama-cli"] = lambda: start(words, common)
        yield found


def measure(repeats: int, gguf: Path | None) -> dict[str, Any]:
    """Measure all rounds but the first, which writes bytecode and fills the page cache."""
    starts: dict[str, list[Start]] = {}
    loads = []
    with commands(gguf) as found:
        for round_ in range(repeats + 1):
            for name, run in found.items():
                measured = run()
                print(f"{round_} {name:22} {measured}", file=sys.stderr)
                if round_:
                    starts.setdefault(name, []).append(measured)
            loads.append(os.getloadavg()[0])
    return {
        "starts": {name: [vars(each) for each in runs] for name, runs in starts.items()},
        "load": statistics.median(loads),
    }


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that the figures depend on."""
    cpu, flags = platform.processor(), set()
    if (info := Path("/proc/cpuinfo")).exists():
        fields = dict(
            line.split("\t: ", 1)
            for line in info.read_text().replace("\t\t:", "\t:").splitlines()
            if "\t: " in line
        )
        cpu, flags = fields.get("model name", cpu), set(fields.get("flags", "").split())
    found = {
        "cpu": cpu, "cores": CORES, "python": platform.python_version(),
        "instructions": [each for each in INSTRUCTIONS if each in flags],
    }  # fmt: skip
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


def to_markdown(result: Mapping[str, Any]) -> str:
    about = result["machine"]
    versions = [f"{name} {about[name]}" for name in ("python", *LIBRARIES) if name in about]
    lines = [
        f"`{result['command']}`",
        "",
        f"{about['cores']} cores of {about['cpu']} ({', '.join(about['instructions'])}); medians "
        f"of {result['repeats']} rounds, the smallest in brackets; load of the machine "
        f"{result['load']:.1f}, of which one is the benchmark's own. {', '.join(versions)}.",
        "",
        "| seconds | first token | end | CPU | target |",
        "|---|---|---|---|---|",
    ]
    for name, starts in result["starts"].items():
        cells = []
        for column in ("first_output", "end", "cpu"):
            values = [each[column] for each in starts]
            missing = any(value is None for value in values)
            cells.append("-" if missing else f"{statistics.median(values):.2f} ({min(values):.2f})")
        target = TARGETS.get(name)
        lines.append(f"| {name} | {' | '.join(cells)} | {f'< {target}' if target else ''} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gguf", type=Path, help="the model for llama-cli")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes every start")
    parser.add_argument("--save", type=Path, help="writes PATH.json and PATH.md")
    options = parser.parse_args()
    result = measure(options.repeats, options.gguf)
    result |= {
        "machine": machine(), "repeats": options.repeats, "command": f"python {' '.join(sys.argv)}",
    }  # fmt: skip
    print(to_markdown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.save:
        tables.save(options.save, to_markdown(result), result)


if __name__ == "__main__":
    main()
