"""The slots of a batch: which sequence runs in each, and how far they all have come.

What a round of decoding asks of every slot (how much it may draw, whether it has the pages for
that, what it needs of the sampler) is answered for all of them at once, by arrays over the slots,
so that the host's work before a launch does not grow with their number.
"""

from dataclasses import dataclass, replace

import numpy as np

from llama_jax.engine.draw_kinds import KINDS, Kind, kind_of
from llama_jax.engine.request import Request
from llama_jax.model.config import PAGE_SIZE


@dataclass(eq=False)
class RunningSequence:
    """A request that has a slot.

    tokens: what has to go through prefill; tokens drawn before a preemption are among them.
    pages: its own and shared ones, in order. max_new_tokens: tokens it may draw in all.
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
        """Return how many of `tokens` still have to be scheduled for prefill."""
        return len(self.tokens) - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < len(self.tokens)


@dataclass(frozen=True, eq=False)
class PendingDraws:
    """The draws of one decode launch whose results have not been taken in yet.

    sequences: by slot, those that had one. max_counts: int64 [batch], how many tokens each slot may
    draw, an upper bound if all launches before have drawn as many as they might. tenures: int64
    [batch], how many sequences had left each slot before.
    """

    sequences: list[RunningSequence | None]
    max_counts: np.ndarray
    tenures: np.ndarray


class Slots:
    """All slots of a batch, the sequences in them, and their pages.

    running: in the order of their admission. prefilling: those of them whose prompt is not through.
    starting: those whose first token has been scheduled and not taken in.
    page_table: int32 [batch, pages_per_sequence], `no_page` where there is none.
    min_remaining: int64 [batch], tokens that a slot may still draw in decode once every scheduled
    call has drawn as much as it may: a lower bound, exact when all results are taken in. It is 0
    before the first token is scheduled, and for a free slot; below 0 for a while where a launch has
    drawn what one before it might have drawn.
    """

    def __init__(self, batch_size: int, pages_per_sequence: int, no_page: int) -> None:
        self.running: list[RunningSequence] = []
        self.prefilling: list[RunningSequence] = []
        self.starting: set[RunningSequence] = set()
        self.num_streamed = 0
        self.page_table = np.full((batch_size, pages_per_sequence), no_page, np.int32)
        self._no_page = no_page
        self._free = list(range(batch_size))[::-1]
        self._sequences: list[RunningSequence | None] = [None] * batch_size
        zeros = np.zeros((7, batch_size), np.int64)
        self.min_remaining = zeros[0]
        # As `min_remaining`, but an upper bound: tokens in the cache.
        self._max_cached_lens = zeros[1]
        self._num_pages = zeros[2]
        self._kinds = zeros[3]  # what it needs of the sampler, as an index into `KINDS`
        self._wants_logprobs = zeros[4]
        self._has_grammar = zeros[5]
        # How many sequences have left a slot: a result belongs to the one that is there if nobody
        # has since it was scheduled.
        self._tenures = zeros[6]

    def enter(
        self,
        request: Request,
        tokens: list[int],
        pages: list[int],
        max_new_tokens: int,
        num_computed: int,
    ) -> RunningSequence:
        """Give a request a slot that is free."""
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
        """Note that the next tokens of a sequence's prompt are scheduled."""
        sequence.num_computed += num_new_tokens
        if not sequence.is_prefilling:
            self.prefilling.remove(sequence)

    def begin(self, sequence: RunningSequence) -> None:
        """Note that a sequence's first token is scheduled; it goes on in decode."""
        drawn = len(sequence.request.token_ids) + 1
        self.min_remaining[sequence.slot] = sequence.max_new_tokens - drawn
        self._max_cached_lens[sequence.slot] = len(sequence.tokens)
        self.starting.add(sequence)

    def num_missing_pages(self, counts: np.ndarray) -> np.ndarray:
        """Return how many more pages each slot needs to draw `counts` tokens: int64 [batch]."""
        needed = -(-(self._max_cached_lens + counts) // PAGE_SIZE) - self._num_pages
        return np.where(counts > 0, np.maximum(needed, 0), 0)

    def add_pages(self, slot: int, pages: list[int]) -> None:
        sequence = self._sequences[slot]
        assert sequence is not None
        sequence.pages += pages
        self._note_pages(sequence)

    def needs(self, counts: np.ndarray) -> tuple[Kind, bool]:
        """Return what the slots that draw `counts` tokens need of the sampler, and whether any of
        them wants logprobs."""
        draws = counts > 0
        kind = KINDS[int(np.max(self._kinds * draws))]
        return kind, bool(np.any(self._wants_logprobs * draws))

    def with_grammar(self, counts: np.ndarray) -> list[RunningSequence]:
        """Return those of the sequences that draw `counts` tokens whose grammar says what may
        follow."""
        slots = np.flatnonzero((counts > 0) & (self._has_grammar > 0)).tolist()
        return [sequence for slot in slots if (sequence := self._sequences[slot])]

    def launch(self, max_counts: np.ndarray) -> PendingDraws:
        """Note that draws of `max_counts` tokens, at most, are scheduled."""
        self.min_remaining -= max_counts
        self._max_cached_lens += max_counts
        return PendingDraws(self._sequences.copy(), max_counts, self._tenures.copy())

    def limit(self, draws: PendingDraws, most: int) -> PendingDraws:
        """The same draws, of `most` tokens at most, and none where the sequence has left since."""
        stays = self._tenures == draws.tenures
        counts = np.where(stays, np.minimum(draws.max_counts, most), 0)
        self.settle(draws, counts)
        return replace(draws, max_counts=counts)

    def settle(self, draws: PendingDraws, counts: np.ndarray) -> None:
        """Note how many tokens were drawn of those that might have been: int [batch]."""
        fewer = np.where(self._tenures == draws.tenures, draws.max_counts - counts, 0)
        self.min_remaining += fewer
        self._max_cached_lens -= fewer

    def _note_pages(self, sequence: RunningSequence) -> None:
        self.page_table[sequence.slot, : len(sequence.pages)] = sequence.pages
        self._num_pages[sequence.slot] = len(sequence.pages)
