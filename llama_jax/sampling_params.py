"""Defines the sampling settings of a prompt. Imports no JAX, so that a wrong setting is reported at
once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

from llama_jax.structured import StructuredOutput

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """The settings for continuing one prompt, under vLLM's names where it has them.

    max_new_tokens, min_new_tokens: bounds on the number of generated tokens. Before
        `min_new_tokens`, no stop token is drawn (even the checkpoint's own with `ignore_eos`) and
        no stop string ends the text.
    temperature: 0 is greedy.
    top_k: keeps the k likeliest tokens and ties with the k-th; 0 (or -1) keeps all.
    top_p: the probability mass of the nucleus, in (0, 1].
    min_p: the least probability relative to the likeliest token.
    repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or
        the output (Keskar et al., 2019); 1 is off.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output, once or
        per occurrence.
    logit_bias: maps token ids to numbers that are added to their logits.
    seed: of the random numbers; None takes a fresh one.
    n: the number of continuations, which draw with `seed`, `seed` + 1 and so on.
    stop: strings that end the text, which is cut before them. The name of a special token means
        that token.
    stop_token_ids: tokens that end the text, besides the checkpoint's own.
    ignore_eos: ignore the checkpoint's own stop tokens.
    logprobs: None for none; n for the logprobs of the chosen token and the n likeliest (up to 20).
    structured: the form that the text must have; the text ends when the form is complete.

    >>> SamplingParams(temperature=0.7, top_p=0.9, seed=1, stop=["\\n"]).max_new_tokens
    256
    >>> SamplingParams(top_p=1.5)
    Traceback (most recent call last):
    ValueError: top_p must be in (0, 1], got 1.5
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        # Values that mean "off" in vLLM.
        off: tuple[tuple[str, Any, Any], ...] = (
            ("top_k", -1, 0), ("stop", None, ()), ("stop_token_ids", None, ()),
            ("logit_bias", None, {}),
        )  # fmt: skip
        for name, theirs, ours in off:
            value = getattr(self, name)
            if value is None if theirs is None else value == theirs:
                object.__setattr__(self, name, ours)
        for name, kind in _KINDS.items():
            check_kind(name, getattr(self, name), kind)
        for name, kind in _OPTIONAL_KINDS.items():
            if getattr(self, name) is not None:
                check_kind(name, getattr(self, name), kind)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for each in stop:
            check_kind("stop", each, str)
        for token_id in (*self.stop_token_ids, *self.logit_bias):
            check_kind("stop_token_ids and the keys of logit_bias", token_id, int)
        for bias in self.logit_bias.values():
            check_kind("logit_bias", bias, float)
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens,
             "between 0 and max_new_tokens"),
            ("temperature", 0 <= self.temperature < math.inf, "finite and at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "finite and above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "finite"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "finite"),
            ("logit_bias", not any(math.isnan(v) for v in self.logit_bias.values()), "free of NaN"),
            ("seed", self.seed is None or 0 <= self.seed < 2**32, "in [0, 2**32)"),
            ("n", self.n >= 1, "at least 1"),
            ("stop", all(stop), "free of empty strings"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS,
             f"None or between 0 and {MAX_TOP_LOGPROBS}"),
            ("min_new_tokens", not (self.structured and self.min_new_tokens),
             "0 with structured, which says where the text may end"),
            ("ignore_eos", not (self.structured and self.ignore_eos), "False with structured"),
        )  # fmt: skip
        for name, holds, expected in rules:
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def of_samples(self) -> list["SamplingParams"]:
        """Return the settings of each of the `n` continuations, with a seed of its own."""
        if self.n == 1:
            return [self]
        seeds = [None if self.seed is None else (self.seed + i) % 2**32 for i in range(self.n)]
        return [replace(self, n=1, seed=seed) for seed in seeds]


# The types of `SamplingParams`' fields.
_KINDS: Mapping[str, type] = {
    "max_new_tokens": int,
    "min_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "logit_bias": Mapping,
    "n": int,
    "stop": Sequence,
    "stop_token_ids": Sequence,
    "ignore_eos": bool,
}
_OPTIONAL_KINDS: Mapping[str, type] = {  # or None
    "seed": int,
    "logprobs": int,
    "structured": StructuredOutput,
}


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless a setting has its type.

    True and "3" are no numbers and 2.5 is no int, but numpy's numbers are accepted.
    """
    if type(value) is kind:  # sooner than by an abstract class, of which a request has dozens
        return
    accepted: Mapping[type, type] = {int: Integral, float: Real}
    if not isinstance(value, accepted.get(kind, kind)) or isinstance(value, bool) != (kind is bool):
        raise TypeError(f"{name}: expected {kind.__name__}, got {value!r} ({type(value).__name__})")
