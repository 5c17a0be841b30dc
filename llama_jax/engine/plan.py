"""Defines a round's plan: the calls that the scheduler has decided on, in the order of launch.

A plan is carried out completely even if one of its requests fails meanwhile, because the contents
that `PagePool` records are true only once all calls of the plan have run.
"""

from dataclasses import dataclass

import numpy as np

from llama_jax.engine.draw_kinds import Kind
from llama_jax.engine.request import OutputKind, Request
from llama_jax.engine.slots import PendingDraws, RunningSequence


@dataclass(frozen=True, eq=False)
class Admission:
    """A sequence that gets a slot.

    num_cached: tokens that its pages hold already.
    page_copy: a page to copy for it first, and the page to copy it to.
    """

    sequence: RunningSequence
    num_cached: int
    page_copy: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class DecodeCall:
    """A launch that draws tokens for the slots whose prompts have been computed.

    steps: the most times that each slot draws.
    kind: of the draws that the program makes.
    structured: the sequences with a grammar, which need other programs.
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

    output_kind: of all of them.
    shape: the prompts, and tokens of each, that the program is compiled for.
    kind, wants_logprobs: as in `DecodeCall`, for the first tokens after prompts that end. For
        "logprobs", `wants_logprobs` is for the likeliest tokens in the places of the prompt's.
    """

    output_kind: OutputKind
    shape: tuple[int, int]
    chunks: tuple[Chunk, ...] = ()
    kind: Kind = "everything"
    wants_logprobs: bool = False

    @property
    def ended(self) -> list[tuple[int, RunningSequence]]:
        """Return the sequences whose prompt ends in this call, and their places in it."""
        return [(i, chunk.sequence) for i, chunk in enumerate(self.chunks) if chunk.is_last]

    @property
    def num_new_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)


@dataclass(frozen=True, eq=False)
class Plan:
    """The calls of one round.

    failed: requests that could not be admitted, with the error as their result.
    page_table: int32 [batch, pages_per_slot], for all calls.
    """

    admissions: tuple[Admission, ...]
    decodes: tuple[DecodeCall, ...]
    prefills: tuple[PrefillCall, ...]
    failed: tuple[Request, ...]
    page_table: np.ndarray
