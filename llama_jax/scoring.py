"""Scoring as a stream: questions about texts that exist already, many at a time, answers in order.

A question is what one score, ranking or perplexity asks of the engine. `answers` reads questions
ahead and hands them to the engine sorted, so that its calls are well filled and what begins alike
is computed once, and gives the answers back in the order of the questions.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Request
from llama_jax.model.kv_cache import PAGE_SIZE
from llama_jax.results import Perplexity, Ranking, Score

if TYPE_CHECKING:
    from llama_jax.llm import LLM

# Questions that are read before any is asked, so that there is something to sort; at least so many
# per row of the engine.
_READ_AHEAD, _READ_AHEAD_PER_ROW = 1024, 16


@dataclass(frozen=True)
class Question[T]:
    """Requests that are made together, and what their results amount to.

    A question without requests has its answer at once.
    """

    requests: tuple[Request, ...]
    conclude: Callable[[Sequence[Request]], T]

    @property
    def is_done(self) -> bool:
        return all(request.finish_reason for request in self.requests)

    @property
    def num_tokens(self) -> int:
        """Tokens in all requests, those that they share counted each time."""
        return sum(len(request.prompt) for request in self.requests)

    def answer(self) -> T:
        return self.conclude(self.requests)


def answers[T](
    engine: Engine, questions: Iterable[Question[T]], read_ahead: int | None = None
) -> Iterator[T]:
    """The answer to each question, in order, as soon as it and those before it are known.

    questions: may be endless; about two times `read_ahead` of them are held at a time, and new ones
    are read between the engine's steps, so that it never runs dry. Requests that are still open
    when the iterator is closed are cancelled.
    """
    rows = engine.options.max_batch_size
    if read_ahead is None:
        read_ahead = max(_READ_AHEAD, _READ_AHEAD_PER_ROW * rows)
    source = iter(questions)
    unanswered: deque[Question[T]] = deque()
    unasked: list[Question[T]] = []
    running: list[Request] = []
    try:
        while True:
            room = read_ahead - len(unasked)
            wanted = min(room, 2 * rows) if running else room
            new = list(itertools.islice(source, wanted))
            unanswered += new
            unasked += new
            if not running or engine.num_waiting < rows:
                for question in _well_sorted(unasked):
                    running += map(engine.submit, question.requests)
                unasked.clear()
            if running:
                engine.step()
                running = [request for request in running if not request.finish_reason]
            while unanswered and unanswered[0].is_done:
                yield unanswered.popleft().answer()
            if len(new) < wanted and not unanswered:
                return
    finally:
        for request in running:
            engine.cancel(request.id)


def _well_sorted[T](questions: Sequence[Question[T]]) -> list[Question[T]]:
    """Questions whose first page is the same one after another, and the longest first otherwise."""

    def length(question: Question[T]) -> int:
        return max((len(request.prompt) for request in question.requests), default=0)

    def beginning(question: Question[T]) -> tuple[int, ...]:
        return tuple(question.requests[0].prompt[:PAGE_SIZE]) if question.requests else ()

    longest: dict[tuple[int, ...], int] = {}
    for question in questions:
        key = beginning(question)
        longest[key] = max(longest.get(key, 0), length(question))
    return sorted(questions, key=lambda q: (-longest[beginning(q)], beginning(q), -length(q)))


def score_request(ids: Sequence[int], start: int) -> Request:
    """How likely is each of `ids` from `start` on, after those before it?"""
    return Request(list(ids), wanted="logprobs", score_from=start)


def score_of(request: Request) -> Score:
    """The answer to a `score_request`. Raises what the work for it raised."""
    logprobs = _logprobs(request)
    return Score(
        token_ids=tuple(request.prompt[request.score_from :]),
        logprobs=tuple(logprobs.tolist()),
        total=float(logprobs.sum(dtype=np.float64)),
        is_greedy=bool(request.prompt_is_likeliest.all()),
    )


def perplexity_of(requests: Sequence[Request], text: str) -> Perplexity:
    """The answer to the `score_request`s of a text's windows. Raises as `score_of` does."""
    logprobs = np.concatenate(list(map(_logprobs, requests)))
    return Perplexity(
        token_ids=tuple(i for request in requests for i in request.prompt[request.score_from :]),
        logprobs=tuple(logprobs.tolist()),
        total=float(logprobs.sum(dtype=np.float64)),
        num_bytes=len(text.encode("utf-8", "replace")),
        num_words=len(text.split()),
    )


def _logprobs(request: Request) -> np.ndarray:
    if request.error:
        raise request.error
    return request.prompt_logprobs


def score_rows(
    llm: "LLM",
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
    llm: "LLM", row: dict[str, Any], window: int | None, stride: int | None
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
