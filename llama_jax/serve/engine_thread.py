"""This module has the only thread that steps the engine, and its interface to the event loop.

The event loop never calls the engine, whose lock is held during a step. Submissions and
cancellations go into an inbox that the thread empties between two steps; the changes of a step come
back in one `call_soon_threadsafe`. So the requests of a client that leaves are cancelled within
one step, and a thousand streams wake the event loop at most once per step.

First and last tokens come back after their step. While there are many streams, the tokens between
wait for others, because a write to a socket takes longer than the rest of a token's way: all
streams together get about 600 writes a second, and each of them at least 20 if steps are that
quick. What waits is copied once, when it is told. Launches of several steps then take as long
as the tokens wait, if every slot is taken (`Engine.stream_steps`).
"""

import asyncio
import logging
import threading
import time
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from traceback import format_tb
from typing import TYPE_CHECKING

import msgspec

from llama_jax.engine import compile_cache
from llama_jax.engine.compile_cache import CompileReport
from llama_jax.engine.request import Request
from llama_jax.engine.scheduling import Stats
from llama_jax.serve.errors import ApiError, ClientGone, engine_failed, not_ready

if TYPE_CHECKING:
    from llama_jax.engine.engine import Engine

_log = logging.getLogger(__name__)

# A step that takes longer is no step any more: `EngineThread.is_stepping`.
_STALLED_AFTER = 60.0
# Seconds from one write of all streams to the next, for each stream; and at most.
_PER_WRITE, _LONGEST_WAIT = 0.0016, 0.05
# Seconds for which the thread leaves Python's lock to the event loop, at most, until a first or
# last token is written.
_PAUSE = 0.001


class Update(msgspec.Struct, frozen=True):
    """An update has the news of one request of a submission: a copy, made between two steps.

    text: what may be shown now. token_ids: drawn since the last one; logprobs, top: of these, where
    the request asks for them. So many are made that a dataclass, which takes four times as long,
    would be noticed.
    """

    index: int
    request: Request
    text: str
    token_ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    is_last: bool
    at: float

    @property
    def is_cancelled(self) -> bool:
        return self.is_last and self.request.finish_reason == "cancelled"


@dataclass(eq=False)
class Submission:
    """A submission holds requests that are submitted together, by one caller in the event loop.

    Made by `EngineThread.ask`. is_streamed: the caller wants pieces, or else only each request's
    end. began: when it was asked for, of `time.perf_counter`.
    """

    requests: Sequence[Request]
    is_streamed: bool
    _owner: "EngineThread"
    began: float = 0.0
    # The event loop's own: what `next` has not returned yet, and then raises.
    _updates: list[Update] = field(default_factory=list)
    _error: ApiError | ClientGone | None = None
    _waiter: "asyncio.Future[None] | None" = None
    _deadline: asyncio.TimerHandle | None = None
    # The thread's own: requests not ended; those that have changed since they were told, by index;
    # characters and tokens of each that were told.
    _remaining: int = 0
    _changed: dict[int, Request] = field(default_factory=dict)
    _told: dict[int, tuple[int, int]] = field(default_factory=dict)
    # The event loop's own: requests that have not ended, as far as it knows, and their tokens.
    num_open: int = 0
    open_tokens: int = 0

    async def next(self) -> list[Update]:
        """Waits for updates and returns all that have come; for ever if all requests have ended.

        Raises `ApiError` if the engine failed or stops, or what `fail` was told.
        """
        if not (self._updates or self._error):
            self._waiter = self._owner.loop.create_future()
            await self._waiter
        if not self._updates and self._error:
            raise self._error
        updates, self._updates = self._updates, []
        return updates

    def fail(self, error: ApiError | ClientGone) -> None:
        """Cancels what has not ended, and makes `next` raise an error after the present updates.

        Called in the event loop. Whoever waits for the socket asks for no update, so it is not
        left to them to close the submission.
        """
        self._error = self._error or error
        self._owner.close(self)
        self._wake()

    def close(self) -> None:
        """Cancels the requests that have not ended, and the deadline."""
        if self._deadline:
            self._deadline.cancel()
        self._owner.close(self)

    def set_deadline(self, seconds: float, on_late: Callable[["Submission"], None]) -> None:
        """Calls `on_late` after so many seconds, unless the submission is closed before."""
        self._deadline = self._owner.loop.call_later(max(0.0, seconds), on_late, self)

    def _take_over(self, updates: Sequence[Update]) -> None:
        """Lets `next` return updates; not those that are too late, or the end of a cancellation."""
        if not self._error:
            self._updates += [each for each in updates if not each.is_cancelled]
        self._wake()

    def _wake(self) -> None:
        """Lets `next` return."""
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    # The engine's thread alone calls these.

    def _take(self) -> list[Update]:
        """Returns the news of all requests."""
        changed, self._changed = self._changed, {}
        return [each for index, request in changed.items() for each in self._news(index, request)]

    def _news(self, index: int, request: Request) -> Iterator[Update]:
        """Yields what is new of a request: one update, but a token without text begins another,
        since a tool call may begin with it."""
        shown, start = self._told.get(index, (0, 0))
        count, released = len(request.token_ids), max(shown, request.released)
        first = bisect(request.silent, start, key=itemgetter(0))
        now = time.perf_counter()
        for stop, length in (*request.silent[first:], (count, released)):
            until = min(max(shown, length), released)
            yield Update(
                index,
                request,
                request.text[shown:until],
                request.token_ids[start:stop],
                request.logprobs[start:stop],
                request.top[start:stop],
                request.finish_reason is not None and stop == count,
                now,
            )
            shown, start = until, stop
        self._told[index] = shown, start


