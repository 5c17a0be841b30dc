"""Collects what grammars require of a launch as arrays: forced tokens and masks of allowed ones."""

from collections.abc import Sequence

import numpy as np

from llama_jax.engine.grammars import MaskThreads, num_words
from llama_jax.engine.request import Request
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.engine.slots import RunningSequence


class TokenMasks:
    """Makes these arrays for an engine of `options` and a vocabulary of `vocab_size`."""

    def __init__(self, options: EngineOptions, vocab_size: int) -> None:
        self._most = options.max_forced_tokens
        self._vocab_size = vocab_size
        self._threads = MaskThreads()
        has_one = options.num_speculative_tokens or options.batch_invariant
        # Numbers of draft tokens for which there are structured programs.
        self.widths = (self._most,) if has_one else (0, self._most)

    def forced(
        self, counts: np.ndarray, structured: Sequence[RunningSequence]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens that grammars force, as draft tokens int32 [batch, width], and their number
        int32 [batch]. The width is 0 unless they save the slots half of their steps.

        counts: tokens that each slot draws.
        structured: the sequences that have a grammar.
        """
        drafts = np.zeros((len(counts), self._most), np.int32)
        num_drafts = np.zeros(len(counts), np.int32)
        for sequence in structured:
            assert sequence.request.matcher is not None
            expected = sequence.request.matcher.expected[: self._most]
            drafts[sequence.slot, : len(expected)] = expected
            num_drafts[sequence.slot] = len(expected)
        if min(self.widths) < self._most and num_drafts.sum() < np.sum(counts > 0):
            return drafts[:, :0], np.zeros_like(num_drafts)
        return drafts, num_drafts

    def everything(self, size: int, width: int) -> np.ndarray:
        """Return masks that allow every token: uint32 [size, 1 + width, words]."""
        return np.full((size, 1 + width, num_words(self._vocab_size)), ~np.uint32(0))

    def masks(
        self, size: int, width: int, places: Sequence[tuple[int, Request, list[int]]]
    ) -> tuple[np.ndarray, list[tuple[Request, Exception]]]:
        """Compute which tokens may be drawn at each place and after each of its draft tokens.

        places: (place, its request, its draft tokens); at other places any token may be drawn.
        Returns masks, uint32 [size, 1 + width, words], and the requests whose masks could not be
        computed, with the error.
        """
        masks = self.everything(size, width)
        jobs = {
            place: (request.matcher, request.token_ids, drafts)
            for place, request, drafts in places
            if request.matcher
        }
        found = dict(zip(jobs, self._threads.masks(list(jobs.values())), strict=True))
        failed: list[tuple[Request, Exception]] = []
        for place, request, _ in places:
            result = found.get(place)
            if isinstance(result, Exception):
                failed.append((request, result))
            elif result is not None:
                masks[place, : len(result)] = result
        return masks, failed
