"""Measures the engine's throughput on TensorRT-LLM's published workloads for 8B in FP8, and
scoring.

    python benchmarks/offline_throughput.py --json FILE       8B, random weights, on a GPU
    python benchmarks/offline_throughput.py --lengths 2048    scoring alone
    python benchmarks/offline_throughput.py --tiny            any machine, sizes too small to matter

Weights, activations and cache are FP8. Prompts are random tokens without common prefixes, and more
of them wait than the engine can take; there is no tokenizer. The published figures are output
tokens per second over a run of thousands of requests. Here the ramp-up is skipped: the first
requests are at every stage of their output (their prompts contain what they would have drawn), and
the clock starts once all of them are decoding. Every workload gets an equal share of --seconds, and
nothing may compile meanwhile.

Columns of the table: rows, the mean number of requests in progress; padding, the share of prefill's
tokens that are padding; host, the share of the time in which the host worked instead of waiting for
the device (near 100 % it is the limit); H200, H100, TensorRT-LLM's published figures for one;
ratio, our output relative to that of the card in use. For scoring, "of peak" is the rate of
multiplications and additions of all matrices and causal attention, relative to the data sheet's FP8
rate.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax.bench import environment, preset_spec, random_params
from llama_jax.engine import compile_cache
from llama_jax.engine.engine import Engine
from llama_jax.engine.memory import MemoryPlan, fitting_pages, plan_memory
from llama_jax.engine.request import OutputKind, Request
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.model.config import PRESETS, LlamaConfig
from llama_jax.model.kv_cache import PAGE_SIZE, storage_dtype
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec
from llama_jax.sampling_params import SamplingParams
from pallas_kernels.dev.case import FP8_OPERATIONS_PER_SECOND

# Output tokens/s of Llama 3.1 8B in FP8 on one GPU, by input and output tokens: TensorRT-LLM 1.0,
# docs/source/performance/perf-overview.md.
PUBLISHED = {
    "H200": {
        (128, 128): 27_911, (1000, 1000): 17_744, (2048, 2048): 12_194, (20_000, 2000): 1_804,
    },
    "H100": {
        (128, 128): 28_312, (1000, 1000): 15_220, (2048, 2048): 9_305, (20_000, 2000): 1_351,
    },
}  # fmt: skip
PUBLISHED_FOR = "llama-3.1-8b"
SCORED_TOKENS = 2048
TINY = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=1, num_heads=4,
    num_kv_heads=2, head_dim=16, rope_theta=500_000.0, rope_scaling=None,
    max_position_embeddings=1024, dtype="bfloat16",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Requests with input_tokens in their prompts and output_tokens to draw; if those are 0, texts
    to score."""

    input_tokens: int
    output_tokens: int

    @property
    def name(self) -> str:
        if self.output_tokens:
            return f"{self.input_tokens}/{self.output_tokens}"
        return f"score {self.input_tokens}"

    @property
    def length(self) -> int:
        return self.input_tokens + self.output_tokens

    @property
    def output_kind(self) -> OutputKind:
        return "tokens" if self.output_tokens else "logprobs"

    def requests(self, vocab_size: int, num_rows: int) -> Iterator[Request]:
        """Yield endless requests. The first `num_rows` are at every stage of their output, those
        that are nearly done first."""
        rng = np.random.default_rng(0)
        for i in count():
            drawn = max(0, num_rows - 1 - i) * self.output_tokens // num_rows
            prompt = rng.integers(0, vocab_size, self.input_tokens + drawn).tolist()
            if self.output_tokens:
                remaining = self.output_tokens - drawn
                yield Request(
                    prompt, SamplingParams(temperature=0, seed=0, max_new_tokens=remaining)
                )
            else:
                yield Request(prompt, output_kind=self.output_kind)


@dataclass(frozen=True)
class Result:
    """The figures of a workload over `seconds`, see the module's docstring.

    is_steady: whether all of the first requests were decoding or done when the clock started. If
        not, it started after half of the workload's time.
    """

    workload: Workload
    is_steady: bool
    seconds: float
    output_tokens: int
    input_tokens: int
    mean_rows: float
    padding_share: float
    host_share: float
    preempted: int
    operations: float

    @property
    def output_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def input_per_second(self) -> float:
        return self.input_tokens / self.seconds

    @property
    def operations_per_second(self) -> float:
        return self.operations / self.seconds


