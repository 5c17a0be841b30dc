"""Implements `llama-jax score`: the likelihood of texts, JSONL in and JSONL out, of any size."""

import itertools
import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from converters.locate import locate
from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.cli import options
from llama_jax.cli.output import (
    check_output,
    note,
    print_json,
    progress_bar,
    seconds_remaining,
    stderr,
    whole_file,
)
from llama_jax.cli.score_ray import score_lines
from llama_jax.cli.speed import Clock, Snapshot, snapshot
from llama_jax.jsonl import json_line, read_jsonl
from llama_jax.plural import counted
from llama_jax.resumable import ResumableFile, resumable_file, survey
from llama_jax.text.windows import window_and_stride

if TYPE_CHECKING:
    from llama_jax.llm import LLM

Row = dict[str, Any] | ValueError
# A line's number, its row with the scores, and the number of tokens read for it.
_Scored = tuple[int, dict[str, Any], int]
_CLUSTER = "Cluster"
# Seconds between two progress messages if there is no progress bar.
_NOTE_EVERY = 60.0


@dataclass
class _Summary:
    """Totals over the lines of the output.

    num_tokens, total, greedy: of lines with a completion or a text.
    resumed: lines of an earlier run.
    num_read: tokens that went through the model for the other lines.
    """

    scored: int = 0
    bad: int = 0
    num_tokens: int = 0
    greedy: int = 0
    total: float = 0.0
    first_error: str | None = None
    resumed: int = 0
    num_read: int = 0

    def add(self, row: dict[str, Any]) -> None:
        if "error" in row:
            self.bad += 1
            self.first_error = self.first_error or row["error"]
            return
        self.scored += 1
        if "choices" not in row:
            self.num_tokens += row["num_tokens"]
            self.total += -math.inf if row["logprob"] is None else row["logprob"]
            self.greedy += "completion" in row and row["is_greedy"]

    @property
    def perplexity(self) -> float | None:
        from llama_jax.results import perplexity

        return perplexity(self.total, self.num_tokens) if self.num_tokens else None


def score(
    input: Annotated[str, typer.Argument(metavar="IN.jsonl", help="JSONL to read; stdin for -.")],
    output: Annotated[
        str, typer.Argument(metavar="OUT.jsonl", help="JSONL to write; stdout for -.")
    ],
    model: options.ModelOption = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Write token_ids and logprobs of each token too.")
    ] = False,
    window: Annotated[
        int | None,
        typer.Option(min=2, help='Tokens of a "text" in one window.', show_default="max-seq-len"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="New tokens that each window scores; the others are context.",
            show_default="window - 1",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.")
    ] = False,
    dtype: options.DType = "bfloat16",
    activations: options.Activations = "auto",
    kv_dtype: options.KVDtype = "bf16",
    max_seq_len: options.MaxSeqLen = None,
    max_batch_size: options.MaxBatchSize = 8,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Score on this Ray cluster: local (this machine), auto, or HOST:PORT.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of models in the cluster.",
            show_default="one per GPU, or per machine without one",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
) -> None:
    """Compute how likely each text is.

    A line of IN.jsonl is an object with "prompt" and "completion", with "prompt" and "choices" (a
    list of texts), or with "text", of any length. A line of OUT.jsonl has the same fields and adds

    - for a completion: logprob (natural log, summed), num_tokens, is_greedy (each token is the
      model's likeliest), perplexity

    - for choices: best (counted from 0), probabilities (which sum to 1), scores (as above)

    - for a text: logprob, num_tokens, perplexity, byte_perplexity, word_perplexity

    - for a line that cannot be scored: error. The others go on.

    Lines are read and written as a stream, in order. OUT.jsonl appears when it is complete. Until
    then its lines are in OUT.jsonl.partial, and the same command continues from there if it was
    stopped.

    With --ray the actors of a cluster score pieces of the file (extra `ray`), so each machine needs
    access to IN.jsonl and MODEL. Only complete pieces, of up to 1024 lines, are written. A run may
    be started with --ray and continued without it, or the other way round.

    **Examples**

        echo '{"prompt": "2 + 2 =", "completion": " 4"}' | llama-jax score - -
        llama-jax score answers.jsonl scored.jsonl --model ./llama-8b --max-batch-size 64
        llama-jax score documents.jsonl scored.jsonl --window 2048 --stride 1024 --json
        llama-jax score answers.jsonl scored.jsonl --model /shared/llama-8b --ray auto
    """
    if output == "-" and as_json:
        raise typer.BadParameter("--json needs stdout for the summary: write OUT.jsonl to a file")
    if ray is None and actors is not None:
        raise typer.BadParameter("--actors needs --ray")
    if ray is not None and input == "-":
        raise typer.BadParameter("--ray reads IN.jsonl on each machine: give a file, not stdin")
    window_and_stride(window, stride, max_seq_len or sys.maxsize)
    check_output(output, overwrite)
    locate(SHIPPED_MODEL if model is None else model)
    num_lines, digest = survey(input)
    loading: dict[str, Any] = {
        "dtype": dtype, "activations": activations, "kv_dtype": kv_dtype,
        "max_seq_len": max_seq_len, "max_batch_size": max_batch_size,
    }  # fmt: skip
    asked: dict[str, Any] = {"tokens": tokens, "window": window, "stride": stride}
    scored: Callable[[int], Iterable[_Scored]]
    llm = None
    if ray is None:
        llm = options.load(model, show_plan=model is not None and not as_json, **loading)
        manifest = llm.manifest
        scored = partial(_score_here, llm, input, **asked)
    else:
        from llama_jax.checkpoint.store import read_manifest

        assert num_lines is not None
        manifest = read_manifest(options.directory(model))
        scored = partial(score_lines, ray, actors, input, num_lines, model, asked, loading)
    from llama_jax.loading import sequence_limit

    max_seq_len = sequence_limit(manifest.config, max_seq_len)
    window_and_stride(window, stride, max_seq_len)  # raises if these are wrong
    settings = {
        "input": digest, "model": manifest.digest, "dtype": dtype, "activations": activations,
        "kv_dtype": kv_dtype, "max_seq_len": max_seq_len, **asked,
    }  # fmt: skip
    before, clock = snapshot(llm) if llm else None, Clock()
    # Stdin cannot be read again, so nothing can be resumed.
    whole = output == "-" or input == "-"
    destination = (
        whole_file(output) if whole else resumable_file(output, settings, overwrite, tell=note)
    )
    with destination as file:
        summary = _write_scores(input, num_lines, file, scored, clock)
    seconds = clock.seconds()
    _report(summary, seconds, snapshot(llm).since(before) if llm and before else None, as_json)


def _score_here(llm: "LLM", input: str, done: int, **asked: Any) -> Iterator[_Scored]:
    """Score the lines after the first `done`."""
    from llama_jax.data_rows import score_rows

    numbers: deque[int] = deque()

    def rows() -> Iterator[Row]:
        for number, row in itertools.islice(read_jsonl(input), done, None):
            numbers.append(number)
            yield row

    for row, num_tokens in score_rows(llm, rows(), **asked):
        yield numbers.popleft(), row, num_tokens


def _write_scores(
    input: str,
    num_lines: int | None,
    output: ResumableFile | TextIO,
    scored: Callable[[int], Iterable[_Scored]],
    clock: Clock,
) -> _Summary:
    """Score the lines that the output lacks, and write them one by one.

    scored: yields the lines after a given number of them, in order.
    """
    summary = _Summary()
    if isinstance(output, ResumableFile):
        for line in output.lines():
            summary.add(json.loads(line))
    summary.resumed = summary.scored + summary.bad
    with progress_bar() as bar:
        task = bar.add_task(
            "scoring", total=num_lines, completed=summary.resumed, before=summary.resumed,
            unit="tokens", units=0, clock=clock,
        )  # fmt: skip
        noted = time.monotonic()
        for done, (number, row, num_tokens) in enumerate(scored(summary.resumed), 1):
            if "error" in row:
                row["error"] = f"{input}, line {number}: {row['error']}"
            output.write(json_line(row) + "\n")
            output.flush()
            summary.add(row)
            summary.num_read += num_tokens
            bar.update(task, advance=1, units=summary.num_read)
            now = time.monotonic()
            if not stderr.is_terminal and now - noted > _NOTE_EVERY:
                noted = now
                note(_progress(summary, done, num_lines, clock.seconds()))
    return summary


def _progress(summary: _Summary, done: int, num_lines: int | None, seconds: float) -> str:
    """Format the progress. done: lines of this run, in so many seconds of work."""
    rate = f"{done / seconds:,.1f} lines/s, {summary.num_read / seconds:,.0f} tok/s"
    if num_lines is None:
        return f"{counted(done, 'line')} · {rate}"
    remaining = seconds_remaining(done, num_lines - summary.resumed - done, seconds)
    rest = "" if remaining is None else f" · {remaining:,.0f} s left"
    return f"{summary.resumed + done} of {counted(num_lines, 'line')} · {rate}{rest}"


def _report(summary: _Summary, seconds: float, here: Snapshot | None, as_json: bool) -> None:
    """Print the summary. seconds: of work. here: this process's counters; None with actors."""
    figures = {
        "scored": summary.scored,
        "bad": summary.bad,
        "resumed": summary.resumed,
        "num_tokens": summary.num_tokens,
        "perplexity": summary.perplexity,
        "greedy": summary.greedy,
        "seconds": seconds,
        "tokens_per_second": summary.num_read / seconds,
        "cache_hit_rate": here and here.stats.hit_rate,
        "compile": here and vars(here.report),
    }
    if as_json:
        print_json(figures)
    else:
        mean = "-" if summary.perplexity is None else f"{summary.perplexity:.3f}"
        before = f" ({summary.resumed} of them before)" if summary.resumed else ""
        note(
            f"{summary.scored} scored, {summary.bad} bad{before} · "
            f"{counted(summary.num_tokens, 'token')}, perplexity {mean}, {summary.greedy} greedy · "
            f"{figures['tokens_per_second']:,.0f} tok/s"
            + (
                f", {here.stats.hit_rate:.0%} of the tokens found in the cache · {here.report}"
                if here
                else ""
            )
        )
    if summary.bad and not as_json:
        note(f"the first bad one is {summary.first_error}")
    if not summary.scored:
        raise ValueError(f"no line could be scored; {summary.first_error}")
