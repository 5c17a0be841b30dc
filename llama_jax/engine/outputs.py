"""Applies the results of calls to their requests: tokens, text, logprobs, and when they end."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax import Array

from llama_jax.engine.drawn import Drawn
from llama_jax.engine.plan import Chunk
from llama_jax.engine.request import Request
from llama_jax.engine.sampling import Sampled
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.scheduling import EngineCounts
from llama_jax.engine.slots import PendingDraws, RunningSequence


class OutputProcessor:
    """Applies results to requests, and frees the slots of those that have ended.

    changed: requests whose `on_change` has not been called yet.
    """

    def __init__(self, scheduler: Scheduler, counts: EngineCounts) -> None:
        self._scheduler = scheduler
        self._counts = counts
        self.changed: dict[Request, None] = {}

    @contextmanager
    def alone(self, request: Request) -> Iterator[None]:
        """Return a context in which an exception ends `request` and nothing else."""
        try:
            yield
        except Exception as error:
            self._end(request, error)

    def tell(self, changed: list[Request]) -> list[Request]:
        """Call the `on_change` of requests that have changed. If one raises it is not called again;
        if it is interrupted it is."""
        for request in changed:
            if request in self.changed and request.on_change:
                try:  # not `alone`, which would be noticed for each of many streams
                    request.on_change(request)
                except Exception as error:
                    self._end(request, error)
            self.changed.pop(request, None)
        return changed

    def fetch(self, outputs: Any) -> Any:
        """Copy the outputs of a call to the host, and count the seconds of waiting for them."""
        began = time.perf_counter()
        fetched = jax.device_get(outputs)
        self._counts.waited += time.perf_counter() - began
        return fetched

    def take_first(
        self,
        ended: Sequence[tuple[int, RunningSequence]],
        outputs: tuple[Array, Sampled | None],
    ) -> None:
        """Apply first tokens. ended: sequences whose prompt has ended, and their places in the
        call."""
        tokens, sampled = self.fetch(outputs)
        now = time.perf_counter()
        for i, sequence in ended:
            self._scheduler.slots.starting.discard(sequence)
            self._extend(sequence, [int(tokens[i])], now, sampled, i)

    def take_draws(self, draws: PendingDraws, outputs: tuple[Array, Sampled | None]) -> None:
        """Apply the tokens of a decode launch."""
        numbers, sampled = self.fetch(outputs)
        drawn = Drawn.unpack(numbers)
        self._counts.drafted += int(drawn.num_drafts.sum())
        self._counts.accepted += int(drawn.num_accepted.sum())
        counts = drawn.num_tokens
        self._scheduler.slots.settle(draws, counts)
        columns, now = drawn.tokens.T.tolist(), time.perf_counter()
        for slot in np.flatnonzero(counts).tolist():
            sequence, token_ids = draws.sequences[slot], columns[slot][: counts[slot]]
            assert sequence is not None
            self._extend(sequence, token_ids, now, sampled, (slice(len(token_ids)), slot))

    def take_logprobs(
        self,
        chunks: Sequence[Chunk],
        outputs: tuple[tuple[Array, ...], tuple[Array, ...] | None],
    ) -> None:
        """Apply the logprobs of the tokens that follow those of the chunks, and the likeliest
        tokens in their places if these were computed."""
        (logprobs, likeliest, most), top = self.fetch(outputs)
        for i, chunk in enumerate(chunks):
            request = chunk.sequence.request
            first = max(0, request.score_from - 1 - chunk.start)
            scored = slice(first, max(first, chunk.stop - chunk.start))
            with self.alone(request):
                request.extend_prompt(logprobs[i, scored], likeliest[i, scored], most[i, scored])
                if request.params.logprobs is not None:
                    request.extend_prompt_top(*(each[i, scored] for each in top))
                self._end_chunk(chunk)

    def take_logits(self, chunks: Sequence[Chunk], outputs: Array) -> None:
        """Apply the logits of prompts' chunks."""
        logits = self.fetch(outputs)
        for i, chunk in enumerate(chunks):
            request = chunk.sequence.request
            with self.alone(request):
                before = [] if chunk.start == 0 else [request.prompt_logits]
                new = logits[i, : chunk.stop - chunk.start]
                request.prompt_logits = np.concatenate([*before, new])
                self._end_chunk(chunk)

    def _extend(
        self,
        sequence: RunningSequence,
        token_ids: list[int],
        now: float,
        drawn: Sampled | None,
        at: Any,
    ) -> None:
        """Append drawn tokens to their request, unless the host has ended it meanwhile.

        drawn[at]: their place in the outputs, for their logprobs.
        """
        request = sequence.request
        if request.finish_reason or not token_ids:
            return
        self.changed[request] = None
        request.first_token_at = request.first_token_at or now
        try:  # not `alone`, as above
            count = request.extend(token_ids, sequence.max_new_tokens)
            self._counts.drawn += count
            if request.params.logprobs is not None:
                assert drawn is not None
                request.logprobs += np.atleast_1d(np.asarray(drawn.logprobs)[at])[:count].tolist()
                ids, values = (
                    np.atleast_2d(np.asarray(top)[at])[:count, : request.params.logprobs].tolist()
                    for top in (drawn.top_ids, drawn.top_logprobs)
                )
                pairs = zip(ids, values, strict=True)
                request.top += [list(zip(*pair, strict=True)) for pair in pairs]
            if request.finish_reason:
                request.finished_at = now
                self._scheduler.leave(sequence)
        except BaseException as error:
            self._end(request, error)
            if not isinstance(error, Exception):  # an interrupt, after which the text is incomplete
                raise

    def _end(self, request: Request, error: BaseException) -> None:
        """End a request whose work has raised `error`."""
        request.fail(error)
        request.finished_at = time.perf_counter()
        self._scheduler.remove(request)
        self.changed[request] = None

    def _end_chunk(self, chunk: Chunk) -> None:
        """Mark a request as changed, and as ended if its prompt has ended."""
        request = chunk.sequence.request
        if request.finish_reason:
            return
        self.changed[request] = None
        if chunk.is_last:
            request.finish_reason = "length"
            request.finished_at = time.perf_counter()
            self._scheduler.leave(chunk.sequence)
