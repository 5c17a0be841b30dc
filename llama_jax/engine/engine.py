"""Runs requests with continuous batching: they come and go while a few compiled programs run.

`submit` queues a request. `step` does one round: schedule (`scheduler`), launch (`batches`),
collect (`outputs`). A round is launched before the results of the previous one are read, so the
host's work (text, stop strings) overlaps the device's. Everything is deterministic and runs in the
caller's thread, except compiling.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.engine import compile_cache
from llama_jax.engine.batches import BatchBuilder, Call
from llama_jax.engine.compile_cache import CompileReport
from llama_jax.engine.draw_kinds import KINDS
from llama_jax.engine.outputs import OutputProcessor
from llama_jax.engine.pages import PagePool
from llama_jax.engine.plan import Admission, DecodeCall, Plan, PrefillCall
from llama_jax.engine.program_cache import begin_to_compile
from llama_jax.engine.request import OutputKind, Request
from llama_jax.engine.sampling import SamplingState
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.scheduling import EngineCounts, EngineOptions, Stats
from llama_jax.engine.slots import RunningSequence
from llama_jax.engine.speculation import Speculation
from llama_jax.engine.steps import DecodeState, has_free_conditions, state_builder
from llama_jax.engine.token_masks import TokenMasks
from llama_jax.model.kv_cache import KVScales
from llama_jax.model.spec import ModelSpec, Params


@dataclass(frozen=True, eq=False)
class _Launch:
    """An in-flight launch: its outputs on the device, and the function that applies them."""

    outputs: Any
    take: Callable[[Any], None]


class Engine:
    """Schedules requests, launches compiled programs and applies their results to the requests.

    Calls from several threads run one at a time.

    params, spec: of the model, as in `forward.prefill`.
    cache_dtype, kv_scales: as in `steps.state_builder`.
    draft: parameters and spec of a smaller model with the same vocabulary, which proposes draft
        tokens (`options.num_speculative_tokens` at a time); without it they are looked up in the
        sequence itself.

    `LLM` makes one; it can also be stepped by hand:

    >>> from llama_jax import LLM, SamplingParams
    >>> from llama_jax.engine.request import Request
    >>> llm = LLM.load(verbose=False)
    >>> ids = llm.tokenizer.encode("2, 4, 6,")
    >>> request = llm.engine.submit(Request(ids, SamplingParams(max_new_tokens=4)))
    >>> while request.finish_reason is None:
    ...     changed = llm.engine.step()
    >>> len(request.token_ids)
    4
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
        speculation = Speculation(options.num_speculative_tokens, draft and draft[1])
        speculation.check(spec.config, options.max_seq_len)
        self.params = params
        self.spec = spec
        self.options = options
        self.counts = EngineCounts()
        stops_early = has_free_conditions()
        self._scheduler = Scheduler(options, self.counts, stops_early)
        self._batches = BatchBuilder(spec, options, speculation, draft and draft[0], stops_early)
        self._masks = TokenMasks(options, spec.config.vocab_size)
        self._outputs = OutputProcessor(self._scheduler, self.counts)
        self._new_state = state_builder(
            spec, options.max_batch_size, options.max_seq_len, cache_dtype, kv_scales,
            options.pool_size, speculation,
        )  # fmt: skip
        self._state: DecodeState | None = None
        self._in_flight: deque[_Launch] = deque()
        self._lock = threading.RLock()
        # Whether the next launch is the first, and the programs that are being compiled for it.
        # On a GPU this has not been tried.
        self._is_cold = stops_early
        self._compiling: dict[Any, list[Future[None]]] = {}

    @property
    def has_work(self) -> bool:
        return bool(
            self.num_waiting or self.num_running or self._in_flight or self._outputs.changed
        )

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def stream_steps(self) -> int:
        """Return the most steps of a launch that draws for a streamed request, while every slot is
        taken; 1 at first, so that each token comes as soon as it is drawn."""
        return self._scheduler.stream_steps

    @stream_steps.setter
    def stream_steps(self, most: int) -> None:
        self._scheduler.stream_steps = most

    @property
    def pages(self) -> PagePool:
        """Return the pool of the cache's pages."""
        return self._scheduler.pages

    def submit(self, request: Request) -> Request:
        """Queue a request and return it; `step` changes it.

        Raises `QueueFullError`, and ValueError for a prompt that leaves no room for output or has
        ids outside the vocabulary.
        """
        with self._lock:
            self._check(request)
            if request.params.seed is None:
                seed = int(np.random.SeedSequence().generate_state(1)[0])
                request.params = replace(request.params, seed=seed)
            self._scheduler.add(request)
            return request

    def cancel(self, request_id: int) -> bool:
        """End a request with what it has. Returns False if it is not in the engine (any more)."""
        with self._lock:
            request = self._scheduler.find(request_id)
            if request is None:
                return False
            try:
                request.cancel()
            finally:
                self._scheduler.remove(request)
                self._outputs.changed[request] = None
            self._outputs.tell([request])
            return True

    def step(self) -> list[Request]:
        """Do one round. Returns the requests that got tokens or results, or finished.

        An exception in the host's work for one request (its text, its `on_change`, its settings)
        ends that request alone, with the error as its result. If a program fails, or the call is
        interrupted, running requests return to the queue with what they have, and the cache starts
        empty.
        """
        with self._lock:
            latest = self._in_flight[-1] if self._in_flight else None
            try:
                if not (latest and self._scheduler.awaits_first_tokens):
                    self._launch(self._schedule())
                while latest in self._in_flight:
                    self._collect()
            except BaseException:
                self._scheduler.restart()
                self._in_flight.clear()
                self._state = None
                raise
            return self._outputs.tell(list(self._outputs.changed))

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Submit requests and step until they are done. Yields a request whenever it has changed.

        When the iterator is closed, unfinished requests are cancelled.
        """
        changed: deque[Request] = deque()  # filled by any thread that steps
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
        """Return the counters since the engine was made."""
        with self._lock:
            return Stats(**vars(self.counts), **vars(self.pages.counts))

    def warmup(
        self,
        output_kinds: Sequence[OutputKind] = ("tokens", "logprobs", "logits"),
        structured: bool = False,
    ) -> CompileReport:
        """Compile the programs for these kinds of output, several at a time, without a step.

        structured: include the programs for structured output.
        Returns the number of programs that were compiled or fetched from the persistent cache, and
        the seconds it took. Raises ValueError for an unknown kind.
        """
        if unknown := [each for each in output_kinds if each not in get_args(OutputKind)]:
            kinds = ", ".join(map(repr, get_args(OutputKind)))
            raise ValueError(f"output_kinds: expected a list of {kinds}, got {unknown[0]!r}")
        began, before = time.perf_counter(), compile_cache.report()
        with self._lock:
            self._is_cold = False
            state = self._state = self._take_state()
            jobs = [
                partial(call.program.lower, self.params, state, *call.args, **call.static)
                for call in self._needed_calls(output_kinds, structured)
            ]
            jobs += [
                partial(call.program.lower, self.params, *call.args, **call.static)
                for call in self._calls_after_prefill(output_kinds)
            ]
            for plain in (True, False):
                call = self._batches.admission([], plain)
                jobs.append(partial(call.program.lower, state, *call.args))
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda lower: lower().compile(), jobs))
        seconds = time.perf_counter() - began
        return replace(compile_cache.report().since(before), seconds=seconds)

    def _needed_calls(self, output_kinds: Sequence[OutputKind], structured: bool) -> list[Call]:
        """Return a call of each program with a state for these kinds of output, except
        admission."""
        scheduler, batches = self._scheduler, self._batches
        table = scheduler.slots.page_table
        nobody = np.zeros(self.options.max_batch_size, bool)
        prefills = {
            (shape, batches.takes_drafts(each)): PrefillCall(each, shape)
            for each in output_kinds
            for shape in scheduler.call_shapes(each)
        }
        calls = [batches.prefill(each, table) for each in prefills.values()]
        hidden = {size: batches.blank_hidden(size) for size, _ in self.options.call_shapes}
        if "tokens" in output_kinds:
            for kind in scheduler.draw_kinds:
                calls += [batches.first_draws(each, [], kind) for each in hidden.values()]
                calls += [
                    batches.decode(table, nobody, steps, kind) for steps in scheduler.step_counts
                ]
        if structured:
            calls += [
                batches.first_draws(each, [], KINDS[-1], self._masks.everything(size, 0)[:, 0])
                for size, each in hidden.items()
            ]
            for width in self._masks.widths:
                calls += self._structured_calls(width)
        return calls

    def _calls_after_prefill(self, output_kinds: Sequence[OutputKind]) -> list[Call]:
        """Return a call of each program without a state for these kinds of output."""
        return [
            self._batches.after_prefill(
                PrefillCall(each, shape), self._batches.blank_hidden(*shape)
            )
            for each in output_kinds
            if each != "tokens"
            for shape in self._scheduler.call_shapes(each)
        ]

    def _structured_calls(self, width: int) -> list[Call]:
        """Return the calls of `_launch_structured` with so many draft tokens."""
        batches, batch = self._batches, self.options.max_batch_size
        table, nobody = self._scheduler.slots.page_table, np.zeros(batch, bool)
        drafts, num_drafts = np.zeros((batch, width), np.int32), np.zeros(batch, np.int32)
        fed: tuple[Any, Any] = drafts, num_drafts
        calls = []
        if self.options.num_speculative_tokens:
            calls.append(batches.draft(table, nobody, drafts, num_drafts))
            fed = batches.on_device(drafts), batches.on_device(num_drafts)
        calls.append(batches.feed(table, nobody, *fed))
        hidden, masks = batches.blank_hidden(batch, 1 + width), self._masks.everything(batch, width)
        return [*calls, batches.draw_fed(hidden, nobody, drafts, num_drafts, masks)]

    def _check(self, request: Request) -> None:
        """Raise ValueError for a request that cannot be served."""
        least, room = (1, 1) if request.output_kind == "tokens" else (2, 0)
        if request.output_kind == "logits":
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

    def _schedule(self) -> Plan:
        """Return the plan of this round, collecting results first if the scheduler needs them."""
        while not (plan := self._scheduler.schedule(bool(self._in_flight))):
            self._collect_all()
        self._outputs.changed |= dict.fromkeys(plan.failed)
        return plan

    # Launch.

    def _launch(self, plan: Plan) -> None:
        """Carry out a plan."""
        admissions = self._admissions(plan.admissions)
        if self._is_cold:
            self._is_cold = False
            self._compile_together(admissions, plan)
        for call in admissions:
            self._wait_for(call)
            self._state = call.program(self._take_state(), *call.args)
        for decode in plan.decodes:
            if decode.structured:
                self._launch_structured(decode, plan.page_table)
            else:
                self._launch_decode(decode, plan.page_table)
        for prefill in plan.prefills:
            self._launch_prefill(prefill, plan.page_table)

    def _admissions(self, admissions: Sequence[Admission]) -> list[Call]:
        admitted: list[tuple[Admission, SamplingState]] = []
        for admission in admissions:
            settings: SamplingState | None = None
            with self._outputs.alone(admission.sequence.request):
                settings = self._batches.settings(admission.sequence.request)
            if settings is None:  # the request has failed
                settings = self._batches.no_settings()
            admitted.append((admission, settings))
        return list(self._batches.admissions(admitted))

    def _compile_together(self, admissions: Sequence[Call], plan: Plan) -> None:
        """Begin to compile the programs of the first launch, and of the decode steps after it."""
        state = self._state = self._take_state()
        jobs = [(each.program, (state, *each.args), each.static) for each in admissions]
        jobs += [
            (each.program, (self.params, state, *each.args), each.static)
            for each in self._first_calls(plan)
        ]
        if len(jobs) > 1:
            self._compiling = begin_to_compile(jobs)

    def _first_calls(self, plan: Plan) -> list[Call]:
        """Return a call of each program that a plan needs to draw its first tokens, and of the
        decode steps after them; none of admission, and none with grammars."""
        batches, table = self._batches, plan.page_table
        prefills = {each.shape: each for each in plan.prefills if each.output_kind == "tokens"}
        calls = [batches.prefill(each, table) for each in prefills.values()]
        drawing = [each for each in prefills.values() if each.ended]
        ended = [each for call in drawing for _, each in call.ended]
        if any(each.request.matcher for each in ended):
            return calls
        calls += [
            batches.first_draws(batches.blank_hidden(each.shape[0]), [], each.kind)
            for each in drawing
        ]
        if any(each.max_new_tokens > 1 for each in ended):
            kind = max((each.kind for each in drawing), key=KINDS.index)
            nobody = np.zeros(self.options.max_batch_size, bool)
            calls.append(batches.decode(table, nobody, 1, kind))
        return calls

    def _wait_for(self, call: Call) -> None:
        """Wait until a call's program is compiled, if it is being compiled. Errors are those of the
        call, which tries again."""
        wait(self._compiling.pop(call.program, ()))

    def _launch_decode(self, call: DecodeCall, page_table: np.ndarray) -> None:
        active = call.draws.max_counts > 0
        drawn = self._run(self._batches.decode(page_table, active, call.steps, call.kind))
        outputs = drawn.numbers, drawn.sampled if call.wants_logprobs else None
        self._send(outputs, partial(self._outputs.take_draws, call.draws))
        self.counts.rounds += 1

    def _launch_structured(self, call: DecodeCall, page_table: np.ndarray) -> None:
        """Launch one step in which grammars restrict what some slots may draw.

        While the model computes, earlier draws reach the host, which computes the masks.
        """
        batches, draws, active = self._batches, call.draws, call.draws.max_counts > 0
        drafts, num_drafts = self._masks.forced(draws.max_counts, call.structured)
        if self.options.num_speculative_tokens:
            drafts, num_drafts = self._run(batches.draft(page_table, active, drafts, num_drafts))
        hidden = self._run(batches.feed(page_table, active, drafts, num_drafts))
        self._collect_all()
        drafts, num_drafts = self._outputs.fetch((drafts, num_drafts))
        width = drafts.shape[1]
        places = [
            (each.slot, each.request, drafts[each.slot, : num_drafts[each.slot]].tolist())
            for each in call.structured
            if not each.request.finish_reason
        ]
        masks = self._computed_masks(len(active), width, places)
        draws = self._scheduler.slots.limit(draws, 1 + width)
        active = draws.max_counts > 0
        drawn = self._run(batches.draw_fed(hidden, active, drafts, num_drafts, masks))
        outputs = drawn.numbers, drawn.sampled if call.wants_logprobs else None
        self._send(outputs, partial(self._outputs.take_draws, draws))
        self.counts.rounds += 1

    def _launch_prefill(self, call: PrefillCall, page_table: np.ndarray) -> None:
        last, hidden = self._run(self._batches.prefill(call, page_table))
        if call.output_kind == "tokens":
            self._launch_first_draws(call, last)
        else:
            after = self._batches.after_prefill(call, hidden)
            outputs = after.program(self.params, *after.args, **after.static)
            if call.output_kind == "logprobs":
                scores, top = outputs
                outputs = scores, top if call.wants_logprobs else None
                self._send(outputs, partial(self._outputs.take_logprobs, call.chunks))
            else:
                self._send(outputs, partial(self._outputs.take_logits, call.chunks))
        prompts, width = call.shape
        self.counts.prefilled += call.num_new_tokens
        self.counts.padding += prompts * width - call.num_new_tokens

    def _launch_first_draws(self, call: PrefillCall, hidden: Array) -> None:
        """Draw the first tokens after prompts that end here, unless their request has failed."""
        masks = None
        if any(each.request.matcher for _, each in call.ended):
            first = [(place, each.request, list[int]()) for place, each in call.ended]
            masks = self._computed_masks(len(hidden), 0, first)[:, 0]
        ended: list[tuple[int, RunningSequence]] = [
            (place, each) for place, each in call.ended if not each.request.finish_reason
        ]
        if not ended:
            return
        kind = call.kind if masks is None else KINDS[-1]
        drawn = self._run(self._batches.first_draws(hidden, ended, kind, masks))
        outputs = drawn.tokens, drawn if call.wants_logprobs else None
        self._send(outputs, partial(self._outputs.take_first, ended))

    def _computed_masks(
        self, size: int, width: int, places: Sequence[tuple[int, Request, list[int]]]
    ) -> np.ndarray:
        """Compute masks by `TokenMasks.masks`, and end requests whose masks cannot be computed."""
        masks, failed = self._masks.masks(size, width, places)
        for request, error in failed:
            with self._outputs.alone(request):
                raise error
        return masks

    def _run(self, call: Call) -> Any:
        """Run a call and return its outputs. The state is donated, so if this fails `step` has to
        start with an empty cache."""
        self._wait_for(call)
        self._state, outputs = call.program(
            self.params, self._take_state(), *call.args, **call.static
        )
        return outputs

    def _take_state(self) -> DecodeState:
        state, self._state = self._state, None
        return self._new_state() if state is None else state

    def _send(self, outputs: Any, take: Callable[[Any], None]) -> None:
        """Start copying outputs to the host; a later round applies them."""
        for output in jax.tree.leaves(outputs):
            output.copy_to_host_async()
        self._in_flight.append(_Launch(outputs, take))

    # Collect.

    def _collect(self) -> None:
        """Apply the results of the oldest launch."""
        launch = self._in_flight.popleft()
        launch.take(launch.outputs)

    def _collect_all(self) -> None:
        while self._in_flight:
            self._collect()
