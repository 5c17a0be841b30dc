"""Measures the cost of the server compared with the bare engine, with the shipped model.

    python benchmarks/serving.py --save benchmarks/results/serving

One process has the engine and the server; the client is another process (`llama-jax bench-serve`).
The same sequences go through the bare engine and through the server in turns: all at once,
streamed, for throughput at saturation, and one after the other for the time to the first token.
Every other round begins with the server. Figures are medians of the rounds, after a warm-up round.

The bare engine streams token by token. The server lets streams share launches of several steps
while every slot is taken, so it is also compared with the engine at its fastest: with replies that
nobody reads before their end.

The client reads every token on the same processors, which the engine uses all of. So a second table
has the processor time that the event loop and the client take for a token (without the start of the
client's process, before it asks anything).
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tables

from llama_jax import LLM, SamplingParams
from llama_jax.bench import environment
from llama_jax.engine.request import Request
from llama_jax.serve.bench import Load
from llama_jax.serve.options import ServeOptions
from llama_jax.serve.server import serve
from llama_jax.serve.service import Service

ROWS, CONTEXT = 32, 1024


def requests_of(llm: LLM, load: Load, is_streamed: bool = True) -> list[Request]:
    return [
        request
        for prompt, count in load.sequences(CONTEXT)
        for request in llm.generate_job(
            prompt,
            SamplingParams(max_new_tokens=count, ignore_eos=True, temperature=0),
            is_streamed=is_streamed,
        ).requests
    ]


def bare_throughput(llm: LLM, load: Load, is_streamed: bool = True) -> float:
    """Return the tokens per second of the engine alone."""
    requests = requests_of(llm, load, is_streamed)
    llm.engine.stream_steps = 1  # which the server changes
    began = time.perf_counter()
    for _ in llm.engine.run(requests):
        pass
    return sum(len(each.token_ids) for each in requests) / (time.perf_counter() - began)


def bare_first_token(llm: LLM, load: Load) -> float:
    """Return the median milliseconds to the first token of single requests."""
    times = []
    for request in requests_of(llm, load):
        began = time.perf_counter()
        for _ in llm.engine.run([request]):
            pass
        times.append(1e3 * (request.first_token_at - began))
    return statistics.median(times)


def over_the_server(url: str, load: Load) -> dict[str, Any]:
    """Run the client and return its report."""
    lengths = [] if load.prompt_tokens is None else [
        "--prompt-tokens", str(load.prompt_tokens), "--reply-tokens", str(load.reply_tokens)
    ]  # fmt: skip
    command = [
        sys.executable, "-m", "llama_jax.cli", "bench-serve", url, "--json",
        "--requests", str(load.requests), "--concurrency", str(load.concurrency),
        "--seed", str(load.seed), *lengths,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def loop_seconds(service: Service) -> float:
    """Return the processor time of the event loop's thread so far."""

    async def read() -> float:
        return time.thread_time()

    return asyncio.run_coroutine_threadsafe(read(), service.thread.loop).result()


@dataclass(frozen=True)
class Round:
    """The figures of one round.

    tokens_per_second, first_token_ms: of the bare engine, and through the server.
    whole_per_second: tokens of the bare engine with replies that are read at their end.
    loop_us, client_us: processor time per token of the event loop and of the client.
    """

    tokens_per_second: tuple[float, float]
    first_token_ms: tuple[float, float]
    whole_per_second: float
    loop_us: float
    client_us: float


def measured(service: Service, url: str, requests: int, seed: int) -> Round:
    """Measure one round. The event loop is idle while the engine runs alone."""
    llm = service.llm
    full = Load(requests, requests, seed=seed)
    single = Load(20, 1, seed=seed, prompt_tokens=64, reply_tokens=4)
    bare = 0.0 if seed % 2 else bare_throughput(llm, full)
    loop = loop_seconds(service)
    served = over_the_server(url, full)
    loop = loop_seconds(service) - loop
    bare = bare or bare_throughput(llm, full)
    whole = bare_throughput(llm, full, is_streamed=False)
    tokens = served["reply_tokens"]
    first = bare_first_token(llm, single)
    served_first = over_the_server(url, single)["first_token_ms"]["50"]
    return Round(
        (bare, served["tokens_per_second"]), (first, served_first), whole,
        1e6 * loop / tokens, 1e6 * served["client_seconds"] / tokens,
    )  # fmt: skip


