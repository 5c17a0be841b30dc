"""Runs jobs on the engine: any number of them, read as a stream, results in the order of the jobs.

A job is all the requests of one generation, score, ranking or perplexity, and the function that
combines their results. `run_jobs` reads jobs ahead and submits them sorted, so that the engine's
calls are well filled and a common prefix is computed once.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Request
from llama_jax.model.config import PAGE_SIZE
from llama_jax.results import Generation, Perplexity, Piece, Ranking, Score
from llama_jax.sampling_params import SamplingParams
from llama_jax.text.windows import rolling_windows

# Jobs that are read before the first is submitted, so that there is something to sort; for a large
# batch, this many per slot.
_READ_AHEAD, _READ_AHEAD_PER_SLOT = 1024, 16


@dataclass(frozen=True)
class Job[T]:
    """Requests and the function that combines their results.

    A job without requests is done at once.
    """

    requests: tuple[Request, ...]
    combine: Callable[[Sequence[Request]], T]

    @property
    def is_done(self) -> bool:
        return all(request.finish_reason for request in self.requests)

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all requests; those that requests share count each time."""
        return sum(len(request.prompt) for request in self.requests)

    def result(self) -> T:
        """Return the combined result. Raises what a request's work raised, if `combine` does."""
        return self.combine(self.requests)


def run_jobs[T](
    engine: Engine, jobs: Iterable[Job[T]], read_ahead: int | None = None
) -> Iterator[T]:
    """Yield the result of each job, in order, as soon as it and those before it are done.

    jobs: may be endless. About twice `read_ahead` of them are held at a time, and new ones are read
        between the engine's steps, so that it never runs dry.

    When the iterator is closed, requests that are still open are cancelled.
    """
    num_slots = engine.options.max_batch_size
    if read_ahead is None:
        read_ahead = max(_READ_AHEAD, _READ_AHEAD_PER_SLOT * num_slots)
    source = iter(jobs)
    unfinished: deque[Job[T]] = deque()
    unsubmitted: list[Job[T]] = []
    running: list[Request] = []
    try:
        while True:
            room = read_ahead - len(unsubmitted)
            count = min(room, 2 * num_slots) if running else room
            new = list(itertools.islice(source, count))
            unfinished += new
            unsubmitted += new
            if not running or engine.num_waiting < num_slots:
                for job in _well_sorted(unsubmitted):
                    running += map(engine.submit, job.requests)
                unsubmitted.clear()
            if running:
                engine.step()
                running = [request for request in running if not request.finish_reason]
            while unfinished and unfinished[0].is_done:
                yield unfinished.popleft().result()
            if len(new) < count and not unfinished:
                return
    finally:
        for request in running:
            engine.cancel(request.id)


def run_together[T](
    engine: Engine, jobs: Sequence[Job[T]], on_finished: Callable[[], None] | None = None
) -> list[T]:
    """Submit all jobs at once, in their order, and return their results.

    on_finished: called each time a job is done.
    """
    unfinished = {request: job for job in jobs for request in job.requests}
    for request in engine.run(list(unfinished)):
        if request.finish_reason:
            job = unfinished.pop(request)
            if on_finished and unfinished.keys().isdisjoint(job.requests):
                on_finished()
    return [job.result() for job in jobs]


def stream_job(engine: Engine, job: Job[Generation]) -> Iterator[Piece]:
    """Yield the text of a job of one request as it grows. Raises what the request's work raised."""
    (request,) = job.requests
    shown = 0
    for _ in engine.run([request]):
        text = request.text[shown : request.released]
        shown = request.released
        if request.error:
            raise request.error
        if request.finish_reason:
            yield Piece(text, job.result())
        elif text:
            yield Piece(text)


def _well_sorted[T](jobs: Sequence[Job[T]]) -> list[Job[T]]:
    """Sort jobs by length, longest first, with those that share their first page together."""

    def length(job: Job[T]) -> int:
        return max((len(request.prompt) for request in job.requests), default=0)

    def prefix(job: Job[T]) -> tuple[int, ...]:
        return tuple(job.requests[0].prompt[:PAGE_SIZE]) if job.requests else ()

    longest: dict[tuple[int, ...], int] = {}
    for job in jobs:
        key = prefix(job)
        longest[key] = max(longest.get(key, 0), length(job))
    return sorted(jobs, key=lambda job: (-longest[prefix(job)], prefix(job), -length(job)))


def score_request(ids: Sequence[int], start: int, num_top: int | None = None) -> Request:
    """Make a request for the logprobs of `ids` from index `start` on, each given those before.

    num_top: also find that many likeliest tokens in the place of each, and its rank.
    """
    params = SamplingParams(temperature=0.0, seed=0, logprobs=num_top)
    return Request(list(ids), params, output_kind="logprobs", score_from=start)


def score_job(ids: Sequence[int], start: int) -> Job[Score]:
    """Make the job of a score, see `score_request`."""
    return Job((score_request(ids, start),), lambda requests: score_of(requests[0]))


def ranking_job(pairs: Iterable[tuple[Sequence[int], int]]) -> Job[Ranking]:
    """Make the job of a ranking. pairs: the arguments of `score_request` for each label."""
    requests = tuple(score_request(*pair) for pair in pairs)
    return Job(requests, lambda done: Ranking(tuple(map(score_of, done))))


def perplexity_job(ids: Sequence[int], text: str, window: int, stride: int) -> Job[Perplexity]:
    """Make the job of a perplexity. ids: at least two. text: what they say after the first.

    window, stride: see `rolling_windows`.
    """
    windows = rolling_windows(len(ids), window, stride)
    requests = tuple(score_request(ids[begin:end], first - begin) for begin, first, end in windows)
    return Job(requests, lambda done: perplexity_of(done, text))


def score_of(request: Request) -> Score:
    """Return the result of a `score_request`. Raises what the request's work raised."""
    logprobs = _logprobs(request)
    return Score(
        token_ids=tuple(request.prompt[request.score_from :]),
        logprobs=tuple(logprobs.tolist()),
        total=float(logprobs.sum(dtype=np.float64)),
        is_greedy=bool(request.prompt_is_likeliest.all()),
    )


def perplexity_of(requests: Sequence[Request], text: str) -> Perplexity:
    """Combine the `score_request`s of a text's windows. Raises as `score_of` does."""
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
