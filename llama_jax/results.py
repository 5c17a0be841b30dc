"""What the calls of `LLM` return."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama_jax.engine.request import FinishReason
from llama_jax.text.tools import ToolCall


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its natural-log probability, and the likeliest tokens in its place.

    `top` holds (token id, token text, logprob), likeliest first.
    """

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclass(frozen=True)
class Timings:
    """Seconds. `prefill` runs from the request's admission to its first token, `decode` from there
    to its last."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Generation:
    """One continuation.

    text: without special tokens, cut before a stop string. token_ids: every token drawn, the stop
    token included. finish_reason: "stop" (a stop token or string), "length" or "error".
    stop_reason: the string of `SamplingParams.stop` or the id of `stop_token_ids` that ended it;
    None for the checkpoint's own stop tokens, and for "length". logprobs: one entry per token if
    asked for. tool_calls: what the reply asks to be called (from `LLM.chat`). others: the other
    continuations of the same prompt, where `SamplingParams.n` asked for several. error: what was
    raised in the work for this continuation alone, which has what there was of it by then.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    timings: Timings
    tool_calls: tuple[ToolCall, ...] = ()
    others: tuple["Generation", ...] = ()
    stop_reason: int | str | None = None
    error: BaseException | None = None

    @property
    def samples(self) -> tuple["Generation", ...]:
        """All continuations of the prompt, this one first."""
        return (self, *self.others)


def generation_fields(result: Generation) -> dict[str, Any]:
    """A continuation as JSON has it."""
    error = {} if result.error is None else {"error": f"{result.error!r}"}
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(result.prompt_token_ids),
        "completion_tokens": len(result.token_ids),
        **error,
    }


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed reply: text that is new, and the whole result with the last piece."""

    text: str
    result: Generation | None = None


@dataclass(frozen=True)
class Score:
    """How likely a completion is after its prompt.

    token_ids and logprobs (natural log): one per token of the completion; total: their sum;
    is_greedy: each token is the model's likeliest.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    total: float
    is_greedy: bool

    @property
    def perplexity(self) -> float:
        """exp of the mean negative logprob per token."""
        return perplexity(self.total, len(self.logprobs))


@dataclass(frozen=True)
class Ranking:
    """How likely each of several completions is after the same prompt: `scores`, in their order."""

    scores: tuple[Score, ...]

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Of each completion, if it has to be one of them: they sum to 1."""
        totals = np.array([score.total for score in self.scores])
        weights = np.exp(totals - totals.max())
        return tuple((weights / weights.sum()).tolist())

    @property
    def best(self) -> int:
        """Which is the likeliest."""
        return int(np.argmax([score.total for score in self.scores]))


@dataclass(frozen=True)
class Perplexity:
    """How well the model predicts a text.

    token_ids and logprobs (natural log): one per token that was scored; total: the logprobs' sum.
    num_bytes, num_words: of the text, in UTF-8 and between white space. Figures per byte and per
    word can be compared between tokenizers.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    total: float
    num_bytes: int
    num_words: int

    @property
    def perplexity(self) -> float:
        """exp of the mean negative logprob per token."""
        return perplexity(self.total, len(self.logprobs))

    @property
    def byte_perplexity(self) -> float:
        return perplexity(self.total, self.num_bytes)

    @property
    def word_perplexity(self) -> float:
        """nan for a text without words."""
        return perplexity(self.total, self.num_words)

    @property
    def bits_per_byte(self) -> float:
        return -self.total / self.num_bytes / math.log(2)


def perplexity(total: float, count: int) -> float:
    """exp of the mean negative logprob; nan for none. total: their sum, natural log."""
    return float(np.exp(-total / count)) if count else math.nan
