"""Schedules requests: turns them, slots, pages and budgets into a plan of calls for each round.

In each round it admits requests that fit, first come, first served; draws tokens for all sequences
whose prompt has been computed; and computes chunks of prompts within a budget of tokens. Decisions
are deterministic and made before any result of the round is known: draws count as the most that
they may be, and are corrected when results arrive (`Slots`). All of it runs on the host, without
JAX.

Pages (`pages.PagePool`) are taken as sequences grow, and shared by sequences with a common prefix.
When none are left, the sequence that was admitted last is preempted: it releases its pages, and its
request is resumed later with the drawn tokens as part of its prompt.
"""

import itertools
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from llama_jax.engine.draw_kinds import KINDS, Kind, kind_of
from llama_jax.engine.pages import Match, PagePool, extend_block_hashes
from llama_jax.engine.plan import Admission, Chunk, DecodeCall, Plan, PrefillCall
from llama_jax.engine.request import OutputKind, Request
from llama_jax.engine.scheduling import (
    OVERHEAD_OF_CALL,
    OVERHEAD_OF_CALL_ON_CPU,
    EngineCounts,
    EngineOptions,
    prefill_calls,
)
from llama_jax.engine.slots import RunningSequence, Slots
from llama_jax.model.config import PAGE_SIZE

# The waiting requests that are examined in a round.
_MAX_EXAMINED = 64
# The share of slots that may idle in a launch, on average, to save launches: on a GPU the host
# takes about as long for a launch as the device takes for a step.
_MAX_IDLE = 1 / 4


class QueueFullError(RuntimeError):
    """Raised if more requests would wait than `EngineOptions.max_waiting` allows."""


