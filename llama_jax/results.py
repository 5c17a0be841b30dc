"""Defines what `LLM` returns: continuations, scores, rankings and perplexities."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llama_jax.engine.request import FinishReason, Request
from llama_jax.text.tokenizer import Tokenizer
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
    """The seconds a continuation took: `prefill` from the request's admission to its first token,
    `decode` from there to its last."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt.

    text: the text without special tokens, cut before a stop string.
    token_ids: every token drawn, including the stop token.
    finish_reason: "stop" (a stop token or string), "length" or "error".
    logprobs: one entry per token if they were asked for.
    tool_calls: the reply's tool calls, from `LLM.chat`.
    others: the other continuations of the same prompt, with `SamplingParams.n` above 1.
    stop_reason: the string of `SamplingParams.stop` or the id of `stop_token_ids` that ended it;
        None for the checkpoint's own stop tokens, and for "length".
    error: the exception that ended this continuation alone; the other fields have what there was
        by then.
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
        """Return all continuations of the prompt, this one first."""
        return (self, *self.others)


def generation_fields(result: Generation) -> dict[str, Any]:
    """Return a continuation as JSON values."""
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
    """A piece of a streamed reply: the new text, and the complete result with the last piece."""

    text: str
    result: Generation | None = None


@dataclass(frozen=True)
class Score:
    """The likelihood of a completion after its prompt.

    token_ids, logprobs: one per token of the completion; natural log.
    total: the sum of the logprobs.
    is_greedy: whether each token is the model's likeliest.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    total: float
    is_greedy: bool

    @property
    def perplexity(self) -> float:
        """Return exp of the mean negative logprob per token."""
        return perplexity(self.total, len(self.logprobs))


@dataclass(frozen=True)
class Ranking:
    """The likelihoods of several completions after the same prompt, in their order."""

    scores: tuple[Score, ...]

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Return the probability of each completion, given that it is one of them; the sum is 1."""
        totals = np.array([score.total for score in self.scores])
        weights = np.exp(totals - totals.max())
        return tuple((weights / weights.sum()).tolist())

    @property
    def best(self) -> int:
        """Return the index of the likeliest completion."""
        return int(np.argmax([score.total for score in self.scores]))


@dataclass(frozen=True)
class Perplexity:
    """The model's logprobs of a text, and measures of how well it predicts the text.

    token_ids, logprobs: one per token that was scored; natural log.
    total: the sum of the logprobs.
    num_bytes, num_words: the text's size in UTF-8 and between white space. Figures per byte and per
        word can be compared between tokenizers.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    total: float
    num_bytes: int
    num_words: int

    @property
    def perplexity(self) -> float:
        """Return exp of the mean negative logprob per token."""
        return perplexity(self.total, len(self.logprobs))

    @property
    def byte_perplexity(self) -> float:
        return perplexity(self.total, self.num_bytes)

    @property
    def word_perplexity(self) -> float:
        """Return exp of the mean negative logprob per word; nan for a text without words."""
        return perplexity(self.total, self.num_words)

    @property
    def bits_per_byte(self) -> float:
        return -self.total / self.num_bytes / math.log(2)


def perplexity(total: float, count: int) -> float:
    """Return exp of the mean negative logprob, of `count` logprobs that sum to `total`; nan for
    none."""
    return float(np.exp(-total / count)) if count else math.nan


def generation_of(request: Request, tokenizer: Tokenizer) -> Generation:
    """Make the result of a request that has ended, without tool calls."""
    logprobs, error = None, request.error
    if request.params.logprobs is not None and not error:
        try:
            drawn = request.token_ids, request.logprobs, request.top
            logprobs = tuple(map(partial(_token_logprob, tokenizer), *drawn))
        except Exception as raised:  # ends this continuation alone
            error = raised
    assert request.finish_reason is not None
    first = request.first_token_at or request.finished_at
    return Generation(
        text=request.text,
        token_ids=tuple(request.token_ids),
        finish_reason="error" if error else request.finish_reason,
        prompt_token_ids=tuple(request.prompt),
        logprobs=logprobs,
        timings=Timings(
            prefill=first - (request.admitted_at or first),
            decode=request.finished_at - first,
        ),
        stop_reason=request.stop_reason,
        error=error,
    )


def _token_logprob(
    tokenizer: Tokenizer, token_id: int, logprob: float, top: list[tuple[int, float]]
) -> TokenLogprob:
    likeliest = tuple((i, tokenizer.token_text(i), value) for i, value in top)
    return TokenLogprob(token_id, tokenizer.token_text(token_id), logprob, likeliest)
