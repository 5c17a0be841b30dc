"""Continuous batching: requests come and go while a handful of compiled programs run.

`submit` queues a request, `step` does one round: admit what fits, run chunks of prompts within a
budget of tokens, draw tokens for every row that has its prompt behind it. Each round is launched
before the results of the one before are read, so the host's work (text, stop strings) overlaps the
device's. Everything is deterministic and runs in the caller's thread.

Pages (`pages.PagePool`) are taken as sequences grow and shared by sequences that begin alike. When
none are left, the request that was admitted last gives its own back and is taken up again later,
with the tokens it has drawn as part of its prompt.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from llama_jax.kv_cache import PAGE_SIZE
from llama_jax.model import ModelSpec, Params
from llama_jax.pages import Match, PagePool
from llama_jax.request import Request, Wanted
from llama_jax.sampling import Sampled, host_rows
from llama_jax.speculation import Speculation
from llama_jax.steps import (
    DecodeState,
    Drawn,
    admit,
    decode_steps,
    init_state,
    logits_step,
    prefill_step,
    score_step,
)

# What a call of a prefill program costs besides its tokens, as a number of tokens: reading the
# weights takes about as long as computing with them for so many.
_TOKENS_PER_CALL = 128
# How many waiting requests are looked at in a round.
_LOOKAHEAD = 64


class QueueFullError(RuntimeError):
    """More requests are waiting than `EngineOptions.max_waiting` allows."""


@dataclass(frozen=True)
class EngineOptions:
    """The sizes that programs are compiled for, and the rules of scheduling.

    max_batch_size: rows; max_seq_len: tokens that prompt and output may have together.
    num_pages: of the cache, by default enough for all rows at full length; at least one row's.
    prefill_chunk: tokens of one prompt that go through at once; longer ones take several rounds.
    prefill_budget: prompt tokens per round, so that rows that are decoding do not wait long; by
        default `max_batch_size` chunks.
    max_steps: tokens drawn per row in one round while nobody streams.
    lookahead: tokens guessed per row and step, which the model then checks together; 0 for none.
    max_waiting: requests that may queue. share_prefixes: whether sequences share pages.
    batch_invariant: a request's tokens and logprobs are bit-equal alone and in any company: prompts
        go through one at a time in chunks of fixed places, nothing is shared, and pages for the
        whole length are reserved on admission.
    """

    max_batch_size: int = 8
    max_seq_len: int = 8192
    num_pages: int | None = None
    prefill_chunk: int = 512
    prefill_budget: int | None = None
    max_steps: int = 8
    lookahead: int = 0
    max_waiting: int = 1_000_000
    share_prefixes: bool = True
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_seq_len", "prefill_chunk", "max_steps", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.pool_size < self.pages_per_row:
            raise ValueError(
                f"num_pages {self.num_pages} cannot hold one sequence of max_seq_len "
                f"{self.max_seq_len}: {self.pages_per_row} pages of {PAGE_SIZE} tokens are needed"
            )

    @property
    def pages_per_row(self) -> int:
        return -(-self.max_seq_len // PAGE_SIZE)

    @property
    def pool_size(self) -> int:
        return self.num_pages or self.max_batch_size * self.pages_per_row

    @property
    def row_buckets(self) -> tuple[int, ...]:
        """How many prompts one prefill call may take."""
        return (1,) if self.batch_invariant else tuple(sorted({1, self.max_batch_size}))

    @property
    def chunk_buckets(self) -> tuple[int, ...]:
        """How many tokens of each it may take."""
        chunk = min(self.prefill_chunk, self.max_seq_len)
        return tuple(sorted({max(1, chunk // 16), max(1, chunk // 4), chunk}))


@dataclass
class EngineCounts:
    """What has happened so far. tokens: prompt tokens computed, tokens drawn; preempted: times that
    a request had to give its pages back; rounds: launches of decode; guessed, accepted: tokens
    guessed ahead, and those of them that stood."""

    prefilled: int = 0
    drawn: int = 0
    preempted: int = 0
    rounds: int = 0
    guessed: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """The part of the guesses that stood."""
        return self.accepted / self.guessed if self.guessed else 0.0


@dataclass(eq=False)
class _Row:
    """A request that is being worked on.

    number: its row. tokens: what has to go through prefill, tokens drawn before a preemption among
    them. pages: its own and shared ones, in order. limit: tokens it may draw in all. stored, drawn:
    tokens in the cache and tokens drawn once all that is launched has run, at most.
    """

    request: Request
    number: int
    tokens: list[int]
    pages: list[int]
    limit: int
    stored: int
    drawn: int

    @property
    def is_prefilling(self) -> bool:
        return self.stored < len(self.tokens)

    @property
    def is_decoding(self) -> bool:
        return not self.is_prefilling and self.drawn < self.limit


@dataclass(frozen=True)
class _Call:
    """A compiled program of `steps` and its arguments after the parameters and the state."""

    program: Any
    args: tuple[Any, ...]
    static: Mapping[str, Any]


@dataclass(frozen=True)
class _Launch:
    """The outputs of a call on their way, and what takes them in: returns requests that changed."""

    outputs: Any
    take: Callable[[Any], list[Request]]


class Engine:
    """The compiled programs with the parameters, the device state, and the requests in between.

    params, spec: as of `model.prefill`; cache_dtype, kv_scales, mesh: as of `steps.init_state`.
    draft: parameters and spec of a smaller model with the same vocabulary that guesses tokens
    (`options.lookahead` at a time); without one they are looked up in the sequence itself.
    One call at a time goes on; those from other threads wait.
    """

    def __init__(
        self,
        params: Params,
        spec: ModelSpec,
        options: EngineOptions,
        cache_dtype: jnp.dtype,
        kv_scales: tuple[tuple[float, float], ...] | None = None,
        mesh: Mesh | None = None,
        draft: tuple[Params, ModelSpec] | None = None,
    ) -> None:
        if draft and draft[1].config.vocab_size != spec.config.vocab_size:
            raise ValueError(
                f"the draft model has {draft[1].config.vocab_size} tokens in its vocabulary, the "
                f"model {spec.config.vocab_size}: they must be the same"
            )
        self.params = params
        self._draft_params = draft and draft[0]
        self._speculation = Speculation(options.lookahead, draft and draft[1])
        self.spec = spec
        self.options = options
        self.counts = EngineCounts()
        self._new_state = partial(
            init_state, spec, options.max_batch_size, options.max_seq_len, cache_dtype, kv_scales,
            mesh, options.pool_size, self._speculation,
        )  # fmt: skip
        self._lock = threading.RLock()
        self._ids = itertools.count()
        self._waiting: deque[Request] = deque()
        self._state: DecodeState | None
        self._start_afresh()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._launches)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, request: Request) -> Request:
        """Queue a request; it is its own handle and changes as `step` works on it.

        Raises `QueueFullError`, and ValueError for a prompt without room for what is wanted.
        """
        with self._lock:
            least, room = (1, 1) if request.wanted == "tokens" else (2, 0)
            if request.wanted == "logits":
                least = 1
            if not least <= len(request.prompt) <= self.options.max_seq_len - room:
                raise ValueError(
                    f"a prompt of {len(request.prompt)} tokens: between {least} and "
                    f"{self.options.max_seq_len - room} are possible"
                )
            if not 1 <= request.score_from <= len(request.prompt):
                raise ValueError(f"score_from {request.score_from} is not inside the prompt")
            if len(self._waiting) >= self.options.max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting already (max_waiting): call step() "
                    "until some are done"
                )
            if request.params.seed is None:
                seed = int(np.random.SeedSequence().generate_state(1)[0])
                request.params = replace(request.params, seed=seed)
            request.id = next(self._ids)
            self._waiting.append(request)
            return request

    def cancel(self, request_id: int) -> bool:
        """End a request where it stands; False if it is not (or no longer) in the engine."""
        with self._lock:
            for request in self._waiting:
                if request.id == request_id:
                    self._waiting.remove(request)
                    request.finish_reason = "cancelled"
                    return True
            for row in self._running:
                if row.request.id == request_id:
                    row.request.finish_reason = "cancelled"
                    self._leave(row)
                    return True
            return False

    def step(self) -> list[Request]:
        """One round. Returns the requests that got tokens or results, or finished.

        If a program fails, or the call is interrupted, running requests go back to the queue with
        what they have, and the cache starts afresh.
        """
        with self._lock:
            try:
                earlier = len(self._launches)
                self._admit()
                changed = self._launch_decode()
                self._launch_prefill()
                for _ in range(min(earlier, len(self._launches))):
                    changed += self._collect()
            except BaseException:
                self._waiting.extendleft(row.request for row in reversed(self._running))
                self._start_afresh()
                raise
            return list(dict.fromkeys(changed))

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Submit requests and step until they are done; yields one whenever it has changed.

        Requests whose results are no longer wanted (the iterator is closed) are cancelled.
        """
        unfinished = {request.id: request for request in map(self.submit, requests)}
        try:
            while unfinished:
                changed = {request.id for request in self.step()}
                for request in list(unfinished.values()):
                    if request.finish_reason:
                        del unfinished[request.id]
                    if request.finish_reason or request.id in changed:
                        yield request
        finally:
            for request_id in unfinished:
                self.cancel(request_id)

    def warmup(self, wanted: Sequence[Wanted] = ("tokens", "logprobs", "logits")) -> float:
        """Compile what these kinds of requests need, several programs at a time; takes no step.

        Returns the seconds taken. Programs in the persistent cache are fetched from there.
        """
        began = time.perf_counter()
        with self._lock:
            state = self._take_state()
            self._state = state
            calls = [
                self._prefill_call(kind, [], size, width)
                for kind in wanted
                for size in self.options.row_buckets
                for width in self.options.chunk_buckets
            ]
            calls += [self._decode_call([], 0)] if "tokens" in wanted else []
            jobs = [partial(admit.lower, state, *self._admission())]
            jobs += [
                partial(call.program.lower, self.params, state, *call.args, **call.static)
                for call in calls
            ]
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda lower: lower().compile(), jobs))
        return time.perf_counter() - began

    # Scheduling.

    def _start_afresh(self) -> None:
        self.pages = PagePool(self.options.pool_size, PAGE_SIZE)
        self._running: list[_Row] = []  # in the order of their admission
        self._launches: deque[_Launch] = deque()
        self._state = None
        shape = (self.options.max_batch_size, self.options.pages_per_row)
        self._table = np.full(shape, self.options.pool_size, np.int32)

    def _admit(self) -> None:
        """Give rows and pages to waiting requests, first come, first served."""
        for request in list(itertools.islice(self._waiting, _LOOKAHEAD)):
            if len(self._running) == self.options.max_batch_size:
                return
            tokens = request.prompt[:-1] if request.wanted == "logprobs" else request.all_tokens
            found = Match((), None, 0)
            if self._shares and request.wanted != "logits":
                found = self.pages.match(tokens[: _first_output(request, tokens)])
                if self._is_coming(tokens, found):
                    continue
            if not self._place(request, tokens, found):
                return
            self._waiting.remove(request)

    def _is_coming(self, tokens: list[int], found: Match) -> bool:
        """Whether a prompt that is on its way will fill the next page that could be shared."""
        end = (len(found.pages) + 1) * PAGE_SIZE
        return end < len(tokens) and any(
            row.is_prefilling and row.tokens[:end] == tokens[:end] for row in self._running
        )

    def _place(self, request: Request, tokens: list[int], found: Match) -> bool:
        """Start a request if there are pages for its prompt, and one more for each that runs."""
        limit = 0
        if request.wanted == "tokens":
            limit = min(
                request.params.max_new_tokens, self.options.max_seq_len - len(request.prompt)
            )
        whole = len(request.prompt) + limit if self.options.batch_invariant else len(tokens)
        lacking = -(-whole // PAGE_SIZE) - len(found.pages)
        source = [found.partial[0]] if found.partial else []
        self.pages.share([*found.pages, *source])
        if lacking + len(self._running) > self.pages.num_available:
            self.pages.release([*found.pages, *source])
            # A page that is copied from cannot be given up: with nothing running, do without it.
            return bool(not self._running and source) and self._place(
                request, tokens, Match(found.pages, None, len(found.pages) * PAGE_SIZE)
            )
        own = self.pages.take(lacking)
        taken = {row.number for row in self._running}
        number = next(i for i in range(self.options.max_batch_size) if i not in taken)
        row = _Row(request, number, tokens, [*found.pages, *own], limit, found.num_tokens,
                   len(request.token_ids))  # fmt: skip
        self._running.append(row)
        self._note_pages(row)
        copied = [*source, own[0]] if source else []
        self._state = admit(self._take_state(), *self._admission(row, copied))
        self.pages.release(source)
        self.pages.counts.queried += len(tokens)
        self.pages.counts.hit += found.num_tokens
        request.start_prompt(found.num_tokens)
        request.admitted_at = request.admitted_at or time.perf_counter()
        return True

    def _launch_prefill(self) -> None:
        """Chunks of prompts, in the order of admission, until the round's budget is spent."""
        everything = self.options.max_batch_size * self.options.prefill_chunk
        budget = self.options.prefill_budget or everything
        rows = [row for row in self._running if row.is_prefilling]
        for kind in dict.fromkeys(row.request.wanted for row in rows):
            group = [row for row in rows if row.request.wanted == kind]
            for call in self._calls(group):
                if budget > 0:
                    budget -= self._launch_chunk(kind, call)

    def _calls(self, rows: list[_Row]) -> list[list[_Row]]:
        """Rows that go through one call: all together, or one by one where padding them to the same
        length would cost more."""
        widest = self.options.row_buckets[-1]
        widths = [bucket(_left(row), self.options.chunk_buckets) for row in rows]
        together = max(widest * max(widths), _TOKENS_PER_CALL)
        apart = sum(max(width, _TOKENS_PER_CALL) for width in widths)
        return [rows] if widest > 1 and together < apart else [[row] for row in rows]

    def _launch_chunk(self, kind: Wanted, rows: list[_Row]) -> int:
        """Launch one prefill call; returns how many tokens go through it."""
        size = bucket(len(rows), self.options.row_buckets)
        width = bucket(max(map(_left, rows)), self.options.chunk_buckets)
        call = self._prefill_call(kind, rows, size, width)
        starts = [row.stored for row in rows]
        for row in rows:
            row.stored += min(_left(row), width)
            if self._shares:
                self.pages.register(row.tokens[: row.stored], row.pages)
        takers: dict[Wanted, Callable[..., list[Request]]] = {
            "tokens": self._take_first, "logprobs": self._take_logprobs, "logits": self._take_logits
        }  # fmt: skip
        if kind == "tokens":
            for row in rows:
                row.drawn += not row.is_prefilling
        parts = [(row, start, row.stored) for row, start in zip(rows, starts, strict=True)]
        self._launch(call, partial(takers[kind], parts))
        count = sum(stop - start for _, start, stop in parts)
        self.counts.prefilled += count
        return count

    def _launch_decode(self) -> list[Request]:
        """Draw tokens for the rows that have their prompt behind them, after making room for them.

        Returns requests that changed while room was made.
        """
        changed: list[Request] = []
        steps = self._steps()
        while steps:
            most = steps * (1 + self.options.lookahead)
            bounds = [(row, min(most, row.limit - row.drawn)) for row in self._decoding()]
            lacking = [
                (row, max(0, -(-(row.stored + count) // PAGE_SIZE) - len(row.pages)))
                for row, count in bounds
            ]
            if sum(count for _, count in lacking) <= self.pages.num_available:
                break
            if self._launches:
                while self._launches:
                    changed += self._collect()
                steps = min(steps, self._steps())
            elif steps > 1:
                steps = 1
            else:
                self._preempt(self._running[-1])
        if not steps or not bounds:
            return changed
        for row, count in lacking:
            row.pages += self.pages.take(count)
            self._note_pages(row)
        call = self._decode_call([row for row, _ in bounds], steps)
        for row, count in bounds:
            row.stored += count
            row.drawn += count
        self._launch(call, partial(self._take_drawn, bounds))
        self.counts.rounds += 1
        return changed

    def _decoding(self) -> list[_Row]:
        return [row for row in self._running if row.request.wanted == "tokens" and row.is_decoding]

    def _steps(self) -> int:
        """How many tokens to draw before the host looks again."""
        left = [row.limit - row.drawn for row in self._decoding()]
        if not left:
            return 0
        if any(row.is_prefilling or row.request.is_streamed for row in self._running):
            return 1
        return min(min(left) if self._waiting else max(left), self.options.max_steps)

    def _preempt(self, row: _Row) -> None:
        self._leave(row)
        self._waiting.appendleft(row.request)
        self.counts.preempted += 1

    def _leave(self, row: _Row) -> None:
        """Take a row from its request; its pages keep their content while there is room."""
        if self._shares:
            stored = row.tokens[: row.stored]
            known = stored if row.is_prefilling else row.request.all_tokens[:-1]
            self.pages.register(known, row.pages, min(len(known), len(stored)))
        self.pages.release(row.pages)
        self._running.remove(row)
        self._table[row.number] = self.options.pool_size

    # Calls of compiled programs, in shapes from short lists.

    def _launch(self, call: _Call, take: Callable[[Any], list[Request]]) -> None:
        """The state is donated: if the program fails, `step` starts afresh."""
        self._state, outputs = call.program(
            self.params, self._take_state(), *call.args, **call.static
        )
        self._launches.append(_Launch(outputs, take))

    def _take_state(self) -> DecodeState:
        state, self._state = self._state, None
        return self._new_state() if state is None else state

    def _admission(self, row: _Row | None = None, copied: Sequence[int] = ()) -> tuple[Any, ...]:
        """Arguments of `admit` for one row, or for none. copied: a page to copy, and where to."""
        request = row.request if row else Request([])
        number, stored = (row.number, row.stored) if row else (self.options.max_batch_size, 0)
        source, target = copied or (0, self.options.pool_size)
        fresh = host_rows(
            [request.params], [request.prompt], [request.stop_ids], self.spec.config.vocab_size,
            [request.token_ids],
        )  # fmt: skip
        text = np.zeros((1, self.options.pages_per_row * PAGE_SIZE), np.int32)
        text[0, : len(request.all_tokens)] = request.all_tokens
        text = text if self._speculation.uses_history else text[:, :0]
        return _int32(number), _int32(stored), fresh, _int32(source), _int32(target), text

    def _prefill_call(self, kind: Wanted, rows: Sequence[_Row], size: int, width: int) -> _Call:
        """The next `width` tokens, at most, of each row; `size` rows with the padding."""
        tokens, targets = np.zeros((2, size, width), np.int32)
        lengths, remaining = np.zeros((2, size), np.int32)
        numbers = np.full(size, self.options.max_batch_size, np.int32)
        for i, row in enumerate(rows):
            part = row.tokens[row.stored : row.stored + width]
            after = row.request.prompt[row.stored + 1 : row.stored + 1 + len(part)]
            tokens[i, : len(part)] = part
            targets[i, : len(after)] = after
            lengths[i], numbers[i] = len(part), row.number
            if row.stored + len(part) == len(row.tokens):
                remaining[i] = row.limit - row.drawn
        args = (self._table.copy(), tokens, lengths, numbers)
        static: dict[str, Any] = {"spec": self.spec}
        if kind == "tokens":
            static["speculation"] = self._speculation
            return _Call(prefill_step, (*args, remaining, self._draft_params), static)
        if kind == "logprobs":
            return _Call(score_step, (*args, targets), static)
        return _Call(logits_step, args, static)

    def _decode_call(self, rows: Sequence[_Row], steps: int) -> _Call:
        active = np.zeros(self.options.max_batch_size, bool)
        active[[row.number for row in rows]] = True
        return _Call(
            decode_steps,
            (self._table.copy(), active, np.int32(steps), self._draft_params),
            {
                "spec": self.spec,
                "max_steps": self.options.max_steps,
                "speculation": self._speculation,
            },
        )

    def _note_pages(self, row: _Row) -> None:
        self._table[row.number, : len(row.pages)] = row.pages

    @property
    def _shares(self) -> bool:
        return self.options.share_prefixes and not self.options.batch_invariant

    # Results.

    def _collect(self) -> list[Request]:
        launch = self._launches.popleft()
        return launch.take(launch.outputs)

    def _take_first(self, parts: Sequence[tuple[_Row, int, int]], drawn: Sampled) -> list[Request]:
        """The tokens that came with the ends of prompts; the rows are in the order of the call."""
        ended = [(i, row) for i, (row, _, stop) in enumerate(parts) if stop == len(row.tokens)]
        if not ended:
            return []
        host = _fetch(drawn, [row for _, row in ended])
        for i, row in ended:
            self._append(row, host, i)
        return [row.request for _, row in ended]

    def _take_drawn(self, bounds: Sequence[tuple[_Row, int]], drawn: Drawn) -> list[Request]:
        counts, guessed, accepted = jax.device_get((drawn.counts, drawn.guessed, drawn.accepted))
        self.counts.guessed += int(guessed.sum())
        self.counts.accepted += int(accepted.sum())
        host = _fetch(drawn.tokens, [row for row, _ in bounds])
        for row, bound in bounds:
            count = int(counts[row.number])
            row.stored -= bound - count
            row.drawn -= bound - count
            for i in range(count):
                self._append(row, host, (i, row.number))
        return [row.request for row, _ in bounds]

    def _append(self, row: _Row, drawn: Sampled, at: Any) -> None:
        """Hand a drawn token to its request, unless that has ended by the host's decision."""
        request = row.request
        if request.finish_reason:
            return
        now = time.perf_counter()
        request.first_token_at = request.first_token_at or now
        wanted = request.params.logprobs
        if wanted is not None:
            request.logprobs.append(float(drawn.logprobs[at]))
            pairs = zip(drawn.top_ids[at], drawn.top_logprobs[at], strict=True)
            request.top.append([(int(i), float(value)) for i, value in pairs][:wanted])
        request.append(int(drawn.tokens[at]), row.limit)
        self.counts.drawn += 1
        if request.finish_reason:
            request.finished_at = now
            self._leave(row)

    def _take_logprobs(
        self, parts: Sequence[tuple[_Row, int, int]], outputs: tuple[Array, Array]
    ) -> list[Request]:
        logprobs, likeliest = jax.device_get(outputs)
        for i, (row, start, stop) in enumerate(parts):
            first = max(0, row.request.score_from - 1 - start)
            wanted = slice(first, max(first, stop - start))
            request = row.request
            request.prompt_logprobs = np.append(request.prompt_logprobs, logprobs[i, wanted])
            request.prompt_is_likeliest = np.append(
                request.prompt_is_likeliest, likeliest[i, wanted]
            )
            self._end_prompt(row, stop)
        return [row.request for row, _, _ in parts]

    def _take_logits(self, parts: Sequence[tuple[_Row, int, int]], outputs: Array) -> list[Request]:
        logits = jax.device_get(outputs)
        for i, (row, start, stop) in enumerate(parts):
            before = [] if start == 0 else [row.request.prompt_logits]
            row.request.prompt_logits = np.concatenate([*before, logits[i, : stop - start]])
            self._end_prompt(row, stop)
        return [row.request for row, _, _ in parts]

    def _end_prompt(self, row: _Row, stop: int) -> None:
        if stop == len(row.tokens) and not row.request.finish_reason:
            row.request.finish_reason = "length"
            row.request.finished_at = time.perf_counter()
            self._leave(row)


def _first_output(request: Request, tokens: Sequence[int]) -> int:
    """The first token whose output is wanted; those before it need not be computed again."""
    return request.score_from - 1 if request.wanted == "logprobs" else len(tokens) - 1


def _left(row: _Row) -> int:
    """Tokens that still have to go through prefill."""
    return len(row.tokens) - row.stored


def _fetch(drawn: Sampled, rows: Sequence[_Row]) -> Sampled:
    """To the host, what the rows ask for: often the tokens alone."""
    if all(row.request.params.logprobs is None for row in rows):
        return drawn.replace(tokens=jax.device_get(drawn.tokens))
    return jax.device_get(drawn)


def _int32(value: int) -> np.ndarray:
    return np.array([value], np.int32)


def bucket(count: int, sizes: Sequence[int]) -> int:
    """The least of the ascending `sizes` that holds `count`, or the largest."""
    return next((size for size in sizes if size >= count), sizes[-1])
