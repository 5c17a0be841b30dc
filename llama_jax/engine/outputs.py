"""Takes the results of calls into their requests: tokens, text, logprobs, and whether they end."""

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
    """Hands results over to requests, and takes the slots of those that have ended.

    changed: requests whose `on_change` is still to be called.
    """

    def __init__(self, scheduler: Scheduler, counts: EngineCounts) -> None:
        self._scheduler = scheduler
        self._counts = counts
        self.changed: dict[Request, None] = {}

    @contextmanager
    def alone(self, request: Request, ends_by: type[BaseException] = Exception) -> Iterator[None]:
        """A context in which what is raised ends `request`, and nothing else.

        ends_by: BaseException where an interrupt would leave the request's text half done. It ends
        the request and goes on to the caller.
        """
        try:
            yield
        except ends_by as error:
            request.fail(error)
            request.finished_at = time.perf_counter()
            self._scheduler.remove(request)
            self.changed[request] = None
            if not isinstance(error, Exception):
                raise

    def tell(self, changed: list[Request]) -> list[Request]:
        """Call the `on_change` of requests that have changed; one that raises is not called again,
        one that is interrupted is."""
        for request in changed:
            if request in self.changed and request.on_change:
                with self.alone(request):
                    request.on_change(request)
            self.changed.pop(request, None)
        return changed

    def fetch(self, outputs: Any) -> Any:
        """Outputs of a call, on the host."""
        began = time.perf_counter()
        fetched = jax.device_get(outputs)
        self._counts.waited += time.perf_counter() - began
        return fetched

    def take_first(
        self,
        ended: Sequence[tuple[int, RunningSequence]],
        outputs: tuple[Array, Sampled | None],
    ) -> None:
        """Take in first tokens. ended: sequences whose prompt has ended, and their places in the
        call."""
        tokens, sampled = self.fetch(outputs)
        now = time.perf_counter()
        for i, sequence in ended:
            self._scheduler.slots.starting.discard(sequence)
            self._extend(sequence, [int(tokens[i])], now, sampled, i)

    def take_draws(self, draws: PendingDraws, outputs: tuple[Array, Sampled | None]) -> None:
        """Take in the tokens of a decode launch."""
        numbers, sampled = self.fetch(outputs)
        drawn = Drawn.unpack(numbers)
        self._counts.guessed += int(drawn.num_drafts.sum())
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
        """Take in how likely the tokens after those of prompts' chunks are, and the likeliest in
        their places, if these were computed."""
        (logprobs, likeliest, most), top = self.fetch(outputs)
        for i, chunk in enumerate(chunks):
            request = chunk.sequence.request
            first = max(0, request.score_from - 1 - chunk.start)
            wanted = slice(first, max(first, chunk.stop - chunk.start))
            with self.alone(request):
                request.extend_prompt(logprobs[i, wanted], likeliest[i, wanted], most[i, wanted])
                if request.params.logprobs is not None:
                    request.extend_prompt_top(*(each[i, wanted] for each in top))
                self._end_chunk(chunk)

    def take_logits(self, chunks: Sequence[Chunk], outputs: Array) -> None:
        """Take in the logits of prompts' chunks."""
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
        """Hand drawn tokens to their request, unless that has ended by the host's decision.

        drawn[at]: where they come from, for their logprobs.
        """
        request = sequence.request
        if request.finish_reason or not token_ids:
            return
        self.changed[request] = None
        request.first_token_at = request.first_token_at or now
        with self.alone(request, ends_by=BaseException):
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

    def _end_chunk(self, chunk: Chunk) -> None:
        """Note that a request has changed, and that it has ended if its prompt has."""
        request = chunk.sequence.request
        if request.finish_reason:
            return
        self.changed[request] = None
        if chunk.is_last:
            request.finish_reason = "length"
            request.finished_at = time.perf_counter()
            self._scheduler.leave(chunk.sequence)
