"""All ways to stop, alone and together, against plain Python: README's table, cell by cell."""

import itertools
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
import pytest

from llama_jax.engine.request import Request, first_stop, held_back
from llama_jax.model.llama import Llama
from llama_jax.sampling_params import SamplingParams
from tests.test_engine import PARAMS, SPEC, VOCAB, finish, make, prompt, sampled
from tests.test_speculation import with_draft

PROMPT = prompt(58, seed=8)
MOST = 14
PENALTY = 100.0  # for a token that was drawn before: the model says something else each time
SILENT = 3  # tokens whose id is divisible by it leave no text, as special ones


def text_of(token_id: int) -> str:
    return f"{token_id:02d}" if token_id % SILENT else ""


class Decoder:
    def push(self, token_id: int) -> str:
        return text_of(token_id)

    def flush(self) -> str:
        return ""


@cache
def logits_after(ids: tuple[int, ...]) -> np.ndarray:
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(forward()({"params": PARAMS}, padded))[0, len(ids) - 1]


@cache
def forward():
    return jax.jit(Llama(SPEC).apply)


@dataclass(frozen=True)
class Case:
    """least, most: min_new_tokens and max_new_tokens. named: special tokens that stop strings
    name."""

    least: int
    most: int
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    eos: tuple[int, ...]
    named: tuple[int, ...]
    ignore_eos: bool

    def request(self, is_streamed: bool) -> Request:
        params = SamplingParams(
            temperature=0, min_new_tokens=self.least, max_new_tokens=self.most, stop=self.stop,
            stop_token_ids=self.stop_ids, ignore_eos=self.ignore_eos, frequency_penalty=PENALTY,
        )  # fmt: skip
        ends = {*self.stop_ids, *self.named, *(() if self.ignore_eos else self.eos)}
        return Request(
            PROMPT, params, Decoder(), frozenset(ends), frozenset(self.eos),
            {token_id: f"<{token_id}>" for token_id in self.named}, is_streamed=is_streamed,
        )  # fmt: skip

    def expected(self) -> tuple[list[int], str, str, int | str | None]:
        """Token ids, text, finish_reason and stop_reason, token by token as README says."""
        ids: list[int] = []
        text = ""
        while True:
            logits = logits_after((*PROMPT, *ids)).copy()
            np.subtract.at(logits, ids, np.float32(PENALTY))
            if len(ids) < self.least:
                logits[[*self.stop_ids, *self.eos, *self.named]] = -np.inf
            ids.append(int(np.argmax(logits)))
            token_id, may_stop, before = ids[-1], len(ids) > self.least, len(text)
            is_eos = token_id in self.eos and not self.ignore_eos
            ends = may_stop and (is_eos or token_id in self.stop_ids + self.named)
            text += "" if ends else text_of(token_id)
            places = (
                (at, stop)
                for at in range(len(text))
                for stop in self.stop
                if text[at:].startswith(stop) and at + len(stop) > before
            )
            if may_stop and (found := next(places, None)):
                return ids, text[: found[0]], "stop", found[1]
            if ends:
                named = f"<{token_id}>" if token_id in self.named else token_id
                return ids, text, "stop", None if is_eos else named
            if len(ids) == self.most:
                return ids, text, "length", None


def cases() -> list[Case]:
    """The product, of stops that come at different places of what the model says on its own."""
    ids, text, *_ = Case(0, MOST, (), (), (), (), False).expected()
    assert len(set(ids)) == MOST
    late = range(4, MOST, 2)
    spoken = next(i for i in late if ids[i] % SILENT and ids[i - 1] % SILENT)
    at = len("".join(map(text_of, ids[:spoken])))
    strings = (text[at - 1 : at + 1], text[at - 1 : at + 2])  # begin in one token, end in the next
    return [
        Case(*each)
        for each in itertools.product(
            (0, late[0], late[1] + 1), (late[1] + 2, MOST),
            ((), strings[:1], (*strings[::-1], "??")), ((), (ids[late[0]],)),
            ((), (ids[late[1]], ids[late[2]])), ((), (ids[late[2]],)), (False, True),
        )
        if each[0] <= each[1]
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"max_batch_size": 16}, marks=pytest.mark.slow),
        pytest.param({"num_pages": 5, "max_batch_size": 6}, marks=pytest.mark.slow),
        pytest.param({"num_speculative_tokens": 2}, marks=pytest.mark.slow),
    ],
    ids=["plain", "many-slots", "preempted", "speculating"],
)
def test_the_product_of_all_ways_to_stop(options: dict) -> None:
    # A draft that is the model itself: its draft tokens are accepted.
    engine = (
        with_draft(PARAMS, SPEC, **options)
        if "num_speculative_tokens" in options
        else make(**options)
    )
    wanted = cases()
    for is_streamed in (False, True):
        requests = [case.request(is_streamed) for case in wanted]
        shown: dict[Request, list[str]] = {request: [] for request in requests}
        # Where pages are few, long sequences that came first take them from the others.
        long = [Request(prompt(60 + n, seed=n), sampled(n, 150)) for n in range(2)]
        for request in engine.run([*(long if "num_pages" in options else ()), *requests]):
            shown.setdefault(request, []).append(request.text[: request.released])
        for case, request in zip(wanted, requests, strict=True):
            found = (request.token_ids, request.text, request.finish_reason, request.stop_reason)
            assert found == case.expected(), case
            # Nothing is shown that is taken back later.
            assert shown[request][-1] == request.text
            assert all(request.text.startswith(each) for each in shown[request]), case
    if "num_pages" in options:
        assert engine.counts.preempted
    if "num_speculative_tokens" in options:
        assert engine.counts.accepted


def test_the_cases_differ() -> None:
    """Every way to stop is the one that stops, somewhere, and length too."""
    reasons = {(case.expected()[2], type(case.expected()[3]).__name__) for case in cases()}
    assert reasons >= {
        ("stop", "int"),
        ("stop", "str"),
        ("stop", "NoneType"),
        ("length", "NoneType"),
    }


def test_a_stop_token_takes_precedence_over_a_string_that_it_would_complete() -> None:
    request = Request(
        [1],
        SamplingParams(stop="52", stop_token_ids=[52]),
        Decoder(),
        frozenset({52}),
    )
    request.extend([32, 52], limit=2)
    assert (request.text, request.stop_reason) == ("32", 52)


def test_first_stop_and_held_back() -> None:
    assert first_stop("abcd", ("cd", "bcd"), 0) == (1, "bcd")
    assert first_stop("abcd", ("bc", "bcd"), 0) == (1, "bc")
    assert first_stop("abcd", ("bc", "d"), 3) == (3, "d")  # "bc" ended before
    assert first_stop("abab", ("ab",), 2) == (2, "ab")
    assert first_stop("abc", (), 0) is None
    assert held_back("xab", ("abc", "bd")) == 2 and held_back("x", ("abc",)) == 0


def test_stop_tokens_outside_the_vocabulary_are_never_drawn() -> None:
    for bias in ({}, {1: 0.5}):
        params = SamplingParams(temperature=0, max_new_tokens=3, logit_bias=bias)
        (request,) = finish(make(), Request(prompt(5), params, stop_ids=frozenset([VOCAB, -1])))
        assert request.finish_reason == "length"
