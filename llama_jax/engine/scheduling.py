"""Defines the engine's options and counters, and decides which prompts share a prefill call."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

from llama_jax.engine.pages import PageCounts
from llama_jax.model.config import PAGE_SIZE
from llama_jax.plural import counted
from llama_jax.sampling_params import check_kind

# The most tokens in a prefill call, unless one chunk is longer. With so many a GPU computes near
# its peak, and temporaries stay small.
MAX_TOKENS_PER_CALL = 4096
# What a prefill call takes besides computing its tokens, in tokens: on a CPU to read and upcast the
# weights (llama-3.2-1b: some 40 ms, where a token takes 5), and on a GPU to launch the kernels.
OVERHEAD_OF_CALL_ON_CPU, OVERHEAD_OF_CALL = 16, 512
# The numbers of prompts in a prefill call.
_PROMPTS_PER_CALL = (1, 8, 32)
# The most tokens forced by a grammar that go through the model together, without speculation.
MAX_FORCED = 4


@dataclass(frozen=True)
class EngineOptions:
    """The sizes for which programs are compiled, and the limits of scheduling.

    max_batch_size: the number of slots, and so of sequences at the same time.
    max_seq_len: the most tokens of a prompt and its output together.
    num_pages: of the cache; by default enough for all slots at full length, at least for one.
    prefill_chunk: the most tokens of one prompt in a call; a longer prompt takes several calls.
    prefill_budget: prompt tokens per round for each token that a sequence draws in it, so that
        decoding sequences do not wait long.
    max_steps: the most tokens drawn per sequence in a round; fewer while a request is streamed
        (`Engine.stream_steps`).
    num_speculative_tokens: draft tokens per sequence and step, which the model checks together; 0
        for none.
    max_waiting: the most requests that may wait.
    share_prefixes: whether sequences share the pages of a common prefix.
    batch_invariant: whether a request's tokens and logprobs are bit-equal alone and in any batch.
        Prompts are then computed one at a time in chunks at fixed positions, nothing is shared, and
        pages for the full length are reserved at admission.
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
            check_kind(name, getattr(self, name), int)
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_kind("num_speculative_tokens", self.num_speculative_tokens, int)
        if self.num_pages is not None:
            check_kind("num_pages", self.num_pages, int)
        for name in ("share_prefixes", "batch_invariant"):
            check_kind(name, getattr(self, name), bool)
        if self.pool_size < self.pages_per_slot:
            raise ValueError(
                f"num_pages {self.num_pages} cannot hold one sequence of max_seq_len "
                f"{self.max_seq_len}: {self.pages_per_slot} pages of {PAGE_SIZE} tokens are needed"
            )

    @property
    def pages_per_slot(self) -> int:
        return -(-self.max_seq_len // PAGE_SIZE)

    @property
    def pool_size(self) -> int:
        if self.num_pages is None:
            return self.max_batch_size * self.pages_per_slot
        return self.num_pages

    @property
    def max_forced_tokens(self) -> int:
        """Return the most tokens forced by a grammar that go through the model together."""
        return self.num_speculative_tokens or MAX_FORCED

    @property
    def call_shapes(self) -> tuple[tuple[int, int], ...]:
        """Return the shapes of prefill programs: (prompts, tokens of each)."""
        chunk = min(self.prefill_chunk, self.max_seq_len)
        most = max(chunk, min(self.prefill_budget, MAX_TOKENS_PER_CALL))
        prompts = {1} if self.batch_invariant else {
            min(count, self.max_batch_size) for count in _PROMPTS_PER_CALL
        }  # fmt: skip
        tokens = {max(1, chunk // 16), max(1, chunk // 4), chunk}
        return tuple((n, t) for n in sorted(prompts) for t in sorted(tokens) if n * t <= most)


def prefill_calls(
    remaining: Sequence[int], shapes: Sequence[tuple[int, int]], overhead: int
) -> list[tuple[list[int], tuple[int, int]]]:
    """Decide which prompts share a prefill call, and its shape.

    Each prompt is in one call, longest first, which takes all of it or a chunk. Each call takes the
    shape (of `EngineOptions.call_shapes`) that wastes least on padding and calls, until its prompts
    have been computed.

    remaining: the remaining tokens of each prompt.
    overhead: what a call costs besides its tokens, in tokens.
    Returns (indices into `remaining`, shape) for each call.
    """
    order = sorted(range(len(remaining)), key=lambda i: -remaining[i])
    sizes = {
        prompts: tuple(sorted(tokens for count, tokens in shapes if count == prompts))
        for prompts, _ in shapes
    }
    calls = []
    while order:

        def gain(prompts: int, order: list[int] = order) -> tuple[float, int]:
            members = order[:prompts]
            useful = sum(remaining[i] for i in members)
            cost, _ = _cheapest(remaining[members[0]], prompts, sizes[prompts], overhead)
            return useful / cost, useful

        prompts = max(sizes, key=gain)
        _, tokens = _cheapest(remaining[order[0]], prompts, sizes[prompts], overhead)
        calls.append((order[:prompts], (prompts, tokens)))
        order = order[prompts:]
    return calls


@lru_cache(maxsize=1 << 16)
def _cheapest(
    remaining: int, prompts: int, sizes: tuple[int, ...], overhead: int
) -> tuple[int, int]:
    """Return the least cost of computing prompts with so many remaining tokens, and how many tokens
    of each the first call takes.

    sizes: the numbers of tokens of each prompt that a call may take, smallest first.
    """
    largest = sizes[-1]
    whole = (remaining - 1) // largest
    if whole:
        rest, _ = _cheapest(remaining - whole * largest, prompts, sizes, overhead)
        return whole * (prompts * largest + overhead) + rest, largest
    costs = []
    for tokens in sizes:
        left = remaining - tokens
        rest = _cheapest(left, prompts, sizes, overhead)[0] if left > 0 else 0
        costs.append((prompts * tokens + overhead + rest, -tokens))
        if left <= 0:
            break
    cost, tokens = min(costs)  # of equal costs, that with fewer calls
    return cost, -tokens


@dataclass
class EngineCounts:
    """Counters of an engine.

    prefilled: prompt tokens computed.
    padding: padding tokens that prefill calls computed.
    drawn: tokens drawn.
    rounds: decode launches.
    preempted: the number of preemptions.
    drafted, accepted: draft tokens proposed, and those of them that were accepted.
    waited: seconds during which the host did nothing but wait for the device.
    """

    prefilled: int = 0
    padding: int = 0
    drawn: int = 0
    rounds: int = 0
    preempted: int = 0
    drafted: int = 0
    accepted: int = 0
    waited: float = 0.0


@dataclass
class Stats(EngineCounts, PageCounts):
    """All counters of an engine, including those of its pages."""

    @property
    def acceptance_rate(self) -> float:
        """Return the share of draft tokens that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def hit_rate(self) -> float:
        """Return the share of prompt tokens that were found in the cache."""
        return self.hit / self.queried if self.queried else 0.0

    def since(self, earlier: "Stats") -> "Stats":
        """Return the counters minus those of `earlier`."""
        names = [field.name for field in fields(self)]
        return Stats(**{name: getattr(self, name) - getattr(earlier, name) for name in names})

    def __str__(self) -> str:
        parts = [
            f"{counted(self.queried, 'prompt token')}, "
            f"{self.hit_rate:.0%} of them found in the cache",
            f"{counted(self.drawn, 'token')} drawn in {counted(self.rounds, 'round')}",
        ]
        if self.drafted:
            drafted = counted(self.drafted, "draft token")
            parts.append(f"{self.acceptance_rate:.0%} of {drafted} accepted")
        if self.preempted:
            parts.append(counted(self.preempted, "preemption"))
        return " · ".join(parts)
