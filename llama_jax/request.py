"""One request on its way through the engine: what was asked, and what has come of it so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llama_jax.pages import Chain
from llama_jax.sampling import SamplingParams
from llama_jax.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length", "cancelled"]
Wanted = Literal["tokens", "logprobs", "logits"]


@dataclass(eq=False)
class Request:
    """What was asked for, in the first three fields and the defaults after them, and the results.

    wanted: "tokens" continues the prompt; "logprobs" asks how likely the prompt's own tokens are,
        from `score_from` on; "logits" for float32 logits of every prompt token.
    is_streamed: the caller wants each token when it is drawn, rather than several at a time.

    on_change: called by the engine whenever there is something new in the request.

    token_ids, logprobs, top: what was drawn, with natural-log probabilities where `params` asks
        for them. `text` is the decoded text, as it grows if the request is streamed or has stop
        strings, else once it has ended; `text[:released]` may be shown: what follows could still
        turn out to be the beginning of a stop string.
    prompt_logprobs, prompt_is_likeliest: float32 and bool, one per token from `score_from` on.
    prompt_logits: float32 [length, vocab]. num_cached: prompt tokens that were found in the cache
    when it was admitted last. chains: see `pages.extend_chains`, of all tokens or a beginning of
    them. Times are of `time.perf_counter`.
    """

    prompt: list[int]
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0, seed=0))
    decoder: StreamDecoder | None = None
    stop_ids: frozenset[int] = frozenset()
    wanted: Wanted = "tokens"
    score_from: int = 1
    is_streamed: bool = False
    on_change: "Callable[[Request], None] | None" = None
    id: int = -1
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""
    released: int = 0
    finish_reason: FinishReason | None = None
    prompt_logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    prompt_is_likeliest: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    prompt_logits: np.ndarray | None = None
    num_cached: int = 0
    chains: list[Chain] = field(default_factory=list)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    finished_at: float = 0.0

    @property
    def all_tokens(self) -> list[int]:
        return self.prompt + self.token_ids

    def start_prompt(self, num_cached: int) -> None:
        """The prompt goes through the model, from its beginning or from `num_cached` tokens on."""
        self.num_cached = num_cached
        self.prompt_logprobs = np.zeros(0, np.float32)
        self.prompt_is_likeliest = np.zeros(0, bool)
        self.prompt_logits = None

    def extend(self, token_ids: Sequence[int], limit: int) -> int:
        """Take in drawn tokens until one of them ends the request; returns how many.

        limit: tokens that may be drawn in all.
        """
        is_followed = self.is_streamed or bool(self.params.stop)
        for count, token_id in enumerate(token_ids, 1):
            self.token_ids.append(token_id)
            reason: FinishReason | None = None
            if token_id in self.stop_ids:
                reason = "stop"
            elif len(self.token_ids) >= limit:
                reason = "length"
            if is_followed:
                self._decode(self.token_ids[-1:], reason)
            elif reason:
                self._decode(self.token_ids, reason)
            if self.finish_reason:
                return count
        return len(token_ids)

    def cancel(self) -> None:
        is_followed = self.is_streamed or bool(self.params.stop)
        self._decode([] if is_followed else self.token_ids, "cancelled")

    def _decode(self, token_ids: Sequence[int], reason: FinishReason | None) -> None:
        """Add the text of tokens, and end for a reason, or where the text ends."""
        searched_from = len(self.text)
        if self.decoder:
            shown = token_ids[:-1] if reason == "stop" else token_ids
            self.text += "".join(map(self.decoder.push, shown))
            self.text += self.decoder.flush() if reason else ""
        self.finish_reason = reason
        self._cut_at_stop_string(searched_from)
        held = 0 if self.finish_reason else held_back(self.text, self.params.stop)
        self.released = len(self.text) - held

    def _cut_at_stop_string(self, searched_from: int) -> None:
        longest = max((len(stop) for stop in self.params.stop), default=0)
        start = max(0, searched_from - longest + 1)
        hits = [at for stop in self.params.stop if (at := self.text.find(stop, start)) >= 0]
        if hits:
            self.text = self.text[: min(hits)]
            self.finish_reason = "stop"


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins one of the stop strings."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )
