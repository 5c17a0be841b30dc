"""Llama 3.2 1B's shape on a CPU, beside transformers: python benchmarks/cpu_against_transformers.py

Each engine runs in a process of its own, on two cores, with random weights: this one with FP8
matrices and the rest in bfloat16, transformers (torch, eager) in bfloat16 and in float32. After a
run of everything to compile and to warm up, workloads go round the engines in turn, so that a
change in the machine's speed meets all of them; the figures are medians. The ratio is that of each
round, its median too. The peak is the largest resident set of the process, from its start. The load
is that of the machine, averaged over a minute; 2 is this benchmark's own.

    pip install -e ".[parity]"
    python benchmarks/cpu_against_transformers.py --save benchmarks/results/cpu_against_transformers
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

PRESET = "llama-3.2-1b"
CORES = 2
# "decode" counts the tokens that are drawn after the first, the others those of the prompt.
WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    "decode, batch 1": {"kind": "decode", "batch_size": 1, "prompt_len": 128, "new_tokens": 25},
    "decode, batch 8": {"kind": "decode", "batch_size": 8, "prompt_len": 128, "new_tokens": 9},
    "prefill, 512 tokens": {"kind": "prefill", "batch_size": 1, "prompt_len": 512, "new_tokens": 2},
    "scoring, 512 tokens": {"kind": "score", "batch_size": 1, "prompt_len": 512, "new_tokens": 2},
}
# At least so many times transformers in bfloat16, in the order of the workloads.
TARGETS = (1.3, 0.7, 0.6, 0.6)
ENGINES = ("llama-jax", "transformers bf16", "transformers f32")

Run = Callable[[Mapping[str, Any]], float]


def llama_jax_runner() -> Run:
    """Tokens per second of one workload, in this project's engine."""
    # As where jax is installed for a CPU: the GPU's libraries would take 0.35 GB.
    sys.modules["jax_plugins.xla_cuda13"] = None
    import jax.numpy as jnp

    from llama_jax import bench
    from llama_jax.engine import compile_cache
    from llama_jax.engine.memory import share_one_arena
    from llama_jax.engine.request import Request
    from llama_jax.model.config import PRESETS

    share_one_arena()  # as the commands do
    compile_cache.enable()
    spec = bench.preset_spec(PRESETS[PRESET])
    params = bench.random_params(spec)

    def sizes_of(workload: Mapping[str, Any]) -> bench.Workload:
        return bench.Workload(*(workload[name] for name in bench.Workload.__match_args__))

    # An engine for each batch size, with room for the longest of its workloads.
    engines = {
        sizes.batch_size: bench.make_engine(params, spec, sizes, jnp.dtype("bfloat16"), 512)
        for sizes in sorted(map(sizes_of, WORKLOADS.values()), key=lambda sizes: sizes.max_seq_len)
    }

    def run(workload: Mapping[str, Any]) -> float:
        sizes = sizes_of(workload)
        engine = engines[sizes.batch_size]
        if workload["kind"] == "score":
            began = time.perf_counter()
            request = Request(list(range(sizes.prompt_len)), wanted="logprobs")
            for _ in engine.run([request]):
                pass
            return sizes.prompt_len / (time.perf_counter() - began)
        if workload["kind"] == "prefill":
            first = bench.run_once(engine, sizes, new_tokens=1)
            return sizes.batch_size * sizes.prompt_len / first.prefill_seconds
        short, long = (
            bench.run_once(engine, sizes, new_tokens).seconds
            for new_tokens in (sizes.short_output, sizes.new_tokens)
        )
        return sizes.batch_size * sizes.measured_steps / (long - short)

    return run


def transformers_runner(dtype: str) -> Run:
    """The same with transformers: its forward pass and cache, no more logits than are wanted."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from llama_jax.model.config import PRESETS

    torch.set_num_threads(CORES)
    torch.manual_seed(0)
    config = LlamaConfig.from_dict(PRESETS[PRESET].to_hf())
    model = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()

    def run(workload: Mapping[str, Any]) -> float:
        batch_size, prompt_len = workload["batch_size"], workload["prompt_len"]
        ids = torch.randint(config.vocab_size, (batch_size, prompt_len))
        began = time.perf_counter()
        if workload["kind"] == "score":
            logprobs = torch.log_softmax(model(ids).logits[:, :-1].float(), dim=-1)
            logprobs.gather(2, ids[:, 1:, None]).sum().item()
            return prompt_len / (time.perf_counter() - began)
        out = model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefilled = time.perf_counter()
        if workload["kind"] == "prefill":
            return batch_size * prompt_len / (prefilled - began)
        steps = workload["new_tokens"] - 1
        for _ in range(steps):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        token.tolist()
        return batch_size * steps / (time.perf_counter() - prefilled)

    return torch.no_grad()(run)


def work(engine: str) -> None:
    """A worker: workloads' names on lines of stdin, a figure and the peak so far on stdout."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    if engine == "llama-jax":
        run = llama_jax_runner()
    else:
        run = transformers_runner({"bf16": "bfloat16", "f32": "float32"}[engine.split()[1]])
    for line in sys.stdin:
        rate = run(WORKLOADS[line.strip()])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"tokens_per_second": rate, "peak_bytes": peak}), flush=True)


