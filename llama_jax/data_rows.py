"""Rows of a data set, of which each asks one question, and the fields of its answer.

A row is a dict, as a line of JSON or a table has it. What a row asks is told by its fields; one
that cannot be answered says why in its field "error", and the others go on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Request
from llama_jax.llm import LLM
from llama_jax.results import Perplexity, Ranking, Score
from llama_jax.scoring import Question, answers


def score_rows(
    llm: LLM,
    rows: Iterable[dict[str, Any] | ValueError],
    *,
    tokens: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> Iterator[tuple[dict[str, Any], int]]:
    """Each row with its scores, and how many tokens were read for it; in order, as they come.

    rows: with "prompt" and "completion", "prompt" and "choices" (a list of texts), or "text"; other
    fields are kept. tokens: add token_ids and logprobs. window, stride: as `LLM.perplexity`.
    """

    def ask(row: dict[str, Any]) -> Question[Score] | Question[Ranking] | Question[Perplexity]:
        return _ask(llm, row, window, stride)

    return answer_rows(llm.engine, rows, ask, partial(result_fields, tokens=tokens))


def answer_rows[T](
    engine: Engine,
    rows: Iterable[dict[str, Any] | ValueError],
    ask: Callable[[dict[str, Any]], Question[T]],
    fields: Callable[[T], dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], int]]:
    """Each row with the fields of its answer, and how many tokens were read for it; in order.

    A row for which `ask` raises ValueError gets the field "error", and so does an error in the
    place of a row, and a row in the work for which something was raised; the others go on.
    """

    def question(row: dict[str, Any] | ValueError) -> Question[tuple[dict[str, Any], int]]:
        kept = {} if isinstance(row, ValueError) else {k: v for k, v in row.items() if k != "error"}
        try:
            if isinstance(row, ValueError):
                raise row
            asked = ask(row)
        except ValueError as error:
            failed = {**kept, "error": str(error)}, 0
            return Question((), lambda _: failed)

        def conclude(requests: Sequence[Request]) -> tuple[dict[str, Any], int]:
            error = next((request.error for request in requests if request.error), None)
            answer = {"error": repr(error)} if error else fields(asked.conclude(requests))
            return {**kept, **answer}, asked.num_tokens

        return Question(asked.requests, conclude)

    return answers(engine, map(question, rows))


def _ask(
    llm: LLM, row: dict[str, Any], window: int | None, stride: int | None
) -> Question[Score] | Question[Ranking] | Question[Perplexity]:
    """The question that a row asks, told by its fields."""
    kinds = [name for name in ("completion", "choices", "text") if name in row]
    if len(kinds) != 1:
        raise ValueError(
            'expected "prompt" with "completion" or "choices", or "text", got '
            + (" and ".join(f'"{name}"' for name in (kinds or row)) or "no field")
        )
    if kinds == ["text"]:
        return llm.perplexity_question(_text(row, "text"), window, stride)
    prompt = _text(row, "prompt")
    if kinds == ["completion"]:
        return llm.score_question(prompt, _text(row, "completion"))
    choices = row["choices"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f'"choices" must be a list of texts, got {choices!r}')
    return llm.rank_question(prompt, choices)


def _text(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise ValueError(f'"{field}" must be a text, got {value!r}')
    return value


def result_fields(result: Score | Ranking | Perplexity, tokens: bool = False) -> dict[str, Any]:
    """A result as JSON has it; `tokens`: with token_ids and logprobs of each."""
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
