"""Implements `llama-jax bench-serve`: measures a server under load."""

import asyncio
import json
import os
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llama_jax.cli import options
from llama_jax.cli.output import check_output, note, print_json, progress_bar, stdout
from llama_jax.cli.speed import Clock
from llama_jax.plural import counted

if TYPE_CHECKING:
    from llama_jax.serve.bench import Report, Timing

_KEY = "LLAMA_JAX_API_KEY"


def bench_serve(
    url: Annotated[str, typer.Argument(help="Of the server.")] = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(min=1, help="Total number of requests.")] = 200,
    concurrency: Annotated[int, typer.Option(min=1, help="Most requests at the same time.")] = 32,
    rate: Annotated[
        float | None,
        typer.Option(
            help="New requests per second, at random times.",
            show_default="a new one when one has ended",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, show_default="a mix like ShareGPT's")
    ] = None,
    reply_tokens: Annotated[
        int | None, typer.Option(min=1, show_default="a mix like ShareGPT's")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of lengths, prompts and times.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Plot the distributions to a PNG or SVG file.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Put load on a server, this project's or another with OpenAI's /v1/completions, and print
    the time to the first token, the time per further token, and the throughput.

    The server's API key is read from $LLAMA_JAX_API_KEY. With --rate and a large --concurrency,
    requests arrive independently of how fast the server is.

    **Examples**

        llama-jax bench-serve
        llama-jax bench-serve http://127.0.0.1:8000 --rate 8 --concurrency 1000 --json
        llama-jax bench-serve --prompt-tokens 512 --reply-tokens 128 --plot latency.png
    """
    from uvicorn.loops.auto import auto_loop_factory

    from llama_jax.serve.bench import Load, measure

    if plot is not None:
        check_output(str(plot), overwrite=True)
    load = Load(requests, concurrency, rate, seed, prompt_tokens, reply_tokens)
    key = os.environ.get(_KEY)
    url = url.rstrip("/").removesuffix("/v1")
    model, context = _served(url, key)
    with progress_bar() as bar:
        task = bar.add_task("asking", total=requests, unit="requests", clock=Clock())
        found, timings = asyncio.run(
            measure(url, model, context, load, key, lambda timing: bar.update(task, advance=1)),
            loop_factory=auto_loop_factory(),
        )
    if plot is not None:
        _draw(timings, plot)
    if as_json:
        print_json({"url": url, "model": model, **found.to_dict()})
    else:
        stdout.print(_table(f"{model} at {url}", found))
    if found.failed:
        note(f"{counted(found.failed, 'request')} failed, the first with: {found.first_error}")
        raise typer.Exit(1)


def _served(url: str, key: str | None) -> tuple[str, int]:
    """Return the name of the server's model, and its context."""
    asked = urllib.request.Request(f"{url}/v1/models")
    if key:
        asked.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(asked, timeout=30) as answer:
        card: dict[str, Any] = json.load(answer)["data"][0]
    return str(card["id"]), int(card.get("max_model_len") or 2048)


def _table(title: str, found: "Report") -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    table.add_column("ms")
    for percentile in found.first_token_ms:
        table.add_column(f"p{percentile}", justify="right")
    for name, values in (
        ("first token", found.first_token_ms),
        ("each further token", found.per_token_ms),
        ("whole request", found.total_ms),
    ):
        table.add_row(name, *(f"{value:,.1f}" for value in values.values()))
    table.caption = (
        f"{counted(found.requests, 'request')}, {counted(found.prompt_tokens, 'token')} in and "
        f"{found.reply_tokens:,} out, in {found.seconds:,.1f} s: "
        f"{found.requests_per_second:,.1f} requests/s, {found.tokens_per_second:,.0f} tokens/s"
    )
    return table


def _draw(timings: "list[Timing]", path: Path) -> None:
    """Plot the cumulative distributions of the times."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError('--plot needs matplotlib: pip install "llama-jax[notebooks]"') from error
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    done = [each for each in timings if each.error is None]
    panels = (
        ("first token, ms", [each.first for each in done]),
        ("each further token, ms", [each.per_token for each in done if each.reply_tokens > 1]),
    )
    for axes, (label, values) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.ecdf([1e3 * value for value in values])
        axes.set(xlabel=label, ylabel="share of the requests", ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
