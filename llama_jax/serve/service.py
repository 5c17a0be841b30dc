"""This module does what every endpoint needs: make jobs, admit them, and wait in time.

Prompts are tokenised, and templates rendered, in worker threads: a long one would keep the event
loop, and with it every stream, waiting. Short prompts without a template are not, since a thread
takes longer to begin.
"""

import asyncio
import math
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llama_jax.engine.request import Request
from llama_jax.jobs import Job
from llama_jax.prompts import PromptTooLongError
from llama_jax.sampling_params import SamplingParams
from llama_jax.serve.engine_thread import EngineThread, Submission, Update
from llama_jax.serve.errors import (
    ApiError,
    bad_request,
    engine_failed,
    not_ready,
    request_failed,
    too_late,
)
from llama_jax.serve.metrics import Metrics
from llama_jax.serve.options import WAITING_POOLS, ServeOptions
from llama_jax.serve.replies import PromptTokensDetails, Usage
from llama_jax.serve.schemas import SAMPLING_FIELDS, Asked, ChatRequest
from llama_jax.serve.structured import field_of_form, structured_output
from llama_jax.structured import GrammarsBusyError

if TYPE_CHECKING:
    from llama_jax.engine.compile_cache import CompileReport
    from llama_jax.llm import LLM

# Fields that messages of `LLM` and `SamplingParams` begin with.
_FIELDS = {
    *SAMPLING_FIELDS,
    "max_tokens",
    "logit_bias",
    "messages",
    "prompt",
    "tools",
    "tool_choice",
    "chat_template",
}
# Grammars compiled at the same time.
_GRAMMAR_THREADS = 4
# The longest that a client is told to wait before it asks again, in seconds.
_LONGEST_RETRY = 60


@dataclass(eq=False)
class Service:
    """A service is a loaded model behind its engine's thread.

    root: what was loaded. end_server: called once when the engine has failed. warms_up: compile
    everything before the first request, and not what is needed when it is.
    """

    llm: "LLM"
    options: ServeOptions
    root: str = "abacus"
    end_server: Callable[[], None] = lambda: None
    warms_up: bool = True
    thread: EngineThread = field(init=False)
    metrics: Metrics = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    warmup_seconds: float = 0.0
    is_draining: bool = False
    _ready: asyncio.Event = field(default_factory=asyncio.Event)
    _grammar_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_GRAMMAR_THREADS, "grammars")
    )
    _ended: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    def __post_init__(self) -> None:
        self.thread = EngineThread(
            self.llm.engine,
            on_ready=self._on_ready,
            on_failure=self._on_failure,
            on_end=self._on_end,
            on_step=lambda tokens: self.metrics.step(tokens),
            warm_up=self._warm_up,
        )
        self.metrics = Metrics(self.options.names[0], self.llm.max_seq_len, self.thread)

    @property
    def name(self) -> str:
        """Returns the model's name in replies."""
        return self.options.names[0]

    @property
    def is_ready(self) -> bool:
        return self.thread.is_ready and self.thread.is_stepping and not self.is_draining

    async def ready(self) -> bool:
        """Waits for the end of the warm-up; returns False if it failed."""
        await self._ready.wait()
        return not self.thread.failure

    def _warm_up(self) -> "CompileReport":
        if self.warms_up:
            return self.llm.warmup(("tokens", "logprobs"), structured=True)
        return self.llm.warmup(())

    def _on_ready(self, report: "CompileReport") -> None:
        self.warmup_seconds = report.seconds
        self._ready.set()

    def _on_failure(self, error: BaseException) -> None:
        self._ready.set()
        self.end_server()

    def _on_end(self, submission: Submission, request: Request) -> None:
        self._ended.append(time.perf_counter())
        self.metrics.request(request, submission.began)
        if not (submission.num_open or request.finish_reason == "cancelled"):
            self.metrics.ended(submission.requests)

    # What was asked.

    def check_model(self, model: str | None) -> None:
        if model is not None and model not in self.options.names:
            raise ApiError(
                404,
                f"the model {model[:100]!r} is not served here; there is "
                f"{', '.join(self.options.names)}",
                param="model",
                code="model_not_found",
            )

    def sampling(self, body: Asked, limit: int | None, logprobs: int | None) -> SamplingParams:
        """Returns the sampling settings of a request, with the checkpoint's defaults.

        Called in a worker thread.

        limit: of new tokens; None for the checkpoint's limit, or as many as the context allows.
        """
        default = self.llm.default_sampling
        if limit is None:
            own = self.llm.manifest.generation.get("max_new_tokens")
            limit = default.max_new_tokens if own else self.llm.max_seq_len
        given = {
            ours: value
            for theirs, ours in SAMPLING_FIELDS.items()
            if (value := getattr(body, theirs)) is not None
        }
        if body.seed is not None:
            given["seed"] = body.seed % 2**32
        if body.logit_bias:
            given["logit_bias"] = {**default.logit_bias, **_biases(body.logit_bias)}
        given["structured"] = structured_output(body)
        return replace(default, **given, max_new_tokens=limit, logprobs=logprobs)

    async def in_thread[T](
        self, make: Callable[[], T], body: Asked | None = None, is_quick: bool = False
    ) -> T:
        """Returns the result of `make`, run in a worker thread. Its ValueError becomes `ApiError`.

        body: the request. Grammars are compiled in separate threads, so that hostile ones delay
        only each other. is_quick: `make` takes less time than a thread takes to begin, unless there
        is a grammar, so it is called at once.
        """
        form = field_of_form(body) if body else None
        pool = self._grammar_threads if form else None
        try:
            if is_quick and not form:
                return make()
            return await asyncio.get_running_loop().run_in_executor(pool, make)
        except (ValueError, TypeError) as error:
            prompt = "messages" if isinstance(body, ChatRequest) else "prompt"
            raise _mistake(error, form, prompt) from error

    def check_room(self, request: Request, limit: int | None, field: str = "max_tokens") -> None:
        """Raises `ApiError` if a request needs more tokens than the context has.

        field: by which `limit` was given.
        """
        length = len(request.prompt)
        if limit is not None and length + limit > self.llm.max_seq_len:
            raise bad_request(
                f"{field} {limit} and a prompt of {length} tokens are more than the "
                f"{self.llm.max_seq_len} tokens of the context",
                field,
                "context_length_exceeded",
            )

    # How it is answered.

    def admit(
        self, requests: Sequence[Request], began: float, *, is_streamed: bool = False
    ) -> Submission:
        """Submits requests to the engine, if the queue has room. The caller must close the result.

        began: when they were asked for, of `time.perf_counter`. At their deadline they are
        cancelled, whatever the client's socket does, and the result raises `ApiError`.

        The engine admits no sequence before there are pages for it, and takes up those again that
        had to give theirs back, so what is accepted here does not die of memory.
        """
        if self.thread.failure:
            raise engine_failed(self.thread.failure)
        if not self.thread.is_ready or self.is_draining:
            raise not_ready(
                "the server is going down" if self.is_draining else "the model is warming up"
            )
        tokens = sum(len(request.prompt) for request in requests)
        self.check_queue(len(requests), tokens)
        submission = self.thread.ask(requests, is_streamed, began)
        seconds = self.options.request_timeout - (time.perf_counter() - began)
        submission.set_deadline(seconds, self._end_late)
        return submission

    def check_queue(self, sequences: int, tokens: int = 0) -> None:
        """Raises `ApiError` if the queue has no room for so many requests and prompt tokens."""
        capacity = self.llm.engine.options.max_batch_size + self.options.max_waiting
        if sequences > capacity:
            raise bad_request(
                f"{sequences} sequences in one request; at most {capacity} are possible", "n"
            )
        pools = WAITING_POOLS * self.thread.snapshot.num_pages * self.llm.engine.pages.page_size
        is_full = self.thread.num_open + sequences > capacity
        if is_full or (self.thread.num_open and self.thread.open_tokens + tokens > pools):
            self.metrics.failures.labels(self.name, "rejected").inc()
            raise ApiError(
                429,
                f"{self.thread.num_open} sequences are running or waiting; try again later",
                type="rate_limit_error",
                code="queue_full",
                retry_after=self._retry_after(),
            )

    def _retry_after(self) -> int:
        """Estimates the seconds until the queue has room, by the pace of the last minutes."""
        if len(self._ended) < 2:
            return 1
        pace = (time.perf_counter() - self._ended[0]) / len(self._ended)
        return min(_LONGEST_RETRY, max(1, math.ceil(pace)))

    async def updates(self, submission: Submission) -> AsyncIterator[list[Update]]:
        """Yields the updates of a submission until all its requests have ended.

        Those that have come meanwhile are yielded together. Raises what `Submission.next` does.
        """
        remaining = len(submission.requests)
        last_at: dict[int, float] = {}
        while remaining:
            updates = await submission.next()
            for update in updates:
                if submission.is_streamed and update.token_ids:
                    if before := last_at.get(update.index):
                        self.metrics.piece(update.at - before, len(update.token_ids))
                    last_at[update.index] = update.at
                remaining -= update.is_last
            yield updates

    def _end_late(self, submission: Submission) -> None:
        if submission.num_open:  # otherwise only its client is late
            self.metrics.failures.labels(self.name, "timeout").inc()
            submission.fail(too_late(self.options.request_timeout))

    async def run[T](self, job: Job[T], began: float) -> T:
        """Runs a job and waits for its result, until the deadline."""
        submission = self.admit(job.requests, began)
        try:
            async for _ in self.updates(submission):
                pass
        finally:
            submission.close()
        return self.result_of(job)

    def result_of[T](self, job: Job[T]) -> T:
        """Returns the result of a job whose requests have ended.

        Raises `ApiError` for what was raised in the work for one of them.
        """
        for request in job.requests:
            if request.error:
                raise request_failed(request.error)
        return job.result()

    def usage(self, requests: Sequence[Request], num_prompts: int = 1) -> Usage:
        """Counts tokens.

        requests: of `num_prompts` prompts, the continuations of each one after another.
        """
        each = len(requests) // num_prompts
        prompts = requests[::each]
        prompt = sum(len(request.prompt) for request in prompts)
        completion = sum(len(request.token_ids) for request in requests)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(request.num_cached for request in prompts)
            ),
        )


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {_token_id(key): value for key, value in given.items()}
    except ValueError as error:
        raise bad_request("logit_bias: keys must be token ids", "logit_bias") from error


def _token_id(text: str) -> int:
    if not re.fullmatch("[0-9]{1,10}", text):  # `int` reads " 5 " and "1_0" too
        raise ValueError(text)
    return int(text)


def _mistake(error: Exception, form: str | None, prompt: str) -> ApiError:
    """Returns the reply to a mistake that `LLM` or `SamplingParams` found, with the client's field.

    form, prompt: the client's names of `SamplingParams.structured` and the prompt.
    """
    message = str(error)
    if isinstance(error, GrammarsBusyError):  # no mistake of this client's
        return ApiError(503, message, type="server_error", code="busy", retry_after=5)
    for theirs, ours in (("max_tokens", "max_new_tokens"), ("min_tokens", "min_new_tokens")):
        message = message.replace(ours, theirs)
    field = re.match(r"(\w+)(\[\d+\])?", message)
    param = field[0] if field and field[1] in _FIELDS else None
    if message.startswith("the prompt "):
        param = prompt
    elif message.startswith("the completion "):
        param = "completions"
    elif form and field and field[1] == "structured":
        param = form
        message = re.sub(r"structured(\.\w+)?", form, message, count=1)
    code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None
    return bad_request(message, param, code)