def cost(of: Round) -> float:
    """Return the share of the bare engine's throughput that is lost."""
    bare, served = of.tokens_per_second
    return 1 - served / bare


def cost_to_whole(of: Round) -> float:
    """Return the share that is lost of the throughput with replies that are read at their end."""
    return 1 - of.tokens_per_second[1] / of.whole_per_second


def figures(rounds: Sequence[Round]) -> dict[str, Any]:
    def median(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, rounds))

    return {
        "rounds": [asdict(each) for each in rounds],
        "bare_tokens_per_second": median(lambda r: r.tokens_per_second[0]),
        "served_tokens_per_second": median(lambda r: r.tokens_per_second[1]),
        "throughput_cost": median(cost),
        "whole_tokens_per_second": median(lambda r: r.whole_per_second),
        "throughput_cost_to_whole": median(cost_to_whole),
        "bare_first_token_ms": median(lambda r: r.first_token_ms[0]),
        "served_first_token_ms": median(lambda r: r.first_token_ms[1]),
        "first_token_cost_ms": median(lambda r: r.first_token_ms[1] - r.first_token_ms[0]),
        "event_loop_us_per_token": median(lambda r: r.loop_us),
        "client_us_per_token": median(lambda r: r.client_us),
        "load_of_the_machine": os.getloadavg()[0],
        **asdict(environment()),
    }


def to_markdown(command: str, found: Mapping[str, Any]) -> str:
    rounds = [Round(**each) for each in found["rounds"]]
    lines = [
        f"`{command}`", "",
        f"{os.cpu_count()} cores of {found['device']}, the shipped model, {ROWS} sequences at a "
        f"time, the others waiting; medians of {len(found['rounds'])} rounds; load of the machine "
        f"{found['load_of_the_machine']:.1f}. The cost in tokens/s was, round by round, "
        f"{', '.join(f'{cost(each):.1%}' for each in rounds)}.", "",
        "| | bare engine | over the server | cost | target |",
        "|---|---|---|---|---|",
        f"| tokens/s, streamed | {found['bare_tokens_per_second']:,.0f} "
        f"| {found['served_tokens_per_second']:,.0f} | {found['throughput_cost']:.1%} | <= 5 % |",
        f"| tokens/s, whole replies from the bare engine | {found['whole_tokens_per_second']:,.0f} "
        f"| {found['served_tokens_per_second']:,.0f} | {found['throughput_cost_to_whole']:.1%} | |",
        f"| first token, ms | {found['bare_first_token_ms']:.1f} "
        f"| {found['served_first_token_ms']:.1f} | {found['first_token_cost_ms']:.1f} | <= 2 |", "",
        "| processor time, us per token | |", "|---|---|",
        f"| event loop of the server | {found['event_loop_us_per_token']:.0f} |",
        f"| client, on the same cores | {found['client_us_per_token']:.0f} |",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", type=Path, help="write PATH.md and PATH.json")
    options = parser.parse_args()
    llm = LLM.load(
        max_batch_size=ROWS, max_seq_len=CONTEXT, share_prefixes=False, verbose=False
    )  # otherwise whoever comes second finds the prompts of the first in the cache
    ready = threading.Event()
    found: list[tuple[Service, str]] = []

    def on_ready(service: Service, url: str) -> None:
        found.append((service, url))
        ready.set()

    thread = threading.Thread(target=serve, args=(llm, ServeOptions(port=0), "abacus", on_ready))
    thread.start()
    ready.wait()
    service, url = found[0]
    measured(service, url, ROWS, seed=-1 % 2**32)
    rounds = [measured(service, url, options.requests, seed) for seed in range(options.rounds)]
    service.thread.loop.call_soon_threadsafe(service.end_server)
    thread.join()
    result = figures(rounds)
    text = to_markdown(" ".join(["python", *sys.argv]), result)
    print(text)
    if options.save:
        tables.save(options.save, text, result)


if __name__ == "__main__":
    main()