@dataclass(frozen=True)
class Snapshot:
    """A snapshot shows the engine between two steps. compiled: programs since the warm-up."""

    stats: Stats
    num_running: int
    num_waiting: int
    pages_used: int
    num_pages: int
    compiled: int
    steps: int


class EngineThread:
    """Steps an engine while there is work.

    on_ready: called in the event loop when everything is compiled, with what that took.
    on_failure: called there when a step, or the warm-up, has raised; nothing is answered any more.
    on_end: called there with each request that has ended or was cancelled, after the others have
    been told. on_step: called in the thread with the tokens that a step computed. warm_up: called
    there before the first step, to compile what will be needed.
    """

    def __init__(
        self,
        engine: "Engine",
        on_ready: Callable[[CompileReport], None],
        on_failure: Callable[[BaseException], None],
        on_end: Callable[[Submission, Request], None],
        on_step: Callable[[int], None],
        warm_up: Callable[[], CompileReport],
    ) -> None:
        self._engine, self._warm_up = engine, warm_up
        self._on_ready, self._on_failure = on_ready, on_failure
        self._on_end, self._on_step = on_end, on_step
        self._wake = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._is_told_to_stop = False
        self._submissions: set[Submission] = set()  # the thread's own
        self._changed: set[Submission] = set()  # those with news
        self._urgent: set[Submission] = set()  # those of them whose news do not wait
        self._has_ends = False  # whether requests have ended, of which nobody has been told
        self._failed: dict[Submission, ApiError] = {}  # those of them whose news is an error
        self._told_at = self._wait = 0.0  # when the others were told, and for how long they wait
        self._is_written = threading.Event()  # what was told last
        self.loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._step_began = 0.0
        self._warm = compile_cache.report()
        self._steps = 0
        self.failure: BaseException | None = None
        self.is_ready = False
        self.num_open = 0  # requests that have not ended, as the event loop knows
        self.open_tokens = 0  # of their prompts
        self.snapshot = self._look()

    # The event loop's side.

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._thread.start()

    def ask(self, requests: Sequence[Request], is_streamed: bool, began: float) -> Submission:
        """Submits requests to the engine. The caller must close the submission."""
        submission = Submission(requests, is_streamed, self, began)
        for index, request in enumerate(requests):
            request.on_change = partial(self._note, submission, index)
        with self._wake:
            if self.failure:
                raise engine_failed(self.failure)
            if not self.is_ready or self._is_told_to_stop:
                raise not_ready("the server is starting or going down")
            self._inbox.append(partial(self._submit, submission))
            self._wake.notify()
        self._count(submission, len(requests), sum(len(request.prompt) for request in requests))
        return submission

    def close(self, submission: Submission) -> None:
        if submission.num_open:
            self._tell(partial(self._cancel, submission))

    def fail_all(self, error: ApiError) -> None:
        """Ends every submission with an error, and refuses new ones."""
        self._tell(partial(self._end_all, error))

    def stop(self, timeout: float) -> bool:
        """Ends the thread after its step; returns False if that takes longer."""
        with self._wake:
            self._is_told_to_stop = True
            self._wake.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def is_stepping(self) -> bool:
        """Returns whether the thread is alive, and no step takes suspiciously long."""
        began = self._step_began
        is_stalled = began and time.perf_counter() - began > _STALLED_AFTER
        return self._thread.is_alive() and not self.failure and not is_stalled

    def _tell(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def _deliver(self, news: list[tuple[Submission, list[Update], ApiError | None]]) -> None:
        ended = []
        for submission, told, error in news:
            for each in told:
                if each.is_last:
                    self._count(submission, -1, -len(each.request.prompt))
                    ended.append((submission, each.request))
            submission._take_over(told)
            if error:  # what is still open has never come to the engine
                self._count(submission, -submission.num_open, -submission.open_tokens)
                submission.fail(error)
        self.loop.call_soon(self._is_written.set)  # those that were woken write before that
        for pair in ended:
            self.loop.call_soon(self._on_end, *pair)

    def _count(self, submission: Submission, requests: int, tokens: int) -> None:
        submission.num_open += requests
        submission.open_tokens += tokens
        self.num_open += requests
        self.open_tokens += tokens

    # The thread's side.

    def _run(self) -> None:
        try:
            report = self._warm_up()
            self._warm = compile_cache.report()
            with self._wake:
                self.is_ready = True
            self._post(self._on_ready, report)
            while self._turn():
                pass
        except BaseException as error:
            self._fail(error)

    def _turn(self) -> bool:
        """Handles messages, and steps; returns False if it has to stop."""
        with self._wake:
            while not (self._inbox or self._engine.has_work or self._is_told_to_stop):
                self._wake.wait()
            inbox, self._inbox = self._inbox, []
            if self._is_told_to_stop:
                return False
        for command in inbox:
            command()
        if self._engine.has_work:
            before = self._engine.counts.prefilled + self._engine.counts.drawn
            self._step_began = time.perf_counter()
            self._engine.step()
            self._set_steps(time.perf_counter() - self._step_began)
            self._step_began = 0.0
            self._steps += 1
            self._on_step(self._engine.counts.prefilled + self._engine.counts.drawn - before)
        self._flush()
        return True

    def _set_steps(self, seconds: float) -> None:
        """Lets launches take about as long as tokens wait for their write anyway.

        seconds: that the last one took. Its steps are not known while a slot is free, see
            `Engine.stream_steps`.
        """
        if self._engine.num_running < self._engine.options.max_batch_size:
            return
        steps, most = self._engine.stream_steps, self._engine.options.max_steps
        fitting = int(steps * self._wait / seconds)
        self._engine.stream_steps = max(1, min(fitting, 2 * steps, most))

    def _look(self) -> Snapshot:
        pages, engine = self._engine.pages, self._engine
        return Snapshot(
            stats=engine.stats(),
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            pages_used=pages.num_pages - pages.num_available,
            num_pages=pages.num_pages,
            compiled=compile_cache.report().since(self._warm).compiled,
            steps=self._steps,
        )

    def _note(self, submission: Submission, index: int, request: Request) -> None:
        is_last = request.finish_reason is not None
        submission._remaining -= is_last
        if not submission._remaining:
            self._submissions.discard(submission)
        if not (is_last or submission.is_streamed):
            return
        self._has_ends |= is_last
        submission._changed[index] = request
        self._changed.add(submission)
        if is_last or index not in submission._told:
            self._urgent.add(submission)

    def _submit(self, submission: Submission) -> None:
        submission._remaining = len(submission.requests)
        if submission.requests:  # `_note` discards it after the last one's end
            self._submissions.add(submission)
        try:
            for request in submission.requests:
                self._engine.submit(request)
        except Exception as error:
            self._end(submission, ApiError(400, str(error)))

    def _cancel(self, submission: Submission) -> None:
        for request in submission.requests:
            if not request.finish_reason and request.id >= 0:
                self._engine.cancel(request.id)

    def _end(self, submission: Submission, error: ApiError) -> None:
        """Cancels a submission, and ends it with `error`."""
        self._submissions.discard(submission)
        self._cancel(submission)
        self._failed[submission] = error
        self._changed.add(submission)
        self._urgent.add(submission)

    def _end_all(self, error: ApiError) -> None:
        for submission in list(self._submissions):
            self._end(submission, error)

    def _flush(self) -> None:
        """Tells the event loop what does not wait, or everything if it has waited long enough."""
        now = time.perf_counter()
        is_due, is_urgent = now - self._told_at >= self._wait, bool(self._urgent)
        # Whoever is told of an end may look at it at once. First tokens do not wait for it.
        looks_first = self._has_ends or not self._engine.has_work
        if looks_first:
            self.snapshot = self._look()
        self._has_ends = False  # ends are urgent, so they are told now
        told = self._changed if is_due else self._urgent
        if is_due:
            self._told_at, self._wait = now, min(_LONGEST_WAIT, _PER_WRITE * len(told))
        failed, self._failed = self._failed, {}  # all of them are urgent
        news = [(each, each._take(), failed.get(each)) for each in told]
        self._changed, self._urgent = self._changed - told, set()
        self._is_written.clear()
        if news:
            self._post(self._deliver, news)
        if is_urgent:
            self._is_written.wait(_PAUSE)
        if is_due and not looks_first:
            self.snapshot = self._look()

    def _fail(self, error: BaseException) -> None:
        """Ends every submission because a step has raised, and releases the pages."""
        _log.error(
            "the engine failed: %s\n%s",
            type(error).__name__,
            "".join(format_tb(error.__traceback__)),
        )
        with self._wake:
            self.failure = error
            inbox, self._inbox = self._inbox, []
        for command in inbox:
            command()
        self._end_all(engine_failed(error))
        self.snapshot = self._look()
        self._flush()
        self._post(self._on_failure, error)

    def _post(self, callback: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the event loop has ended
            self.loop.call_soon_threadsafe(callback, *arguments)
