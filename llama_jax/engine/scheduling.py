"""The rules of scheduling: sizes and limits, which prompts share a call, and the counters."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from llama_jax.engine.pages import PageCounts
from llama_jax.model.config import PAGE_SIZE

# Tokens that go through one call of a prefill program, at most, unless one chunk is longer: with
# that many a GPU computes near its peak, and the temporaries stay small.
MAX_TOKENS_PER_CALL = 4096
# What a call of a prefill program costs, at least, as a number of tokens: on a CPU, reading the
# weights takes as long as computing with them for so many; on a GPU, launching its kernels does.
MIN_TOKENS_PER_CALL_ON_CPU, MIN_TOKENS_PER_CALL = 128, 512
# How many prompts one call may take.
_PROMPTS_PER_CALL = (1, 8, 32)
# Tokens that a grammar forces and that go through the model together, without speculation.
MAX_FORCED = 4


@dataclass(frozen=True)
class EngineOptions:
    """The sizes that programs are compiled for, and the rules of scheduling.

    max_batch_size: slots, that is sequences at a time.
    max_seq_len: tokens that prompt and output may have together.
    num_pages: of the cache, by default enough for all slots at full length; at least one slot's.
    prefill_chunk: tokens of one prompt that go through at once; longer ones take several calls.
    prefill_budget: prompt tokens in a round for each token that its sequences draw, so that those
        that are decoding do not wait long.
    max_steps: tokens drawn per sequence in one round while nobody streams.
    num_speculative_tokens: draft tokens proposed per sequence and step, which the model then checks
        together; 0 for none.
    max_waiting: requests that may queue. share_prefixes: whether sequences share pages.
    batch_invariant: a request's tokens and logprobs are bit-equal alone and in any company: prompts
        go through one at a time in chunks of fixed places, nothing is shared, and pages for the
        whole length are reserved on admission.
    """

    max_batch_size: int = 8
    max_seq_len: int = 8192
    num_pages: int | None = None
    prefill_chunk: int = 512
    prefill_budget: int = MAX_TOKENS_PER_CALL
    max_steps: int = 8
    num_speculative_tokens: int = 0
    max_waiting: int = 1_000_000
    share_prefixes: bool = True
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        for name in (
            "max_batch_size", "max_seq_len", "prefill_chunk", "prefill_budget", "max_steps",
            "max_waiting",
        ):  # fmt: skip
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
        if self.num_pages is None:
            return self.max_batch_size * self.pages_per_row
        return self.num_pages

    @property
    def max_forced_tokens(self) -> int:
        """Return how many tokens that a grammar forces go through the model together."""
        return self.num_speculative_tokens or MAX_FORCED

    @property
    def call_shapes(self) -> tuple[tuple[int, int], ...]:
        """The shapes that prefill programs are compiled for: prompts, and tokens of each."""
        chunk = min(self.prefill_chunk, self.max_seq_len)
        most = max(chunk, min(self.prefill_budget, MAX_TOKENS_PER_CALL))
        prompts = {1} if self.batch_invariant else {
            min(count, self.max_batch_size) for count in _PROMPTS_PER_CALL
        }  # fmt: skip
        tokens = {max(1, chunk // 16), max(1, chunk // 4), chunk}
        return tuple((n, t) for n in sorted(prompts) for t in sorted(tokens) if n * t <= most)


def prefill_calls(
    remaining: Sequence[int], shapes: Sequence[tuple[int, int]], min_tokens: int
) -> list[tuple[list[int], tuple[int, int]]]:
    """Decide which prompts go through calls of which shapes: (indices into `remaining`, shape).

    remaining: how many tokens of each prompt remain. min_tokens: what a call costs at least. Each
    prompt is in one call, the longest first, which takes all of it or a chunk. The one of the
    shapes (`EngineOptions.call_shapes`) is taken that wastes the least on padding and small calls.
    """
    order = sorted(range(len(remaining)), key=lambda i: -remaining[i])
    calls = []
    while order:

        def gain(shape: tuple[int, int], order: list[int] = order) -> tuple[float, int]:
            prompts, tokens = shape
            useful = sum(min(remaining[i], tokens) for i in order[:prompts])
            return useful / max(prompts * tokens, min_tokens), useful

        shape = max(shapes, key=gain)
        calls.append((order[: shape[0]], shape))
        order = order[shape[0] :]
    return calls


@dataclass
class EngineCounts:
    """Counters of what an engine has done. prefilled: prompt tokens computed; padding: what their
    calls computed besides, for nothing. drawn: tokens drawn. rounds: launches of decode. preempted:
    times that a request had to give its pages back. guessed, accepted: draft tokens proposed, and
    those of them that were accepted. waited: seconds in which the host did nothing but wait for the
    device."""

    prefilled: int = 0
    padding: int = 0
    drawn: int = 0
    rounds: int = 0
    preempted: int = 0
    guessed: int = 0
    accepted: int = 0
    waited: float = 0.0


@dataclass
class Stats(EngineCounts, PageCounts):
    """What an engine has done so far: the counters of both."""

    @property
    def acceptance_rate(self) -> float:
        """The part of the draft tokens that was accepted."""
        return self.accepted / self.guessed if self.guessed else 0.0

    @property
    def hit_rate(self) -> float:
        """The part of the prompts' tokens that was found in the cache."""
        return self.hit / self.queried if self.queried else 0.0

    def since(self, earlier: "Stats") -> "Stats":
        """Return what has happened after `earlier`."""
        names = [field.name for field in fields(self)]
        return Stats(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    def __str__(self) -> str:
        parts = [
            f"{self.queried:,} prompt tokens, {self.hit_rate:.0%} of them found in the cache",
            f"{self.drawn:,} tokens drawn in {self.rounds:,} rounds",
        ]
        if self.guessed:
            parts.append(f"{self.acceptance_rate:.0%} of {self.guessed:,} guesses accepted")
        if self.preempted:
            parts.append(f"{self.preempted:,} preemptions")
        return " · ".join(parts)
