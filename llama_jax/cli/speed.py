"""Measures the speed of a reply, without the time of compiling."""

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
    """Counts the seconds since it was made, without those of compiling."""

    def __init__(self) -> None:
        self._began = time.time()

    def seconds(self) -> float:
        from llama_jax.engine.compile_cache import seconds_between

        now = time.time()
        return now - self._began - seconds_between(self._began, now)


@dataclass(frozen=True)
class Speed:
    """The speed of one reply.

    prefill_seconds, decode_seconds: without the time of `compile`.
    compile: what was compiled meanwhile.
    acceptance_rate: None if no draft tokens were proposed.
    """

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
            parts.append(f"{self.acceptance_rate:.0%} of draft tokens accepted")
        if self.compile.compiled + self.compile.from_cache:
            parts.append(str(self.compile))
        return " · ".join(parts)


def snapshot(llm: "LLM") -> Snapshot:
    from llama_jax.engine import compile_cache

    return Snapshot(compile_cache.report(), llm.stats())


def speed_since(before: Snapshot, llm: "LLM", result: "Generation") -> Speed:
    """Return the speed of a reply that was generated alone, started after `before` was taken, and
    has just ended.

    The decode program counts as compiled during prefill, because it is launched before the first
    token is read.
    """
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
        acceptance_rate=stats.acceptance_rate if stats.drafted else None,
    )
