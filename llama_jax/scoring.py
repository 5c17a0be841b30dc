"""Scoring as a stream: questions about texts that exist already, many at a time, answers in order.

A question is what one score, ranking or perplexity asks of the engine. `answers` reads questions
ahead and hands them to the engine sorted, so that its calls are well filled and what begins alike
is computed once, and gives the answers back in the order of the questions.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Request
from llama_jax.model.config import PAGE_SIZE
from llama_jax.results import Perplexity, Score
from llama_jax.sampling_params import SamplingParams

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


def score_request(ids: Sequence[int], start: int, num_top: int | None = None) -> Request:
    """How likely is each of `ids` from `start` on, after those before it?

    num_top: how many of the likeliest tokens in each one's place are wanted, and its rank; None for
    neither.
    """
    params = SamplingParams(temperature=0.0, seed=0, logprobs=num_top)
    return Request(list(ids), params, wanted="logprobs", score_from=start)


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
