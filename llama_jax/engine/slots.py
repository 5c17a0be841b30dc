"""Tracks the slots of a batch: the sequence in each, and its progress.

Before a decode launch the host has to know of each slot how much it may draw, whether it has the
pages, and what it needs of the sampler. These are arrays over all slots, so that the host's work
hardly grows with their number.
"""

from dataclasses import dataclass, replace

import numpy as np

from llama_jax.engine.draw_kinds import KINDS, Kind, kind_of
from llama_jax.engine.request import Request
from llama_jax.model.config import PAGE_SIZE


@dataclass(eq=False)
class RunningSequence:
    """A request that has a slot.

    tokens: the tokens for prefill, including those drawn before a preemption.
    pages: its own and shared ones, in order.
    max_new_tokens: the tokens that it may draw in total.
    num_computed: how many of `tokens` are in the cache once all scheduled calls have run.
    """

    request: Request
    slot: int
    tokens: list[int]
    pages: list[int]
    max_new_tokens: int
    num_computed: int

    @property
    def remaining(self) -> int:
        """Return how many of `tokens` are still to be scheduled for prefill."""
        return len(self.tokens) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < len(self.tokens)


@dataclass(frozen=True, eq=False)
class PendingDraws:
    """The draws of one decode launch whose results have not been applied yet.

    sequences: by slot, None for a free one.
    max_counts: int64 [batch], the most tokens that each slot may draw.
    tenures: int64 [batch], the number of sequences that had left each slot before.
    """

    sequences: list[RunningSequence | None]
    max_counts: np.ndarray
    tenures: np.ndarray


class Slots:
    """All slots of a batch, the sequences in them, and their pages.

    running: in the order of admission.
    prefilling: running sequences whose prompt has not been completely scheduled.
    starting: those whose first token has been scheduled but not applied.
    page_table: int32 [batch, pages_per_slot], `no_page` where there is none.
    min_remaining: int64 [batch], the tokens that a slot may still draw in decode if every scheduled
        call draws as many as it may: a lower bound, exact once all results have been applied. It is
        0 for a free slot and before the first token is scheduled, and may be negative for a while
        if a launch draws tokens that were already counted for an earlier one.
    """

    def __init__(self, batch_size: int, pages_per_slot: int, no_page: int) -> None:
        self.running: list[RunningSequence] = []
        self.prefilling: list[RunningSequence] = []
        self.starting: set[RunningSequence] = set()
        self.num_streamed = 0
        self.page_table = np.full((batch_size, pages_per_slot), no_page, np.int32)
        self._no_page = no_page
        self._free = list(range(batch_size))[::-1]
        self._sequences: list[RunningSequence | None] = [None] * batch_size
        zeros = np.zeros((7, batch_size), np.int64)
        self.min_remaining = zeros[0]
        # An upper bound of the tokens in the cache, in the sense of `min_remaining`.
        self._max_cached_lens = zeros[1]
        self._num_pages = zeros[2]
        self._kinds = zeros[3]  # the kind of draw that it needs, as an index into `KINDS`
        self._wants_logprobs = zeros[4]
        self._has_grammar = zeros[5]
        # The number of sequences that have left a slot. A result is for the present sequence if
        # this has not changed since the launch.
        self._tenures = zeros[6]

    def enter(
        self,
        request: Request,
        tokens: list[int],
        pages: list[int],
        max_new_tokens: int,
        num_computed: int,
    ) -> RunningSequence:
        """Put a request into a free slot."""
        sequence = RunningSequence(
            request, self._free.pop(), tokens, pages, max_new_tokens, num_computed
        )
        self._sequences[sequence.slot] = sequence
        self.running.append(sequence)
        self.prefilling.append(sequence)
        self.num_streamed += request.is_streamed
        self._kinds[sequence.slot] = KINDS.index(kind_of(request.params))
        self._wants_logprobs[sequence.slot] = request.params.logprobs is not None
        self._has_grammar[sequence.slot] = request.matcher is not None
        self._note_pages(sequence)
        return sequence

    def leave(self, sequence: RunningSequence) -> None:
        """Free a sequence's slot."""
        self.running.remove(sequence)
        if sequence in self.prefilling:
            self.prefilling.remove(sequence)
        self.starting.discard(sequence)
        self.num_streamed -= sequence.request.is_streamed
        self.page_table[sequence.slot] = self._no_page
        self.min_remaining[sequence.slot] = self._num_pages[sequence.slot] = 0
        self._tenures[sequence.slot] += 1
        self._sequences[sequence.slot] = None
        self._free.append(sequence.slot)

    def prefill(self, sequence: RunningSequence, num_new_tokens: int) -> None:
        """Record that the next tokens of a sequence's prompt are scheduled."""
        sequence.num_computed += num_new_tokens
        if not sequence.is_prefilling:
            self.prefilling.remove(sequence)

    def begin(self, sequence: RunningSequence) -> None:
        """Record that a sequence's first token is scheduled; decode continues it."""
        drawn = len(sequence.request.token_ids) + 1
        self.min_remaining[sequence.slot] = sequence.max_new_tokens - drawn
        self._max_cached_lens[sequence.slot] = len(sequence.tokens)
        self.starting.add(sequence)

    def num_missing_pages(self, counts: np.ndarray) -> np.ndarray:
        """Return the number of pages that slots lack to draw `counts` tokens: int64 [batch]."""
        needed = -(-(self._max_cached_lens + counts) // PAGE_SIZE) - self._num_pages
        return np.where(counts > 0, np.maximum(needed, 0), 0)

    def add_pages(self, slot: int, pages: list[int]) -> None:
        sequence = self._sequences[slot]
        assert sequence is not None
        sequence.pages += pages
        self._note_pages(sequence)

    def needs(self, counts: np.ndarray) -> tuple[Kind, bool]:
        """Return the kind of draw for the slots that draw `counts` tokens, and whether any of them
        needs logprobs."""
        draws = counts > 0
        kind = KINDS[int(np.max(self._kinds * draws))]
        return kind, bool(np.any(self._wants_logprobs * draws))

    def with_grammar(self, counts: np.ndarray) -> list[RunningSequence]:
        """Return the sequences with a grammar among those that draw `counts` tokens."""
        slots = np.flatnonzero((counts > 0) & (self._has_grammar > 0)).tolist()
        return [sequence for slot in slots if (sequence := self._sequences[slot])]

    def launch(self, max_counts: np.ndarray) -> PendingDraws:
        """Record that draws of at most `max_counts` tokens are scheduled."""
        self.min_remaining -= max_counts
        self._max_cached_lens += max_counts
        return PendingDraws(self._sequences.copy(), max_counts, self._tenures.copy())

    def limit(self, draws: PendingDraws, most: int) -> PendingDraws:
        """Return the same draws with at most `most` tokens, and none if the sequence has left."""
        stays = self._tenures == draws.tenures
        counts = np.where(stays, np.minimum(draws.max_counts, most), 0)
        self.settle(draws, counts)
        return replace(draws, max_counts=counts)

    def settle(self, draws: PendingDraws, counts: np.ndarray) -> None:
        """Record the number of tokens that were actually drawn: int [batch]."""
        fewer = np.where(self._tenures == draws.tenures, draws.max_counts - counts, 0)
        self.min_remaining += fewer
        self._max_cached_lens -= fewer

    def _note_pages(self, sequence: RunningSequence) -> None:
        self.page_table[sequence.slot, : len(sequence.pages)] = sequence.pages
        self._num_pages[sequence.slot] = len(sequence.pages)