def run(engine: Engine, workload: Workload, seconds: float) -> Result:
    """Keep the engine busy with a workload for `seconds`."""
    options = engine.options
    mean_pages = (workload.input_tokens + workload.output_tokens // 2) // PAGE_SIZE + 1
    num_rows = max(1, min(options.max_batch_size, options.pool_size // mean_pages))
    new = workload.requests(engine.spec.config.vocab_size, num_rows)
    unfinished = {engine.submit(next(new)) for _ in range(num_rows)}
    starting = set(unfinished)
    began = last = time.perf_counter()
    start, row_seconds = None, 0.0
    while start in (None, last) or last < began + seconds:
        while engine.num_waiting < min(options.max_batch_size, 64):
            unfinished.add(engine.submit(next(new)))
        changed = engine.step()
        unfinished -= {request for request in changed if request.finish_reason}
        starting -= {request for request in changed if request.finish_reason or request.token_ids}
        now = time.perf_counter()
        row_seconds += engine.num_running * (now - last)
        last = now
        if start is None and (not starting or now > began + seconds / 2):
            start, row_seconds, before = now, 0.0, engine.stats()
            is_steady = not starting
    happened, elapsed = engine.stats().since(before), last - start
    for request in unfinished:
        engine.cancel(request.id)
    while engine.has_work:
        engine.step()
    return Result(
        workload=workload,
        is_steady=is_steady,
        seconds=elapsed,
        output_tokens=happened.drawn,
        input_tokens=happened.prefilled,
        mean_rows=row_seconds / elapsed,
        padding_share=happened.padding / max(1, happened.prefilled + happened.padding),
        host_share=1 - happened.waited / elapsed,
        preempted=happened.preempted,
        operations=happened.prefilled * operations_per_token(engine.spec, workload.input_tokens),
    )


def operations_per_token(spec: ModelSpec, length: int) -> float:
    """Return the mean multiplications and additions per token of a scored text."""
    config, params = spec.config, abstract_params(spec)
    embedding = config.vocab_size * config.hidden_size
    weights = [leaf.size for leaf in jax.tree.leaves(params) if len(leaf.shape) == 2]
    matrices = sum(weights) - (0 if config.tie_word_embeddings else embedding)
    attention = config.num_layers * config.num_heads * config.head_dim * length
    return 2.0 * (matrices + attention)


def make_engine(config: LlamaConfig, max_batch_size: int, max_seq_len: int) -> Engine:
    """Make an engine with random weights, and a cache for all rows or as large as fits."""
    formats = preset_spec(config)
    spec = ModelSpec(formats.config, formats.formats, activations="auto")
    options = EngineOptions(max_batch_size, max_seq_len)
    cache_dtype = storage_dtype("fp8", spec.dtype)

    def plan(num_pages: int) -> MemoryPlan:
        return plan_memory(
            spec, max_batch_size, max_seq_len, cache_dtype, options.prefill_chunk,
            num_pages=num_pages,
        )  # fmt: skip

    num_pages = fitting_pages(plan, options.pages_per_slot, options.pool_size)
    plan(num_pages).check()
    options = replace(options, num_pages=num_pages)
    return Engine(random_params(spec), spec, options, cache_dtype)


def published_for(model: str, workload: Workload) -> dict[str, int]:
    """Return TensorRT-LLM's published figures for such requests, by card."""
    key = workload.input_tokens, workload.output_tokens
    found = PUBLISHED if model == PUBLISHED_FOR else {}
    return {card: figures[key] for card, figures in found.items() if key in figures}


def to_dict(result: Result, published: Mapping[str, int]) -> dict[str, Any]:
    rates = {
        "output_per_second": result.output_per_second,
        "input_per_second": result.input_per_second,
        "operations_per_second": result.operations_per_second,
        "published_output_per_second": published,
    }
    return asdict(result) | rates


def row(result: Result, max_batch_size: int, published: Mapping[str, int]) -> str:
    """Format a line of the table, with the ratio to the published figure of the card in use."""
    output = f"{result.output_per_second:,.0f}" if result.output_tokens else ""
    rows = f"{result.mean_rows:.0f} of {max_batch_size}"
    beside = "".join(f"{published[c]:>9,}" if c in published else f"{'':>9}" for c in PUBLISHED)
    device = jax.devices()[0].device_kind
    own = next((figure for card, figure in published.items() if card in device), None)
    ratio = f"{result.output_per_second / own:.2f}" if own else ""
    if not result.output_tokens and jax.default_backend() == "gpu":
        ratio = f"{result.operations_per_second / FP8_OPERATIONS_PER_SECOND:.0%} of peak"
    return (
        f"{result.workload.name:<12}{output:>10}{result.input_per_second:>10,.0f}{rows:>12}"
        f"{result.padding_share:>9.0%}{result.host_share:>6.0%}{result.preempted:>10,}"
        f"{beside}  {ratio}" + ("" if result.is_steady else "  not steady: more --seconds")
    )


def workload(text: str) -> Workload:
    try:
        numbers = [int(each) for each in text.split("/")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise argparse.ArgumentTypeError(
            f"expected IN/OUT, as in 1000/1000, or IN to score texts, got {text!r}"
        )
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"numbers must be at least 1, got {text!r}")
    return Workload(numbers[0], numbers[1] if len(numbers) == 2 else 0)


def main() -> None:
    options = argparse.ArgumentParser(description="Measure the engine's offline throughput.")
    option = options.add_argument
    option("--preset", choices=PRESETS, default=PUBLISHED_FOR, help="whose shapes")
    option(
        "--lengths", type=workload, nargs="+", metavar="IN/OUT",
        help="tokens per request, or of a text to score",
    )  # fmt: skip
    option("--max-batch-size", type=int, default=512, help="rows (8 with --tiny)")
    option("--seconds", type=float, default=300, help="for all workloads, not counting compilation")
    option("--json", type=Path, help="also write the results to this file")
    option("--tiny", action="store_true", help="a model and lengths for any machine")
    chosen = options.parse_args()
    if chosen.tiny:
        config, name, max_batch_size = TINY, "tiny", 8
        workloads = [Workload(16, 16), Workload(100, 100), Workload(500, 50), Workload(128, 0)]
    else:
        config, name, max_batch_size = PRESETS[chosen.preset], chosen.preset, chosen.max_batch_size
        workloads = [*(Workload(*each) for each in PUBLISHED["H200"]), Workload(SCORED_TOKENS, 0)]
    workloads = chosen.lengths or workloads
    max_seq_len = max(each.length for each in workloads)
    if max_seq_len > config.max_position_embeddings:
        options.error(
            f"{max_seq_len} tokens are more than the model's context of "
            f"{config.max_position_embeddings}"
        )
    for argument in ("seconds", "max_batch_size"):
        if getattr(chosen, argument) <= 0:
            flag = "--" + argument.replace("_", "-")
            options.error(f"{flag} must be above 0, got {getattr(chosen, argument)}")
    compile_cache.enable()
    engine = make_engine(config, max_batch_size, max_seq_len)
    # The sets of programs that the workloads need.
    ready = engine.warmup(sorted({each.output_kind for each in workloads}))
    pages = engine.options.pool_size
    print(f"{name}: cache of {pages:,} pages of {PAGE_SIZE} tokens; {ready}")
    print(
        f"{'':<12}{'output/s':>10}{'input/s':>10}{'rows':>12}{'padding':>9}{'host':>6}"
        f"{'preempted':>10}" + "".join(f"{card:>9}" for card in PUBLISHED) + "  ratio"
    )
    document = {
        "model": name, "environment": asdict(environment()), "compile": asdict(ready),
        "max_batch_size": max_batch_size, "num_pages": pages, "page_size": PAGE_SIZE,
        "results": [],
    }  # fmt: skip
    for each in workloads:
        with compile_cache.forbid_compile():
            result = run(engine, each, chosen.seconds / len(workloads))
        published = published_for(name, each)
        print(row(result, max_batch_size, published), flush=True)
        document["results"].append(to_dict(result, published))
        if chosen.json:
            chosen.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
