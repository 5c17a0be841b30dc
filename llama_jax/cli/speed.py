"""How fast a reply came, without the time that compiling took."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.compile_cache import CompileReport
    from llama_jax.results import Generation


@dataclass(frozen=True)
class Snapshot:
    """What had been compiled at some moment; decode_seconds is the decode step's part of it."""

    report: "CompileReport"
    decode_seconds: float


@dataclass(frozen=True)
class Speed:
    """One reply. prefill_seconds and decode_seconds leave out `compile`, what was compiled
    meanwhile; decode_tokens_per_second is None for a reply of one token, which prefill draws."""

    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    compile: "CompileReport"

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
        if self.compile.compiled + self.compile.from_cache:
            parts.append(str(self.compile))
        return " · ".join(parts)


def snapshot() -> Snapshot:
    from llama_jax import compile_cache

    return Snapshot(compile_cache.report(), compile_cache.seconds_of("decode_steps"))


def speed_since(before: Snapshot, result: "Generation") -> Speed:
    """The speed of a reply that was generated alone, and began after `before` was taken."""
    after = snapshot()
    compiled = after.report.since(before.report)
    compiling_decode = after.decode_seconds - before.decode_seconds
    return Speed(
        prompt_tokens=len(result.prompt_token_ids),
        completion_tokens=len(result.token_ids),
        prefill_seconds=result.timings.prefill - (compiled.seconds - compiling_decode),
        decode_seconds=result.timings.decode - compiling_decode,
        compile=compiled,
    )
