"""Generation: a fixed number of rows, refilled from a queue of prompts as they finish.

The compiled programs (`steps`) are called with shapes from a short list (`Shapes`), so that nothing
compiles after warm-up, whatever the requests look like.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from llama_jax.model import ModelSpec, Params
from llama_jax.sampling import Sampled, SamplingParams, host_rows
from llama_jax.steps import (
    DecodeState,
    admit,
    clear_rows,
    decode_step,
    logits_step,
    prefill_step,
    score_step,
)
from llama_jax.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Shapes:
    """The sizes that programs are compiled for.

    batch_size: rows of the cache; max_seq_len: tokens that each holds. row_buckets: how many rows
    one prefill takes. chunk_buckets: how many tokens of each it takes; longer prompts go through
    in chunks of the largest.
    """

    batch_size: int
    max_seq_len: int
    row_buckets: tuple[int, ...]
    chunk_buckets: tuple[int, ...]


def shapes_for(batch_size: int, max_seq_len: int, prefill_chunk: int) -> Shapes:
    """One row or all of them, and three chunk sizes up to `prefill_chunk`."""
    chunk = min(prefill_chunk, max_seq_len)
    return Shapes(
        batch_size=batch_size,
        max_seq_len=max_seq_len,
        row_buckets=tuple(sorted({1, batch_size})),
        chunk_buckets=tuple(sorted({max(1, chunk // 16), max(1, chunk // 4), chunk})),
    )


@dataclass
class Request:
    """One request on its way: what was asked, and what has come of it so far.

    `text` is all decoded text; `text[:released]` may be shown: what follows could still turn out
    to be the beginning of a stop string.
    """

    prompt: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    decoder: StreamDecoder
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""
    released: int = 0
    finish_reason: FinishReason | None = None
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    finished_at: float = 0.0

    def append(self, token_id: int, capacity: int) -> None:
        """Take in a drawn token, then decide whether the request is finished.

        capacity: tokens that prompt and output may have together.
        """
        self.token_ids.append(token_id)
        searched_from = len(self.text)
        if token_id in self.stop_ids:
            self.finish_reason = "stop"
        else:
            self.text += self.decoder.push(token_id)
            full = len(self.prompt) + len(self.token_ids) >= capacity
            if len(self.token_ids) >= self.params.max_new_tokens or full:
                self.finish_reason = "length"
        if self.finish_reason:
            self.text += self.decoder.flush()
        self._cut_at_stop_string(searched_from)
        self.released = len(self.text) - (0 if self.finish_reason else self._held_back())

    def _cut_at_stop_string(self, searched_from: int) -> None:
        longest = max((len(stop) for stop in self.params.stop), default=0)
        start = max(0, searched_from - longest + 1)
        hits = [at for stop in self.params.stop if (at := self.text.find(stop, start)) >= 0]
        if hits:
            self.text = self.text[: min(hits)]
            self.finish_reason = "stop"

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max(
            (
                size
                for stop in self.params.stop
                for size in range(1, len(stop))
                if self.text.endswith(stop[:size])
            ),
            default=0,
        )


class Runner:
    """The compiled programs with the parameters and the device state they run on.

    One caller at a time: starting a second generation while one is unfinished raises RuntimeError.
    """

    def __init__(
        self, params: Params, spec: ModelSpec, shapes: Shapes, new_state: Callable[[], DecodeState]
    ) -> None:
        self.params = params
        self.spec = spec
        self.shapes = shapes
        self._new_state = new_state
        self._state: DecodeState | None = None
        self._busy = threading.Lock()

    def generate(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Run the requests to their ends, as many at a time as there are rows.

        Yields a request each time a token was appended to it.
        """
        with self._exclusive():
            waiting = deque(requests)
            rows: list[Request | None] = [None] * self.shapes.batch_size
            while waiting or any(rows):
                free = [row for row, occupant in enumerate(rows) if occupant is None]
                admitted = {row: waiting.popleft() for row in free if waiting}
                if admitted:
                    yield from self._prefill(admitted)
                    rows = [admitted.get(row, occupant) for row, occupant in enumerate(rows)]
                    rows = [
                        None if request and request.finish_reason else request for request in rows
                    ]
                active = [request is not None for request in rows]
                if not any(active):
                    continue
                drawn = self._step(decode_step, np.array(active), spec=self.spec)
                for row, request in enumerate(rows):
                    if request is not None:
                        self._take(request, drawn, row)
                        if request.finish_reason:
                            rows[row] = None
                        yield request

    def score(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each prompt of token ids, in order: how likely each token was after those before it.

        Yields logprobs, float32 [length - 1], and whether each was the likeliest, bool alike.
        """
        for group in self._groups(prompts):
            logprobs: list[list[np.ndarray]] = [[] for _ in group]
            greedy: list[list[np.ndarray]] = [[] for _ in group]
            for chunk in chunks(group, list(range(len(group))), self.shapes):
                targets = chunk.following(group)
                values, hits = self._step(
                    score_step, chunk.tokens, targets, chunk.lengths, chunk.rows, spec=self.spec
                )
                for i, length in enumerate(chunk.lengths[: len(group)]):
                    logprobs[i].append(values[i, :length])
                    greedy[i].append(hits[i, :length])
            for i in range(len(group)):
                yield np.concatenate(logprobs[i])[:-1], np.concatenate(greedy[i])[:-1]

    def logits(self, prompts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Float32 logits [length, vocab] of each prompt, in order."""
        for group in self._groups(prompts):
            parts: list[list[np.ndarray]] = [[] for _ in group]
            for chunk in chunks(group, list(range(len(group))), self.shapes):
                logits = self._step(
                    logits_step, chunk.tokens, chunk.lengths, chunk.rows, spec=self.spec
                )
                for i, length in enumerate(chunk.lengths[: len(group)]):
                    parts[i].append(logits[i, :length])
            yield from (np.concatenate(part) for part in parts)

    def warmup(self) -> float:
        """Compile the programs that `generate` uses, for every shape. Returns the seconds taken."""
        began = time.perf_counter()
        with self._exclusive():
            for size in self.shapes.row_buckets:
                rows = np.full(size, self.shapes.batch_size, np.int32)
                none = np.zeros(size, np.int32)
                self._admit(rows, [])
                for length in self.shapes.chunk_buckets:
                    tokens = np.zeros((size, length), np.int32)
                    self._step(prefill_step, tokens, none, rows, none > 0, spec=self.spec)
            idle = np.zeros(self.shapes.batch_size, bool)
            self._step(decode_step, idle, spec=self.spec)
        return time.perf_counter() - began

    def _prefill(self, admitted: dict[int, Request]) -> Iterator[Request]:
        rows, group = list(admitted), list(admitted.values())
        began = time.perf_counter()
        size = bucket(len(rows), self.shapes.row_buckets)
        self._admit(pad(rows, size, self.shapes.batch_size), group)
        for chunk in chunks([request.prompt for request in group], rows, self.shapes):
            drawn = self._step(
                prefill_step, chunk.tokens, chunk.lengths, chunk.rows, chunk.last, spec=self.spec
            )
            for i, request in enumerate(group):
                if chunk.last[i]:
                    request.admitted_at = began
                    self._take(request, drawn, i)
                    yield request

    def _admit(self, rows: np.ndarray, group: Sequence[Request]) -> None:
        vocab_size = self.spec.config.vocab_size
        idle = len(rows) - len(group)
        fresh = host_rows(
            [request.params for request in group]
            + [SamplingParams(temperature=0.0, seed=0)] * idle,
            [request.prompt for request in group] + [[]] * idle,
            [sorted(request.stop_ids) for request in group] + [[]] * idle,
            vocab_size,
        )
        self._state = admit(self._take_state(), rows, fresh)

    def _take(self, request: Request, drawn: Sampled, row: int) -> None:
        now = time.perf_counter()
        if not request.token_ids:
            request.first_token_at = now
        wanted = request.params.logprobs
        if wanted is not None:
            request.logprobs.append(float(drawn.logprobs[row]))
            pairs = zip(drawn.top_ids[row], drawn.top_logprobs[row], strict=True)
            request.top.append([(int(i), float(value)) for i, value in pairs][:wanted])
        request.append(int(drawn.tokens[row]), self.shapes.max_seq_len)
        if request.finish_reason:
            request.finished_at = now

    def _groups(self, prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
        """Batches of prompts, their rows 0, 1, ... emptied."""
        size = self.shapes.batch_size
        with self._exclusive():
            for start in range(0, len(prompts), size):
                self._state = clear_rows(self._take_state(), np.arange(size, dtype=np.int32))
                yield prompts[start : start + size]

    def _step(self, program: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """Run a program that takes and returns the state; its other outputs as numpy arrays.

        The state is donated: if the program fails, the next call starts from a new one.
        """
        self._state, out = program(self.params, self._take_state(), *args, **static)
        return jax.device_get(out)

    def _take_state(self) -> DecodeState:
        state, self._state = self._state, None
        return self._new_state() if state is None else state

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError(
                "this model is in the middle of another generation: finish it, or close its stream"
            )
        try:
            yield
        finally:
            self._busy.release()


@dataclass(frozen=True)
class Chunk:
    """One prefill call for a group of prompts.

    tokens: int32 [b, t]; lengths, rows: int32 [b]; last: bool [b], where a prompt ends; offset: the
    position of the first column. Padding rows have length 0 and a row index past the end.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    rows: np.ndarray
    last: np.ndarray
    offset: int

    def following(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The token after each of `tokens`, int32 [b, t]; 0 where there is none."""
        after = np.zeros_like(self.tokens)
        for i, prompt in enumerate(prompts):
            part = prompt[self.offset + 1 : self.offset + 1 + self.tokens.shape[1]]
            after[i, : len(part)] = part
        return after


def chunks(
    prompts: Sequence[Sequence[int]], rows: Sequence[int], shapes: Shapes
) -> Iterator[Chunk]:
    """Cut prompts, to be stored in `rows`, into calls whose shapes come from `shapes`."""
    size = bucket(len(prompts), shapes.row_buckets)
    longest, offset = max(map(len, prompts)), 0
    while offset < longest:
        width = bucket(longest - offset, shapes.chunk_buckets)
        tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        last = np.zeros(size, bool)
        for i, prompt in enumerate(prompts):
            part = prompt[offset : offset + width]
            tokens[i, : len(part)] = part
            lengths[i] = len(part)
            last[i] = bool(part) and offset + len(part) == len(prompt)
        yield Chunk(tokens, lengths, pad(rows, size, shapes.batch_size), last, offset)
        offset += width


def bucket(count: int, sizes: Sequence[int]) -> int:
    """The least of the ascending `sizes` that holds `count`, or the largest."""
    return next((size for size in sizes if size >= count), sizes[-1])


def pad(rows: Sequence[int], size: int, filler: int) -> np.ndarray:
    return np.array([*rows, *[filler] * (size - len(rows))], np.int32)
