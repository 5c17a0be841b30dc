"""Turns rows of a data set into jobs, and their results into fields of the rows.

A row is a dict, from a line of JSON or a table. Its fields decide which job it is. A row that fails
gets a field "error", and the others go on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Request
from llama_jax.jobs import Job, run_jobs
from llama_jax.llm import LLM
from llama_jax.results import Perplexity, Ranking, Score


def score_rows(
    llm: LLM,
    rows: Iterable[dict[str, Any] | ValueError],
    *,
    tokens: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each row with its scores, and the number of tokens that were read for it, in order.

    rows: have "prompt" and "completion", "prompt" and "choices" (a list of texts), or "text". Their
        other fields are kept.
    tokens: add token_ids and logprobs.
    window, stride: as in `LLM.perplexity`.
    """

    def make_job(row: dict[str, Any]) -> Job[Score] | Job[Ranking] | Job[Perplexity]:
        return _score_job(llm, row, window, stride)

    return run_rows(llm.engine, rows, make_job, partial(result_fields, tokens=tokens))


def run_rows[T](
    engine: Engine,
    rows: Iterable[dict[str, Any] | ValueError],
    make_job: Callable[[dict[str, Any]], Job[T]],
    fields: Callable[[T], dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield each row with the fields of its result, and the number of tokens that were read for it,
    in order.

    A row gets the field "error" if `make_job` raises ValueError for it, or if its requests fail. An
    error in place of a row becomes a row with that field.
    """

    def job_of(row: dict[str, Any] | ValueError) -> Job[tuple[dict[str, Any], int]]:
        kept = {} if isinstance(row, ValueError) else {k: v for k, v in row.items() if k != "error"}
        try:
            if isinstance(row, ValueError):
                raise row
            job = make_job(row)
        except ValueError as error:
            failed = {**kept, "error": str(error)}, 0
            return Job((), lambda _: failed)

        def combine(requests: Sequence[Request]) -> tuple[dict[str, Any], int]:
            error = next((request.error for request in requests if request.error), None)
            result = {"error": repr(error)} if error else fields(job.combine(requests))
            return {**kept, **result}, job.num_tokens

        return Job(job.requests, combine)

    return run_jobs(engine, map(job_of, rows))


def _score_job(
    llm: LLM, row: dict[str, Any], window: int | None, stride: int | None
) -> Job[Score] | Job[Ranking] | Job[Perplexity]:
    """Make the job that a row's fields ask for."""
    kinds = [name for name in ("completion", "choices", "text") if name in row]
    if len(kinds) != 1:
        raise ValueError(
            'expected "prompt" with "completion" or "choices", or "text", got '
            + (" and ".join(f'"{name}"' for name in (kinds or row)) or "no field")
        )
    if kinds == ["text"]:
        return llm.perplexity_job(_text(row, "text"), window, stride)
    prompt = _text(row, "prompt")
    if kinds == ["completion"]:
        return llm.score_job(prompt, _text(row, "completion"))
    choices = row["choices"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f'"choices" must be a list of texts, got {choices!r}')
    return llm.rank_job(prompt, choices)


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise ValueError(f'"{field}" must be a text, got {value!r}')
    return value


def result_fields(result: Score | Ranking | Perplexity, tokens: bool = False) -> dict[str, Any]:
    """Return a result as JSON values. tokens: whether to include token_ids and logprobs."""
    if isinstance(result, Ranking):
        return {
            "best": result.best,
            "probabilities": result.probabilities,
            "scores": [result_fields(score, tokens) for score in result.scores],
        }
    fields: dict[str, Any] = {"logprob": result.total, "num_tokens": len(result.token_ids)}
    if isinstance(result, Score):
        fields["is_greedy"] = result.is_greedy
    fields["perplexity"] = result.perplexity
    if isinstance(result, Perplexity):
        fields |= {"byte_perplexity": result.byte_perplexity,
                   "word_perplexity": result.word_perplexity}  # fmt: skip
    if tokens:
        fields |= {"token_ids": result.token_ids, "logprobs": result.logprobs}
    return fields
