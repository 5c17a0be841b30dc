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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.engine import calls, compile_cache
from llama_jax.engine.calls import Admission, Call, admitted_per_call
from llama_jax.engine.compile_cache import CompileReport
from llama_jax.engine.grammars import MaskThreads
from llama_jax.engine.pages import Match, PagePool, extend_chains
from llama_jax.engine.request import Request, Wanted
from llama_jax.engine.rows import Drawing, Row, Rows
from llama_jax.engine.sampling import (
    KINDS,
    Kind,
    Sampled,
    SamplingState,
    host_rows,
    is_plain,
    kind_of,
    num_words,
)
from llama_jax.engine.scheduling import EngineCounts, EngineOptions, Stats, prefill_calls
from llama_jax.engine.speculation import Speculation
from llama_jax.engine.steps import (
    DecodeState,
    admit,
    decode_steps,
    draw_fed_step,
    draw_step,
    feed_step,
    guess_step,
    has_free_conditions,
    logits_step,
    prefill_step,
    score_step,
    state_builder,
)
from llama_jax.model.kv_cache import PAGE_SIZE, KVScales
from llama_jax.model.sharding import default_sharding, whole_on
from llama_jax.model.spec import ModelSpec, Params

# How many waiting requests are looked at in a round.
_LOOKAHEAD = 64
# Tokens that a grammar forces and that go through the model together, without speculation.
_MAX_FORCED = 4


class QueueFullError(RuntimeError):
    """More requests are waiting than `EngineOptions.max_waiting` allows."""


@dataclass(frozen=True, eq=False)
class _Launch:
    """The outputs of a call on their way, and what takes them in."""

    outputs: Any
    take: Callable[[Any], None]


