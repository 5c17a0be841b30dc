"""The scheduler: requests, slots, pages and budgets in, a plan of calls out.

Each round it admits what fits, first come, first served; draws tokens for every sequence that has
its prompt behind it; and takes chunks of prompts through the model within a budget of tokens.
Everything is deterministic, and known before any result of the round is: what will be drawn is
counted at its most and corrected when results are taken in (`Slots`). It computes with numbers and
lists alone, on the host, and imports no JAX.

Pages (`pages.PagePool`) are taken as sequences grow and shared by sequences that begin alike. When
none are left, the sequence that was admitted last gives its own back, and its request is taken up
again later, with the tokens it has drawn as part of its prompt.
"""

import itertools
import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from llama_jax.engine.draw_kinds import KINDS, Kind, kind_of
from llama_jax.engine.pages import Match, PagePool, extend_block_hashes
from llama_jax.engine.plan import Admission, Chunk, DecodeCall, Plan, PrefillCall
from llama_jax.engine.request import Request, Wanted
from llama_jax.engine.scheduling import (
    MIN_TOKENS_PER_CALL,
    MIN_TOKENS_PER_CALL_ON_CPU,
    EngineCounts,
    EngineOptions,
    prefill_calls,
)
from llama_jax.engine.slots import RunningSequence, Slots
from llama_jax.model.config import PAGE_SIZE

# How many waiting requests are looked at in a round.
_MAX_EXAMINED = 64
# The part of the slots that may idle in a launch, on average, for the sake of fewer launches: on a
# GPU the host takes about as long for a launch as the device for a step.
_MAX_IDLE = 1 / 4


class QueueFullError(RuntimeError):
    """More requests are waiting than `EngineOptions.max_waiting` allows."""


