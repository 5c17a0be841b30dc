"""Defines a request to the engine, which holds its arguments and its results so far."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llama_jax.engine.grammars import Matcher
from llama_jax.engine.pages import BlockHash
from llama_jax.sampling_params import SamplingParams
from llama_jax.text.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length", "cancelled", "error"]
OutputKind = Literal["tokens", "logprobs", "logits"]


@dataclass(eq=False)
class Request:
    """A request. The fields up to `on_change` are its arguments, the others its results.

    stop_ids: tokens that end the text and are not part of it.
    eos_ids: tokens with which the model ends its replies. They are not drawn before
        `params.min_new_tokens`, even if `params.ignore_eos` keeps them out of `stop_ids`.
    stop_names: the special tokens among `stop_ids` that `params.stop` names.
    matcher: for `params.structured`, at the beginning of the reply.
    output_kind: "tokens" continues the prompt; "logprobs" computes those of the prompt's own tokens
        from `score_from` on, and the likeliest tokens in their places if `params.logprobs` is not
        None; "logits" computes float32 logits of every prompt token.
    is_streamed: whether the caller needs each token soon, see `Engine.stream_steps`.

    on_change: called by the engine after each change of the request.

    token_ids, logprobs, top: the drawn tokens, with natural-log probabilities if `params` asks for
        them.
    text, released: the decoded text. It grows token by token if the request is streamed or has stop
        strings, and is otherwise decoded at the end. `text[:released]` may be shown; the rest could
        still become a stop string.
    silent: if the request is streamed, the tokens without text: the index of each in `token_ids`
        and the length of the text at it.
    finish_reason: "stop" (a stop token or string), "length", "cancelled", or "error" with the
        exception in `error`.
    stop_reason: the string, or the id of `params`, that ended it; None for the model's own end.
    prompt_logprobs: float32, one per prompt token from `score_from` on.
    prompt_likeliest, prompt_most: int32 and float32, the likeliest token in the place of each, and
        its logprob.
    prompt_top, prompt_ranks: if `params.logprobs` is not None, that many likeliest tokens in the
        place of each with their logprobs, and its own rank among all tokens, from 1 on.
    prompt_logits: float32 [length, vocab].
    num_cached: prompt tokens that were found in the cache at the last admission.
    block_hashes: of all tokens or a prefix of them, see `pages.extend_block_hashes`.
    admitted_at, first_token_at, finished_at: times of `time.perf_counter`.
    """

    prompt: list[int]
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0, seed=0))
    decoder: StreamDecoder | None = None
    stop_ids: frozenset[int] = frozenset()
    eos_ids: frozenset[int] = frozenset()
    stop_names: Mapping[int, str] = field(default_factory=dict)
    matcher: Matcher | None = None
    output_kind: OutputKind = "tokens"
    score_from: int = 1
    is_streamed: bool = False
    on_change: "Callable[[Request], None] | None" = None
    id: int = -1
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    text: str = ""
    released: int = 0
    silent: list[tuple[int, int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: BaseException | None = None
    prompt_logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    prompt_likeliest: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    prompt_most: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    prompt_top: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_ranks: list[int] = field(default_factory=list)
    prompt_logits: np.ndarray | None = None
    num_cached: int = 0
    block_hashes: list[BlockHash] = field(default_factory=list)
    admitted_at: float = 0.0
    first_token_at: float = 0.0
    finished_at: float = 0.0

    @property
    def all_tokens(self) -> list[int]:
        return self.prompt + self.token_ids

    def start_prompt(self, num_cached: int) -> None:
        """Reset the prompt's results. num_cached: the number of its tokens that are cached."""
        self.num_cached = num_cached
        self.prompt_logprobs = np.zeros(0, np.float32)
        self.prompt_likeliest = np.zeros(0, np.int32)
        self.prompt_most = np.zeros(0, np.float32)
        self.prompt_top, self.prompt_ranks = [], []
        self.prompt_logits = None

    @property
    def prompt_is_likeliest(self) -> np.ndarray:
        """Return for each prompt token from `score_from` on whether it is the likeliest: bool."""
        until = self.score_from + len(self.prompt_likeliest)
        return self.prompt_likeliest == np.asarray(self.prompt[self.score_from : until], np.int32)

    def extend_prompt(self, logprobs: np.ndarray, likeliest: np.ndarray, most: np.ndarray) -> None:
        """Append the results of the next tokens of the prompt."""
        self.prompt_logprobs = np.append(self.prompt_logprobs, logprobs)
        self.prompt_likeliest = np.append(self.prompt_likeliest, likeliest)
        self.prompt_most = np.append(self.prompt_most, most)

    def extend_prompt_top(self, ids: np.ndarray, logprobs: np.ndarray, ranks: np.ndarray) -> None:
        """Append the likeliest tokens in the places of the prompt's next tokens, ids and logprobs
        [tokens, k], and the ranks of the prompt's tokens."""
        count = self.params.logprobs or 0
        pairs = zip(ids[:, :count].tolist(), logprobs[:, :count].tolist(), strict=True)
        self.prompt_top += [list(zip(*pair, strict=True)) for pair in pairs]
        self.prompt_ranks += ranks.tolist()

    def extend(self, token_ids: Sequence[int], limit: int) -> int:
        """Append drawn tokens until one of them ends the request. Returns how many were appended.

        limit: the number of tokens that may be drawn in total.
        """
        goes_on = len(self.token_ids) + len(token_ids) < limit and not self.params.stop
        if goes_on and self.stop_ids.isdisjoint(token_ids):
            if self.is_streamed:
                self._append_shown(token_ids)
            else:
                self.token_ids += token_ids
            return len(token_ids)
        for count, token_id in enumerate(token_ids, 1):
            self._append(token_id, limit)
            if self.finish_reason:
                return count
        return len(token_ids)

    def cancel(self) -> None:
        """End the request with the text so far, as far as it can be decoded."""
        self.finish_reason = "cancelled"
        with suppress(Exception):
            self._decode([] if self._is_followed else self.token_ids, is_end=True)
            self.released = len(self.text)

    def fail(self, error: BaseException) -> None:
        """End the request with `error` as its result."""
        self.error = error
        if self.finish_reason != "cancelled":
            self.finish_reason = "error"

    @property
    def _is_followed(self) -> bool:
        """Return whether the text is decoded token by token."""
        return self.is_streamed or bool(self.params.stop)

    def _append_shown(self, token_ids: Sequence[int]) -> None:
        """Append tokens to a streamed request that go on without a stop, and their text."""
        push = self.decoder.push if self.decoder else lambda token_id: ""
        for token_id in token_ids:
            self.token_ids.append(token_id)
            if text := push(token_id):
                self.text += text
                self.released = len(self.text)
            else:
                self.silent.append((len(self.token_ids) - 1, len(self.text)))

    def _append(self, token_id: int, limit: int) -> None:
        """Append a token and its text, and end the request if one of them is a stop.

        Nothing stops it before there are more than `min_new_tokens` tokens, though a stop string
        may begin earlier.
        """
        self.token_ids.append(token_id)
        may_stop = len(self.token_ids) > self.params.min_new_tokens
        is_stop = may_stop and token_id in self.stop_ids
        is_end = is_stop or len(self.token_ids) >= limit
        searched = len(self.text)
        if self._is_followed:
            self._decode([] if is_stop else [token_id], is_end)
        elif is_end:
            self._decode(self.token_ids[:-1] if is_stop else self.token_ids, is_end)
        if self.is_streamed and len(self.text) == searched:
            self.silent.append((len(self.token_ids) - 1, searched))
        if may_stop and (found := first_stop(self.text, self.params.stop, searched)):
            at, self.stop_reason = found
            self.text = self.text[:at]
            self.finish_reason = "stop"
        elif is_stop:
            is_eos = token_id in self.eos_ids and not self.params.ignore_eos
            self.stop_reason = None if is_eos else self.stop_names.get(token_id, token_id)
            self.finish_reason = "stop"
        elif is_end:
            self.finish_reason = "length"
        held = 0 if self.finish_reason else held_back(self.text, self.params.stop)
        self.released = len(self.text) - held

    def _decode(self, token_ids: Sequence[int], is_end: bool) -> None:
        if self.decoder:
            self.text += "".join(map(self.decoder.push, token_ids))
            self.text += self.decoder.flush() if is_end else ""


def first_stop(text: str, stops: Sequence[str], searched: int) -> tuple[int, str] | None:
    """Find the first stop string that ends after `searched` characters of `text`.

    Returns its start and the string, or None. If several start at one place, the first in `stops`
    counts.
    """
    hits = [
        (at, stop)
        for stop in stops
        if (at := text.find(stop, max(0, searched - len(stop) + 1))) >= 0
    ]
    return min(hits, key=lambda hit: hit[0], default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of a stop string."""
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )
