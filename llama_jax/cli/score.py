"""`llama-jax score`: how likely completions are, JSONL in and JSONL out."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import batched
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_jax.cli import options
from llama_jax.cli.output import (
    check_output,
    json_line,
    note,
    print_json,
    progress_bar,
    read_jsonl,
    whole_file,
)
from llama_jax.cli.speed import snapshot

if TYPE_CHECKING:
    from llama_jax.llm import LLM
    from llama_jax.results import Score


@dataclass(frozen=True)
class _Line:
    """A line of the input; prompt and completion are token ids, empty where `row` has an error."""

    row: dict[str, Any]
    prompt: list[int]
    completion: list[int]


def score(
    input: Annotated[str, typer.Argument(metavar="IN.jsonl", help="JSONL to read; stdin for -.")],
    output: Annotated[
        str, typer.Argument(metavar="OUT.jsonl", help="JSONL to write; stdout for -.")
    ],
    model: options.ModelOption = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Write token_ids and logprobs of each token too.")
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help='Write {"error": ...} for a bad line and go on.'),
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on stdout.")
    ] = False,
    dtype: options.DType = "bfloat16",
    activations: options.Activations = "bf16",
    kv_dtype: options.KVDtype = "bf16",
    max_seq_len: options.MaxSeqLen = None,
    max_batch_size: options.MaxBatchSize = 8,
) -> None:
    """How likely is each completion after its prompt?

    A line of IN.jsonl is an object with "prompt" and "completion"; whatever else it has is kept. A
    line of OUT.jsonl adds logprob (natural log, summed over the completion), num_tokens, is_greedy
    (each token is the model's likeliest) and perplexity. OUT.jsonl appears when it is whole. A bad
    line is reported before anything is scored.

    **Examples**

        echo '{"prompt": "2 + 2 =", "completion": " 4"}' | llama-jax score - -
        llama-jax score answers.jsonl scored.jsonl --model ./llama-8b
        llama-jax score answers.jsonl scored.jsonl --tokens --skip-bad --overwrite --json
    """
    if output == "-" and as_json:
        raise typer.BadParameter("--json needs stdout for the summary: write OUT.jsonl to a file")
    check_output(output, overwrite)
    rows = list(read_jsonl(input))
    if not rows:
        raise ValueError(f"{input} has no lines to score")
    llm = options.load(
        model, show_plan=model is not None and not as_json, dtype=dtype, activations=activations,
        kv_dtype=kv_dtype, max_seq_len=max_seq_len, max_batch_size=max_batch_size,
    )  # fmt: skip
    lines = [_line(llm, f"{input}, line {number}", row, skip_bad) for number, row in rows]
    before, began = snapshot(), time.perf_counter()
    scores: list[Score] = []
    with progress_bar() as bar, whole_file(output) as file:
        task = bar.add_task("scoring", total=len(lines), unit="tokens", units=0)
        for line, result in _scored(llm, lines):
            row = line.row if result is None else {**line.row, **_fields(result, tokens)}
            file.write(json_line(row) + "\n")
            read = len(line.prompt) + len(line.completion)
            bar.update(task, advance=1, units=bar.tasks[task].fields["units"] + read)
            scores += [] if result is None else [result]
    compiled = snapshot().report.since(before.report)
    seconds = time.perf_counter() - began - compiled.seconds
    num_tokens, total = sum(len(s.token_ids) for s in scores), sum(s.total for s in scores)
    summary = {
        "scored": len(scores),
        "bad": len(lines) - len(scores),
        "num_tokens": num_tokens,
        "perplexity": math.exp(-total / num_tokens) if scores else None,
        "greedy": sum(s.is_greedy for s in scores),
        "seconds": seconds,
        "tokens_per_second": sum(len(x.prompt) + len(x.completion) for x in lines) / seconds,
        "compile": vars(compiled),
    }
    if as_json:
        print_json(summary)
        return
    perplexity = f"{summary['perplexity']:.3f}" if scores else "-"
    note(
        f"{len(scores)} scored, {summary['bad']} bad · {num_tokens} tokens, perplexity "
        f"{perplexity}, {summary['greedy']} greedy · {summary['tokens_per_second']:,.0f} tok/s · "
        f"{compiled}"
    )


def _line(llm: "LLM", where: str, row: dict[str, Any] | ValueError, skip_bad: bool) -> _Line:
    """Check and tokenise a line; a bad one raises ValueError, or says so in `row`."""
    kept = {} if isinstance(row, ValueError) else row
    try:
        if isinstance(row, ValueError):
            raise row
        for field in ("prompt", "completion"):
            if not isinstance(row.get(field), str):
                raise ValueError(f'"{field}" must be a text, got {row.get(field)!r}')
        ids, start = llm.pair_ids(row["prompt"], row["completion"])
    except ValueError as error:
        if not skip_bad:
            raise ValueError(f"{where}: {error}") from error
        return _Line({**kept, "error": f"{where}: {error}"}, [], [])
    return _Line(kept, ids[:start], ids[start:])


def _scored(llm: "LLM", lines: list[_Line]) -> Iterator[tuple[_Line, "Score | None"]]:
    """Each line with its score, in order; None for a bad one."""
    for group in batched(lines, llm.engine.options.max_batch_size):
        good = [line for line in group if line.completion]
        scores = iter(llm.score([x.prompt for x in good], [x.completion for x in good]))
        for line in group:
            yield line, next(scores) if line.completion else None


def _fields(result: "Score", tokens: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "logprob": result.total,
        "num_tokens": len(result.token_ids),
        "is_greedy": result.is_greedy,
        "perplexity": result.perplexity,
    }
    if tokens:
        fields |= {"token_ids": result.token_ids, "logprobs": result.logprobs}
    return fields
