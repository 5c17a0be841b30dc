"""Measures how fast a reply came, without the time that compiling took."""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.engine.compile_cache import CompileReport
    from llama_jax.engine.scheduling import Stats
    from llama_jax.llm import LLM
    from llama_jax.results import Generation


@dataclass(frozen=True)
class Snapshot:
    """The counters of compiling and of the engine at one moment."""

    report: "CompileReport"
    stats: "Stats"

    def since(self, earlier: "Snapshot") -> "Snapshot":
        """Return the difference to `earlier`."""
        return Snapshot(self.report.since(earlier.report), self.stats.since(earlier.stats))


class Clock:
    """Counts the time since it was made, without the time that compiling took."""

    def __init__(self) -> None:
        self._began = time.time()

    def seconds(self) -> float:
        from llama_jax.engine.compile_cache import seconds_between

        now = time.time()
        return now - self._began - seconds_between(self._began, now)


@dataclass(frozen=True)
class Speed:
    """One reply. prefill_seconds and decode_seconds leave out `compile`, what was compiled
    meanwhile; decode_tokens_per_second is None for a reply of one token, which prefill draws, and
    acceptance_rate where no tokens were guessed ahead."""

    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    compile: "CompileReport"
    acceptance_rate: float | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        steps = self.completion_tokens - 1
        return steps / self.decode_seconds if steps else None

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }

    def __str__(self) -> str:
        parts = [f"prefill {self.prefill_tokens_per_second:,.0f} tok/s"]
        if self.decode_tokens_per_second is not None:
            parts.append(f"decode {self.decode_tokens_per_second:,.0f} tok/s")
        if self.acceptance_rate is not None:
            parts.append(f"{self.acceptance_rate:.0%} of guesses accepted")
        if self.compile.compiled + self.compile.from_cache:
            parts.append(str(self.compile))
        return " · ".join(parts)


def snapshot(llm: "LLM") -> Snapshot:
    from llama_jax.engine import compile_cache

    return Snapshot(compile_cache.report(), llm.stats())


def speed_since(before: Snapshot, llm: "LLM", result: "Generation") -> Speed:
    """The speed of a reply that was generated alone, began after `before` was taken and has just
    ended. Decode is launched, and compiled, before the first token is read."""
    from llama_jax.engine.compile_cache import seconds_between

    ended, timings = time.time(), result.timings
    first_token = ended - timings.decode
    meanwhile = snapshot(llm).since(before)
    stats = meanwhile.stats
    return Speed(
        prompt_tokens=len(result.prompt_token_ids),
        completion_tokens=len(result.token_ids),
        prefill_seconds=timings.prefill
        - seconds_between(first_token - timings.prefill, first_token),
        decode_seconds=timings.decode - seconds_between(first_token, ended),
        compile=meanwhile.report,
        acceptance_rate=stats.acceptance_rate if stats.guessed else None,
    )