class Engine:
    """The compiled programs with the parameters, the device state, and the requests in between.

    params, spec: as of `forward.prefill`; cache_dtype, kv_scales: as of `steps.state_builder`.
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
        kv_scales: KVScales | None = None,
        draft: tuple[Params, ModelSpec] | None = None,
    ) -> None:
        if options.batch_invariant:
            spec = replace(spec, is_batch_invariant=True)
            draft = draft and (draft[0], replace(draft[1], is_batch_invariant=True))
        if draft and draft[1].mesh != spec.mesh:
            raise ValueError("the draft model's spec must have the same mesh as the model's")
        self.params = params
        self._draft_params = draft and draft[0]
        self._speculation = Speculation(options.lookahead, draft and draft[1])
        self._speculation.check(spec.config, options.max_seq_len)
        self.spec = spec
        self.options = options
        self.counts = EngineCounts()
        # What is left out of programs pays on a GPU, and costs one more program each to compile.
        # Other kernels might be taken around it, so that equal bits are not certain.
        self._stops_early = has_free_conditions()
        is_varied = not self._stops_early and not options.batch_invariant
        self._kinds: tuple[Kind, ...] = KINDS if is_varied else KINDS[-1:]
        self._changed: dict[Request, None] = {}  # those whose `on_change` is still to be called
        self._new_state = state_builder(
            spec, options.max_batch_size, options.max_seq_len, cache_dtype, kv_scales,
            options.pool_size, self._speculation,
        )  # fmt: skip
        self._lock = threading.RLock()
        self._ids = itertools.count()
        self._mask_threads = MaskThreads()
        self._waiting: deque[Request] = deque()
        self._state: DecodeState | None
        self.pages = PagePool(options.pool_size, PAGE_SIZE)
        self._start_afresh()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._launches or self._changed)

    @property
    def _running(self) -> list[Row]:
        """In the order of their admission."""
        return self._rows.running

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, request: Request) -> Request:
        """Queue a request; it is its own handle and changes as `step` works on it.

        Raises `QueueFullError`, and ValueError for a prompt without room for what is wanted, or
        with ids that the model has not.
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
            vocab_size, ids = self.spec.config.vocab_size, np.asarray(request.prompt)
            if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(f"the prompt must consist of token ids in [0, {vocab_size})")
            if not 1 <= request.score_from <= len(request.prompt):
                raise ValueError(f"score_from {request.score_from} is not inside the prompt")
            if request.params.structured and not request.matcher:
                raise ValueError("a request with params.structured needs a matcher for it")
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
            everywhere = itertools.chain((row.request for row in self._running), self._waiting)
            request = next((each for each in everywhere if each.id == request_id), None)
            if request is None:
                return False
            try:
                request.cancel()
            finally:
                self._remove(request)
                self._changed[request] = None
            self._tell([request])
            return True

    def step(self) -> list[Request]:
        """One round. Returns the requests that got tokens or results, or finished.

        What the work for one request raises (its text, its `on_change`, its settings) ends that
        request with the error as its result. If a program fails, or the call is interrupted,
        running requests go back to the queue with what they have, and the cache starts afresh.
        """
        with self._lock:
            try:
                latest = self._launches[-1] if self._launches else None
                self._admit()
                self._launch_decode()
                self._launch_prefill()
                while latest in self._launches:
                    self._collect()
            except BaseException:
                running = (row.request for row in self._running)
                unfinished = [each for each in running if not each.finish_reason]
                self._waiting.extendleft(
                    each for each in reversed(unfinished) if each not in self._waiting
                )
                self._start_afresh()
                raise
            return self._tell(list(self._changed))

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Submit requests and step until they are done; yields one whenever it has changed.

        Requests whose results are no longer wanted (the iterator is closed) are cancelled.
        """
        changed: deque[Request] = deque()  # from any thread that takes steps
        unfinished = set[int]()
        try:
            for request in requests:
                request.on_change = changed.append
                unfinished.add(self.submit(request).id)
            while unfinished:
                self.step()
                while changed:
                    request = changed.popleft()
                    if request.id in unfinished:
                        if request.finish_reason:
                            unfinished.remove(request.id)
                        yield request
        finally:
            for request_id in unfinished:
                self.cancel(request_id)

    def stats(self) -> Stats:
        """What has happened so far."""
        with self._lock:
            return Stats(**vars(self.counts), **vars(self.pages.counts))

    def warmup(
        self,
        wanted: Sequence[Wanted] = ("tokens", "logprobs", "logits"),
        structured: bool = False,
    ) -> CompileReport:
        """Compile what these kinds of requests need, several programs at a time; takes no step.

        structured: what structured output needs too.
        Returns what was compiled or fetched from the persistent cache, and the seconds it took.
        """
        began, before = time.perf_counter(), compile_cache.report()
        with self._lock:
            state = self._take_state()
            self._state = state
            needed = [
                self._prefill_call(kind, [], shape)
                for kind in wanted
                for shape in self._shapes(kind)
            ]
            if "tokens" in wanted:
                sizes = dict.fromkeys(size for size, _ in self.options.call_shapes)
                for kind in self._kinds:
                    needed += [self._draw_call(self._hidden(size), [], kind) for size in sizes]
                    nobody = np.zeros(self.options.max_batch_size, bool)
                    needed += [self._decode_call(nobody, n, kind) for n in self._step_counts]
            if structured:
                needed += self._matched_calls(sizes)
            jobs = [
                partial(admit.lower, state, *self._admission([], plain)) for plain in (True, False)
            ]
            jobs += [
                partial(call.program.lower, self.params, state, *call.args, **call.static)
                for call in needed
            ]
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda lower: lower().compile(), jobs))
        seconds = time.perf_counter() - began
        return replace(compile_cache.report().since(before), seconds=seconds)

    # What concerns one request alone.

    @contextmanager
    def _alone(self, request: Request, ends_by: type[BaseException] = Exception) -> Iterator[None]:
        """What is raised inside ends `request`, and nothing else.

        ends_by: BaseException where an interrupt would leave the request's text half done. It ends
        the request and goes on to the caller.
        """
        try:
            yield
        except ends_by as error:
            request.fail(error)
            request.finished_at = time.perf_counter()
            self._remove(request)
            self._changed[request] = None
            if not isinstance(error, Exception):
                raise

    def _remove(self, request: Request) -> None:
        """Take a request that has ended from wherever it is."""
        row = next((row for row in self._running if row.request is request), None)
        if row:
            self._leave(row)
        elif request in self._waiting:
            self._waiting.remove(request)

    def _tell(self, changed: list[Request]) -> list[Request]:
        """Call the `on_change` of requests that have changed; one that raises is not called again,
        one that is interrupted is."""
        for request in changed:
            if request in self._changed and request.on_change:
                with self._alone(request):
                    request.on_change(request)
            self._changed.pop(request, None)
        return changed

    # Scheduling.

    def _start_afresh(self) -> None:
        self.pages = PagePool(self.options.pool_size, PAGE_SIZE, self.pages.counts)
        self._rows = Rows(
            self.options.max_batch_size, self.options.pages_per_row, self.options.pool_size
        )
        self._launches: deque[_Launch] = deque()
        self._num_starting = 0  # launches that first tokens come with
        self._state = None

    def _admit(self) -> None:
        """Give rows and pages to waiting requests, first come, first served."""
        admitted: list[Admission] = []
        on_their_way = [row.request for row in self._rows.prefilling]
        for request in list(itertools.islice(self._waiting, _LOOKAHEAD)):
            if len(self._running) == self.options.max_batch_size:
                break
            with self._alone(request):
                tokens = request.prompt[:-1] if request.wanted == "logprobs" else request.all_tokens
                found = Match((), None, 0)
                if self._shares and request.wanted != "logits":
                    known = tokens[: _first_output(request, tokens)]
                    found = self.pages.match(known, request.chains)
                    if _is_coming(request, found, on_their_way):
                        continue
                admission = self._place(request, tokens, found)
                if admission is None:
                    break
                self._waiting.remove(request)
                admitted.append(admission)
                on_their_way.append(request)
        for plain in (True, False):
            group = [each for each in admitted if each.is_plain == plain]
            for part in itertools.batched(group, admitted_per_call(self.options, plain)):
                self._state = admit(self._take_state(), *self._admission(part, plain))

    def _place(self, request: Request, tokens: list[int], found: Match) -> Admission | None:
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
            if self._running or not source:
                return None
            # A page that is copied from cannot be given up: with nothing running, do without it.
            return self._place(
                request, tokens, Match(found.pages, None, len(found.pages) * PAGE_SIZE)
            )
        try:
            fresh = self._settings(request)
        except Exception:
            self.pages.release([*found.pages, *source])
            raise
        own = self.pages.take(lacking)
        row = self._rows.enter(request, tokens, [*found.pages, *own], limit, found.num_tokens)
        if self._shares:
            extend_chains(request.chains, tokens, PAGE_SIZE)
        # All pages are copied before any is written to, so that this one need not be kept.
        self.pages.release(source)
        self.pages.counts.queried += len(tokens)
        self.pages.counts.hit += found.num_tokens
        request.start_prompt(found.num_tokens)
        request.admitted_at = request.admitted_at or time.perf_counter()
        return Admission(row, (source[0], own[0]) if source else None, fresh)

    def _settings(self, request: Request) -> SamplingState:
        """The row of `sampling.host_rows`."""
        return host_rows(
            [request.params], [request.prompt], [request.stop_ids], self.spec.config.vocab_size,
            [request.token_ids], [request.eos_ids],
            plain=is_plain(request.params, request.stop_ids, request.eos_ids),
        )  # fmt: skip

    def _launch_prefill(self) -> None:
        """Chunks of prompts, first those admitted first, until the round's budget is spent."""
        budget = self.options.prefill_budget
        while budget > 0:
            rows = []
            for row in self._rows.prefilling:
                if budget > 0:
                    rows.append(row)
                    budget -= min(row.left, self.options.prefill_chunk)
            if not rows:
                return
            for kind in dict.fromkeys(row.request.wanted for row in rows):
                group = [row for row in rows if row.request.wanted == kind]
                left = [row.left for row in group]
                for members, shape in prefill_calls(left, self._shapes(kind)):
                    self._launch_chunk(kind, [group[i] for i in members], shape)

    def _shapes(self, kind: Wanted) -> tuple[tuple[int, int], ...]:
        """Logits of a whole vocabulary are large: those of one prompt at a time."""
        shapes = self.options.call_shapes
        return tuple(each for each in shapes if each[0] == 1) if kind == "logits" else shapes

    def _launch_chunk(self, kind: Wanted, rows: list[Row], shape: tuple[int, int]) -> None:
        """The next tokens of each row, in one call."""
        call = self._prefill_call(kind, rows, shape)
        starts = [row.stored for row in rows]
        for row, start in zip(rows, starts, strict=True):
            self._rows.prefill(row, min(row.left, shape[1]))
            if self._shares:
                stored = row.tokens[: row.stored]
                self.pages.register(stored, row.pages, start, row.request.chains)
        parts = [(row, start, row.stored) for row, start in zip(rows, starts, strict=True)]
        outputs = self._run(call)
        if kind == "tokens":
            self._launch_draw(outputs, rows)
        else:
            take = self._take_logprobs if kind == "logprobs" else self._take_logits
            self._launch(outputs, partial(take, parts))
        count = sum(stop - start for _, start, stop in parts)
        self.counts.prefilled += count
        self.counts.padding += shape[0] * shape[1] - count

    def _launch_draw(self, hidden: Array, rows: list[Row]) -> None:
        """Draw the first tokens of those rows of a prefill call whose prompt has ended."""
        ended = [(i, row) for i, row in enumerate(rows) if not row.is_prefilling]
        masks = None
        if any(row.request.matcher for _, row in ended):
            masks = self._masks(len(hidden), 0, [(i, row, []) for i, row in ended])[:, 0]
            ended = [(i, row) for i, row in ended if not row.request.finish_reason]
        if not ended:
            return
        params = [row.request.params for _, row in ended]
        kind = self._kind(max(map(kind_of, params), key=KINDS.index))
        call = self._draw_call(hidden, ended, kind if masks is None else KINDS[-1], masks)
        for _, row in ended:
            self._rows.begin(row)
        drawn = self._run(call)
        self._num_starting += 1
        asked = any(each.logprobs is not None for each in params)
        self._launch((drawn.tokens, drawn if asked else None), partial(self._take_first, ended))

    def _launch_decode(self) -> None:
        """Draw tokens for the rows that have their prompt behind them, after making room."""
        steps = self._steps()
        while steps:
            most = steps * (1 + self.options.lookahead)
            if self._rows.matched(self._rows.room):
                most = 1 + self._max_forced
            counts = np.minimum(self._rows.room, most)
            lacking = self._rows.lacking(counts)
            if lacking.sum() <= self.pages.num_available:
                break
            if self._launches:
                while self._launches:
                    self._collect()
                steps = min(steps, self._steps())
            elif steps > 1:
                steps = 1
            else:
                self._preempt(self._running[-1])
        if not steps or not counts.any():
            return
        for number in np.flatnonzero(lacking).tolist():
            self._rows.add_pages(number, self.pages.take(int(lacking[number])))
        matched = [row.number for row in self._rows.matched(counts)]
        others = counts
        if matched and self.options.batch_invariant:  # others go through the same programs as ever
            others = np.minimum(counts, 1 + self.options.lookahead)
            others[matched], counts[others > 0] = 0, 0
        if not matched or (others is not counts and others.any()):
            self._launch_steps(others, steps)
        if matched:
            self._launch_matched(counts)

    def _launch_steps(self, counts: np.ndarray, steps: int) -> None:
        """So many steps in one program. counts: tokens that each row may draw in them."""
        kind, asked = self._rows.needs(counts)
        call = self._decode_call(counts > 0, steps, self._kind(kind))
        drawing = self._rows.launch(counts)
        drawn = self._run(call)
        outputs = drawn.numbers, drawn.sampled if asked else None
        self._launch(outputs, partial(self._take_drawn, drawing))
        self.counts.rounds += 1

    def _launch_matched(self, counts: np.ndarray) -> None:
        """One step, in which grammars say what some rows may draw. counts: tokens that each row may
        draw, in it or more.

        While the model works, what was drawn before reaches the host, which computes masks.
        """
        guesses, guessed = self._expected(counts)
        if self.options.lookahead:
            guesses, guessed = self._run(self._guess_call(counts > 0, guesses, guessed))
        hidden = self._run(self._feed_call(counts > 0, guesses, guessed))
        while self._launches:
            self._collect()
        guesses, guessed = self._fetch((guesses, guessed))
        counts = np.minimum(counts, self._rows.room)
        rows = [
            (row.number, row, guesses[row.number, : guessed[row.number]].tolist())
            for row in self._rows.matched(counts)
        ]
        masks = self._masks(len(counts), guesses.shape[1], rows)
        counts = np.minimum(np.minimum(counts, self._rows.room), 1 + guesses.shape[1])
        asked = self._rows.needs(counts)[1]
        call = self._draw_fed_call(hidden, counts > 0, guesses, guessed, masks)
        drawing = self._rows.launch(counts)
        drawn = self._run(call)
        outputs = drawn.numbers, drawn.sampled if asked else None
        self._launch(outputs, partial(self._take_drawn, drawing))
        self.counts.rounds += 1

    @property
    def _max_forced(self) -> int:
        return self.options.lookahead or _MAX_FORCED

    @property
    def _widths(self) -> tuple[int, ...]:
        """How many guesses the programs for `_launch_matched` take."""
        has_one = self.options.lookahead or self.options.batch_invariant
        return (self._max_forced,) if has_one else (0, self._max_forced)

    def _expected(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Guesses that grammars force, int32 [batch, width], and how many, int32 [batch]. They go
        through the model if that saves the rows half of their steps; without, the width is 0."""
        guesses = np.zeros((len(counts), self._max_forced), np.int32)
        guessed = np.zeros(len(counts), np.int32)
        for row in self._rows.matched(counts):
            assert row.request.matcher is not None
            expected = row.request.matcher.expected[: self._max_forced]
            guesses[row.number, : len(expected)] = expected
            guessed[row.number] = len(expected)
        if min(self._widths) < guesses.shape[1] and guessed.sum() < np.sum(counts > 0):
            return guesses[:, :0], np.zeros_like(guessed)
        return guesses, guessed

    def _masks(
        self, size: int, width: int, wanted: Sequence[tuple[int, Row, list[int]]]
    ) -> np.ndarray:
        """uint32 [size, 1 + width, words]: what may be drawn at each place and after its guesses.

        wanted: a place, the row that is drawn for there, and guesses; elsewhere any token may be
        drawn. A request whose masks cannot be computed ends.
        """
        vocab_size = self.spec.config.vocab_size
        masks = np.full((size, 1 + width, num_words(vocab_size)), ~np.uint32(0))
        jobs = {
            place: (row.request.matcher, row.request.token_ids, guesses)
            for place, row, guesses in wanted
            if row.request.matcher
        }
        results = self._mask_threads.masks(list(jobs.values()))
        found = dict(zip(jobs, results, strict=True))
        for place, row, _ in wanted:
            result = found.get(place)
            with self._alone(row.request):
                if isinstance(result, Exception):
                    raise result
                if result is not None:
                    masks[place, : len(result)] = result
        return masks

    def _steps(self) -> int:
        """How many tokens to draw before the host looks again."""
        room = self._rows.room[self._rows.room > 0]
        if not room.size:
            return 0
        if self._rows.prefilling or self._rows.num_streamed or self._rows.matched(self._rows.room):
            return 1
        if self._num_starting and not self._stops_early:
            return 1  # first tokens are not kept waiting for long launches
        steps = min(int(room.min() if self._waiting else room.max()), self.options.max_steps)
        return (
            steps if self._stops_early else max(each for each in self._step_counts if each <= steps)
        )

    @property
    def _step_counts(self) -> tuple[int, ...]:
        """How many steps decode programs are compiled for; those of different numbers might be
        rounded differently."""
        most = self.options.max_steps
        if self.options.batch_invariant and not self._stops_early:
            return (1,)
        return (most,) if self._stops_early else tuple(dict.fromkeys((1, most)))

    def _kind(self, needed: Kind) -> Kind:
        """The least kind of draw that there is a program for."""
        return needed if needed in self._kinds else self._kinds[-1]

    def _preempt(self, row: Row) -> None:
        self._leave(row)
        self._waiting.appendleft(row.request)
        self.counts.preempted += 1

    def _leave(self, row: Row) -> None:
        """Take a row from its request; its pages keep their content while there is room."""
        if self._shares:
            stored = row.tokens[: row.stored]
            known = stored if row.is_prefilling else row.request.all_tokens[:-1]
            start = min(len(known), len(stored))
            self.pages.register(known, row.pages, start, row.request.chains)
        self.pages.release(row.pages)
        self._rows.leave(row)

    # Calls of compiled programs, in shapes from short lists.

    def _run(self, call: Call) -> Any:
        """Outputs of a call. The state is donated: if the program fails, `step` starts afresh."""
        self._state, outputs = call.program(
            self.params, self._take_state(), *call.args, **call.static
        )
        return outputs

    def _launch(self, outputs: Any, take: Callable[[Any], None]) -> None:
        """Have outputs copied to the host as soon as they exist, and taken in in a later round."""
        for output in jax.tree.leaves(outputs):
            output.copy_to_host_async()
        self._launches.append(_Launch(outputs, take))

    def _take_state(self) -> DecodeState:
        state, self._state = self._state, None
        return self._new_state() if state is None else state

    def _admission(self, admitted: Sequence[Admission], plain: bool) -> tuple[Any, ...]:
        vocab_size, uses_history = self.spec.config.vocab_size, self._speculation.uses_history
        return calls.admission(admitted, plain, self.options, vocab_size, uses_history)

    def _prefill_call(self, kind: Wanted, rows: Sequence[Row], shape: tuple[int, int]) -> Call:
        """The next shape[1] tokens, at most, of each row; shape[0] rows with the padding."""
        tokens, lengths, numbers, targets = calls.chunk(rows, shape, self.options.max_batch_size)
        args = (self._rows.table.copy(), tokens, lengths, numbers)
        static: dict[str, Any] = {"spec": self.spec}
        if kind == "tokens":
            static["speculation"] = self._speculation
            return Call(prefill_step, (*args, self._draft_params), static)
        if kind == "logprobs":
            return Call(score_step, (*args, targets), static)
        return Call(logits_step, args, static)

    def _hidden(self, *shape: int) -> Array:
        """Such as `prefill_step` returns for so many rows, and `feed_step` for so many tokens."""
        zeros = np.zeros((*shape, self.spec.config.hidden_size), jnp.dtype(self.spec.dtype))
        return self._on_device(zeros)

    def _on_device(self, array: np.ndarray) -> Array:
        """Like what a program has returned."""
        whole = whole_on(self.spec.mesh) if self.spec.mesh else default_sharding()
        return jax.device_put(array, whole)

    def _draw_call(
        self,
        hidden: Array,
        ended: Sequence[tuple[int, Row]],
        kind: Kind,
        masks: np.ndarray | None = None,
    ) -> Call:
        """ended: rows, before their first token, and their places in `hidden`."""
        numbers = np.full(len(hidden), self.options.max_batch_size, np.int32)
        remaining = np.zeros(len(hidden), np.int32)
        for i, row in ended:
            numbers[i], remaining[i] = row.number, row.limit - len(row.request.token_ids)
        static = {"spec": self.spec, "kind": kind}
        return Call(draw_step, (hidden, numbers, remaining, masks), static)

    def _guess_call(self, active: np.ndarray, guesses: np.ndarray, guessed: np.ndarray) -> Call:
        """active: bool [batch]; guesses, guessed: those there are already."""
        static = {"spec": self.spec, "speculation": self._speculation}
        args = (self._rows.table.copy(), active, guesses, guessed, self._draft_params)
        return Call(guess_step, args, static)

    def _feed_call(
        self, active: np.ndarray, guesses: Array | np.ndarray, guessed: Array | np.ndarray
    ) -> Call:
        args = (self._rows.table.copy(), active, guesses, guessed)
        return Call(feed_step, args, {"spec": self.spec})

    def _draw_fed_call(
        self,
        hidden: Array,
        active: np.ndarray,
        guesses: np.ndarray,
        guessed: np.ndarray,
        masks: np.ndarray,
    ) -> Call:
        args = (hidden, active, guesses, guessed, masks)
        return Call(draw_fed_step, args, {"spec": self.spec, "kind": KINDS[-1]})

    def _matched_calls(self, sizes: Iterable[int]) -> list[Call]:
        """What `_launch_matched` calls, and `_launch_draw` for so many prompts."""
        batch = self.options.max_batch_size
        nobody, guessed = np.zeros(batch, bool), np.zeros(batch, np.int32)
        calls = [
            self._draw_call(self._hidden(size), [], KINDS[-1], self._masks(size, 0, [])[:, 0])
            for size in sizes
        ]
        for width in self._widths:
            guesses = np.zeros((batch, width), np.int32)
            fed: tuple[Any, Any] = guesses, guessed
            if self.options.lookahead:
                calls.append(self._guess_call(nobody, guesses, guessed))
                fed = self._on_device(guesses), self._on_device(guessed)
            calls.append(self._feed_call(nobody, *fed))
            hidden, masks = self._hidden(batch, 1 + width), self._masks(batch, width, [])
            calls.append(self._draw_fed_call(hidden, nobody, guesses, guessed, masks))
        return calls

    def _decode_call(self, active: np.ndarray, steps: int, kind: Kind) -> Call:
        """active: bool [batch], the rows that draw."""
        return Call(
            decode_steps,
            (self._rows.table.copy(), active, np.int32(steps), self._draft_params),
            {
                "spec": self.spec,
                "max_steps": self.options.max_steps if self._stops_early else steps,
                "speculation": self._speculation,
                "kind": kind,
                "stops_early": self._stops_early,
            },
        )

    @property
    def _shares(self) -> bool:
        return self.options.share_prefixes and not self.options.batch_invariant

    # Results.

    def _collect(self) -> None:
        launch = self._launches.popleft()
        launch.take(launch.outputs)

    def _fetch(self, outputs: Any) -> Any:
        """Outputs of a call, on the host."""
        began = time.perf_counter()
        fetched = jax.device_get(outputs)
        self.counts.waited += time.perf_counter() - began
        return fetched

    def _take_first(
        self, ended: Sequence[tuple[int, Row]], outputs: tuple[Array, Sampled | None]
    ) -> None:
        """The tokens that came with the ends of prompts, and the rows' places in the call."""
        self._num_starting -= 1
        tokens, sampled = self._fetch(outputs)
        now = time.perf_counter()
        for i, row in ended:
            self._extend(row, [int(tokens[i])], now, sampled, i)

    def _take_drawn(self, drawing: Drawing, outputs: tuple[Array, Sampled | None]) -> None:
        numbers, sampled = self._fetch(outputs)
        counts, guessed, accepted = numbers[:3]
        self.counts.guessed += int(guessed.sum())
        self.counts.accepted += int(accepted.sum())
        self._rows.settle(drawing, counts)
        columns, now = numbers[3:].T.tolist(), time.perf_counter()
        for number in np.flatnonzero(counts).tolist():
            row, token_ids = drawing.rows[number], columns[number][: counts[number]]
            assert row is not None
            self._extend(row, token_ids, now, sampled, (slice(len(token_ids)), number))

    def _extend(
        self, row: Row, token_ids: list[int], now: float, drawn: Sampled | None, at: Any
    ) -> None:
        """Hand drawn tokens to their request, unless that has ended by the host's decision.

        drawn[at]: where they come from, for their logprobs.
        """
        request = row.request
        if request.finish_reason or not token_ids:
            return
        self._changed[request] = None
        request.first_token_at = request.first_token_at or now
        with self._alone(request, ends_by=BaseException):
            count = request.extend(token_ids, row.limit)
            self.counts.drawn += count
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
                self._leave(row)

    def _take_logprobs(
        self, parts: Sequence[tuple[Row, int, int]], outputs: tuple[Array, Array, Array]
    ) -> None:
        logprobs, likeliest, most = self._fetch(outputs)
        for i, (row, start, stop) in enumerate(parts):
            request = row.request
            first = max(0, request.score_from - 1 - start)
            wanted = slice(first, max(first, stop - start))
            with self._alone(request):
                request.extend_prompt(logprobs[i, wanted], likeliest[i, wanted], most[i, wanted])
                self._end_prompt(row, stop)

    def _take_logits(self, parts: Sequence[tuple[Row, int, int]], outputs: Array) -> None:
        logits = self._fetch(outputs)
        for i, (row, start, stop) in enumerate(parts):
            request = row.request
            with self._alone(request):
                before = [] if start == 0 else [request.prompt_logits]
                request.prompt_logits = np.concatenate([*before, logits[i, : stop - start]])
                self._end_prompt(row, stop)

    def _end_prompt(self, row: Row, stop: int) -> None:
        if row.request.finish_reason:
            return
        self._changed[row.request] = None
        if stop == len(row.tokens):
            row.request.finish_reason = "length"
            row.request.finished_at = time.perf_counter()
            self._leave(row)


def _first_output(request: Request, tokens: Sequence[int]) -> int:
    """The first token whose output is wanted; those before it need not be computed again."""
    return request.score_from - 1 if request.wanted == "logprobs" else len(tokens) - 1


def _is_coming(request: Request, found: Match, on_their_way: list[Request]) -> bool:
    """Whether a prompt that is on its way will fill the next page that could be shared."""
    count = len(found.pages)
    wanted = request.chains[count : count + 1]
    return bool(wanted) and any(other.chains[count : count + 1] == wanted for other in on_their_way)