def ask(worker: subprocess.Popen[str], workload: str) -> dict[str, float]:
    assert worker.stdin and worker.stdout
    print(workload, file=worker.stdin, flush=True)
    return json.loads(worker.stdout.readline())


def compare(engines: list[str], repeats: int) -> dict[str, Any]:
    """Every figure of every round: {engine: {workload: [tokens per second]}}, and the peaks."""
    workers = {
        engine: subprocess.Popen(
            [sys.executable, __file__, "--worker", engine],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            # Threads that spin while they wait would take the cores from the next engine.
            env=os.environ
            | {"OMP_NUM_THREADS": str(CORES), "OMP_WAIT_POLICY": "PASSIVE", "JAX_PLATFORMS": "cpu"},
        )
        for engine in engines
    }  # fmt: skip
    rates: dict[str, dict[str, list[float]]] = {e: {w: [] for w in WORKLOADS} for e in engines}
    peaks: dict[str, dict[str, float]] = {engine: {} for engine in engines}
    loads = []
    for round_ in range(repeats + 1):
        for workload in WORKLOADS:
            for engine, worker in workers.items():
                answer = ask(worker, workload)
                if round_:
                    rates[engine][workload].append(answer["tokens_per_second"])
                peaks[engine][workload] = answer["peak_bytes"]
                print(f"{round_} {workload:20} {engine:18} {answer}", file=sys.stderr)
        loads.append(os.getloadavg()[0])
    for worker in workers.values():
        assert worker.stdin
        worker.stdin.close()
        worker.wait()
    return {"tokens_per_second": rates, "peak_bytes": peaks, "load": statistics.median(loads)}


def to_markdown(result: Mapping[str, Any]) -> str:
    rates, peaks = result["tokens_per_second"], result["peak_bytes"]
    about = result["environment"]
    lines = [
        f"`{result['command']}`",
        "",
        f"Random weights in the shape of {PRESET}, {CORES} cores of {about['device']}; medians of "
        f"{result['repeats']} rounds; load of the machine {result['load']:.1f}. "
        + ", ".join(f"{name} {about[name]}" for name in ("python", "jax", "torch", "transformers"))
        + ".",
        "",
        f"| tokens/s | {' | '.join(rates)} | llama-jax / bf16 | target |",
        f"|---|{'---|' * (len(rates) + 2)}",
    ]
    for workload, target in zip(WORKLOADS, TARGETS, strict=True):
        cells = [f"{statistics.median(each[workload]):.1f}" for each in rates.values()]
        pairs = zip(rates["llama-jax"][workload], rates["transformers bf16"][workload], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        lines.append(f"| {workload} | {' | '.join(cells)} | {ratio:.2f} | {target} |")
    most = {engine: max(each.values()) for engine, each in peaks.items()}
    cells = [f"{each / 1e9:.2f} GB" for each in most.values()]
    ratio = most["llama-jax"] / most["transformers bf16"]
    lines.append(f"| peak memory | {' | '.join(cells)} | {ratio:.2f} | < 2.8 GB |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--without-f32", action="store_true", help="saves 5 GB of memory")
    parser.add_argument("--save", type=Path, help="writes PATH.json and PATH.md")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    result = compare(list(ENGINES[: 2 if options.without_f32 else 3]), options.repeats)
    # Only now: a process that is started inherits the peak of the one that starts it.
    from llama_jax.bench import environment

    result["environment"] = vars(environment()) | {
        name: version(name) for name in ("torch", "transformers")
    }
    result |= {"repeats": options.repeats, "command": f"python {' '.join(sys.argv)}"}
    print(to_markdown(result))
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.save.with_suffix(".md").write_text(to_markdown(result))


if __name__ == "__main__":
    main()
