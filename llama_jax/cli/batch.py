"""Implements `llama-jax batch`: OpenAI's batch files, JSONL in and JSONL out."""

import asyncio
import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer

from converters.locate import locate
from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.cli import options
from llama_jax.cli.output import check_output, note, progress_bar
from llama_jax.cli.serve import check_extra
from llama_jax.cli.speed import Clock
from llama_jax.jsonl import json_line, read_jsonl
from llama_jax.resumable import ResumableFile, resumable_file, survey

if TYPE_CHECKING:
    from llama_jax.llm import LLM


def batch(
    input: Annotated[str, typer.Argument(metavar="IN.jsonl", help="Requests, one per line.")],
    output: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="Replies, in the same order.")],
    model: options.ModelOption = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="The model's name in the requests.", show_default="MODEL's name"),
    ] = None,
    overwrite: options.Overwrite = False,
    dtype: options.DType = "bfloat16",
    activations: options.Activations = "auto",
    kv_dtype: options.KVDtype = "bf16",
    max_seq_len: options.MaxSeqLen = None,
    max_batch_size: options.MaxBatchSize = 32,
    num_speculative_tokens: options.NumSpeculativeTokens = None,
    draft: options.Draft = None,
) -> None:
    """Reply to the requests of a batch file as `llama-jax serve` would (extra `serve`): /v1/chat/completions,
    /v1/completions and /v1/score.

    Each line is {"custom_id", "method": "POST", "url", "body"}. The line of a refused request has
    an error, and the others go on. A file in which lines share a custom_id is refused. OUT.jsonl
    appears when it is complete. Until then its lines are in OUT.jsonl.partial, and the same command
    continues from there if it was stopped.

    **Examples**

        llama-jax batch requests.jsonl answers.jsonl
        llama-jax batch requests.jsonl answers.jsonl --model ./llama-8b --max-batch-size 64
    """  # noqa: E501
    check_extra()
    if "-" in (input, output):
        raise typer.BadParameter(
            "give files, not stdin or stdout: a batch is read twice and can be continued"
        )
    check_output(output, overwrite)
    locate(SHIPPED_MODEL if model is None else model)
    num_lines, digest = survey(input)
    _check_ids(input)
    llm = options.load(
        model, show_plan=model is not None, dtype=dtype, activations=activations,
        kv_dtype=kv_dtype, max_seq_len=max_seq_len, max_batch_size=max_batch_size,
        num_speculative_tokens=num_speculative_tokens, draft=draft,
    )  # fmt: skip
    settings = {
        "input": digest, "model": llm.manifest.digest, "dtype": dtype,
        "activations": activations, "kv_dtype": kv_dtype, "max_seq_len": llm.max_seq_len,
        "served_model_name": served_model_name,
    }  # fmt: skip
    name = served_model_name or options.model_name(model)
    with resumable_file(output, settings, overwrite, tell=note) as file:
        done, failed = asyncio.run(_write(llm, name, input, num_lines, file))
    note(f"{done} answered, {failed} of them with an error")


def _check_ids(input: str) -> None:
    """Raise ValueError if lines share a custom_id, by which nobody could tell their answers apart.

    OpenAI refuses such a file too.
    """
    seen: dict[str, int] = {}
    for number, line in read_jsonl(input):
        if isinstance(line, ValueError) or not isinstance(own := line.get("custom_id"), str):
            continue  # its answer is an error
        if (first := seen.setdefault(own, number)) != number:
            raise ValueError(
                f"{input}: lines {first} and {number} have the same custom_id {own[:100]!r}"
            )


async def _write(
    llm: "LLM", name: str, input: str, num_lines: int | None, file: ResumableFile
) -> tuple[int, int]:
    """Process the lines that the output lacks. Returns their number, and how many were refused."""
    from llama_jax.serve.batch import answer_lines

    before = sum(1 for _ in file.lines())
    lines = (line for _, line in itertools.islice(read_jsonl(input), before, None))
    done = failed = 0
    with progress_bar() as bar:
        task = bar.add_task(
            "answering", total=num_lines, completed=before, before=before, unit="requests",
            clock=Clock(),
        )  # fmt: skip
        async for answer in answer_lines(llm, name, lines):
            file.write(json_line(answer) + "\n")
            file.flush()
            done += 1
            failed += _is_refused(answer)
            bar.update(task, advance=1)
    return done, failed


def _is_refused(answer: dict[str, Any]) -> bool:
    return answer["response"] is None or answer["response"]["status_code"] != 200
