"""Implements `llama-jax generate`: continues prompts."""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama_jax.cli import options
from llama_jax.cli.output import (
    check_output,
    note,
    progress_bar,
    whole_file,
)
from llama_jax.cli.speed import Clock, snapshot, speed_since
from llama_jax.jsonl import json_line, read_jsonl, read_lines
from llama_jax.plural import counted

if TYPE_CHECKING:
    from llama_jax.llm import LLM
    from llama_jax.sampling_params import SamplingParams


def generate(
    model: options.Model = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to continue.")
    ] = None,
    input: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='A prompt per line, or in a .jsonl file an object with "prompt"; stdin for -.',
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write JSONL to this file, in the order of the input."),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    samples: options.Samples = 1,
    dtype: options.DType = "bfloat16",
    activations: options.Activations = "auto",
    kv_dtype: options.KVDtype = "bf16",
    max_seq_len: options.MaxSeqLen = None,
    max_batch_size: options.MaxBatchSize = 8,
    num_speculative_tokens: options.NumSpeculativeTokens = None,
    draft: options.Draft = None,
) -> None:
    """Continue a text, or each line of a file. Prompts are used as they are; for a chat format see
    `chat`.

    A single prompt is streamed to stdout. With --json or --output there is a JSON object for each
    continuation, which has the fields of the input line, text, finish_reason, prompt_tokens,
    completion_tokens, and, with --samples, sample (from 0).

    **Examples**

        llama-jax generate --prompt "Once upon a time" --temperature 0.8 --seed 1
        llama-jax generate --prompt "Sort: 5, 3, 8" --samples 4 --temperature 1 --json
        llama-jax generate ./llama-8b --input prompts.txt --output texts.jsonl
        llama-jax generate ./llama-8b --input questions.jsonl --stop "\\n" --json | jq .text
    """
    if (prompt is None) == (input is None):
        raise typer.BadParameter("give either --prompt TEXT or --input FILE")
    if output is not None and as_json:
        raise typer.BadParameter("--json writes to stdout and --output to a file: give one of them")
    asked = options.sampling_settings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, seed=seed, stop=stop, n=samples,
    )  # fmt: skip
    if output is not None:
        check_output(output, overwrite)
    rows: list[dict[str, Any]] = [{"prompt": prompt}] if input is None else _read(input)
    llm = options.load(
        model, show_plan=model is not None and not as_json, dtype=dtype, activations=activations,
        kv_dtype=kv_dtype, max_seq_len=max_seq_len,
        max_batch_size=max_batch_size if input is not None else min(samples, max_batch_size),
        num_speculative_tokens=num_speculative_tokens, draft=draft,
    )  # fmt: skip
    sampling = replace(llm.default_sampling, **asked)
    if prompt is not None and samples == 1 and output is None and not as_json:
        _stream(llm, prompt, sampling)
        return
    before, clock = snapshot(llm), Clock()
    with progress_bar() as bar:
        task = bar.add_task("generating", total=len(rows), unit="prompts", clock=clock)
        prompts = [row["prompt"] for row in rows]
        results = llm.generate(prompts, sampling, lambda: bar.advance(task))
    seconds = clock.seconds()
    made = [
        (row, {"sample": i} if samples > 1 else {}, each)
        for row, result in zip(rows, results, strict=True)
        for i, each in enumerate(result.samples)
    ]
    if output is None and not as_json:
        for row, _, each in made:
            print(row["prompt"] + each.text)
    else:
        from llama_jax.results import generation_fields

        with whole_file("-" if output is None else output) as file:
            for row, number, each in made:
                file.write(json_line({**row, **number, **generation_fields(each)}) + "\n")
    meanwhile = snapshot(llm).since(before)
    compiled, stats = meanwhile.report, meanwhile.stats
    rate = stats.drawn / seconds
    done = f"{counted(len(results), 'prompt')}, {counted(stats.drawn, 'token')}"
    note(f"{done}, {rate:,.0f} tok/s · {compiled}")
    note(str(stats))


def _stream(llm: "LLM", prompt: str, sampling: "SamplingParams") -> None:
    before, result = snapshot(llm), None
    for piece in llm.stream(prompt, sampling):
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        result = piece.result
    print()
    assert result is not None
    note(str(speed_since(before, llm, result)))


def _read(path: str) -> list[dict[str, Any]]:
    """Read the lines of a file as objects with a prompt.

    Raises ValueError, which names the line, if one has no prompt.
    """
    if path.endswith((".jsonl", ".json")):
        rows = []
        for number, row in read_jsonl(path):
            if isinstance(row, ValueError):
                raise ValueError(f"{path}, line {number}: {row}")
            if not isinstance(row.get("prompt"), str) or not row["prompt"]:
                raise ValueError(
                    f'{path}, line {number}: "prompt" must be a text, got {row.get("prompt")!r}'
                )
            rows.append(row)
    else:
        rows = [{"prompt": line} for _, line in read_lines(path)]
    if not rows:
        raise ValueError(f"{path} has no prompts")
    return rows
