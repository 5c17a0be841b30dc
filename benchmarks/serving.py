"""What the server costs beside the bare engine, with the model that ships, in one run.

    python benchmarks/serving.py [--requests 96] [--rounds 3] [--json]

One process has the engine, and the server around it; the client is a process of its own
(`llama-jax bench-serve`). The same sequences go through the bare engine and over the server, in
turns: all at once, streamed, for throughput at saturation, and one after the other for the time to
the first token. Figures are medians of the rounds. What the event loop's thread computes for a
token hardly depends on what else runs on the machine.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from typing import Annotated, Any

import typer

from llama_jax import LLM, SamplingParams
from llama_jax.engine.request import Request
from llama_jax.serve.bench import Load
from llama_jax.serve.options import ServeOptions
from llama_jax.serve.server import serve
from llama_jax.serve.service import Service

ROWS, CONTEXT = 32, 1024


def requests_of(llm: LLM, load: Load) -> list[Request]:
    return [
        request
        for prompt, count in load.sequences(CONTEXT)
        for request in llm.generate_question(
            prompt,
            SamplingParams(max_new_tokens=count, ignore_eos=True, temperature=0),
            is_streamed=True,
        ).requests
    ]


def bare_throughput(llm: LLM, load: Load) -> float:
    """Tokens a second of the engine alone."""
    requests = requests_of(llm, load)
    began = time.perf_counter()
    for _ in llm.engine.run(requests):
        pass
    return sum(len(each.token_ids) for each in requests) / (time.perf_counter() - began)


def bare_first_token(llm: LLM, load: Load) -> float:
    """Milliseconds until the first token of requests that are alone, the median."""
    times = []
    for request in requests_of(llm, load):
        began = time.perf_counter()
        for _ in llm.engine.run([request]):
            pass
        times.append(1e3 * (request.first_token_at - began))
    return statistics.median(times)


def over_the_server(url: str, load: Load) -> dict[str, Any]:
    """What the client reports."""
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
    """Processor time of the event loop's thread so far."""

    async def read() -> float:
        return time.thread_time()

    return asyncio.run_coroutine_threadsafe(read(), service.thread.loop).result()


def main(
    requests: Annotated[int, typer.Option(min=1)] = 96,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    llm = LLM.load(max_batch_size=ROWS, max_seq_len=CONTEXT, verbose=False)
    ready = threading.Event()
    found: list[tuple[Service, str]] = []

    def on_ready(service: Service, url: str) -> None:
        found.append((service, url))
        ready.set()

    options = ServeOptions(port=0)
    thread = threading.Thread(target=serve, args=(llm, options, "abacus", on_ready))
    thread.start()
    ready.wait()
    service, url = found[0]
    saturated = [Load(requests, ROWS, seed=seed) for seed in range(rounds)]
    alone = [Load(20, 1, seed=seed, prompt_tokens=64, reply_tokens=4) for seed in range(rounds)]
    # The event loop is idle while the engine works alone: its thread waits for nothing else.
    bare, served, first, served_first, per_token = [], [], [], [], []
    for full, single in zip(saturated, alone, strict=True):
        bare.append(bare_throughput(llm, full))
        before = loop_seconds(service)
        reported = over_the_server(url, full)
        served.append(reported["tokens_per_second"])
        per_token.append(1e6 * (loop_seconds(service) - before) / reported["reply_tokens"])
        first.append(bare_first_token(llm, single))
        served_first.append(over_the_server(url, single)["first_token_ms"]["50"])
    service.thread.loop.call_soon_threadsafe(service.end_server)
    thread.join()
    figures = {
        "bare_tokens_per_second": statistics.median(bare),
        "served_tokens_per_second": statistics.median(served),
        "ratio": statistics.median(b / a for a, b in zip(bare, served, strict=True)),
        "event_loop_us_per_token": statistics.median(per_token),
        "bare_first_token_ms": statistics.median(first),
        "served_first_token_ms": statistics.median(served_first),
        "first_token_cost_ms": statistics.median(
            b - a for a, b in zip(first, served_first, strict=True)
        ),
    }
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:28} {value:10.3f}")


if __name__ == "__main__":
    typer.run(main)