class Scheduler:
    """The requests that wait and run, their slots and their pages.

    stops_early: whether a decode launch ends when no slot has anything left to draw; otherwise it
    has one of a few fixed numbers of steps (`step_counts`).
    draw_kinds: the kinds of draws that there are programs for.
    """

    def __init__(self, options: EngineOptions, counts: EngineCounts, stops_early: bool) -> None:
        self.options = options
        self.pages = PagePool(options.pool_size, PAGE_SIZE)
        self._counts = counts
        self._stops_early = stops_early
        # What is left out of programs pays on a GPU, and costs one more program each to compile.
        # Other kernels might be taken around it, so that equal bits are not certain.
        is_varied = not stops_early and not options.batch_invariant
        self.draw_kinds: tuple[Kind, ...] = KINDS if is_varied else KINDS[-1:]
        self._shares = options.share_prefixes and not options.batch_invariant
        self._waiting: deque[Request] = deque()
        self._admissions: list[Admission] = []  # of a plan that is not complete
        self._failed: list[Request] = []
        self._ids = itertools.count()
        self._start_afresh()

    @property
    def running(self) -> list[RunningSequence]:
        """In the order of their admission."""
        return self.slots.running

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Return how many steps decode programs are compiled for. Programs of different numbers of
        steps might round differently, so `batch_invariant` has one."""
        most = self.options.max_steps
        if self.options.batch_invariant and not self._stops_early:
            return (1,)
        return (most,) if self._stops_early else tuple(dict.fromkeys((1, most)))

    def call_shapes(self, wanted: Wanted) -> tuple[tuple[int, int], ...]:
        """The shapes of prefill calls. Logits of a whole vocabulary are large, so calls for them
        take one prompt at a time."""
        shapes = self.options.call_shapes
        return tuple(each for each in shapes if each[0] == 1) if wanted == "logits" else shapes

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
        """The request of this id, if it runs or waits."""
        everywhere = itertools.chain((each.request for each in self.running), self._waiting)
        return next((each for each in everywhere if each.id == request_id), None)

    def remove(self, request: Request) -> None:
        """Take a request that has ended from wherever it is."""
        sequence = next((each for each in self.running if each.request is request), None)
        if sequence:
            self.leave(sequence)
        elif request in self._waiting:
            self._waiting.remove(request)

    def leave(self, sequence: RunningSequence) -> None:
        """Take the slot from a sequence; its pages keep their content while there is room."""
        if self._shares:
            computed = sequence.tokens[: sequence.num_computed]
            known = computed if sequence.is_prefilling else sequence.request.all_tokens[:-1]
            start = min(len(known), len(computed))
            self.pages.register(known, sequence.pages, start, sequence.request.block_hashes)
        self.pages.release(sequence.pages)
        self.slots.leave(sequence)

    def preempt(self, sequence: RunningSequence) -> None:
        """Take slot and pages from a sequence, none of whose results may be on their way, and put
        its request back to the head of the queue."""
        self._waiting.appendleft(sequence.request)
        self.leave(sequence)
        self._counts.preempted += 1

    def restart(self) -> None:
        """Begin again with an empty cache: running requests go back to the head of the queue with
        the tokens they have."""
        unfinished = [each.request for each in self.running if not each.request.finish_reason]
        self._waiting.extendleft(each for each in reversed(unfinished) if each not in self._waiting)
        self._start_afresh()

    def schedule(self, results_are_coming: bool) -> Plan | None:
        """The calls of the next round.

        results_are_coming: whether launched calls have results that were not taken in yet. Then it
        may return None: pages are short, and sequences may have ended that have some. Take results
        in, and ask again.
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
        self.slots = Slots(options.max_batch_size, options.pages_per_row, options.pool_size)
        self._admissions = []

    # Admission.

    def _admit(self) -> None:
        """Give slots and pages to waiting requests, first come, first served."""
        in_prefill = [each.request for each in self.slots.prefilling]
        for request in list(itertools.islice(self._waiting, _MAX_EXAMINED)):
            if len(self.running) == self.options.max_batch_size:
                break
            try:
                tokens = request.prompt[:-1] if request.wanted == "logprobs" else request.all_tokens
                prefix = Match((), None, 0)
                if self._shares and request.wanted != "logits":
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
        """Start a request if there are pages for its prompt, and one more for each that runs.

        prefix: what the cache holds of `tokens` already.
        """
        max_new_tokens = 0
        if request.wanted == "tokens":
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
            # A page that is copied from cannot be given up: with nothing running, do without it.
            full = Match(prefix.pages, None, len(prefix.pages) * PAGE_SIZE)
            return self._place(request, tokens, full)
        own = self.pages.take(missing)
        pages = [*prefix.pages, *own]
        sequence = self.slots.enter(request, tokens, pages, max_new_tokens, prefix.num_tokens)
        if self._shares:
            extend_block_hashes(request.block_hashes, tokens, PAGE_SIZE)
        # Pages are copied in the order of admission, and before any call writes to one, so that
        # this one need not be kept.
        self.pages.release(source)
        self.pages.counts.queried += len(tokens)
        self.pages.counts.hit += prefix.num_tokens
        request.start_prompt(prefix.num_tokens)
        request.admitted_at = request.admitted_at or time.perf_counter()
        return Admission(sequence, prefix.num_tokens, (source[0], own[0]) if source else None)

    # Decode.

    def _decode(self, results_are_coming: bool) -> tuple[DecodeCall, ...] | None:
        """Draws for the sequences that have their prompt behind them, after making room; None where
        results may make some."""
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
            # The others go through the same programs as ever.
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
        """Return how many tokens to draw before the host looks again: as many as leave few slots
        idle, but 1 where somebody waits for each token."""
        slots = self.slots
        remaining = slots.min_remaining[slots.min_remaining > 0]
        if not remaining.size:
            return 0
        if slots.num_streamed or slots.with_grammar(slots.min_remaining):
            return 1
        most = min(int(remaining.max()), self.options.max_steps)
        possible = range(1, most + 1) if self._stops_early else self.step_counts
        return max(n for n in possible if n == 1 or (n <= most and self._few_idle(n, remaining)))

    def _few_idle(self, steps: int, remaining: np.ndarray) -> bool:
        """Return whether few slots idle in a launch of so many steps, and few first tokens wait for
        it.

        A slot idles where the prompt is not through, and where a sequence ends that another one
        waits for. remaining: tokens left, of the slots that draw.
        """
        most = 0 if self._stops_early else _MAX_IDLE * len(self.running)
        ended = int(np.maximum(steps - remaining, 0).sum()) / steps if self._waiting else 0
        is_early = not self._stops_early and len(self.slots.starting) > most
        return len(self.slots.prefilling) + ended <= most and not is_early

    def _kind(self, needed: Kind) -> Kind:
        """The least kind of draw that there is a program for."""
        return needed if needed in self.draw_kinds else self.draw_kinds[-1]

    # Prefill.

    def _prefill(self, steps: int) -> tuple[PrefillCall, ...]:
        """Chunks of prompts, first those admitted first, until the round's budget is spent.

        steps: tokens that each sequence draws in this round.
        """
        calls: list[PrefillCall] = []
        budget = self.options.prefill_budget * steps
        min_tokens = MIN_TOKENS_PER_CALL_ON_CPU if self._stops_early else MIN_TOKENS_PER_CALL
        while budget > 0:
            chosen = []
            for sequence in self.slots.prefilling:
                if budget > 0:
                    chosen.append(sequence)
                    budget -= min(sequence.remaining, self.options.prefill_chunk)
            if not chosen:
                break
            for wanted in dict.fromkeys(each.request.wanted for each in chosen):
                group = [each for each in chosen if each.request.wanted == wanted]
                remaining = [each.remaining for each in group]
                shapes = self.call_shapes(wanted)
                for members, shape in prefill_calls(remaining, shapes, min_tokens):
                    calls.append(self._prefill_call(wanted, [group[i] for i in members], shape))
        return tuple(calls)

    def _prefill_call(
        self, wanted: Wanted, sequences: Sequence[RunningSequence], shape: tuple[int, int]
    ) -> PrefillCall:
        """The next tokens of each sequence, in one call."""
        chunks = []
        for sequence in sequences:
            start = sequence.num_computed
            self.slots.prefill(sequence, min(sequence.remaining, shape[1]))
            if self._shares:
                computed = sequence.tokens[: sequence.num_computed]
                self.pages.register(computed, sequence.pages, start, sequence.request.block_hashes)
            chunks.append(Chunk(sequence, start, sequence.num_computed))
        ended = [chunk.sequence for chunk in chunks if chunk.is_last and wanted == "tokens"]
        for sequence in ended:
            self.slots.begin(sequence)
        params = [each.request.params for each in ended]
        kind = max(map(kind_of, params), key=KINDS.index, default=KINDS[0])
        if wanted == "logprobs":
            params = [each.request.params for each in sequences]
        wants_logprobs = any(each.logprobs is not None for each in params)
        return PrefillCall(wanted, shape, tuple(chunks), self._kind(kind), wants_logprobs)


def _first_output(request: Request, tokens: Sequence[int]) -> int:
    """The first token whose output is wanted; those before it need not be computed again."""
    return request.score_from - 1 if request.wanted == "logprobs" else len(tokens) - 1


def _is_coming(request: Request, prefix: Match, in_prefill: list[Request]) -> bool:
    """Return whether a prompt in prefill will fill the next page that could be shared."""
    count = len(prefix.pages)
    wanted = request.block_hashes[count : count + 1]
    return bool(wanted) and any(
        other.block_hashes[count : count + 1] == wanted for other in in_prefill
    )