class Scheduler:
    """Holds the waiting and running requests with their slots and pages, and plans rounds.

    stops_early: whether a decode launch ends as soon as no slot has tokens to draw; otherwise it
        has one of a few fixed numbers of steps (`step_counts`).
    draw_kinds: the kinds of draws for which there are programs.
    stream_steps: the most steps of a launch in which a streamed request draws, while every slot is
        taken. May be changed between rounds.
    """

    def __init__(self, options: EngineOptions, counts: EngineCounts, stops_early: bool) -> None:
        self.options = options
        self.stream_steps = 1
        self.pages = PagePool(options.pool_size, PAGE_SIZE)
        self._counts = counts
        self._stops_early = stops_early
        # Programs without parts of the sampler save time on a GPU, and cost one more compilation
        # each; on a CPU the greedy one saves most of compiling, which many need no more than. They
        # might not be bit-equal, hence not with batch_invariant.
        kinds = (KINDS[0], KINDS[-1]) if stops_early else KINDS
        self.draw_kinds: tuple[Kind, ...] = KINDS[-1:] if options.batch_invariant else kinds
        self._shares = options.share_prefixes and not options.batch_invariant
        self._waiting: deque[Request] = deque()
        self._admissions: list[Admission] = []  # of an unfinished plan
        self._failed: list[Request] = []
        self._ids = itertools.count()
        self._start_afresh()

    @property
    def running(self) -> list[RunningSequence]:
        """Return the running sequences in the order of admission."""
        return self.slots.running

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def awaits_first_tokens(self) -> bool:
        """Return whether the next launch should wait for first tokens: if they are streamed and
        nothing else is to be done, they would reach their readers later by its preparation."""
        slots = self.slots
        is_alone = len(slots.starting) == len(self.running) == slots.num_streamed
        return is_alone and not self._waiting

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Return the numbers of steps for which decode programs are compiled.

        With `batch_invariant` it is a single one, because programs with different numbers might
        round differently.
        """
        most = self.options.max_steps
        if self.options.batch_invariant and not self._stops_early:
            return (1,)
        return (most,) if self._stops_early else tuple(dict.fromkeys((1, most)))

    def call_shapes(self, output_kind: OutputKind) -> tuple[tuple[int, int], ...]:
        """Return the shapes of prefill calls. Those for logits, which are large, take one prompt at
        a time."""
        shapes = self.options.call_shapes
        return tuple(each for each in shapes if each[0] == 1) if output_kind == "logits" else shapes

    def add(self, request: Request) -> None:
        """Queue a request and give it an id. Raises `QueueFullError`."""
        if len(self._waiting) >= self.options.max_waiting:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting already (max_waiting): call step() "
                "until some are done"
            )
        request.id = next(self._ids)
        self._waiting.append(request)

    def find(self, request_id: int) -> Request | None:
        """Return the running or waiting request of this id, or None."""
        everywhere = itertools.chain((each.request for each in self.running), self._waiting)
        return next((each for each in everywhere if each.id == request_id), None)

    def remove(self, request: Request) -> None:
        """Remove a request that has ended from its slot or the queue."""
        sequence = next((each for each in self.running if each.request is request), None)
        if sequence:
            self.leave(sequence)
        elif request in self._waiting:
            self._waiting.remove(request)

    def leave(self, sequence: RunningSequence) -> None:
        """Free the slot of a sequence. Its pages keep their content while there is room."""
        if self._shares:
            computed = sequence.tokens[: sequence.num_computed]
            known = computed if sequence.is_prefilling else sequence.request.all_tokens[:-1]
            start = min(len(known), len(computed))
            self.pages.register(known, sequence.pages, start, sequence.request.block_hashes)
        self.pages.release(sequence.pages)
        self.slots.leave(sequence)

    def preempt(self, sequence: RunningSequence) -> None:
        """Free the slot and pages of a sequence and put its request at the head of the queue. The
        sequence must have no results in flight."""
        self._waiting.appendleft(sequence.request)
        self.leave(sequence)
        self._counts.preempted += 1

    def restart(self) -> None:
        """Start over with an empty cache: running requests return to the head of the queue with the
        tokens they have."""
        unfinished = [each.request for each in self.running if not each.request.finish_reason]
        self._waiting.extendleft(each for each in reversed(unfinished) if each not in self._waiting)
        self._start_afresh()

    def schedule(self, results_are_coming: bool) -> Plan | None:
        """Plan the next round.

        results_are_coming: whether launches are in flight. If so, this may return None when pages
            are short, because their results may end sequences and free pages: the caller collects
            results and calls again.
        """
        self._admit()
        decodes = self._decode(results_are_coming)
        if decodes is None:
            return None
        prefills = self._prefill(max((each.steps for each in decodes), default=1))
        table = self.slots.page_table.copy()
        plan = Plan(tuple(self._admissions), decodes, prefills, tuple(self._failed), table)
        self._admissions, self._failed = [], []
        return plan

    def _start_afresh(self) -> None:
        options = self.options
        self.pages = PagePool(options.pool_size, PAGE_SIZE, self.pages.counts)
        self.slots = Slots(options.max_batch_size, options.pages_per_slot, options.pool_size)
        self._admissions = []

    # Admission.

    def _admit(self) -> None:
        """Give slots and pages to waiting requests, first come, first served."""
        in_prefill = [each.request for each in self.slots.prefilling]
        for request in list(itertools.islice(self._waiting, _MAX_EXAMINED)):
            if len(self.running) == self.options.max_batch_size:
                break
            try:
                tokens = (
                    request.prompt[:-1] if request.output_kind == "logprobs" else request.all_tokens
                )
                prefix = Match((), None, 0)
                if self._shares and request.output_kind != "logits":
                    known = tokens[: _first_output(request, tokens)]
                    prefix = self.pages.match(known, request.block_hashes)
                    if _is_coming(request, prefix, in_prefill):
                        continue
                admission = self._place(request, tokens, prefix)
            except Exception as error:
                request.fail(error)
                request.finished_at = time.perf_counter()
                self._failed.append(request)
                self.remove(request)
                continue
            if admission is None:
                break
            self._waiting.remove(request)
            self._admissions.append(admission)
            in_prefill.append(request)

    def _place(self, request: Request, tokens: list[int], prefix: Match) -> Admission | None:
        """Admit a request if there are pages for its prompt, plus one for each running sequence.

        prefix: the part of `tokens` that is in the cache already.
        """
        max_new_tokens = 0
        if request.output_kind == "tokens":
            room = self.options.max_seq_len - len(request.prompt)
            max_new_tokens = min(request.params.max_new_tokens, room)
        whole = len(tokens)
        if self.options.batch_invariant:
            whole = len(request.prompt) + max_new_tokens
        missing = -(-whole // PAGE_SIZE) - len(prefix.pages)
        source = [prefix.partial[0]] if prefix.partial else []
        self.pages.share([*prefix.pages, *source])
        if missing + len(self.running) > self.pages.num_available:
            self.pages.release([*prefix.pages, *source])
            if self.running or not source:
                return None
            # The page to copy from cannot be evicted. If nothing is running, recompute it instead.
            full = Match(prefix.pages, None, len(prefix.pages) * PAGE_SIZE)
            return self._place(request, tokens, full)
        own = self.pages.take(missing)
        pages = [*prefix.pages, *own]
        sequence = self.slots.enter(request, tokens, pages, max_new_tokens, prefix.num_tokens)
        if self._shares:
            extend_block_hashes(request.block_hashes, tokens, PAGE_SIZE)
        # Pages are copied in the order of admission, before any call writes to one, so the source
        # may be released now.
        self.pages.release(source)
        self.pages.counts.queried += len(tokens)
        self.pages.counts.hit += prefix.num_tokens
        request.start_prompt(prefix.num_tokens)
        request.admitted_at = request.admitted_at or time.perf_counter()
        return Admission(sequence, prefix.num_tokens, (source[0], own[0]) if source else None)

    # Decode.

    def _decode(self, results_are_coming: bool) -> tuple[DecodeCall, ...] | None:
        """Plan draws for all sequences whose prompt has been computed, preempting for pages if
        needed. Returns None if results in flight may free pages."""
        slots = self.slots
        steps = self._num_steps()
        while steps:
            most = steps * (1 + self.options.num_speculative_tokens)
            if slots.with_grammar(slots.min_remaining):
                most = 1 + self.options.max_forced_tokens
            counts = np.clip(slots.min_remaining, 0, most)
            missing = slots.num_missing_pages(counts)
            if missing.sum() <= self.pages.num_available:
                break
            if results_are_coming:
                return None
            if steps > 1:
                steps = 1
            else:
                self.preempt(self.running[-1])
        if not steps or not counts.any():
            return ()
        for slot in np.flatnonzero(missing).tolist():
            slots.add_pages(slot, self.pages.take(int(missing[slot])))
        structured = tuple(slots.with_grammar(counts))
        calls = []
        if structured and self.options.batch_invariant:
            # Sequences without a grammar use the usual programs.
            others = np.minimum(counts, 1 + self.options.num_speculative_tokens)
            others[[each.slot for each in structured]] = 0
            counts[others > 0] = 0
            if others.any():
                calls.append(self._decode_call(others, steps))
        return (*calls, self._decode_call(counts, steps, structured))

    def _decode_call(
        self, counts: np.ndarray, steps: int, structured: tuple[RunningSequence, ...] = ()
    ) -> DecodeCall:
        kind, wants_logprobs = self.slots.needs(counts)
        kind = KINDS[-1] if structured else self._kind(kind)
        return DecodeCall(self.slots.launch(counts), steps, kind, wants_logprobs, structured)

    def _num_steps(self) -> int:
        """Return the number of steps of the next launch: as many as leave few slots idle.

        While a request is streamed there are at most `stream_steps`, and 1 if a slot is free, since
        a new request would wait for the launch.
        """
        slots = self.slots
        remaining = slots.min_remaining[slots.min_remaining > 0]
        if not remaining.size:
            return 0
        if slots.with_grammar(slots.min_remaining):
            return 1
        most = min(int(remaining.max()), self.options.max_steps)
        if slots.num_streamed:
            is_full = len(self.running) == self.options.max_batch_size
            most = min(most, self.stream_steps) if is_full else 1
        possible = range(1, most + 1) if self._stops_early else self.step_counts
        return max(n for n in possible if n == 1 or (n <= most and self._few_idle(n, remaining)))

    def _few_idle(self, steps: int, remaining: np.ndarray) -> bool:
        """Return whether a launch of so many steps leaves few slots idle and delays few first
        tokens.

        A slot idles while its prompt is not computed, and after its sequence has ended if another
        one waits.

        remaining: the remaining tokens of the slots that draw.
        """
        most = 0 if self._stops_early else _MAX_IDLE * len(self.running)
        ended = int(np.maximum(steps - remaining, 0).sum()) / steps if self._waiting else 0
        is_early = not self._stops_early and len(self.slots.starting) > most
        return len(self.slots.prefilling) + ended <= most and not is_early

    def _kind(self, needed: Kind) -> Kind:
        """Return the simplest kind of draw that covers `needed` and has a program."""
        return needed if needed in self.draw_kinds else self.draw_kinds[-1]

    # Prefill.

    def _prefill(self, steps: int) -> tuple[PrefillCall, ...]:
        """Plan chunks of prompts in the order of admission until the round's budget is spent.

        steps: tokens that each sequence draws in this round.
        """
        calls: list[PrefillCall] = []
        budget = self.options.prefill_budget * steps
        overhead = OVERHEAD_OF_CALL_ON_CPU if self._stops_early else OVERHEAD_OF_CALL
        while budget > 0:
            chosen = []
            for sequence in self.slots.prefilling:
                if budget > 0:
                    chosen.append(sequence)
                    budget -= min(sequence.remaining, self.options.prefill_chunk)
            if not chosen:
                break
            for output_kind in dict.fromkeys(each.request.output_kind for each in chosen):
                group = [each for each in chosen if each.request.output_kind == output_kind]
                remaining = [each.remaining for each in group]
                shapes = self.call_shapes(output_kind)
                for members, shape in prefill_calls(remaining, shapes, overhead):
                    calls.append(
                        self._prefill_call(output_kind, [group[i] for i in members], shape)
                    )
        return tuple(calls)

    def _prefill_call(
        self, output_kind: OutputKind, sequences: Sequence[RunningSequence], shape: tuple[int, int]
    ) -> PrefillCall:
        """Plan a call with the next prompt tokens of each sequence."""
        chunks = []
        for sequence in sequences:
            start = sequence.num_computed
            self.slots.prefill(sequence, min(sequence.remaining, shape[1]))
            if self._shares:
                computed = sequence.tokens[: sequence.num_computed]
                self.pages.register(computed, sequence.pages, start, sequence.request.block_hashes)
            chunks.append(Chunk(sequence, start, sequence.num_computed))
        ended = [chunk.sequence for chunk in chunks if chunk.is_last and output_kind == "tokens"]
        for sequence in ended:
            self.slots.begin(sequence)
        params = [each.request.params for each in ended]
        kind = max(map(kind_of, params), key=KINDS.index, default=KINDS[0])
        if output_kind == "logprobs":
            params = [each.request.params for each in sequences]
        wants_logprobs = any(each.logprobs is not None for each in params)
        return PrefillCall(output_kind, shape, tuple(chunks), self._kind(kind), wants_logprobs)


def _first_output(request: Request, tokens: Sequence[int]) -> int:
    """Return the index of the first token whose output is needed. Earlier ones may come from the
    cache."""
    return request.score_from - 1 if request.output_kind == "logprobs" else len(tokens) - 1


def _is_coming(request: Request, prefix: Match, in_prefill: list[Request]) -> bool:
    """Return whether a prompt in prefill will fill the next page that this one could share."""
    count = len(prefix.pages)
    next_hash = request.block_hashes[count : count + 1]
    return bool(next_hash) and any(
        other.block_hashes[count : count + 1] == next_hash for other in in_prefill
    )
