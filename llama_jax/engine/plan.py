"""A round's plan: the calls that the scheduler wants, in the order in which they are launched.

A plan is carried out whole, even where a request of it fails meanwhile: what `PagePool` says of the
pages' content holds once all calls of the plan have run.
"""

from dataclasses import dataclass

import numpy as np

from llama_jax.engine.draw_kinds import Kind
from llama_jax.engine.request import Request, Wanted
from llama_jax.engine.slots import PendingDraws, RunningSequence


@dataclass(frozen=True, eq=False)
class Admission:
    """A sequence that gets a slot. num_cached: tokens that its pages hold already.
    page_copy: a page to copy for it first, and the page to copy it to."""

    sequence: RunningSequence
    num_cached: int
    page_copy: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class DecodeCall:
    """A launch that draws tokens for the slots whose prompts are through.

    steps: times that each slot draws, at most. kind: what the program does for the sampler.
    structured: the sequences whose grammar says what they may draw, which takes other programs.
    """

    draws: PendingDraws
    steps: int
    kind: Kind
    wants_logprobs: bool
    structured: tuple[RunningSequence, ...] = ()


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens [start, stop) of a sequence's prompt."""

    sequence: RunningSequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        return self.stop == len(self.sequence.tokens)


@dataclass(frozen=True, eq=False)
class PrefillCall:
    """A call that takes chunks of prompts through the model.

    wanted: what all of them are for. shape: prompts and tokens of each that the program is compiled
    for. kind, wants_logprobs: as in `DecodeCall`, for the first tokens of the prompts that end;
    where "logprobs" of prompts are wanted, `wants_logprobs` is for the likeliest tokens too.
    """

    wanted: Wanted
    shape: tuple[int, int]
    chunks: tuple[Chunk, ...] = ()
    kind: Kind = "everything"
    wants_logprobs: bool = False

    @property
    def ended(self) -> list[tuple[int, RunningSequence]]:
        """The sequences whose prompt ends here, and their places in the call."""
        return [(i, chunk.sequence) for i, chunk in enumerate(self.chunks) if chunk.is_last]

    @property
    def num_new_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)


@dataclass(frozen=True, eq=False)
class Plan:
    """The calls of one round. page_table: int32 [batch, pages_per_sequence], for all of them.
    failed: requests that could not be admitted, with the error as their result."""

    admissions: tuple[Admission, ...]
    decodes: tuple[DecodeCall, ...]
    prefills: tuple[PrefillCall, ...]
    failed: tuple[Request, ...]
    page_table: np.ndarray
