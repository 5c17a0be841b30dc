"""What the calls of `LLM` return."""

from dataclasses import dataclass

import numpy as np

from llama_jax.request import FinishReason
from llama_jax.tools import ToolCall


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
    token included. finish_reason: "stop" (a stop token or string) or "length". logprobs: one entry
    per token if asked for. tool_calls: what the reply asks to be called (from `LLM.chat`).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    timings: Timings
    tool_calls: tuple[ToolCall, ...] = ()


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
        return float(np.exp(-self.total / len(self.logprobs)))
