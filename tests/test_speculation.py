"""Speculation changes no token; it only saves launches where draft tokens are accepted."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from llama_jax.engine.compile_cache import forbid_compile
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Request
from llama_jax.engine.speculation import LONGEST_NGRAM, Speculation, look_up
from llama_jax.model.params import init_params
from llama_jax.model.spec import ModelSpec
from tests.test_engine import (
    OPTIONS,
    PARAMS,
    SPEC,
    VOCAB,
    drawn,
    finish,
    greedy,
    make,
    mixed,
    prompt,
    sampled,
)  # fmt: skip

SMALL = ModelSpec(replace(SPEC.config, num_layers=1), {}, "float32")


def with_draft(params, spec: ModelSpec, num_speculative_tokens: int = 3, **changes) -> Engine:
    options = replace(OPTIONS, num_speculative_tokens=num_speculative_tokens, **changes)
    return Engine(PARAMS, SPEC, options, jnp.dtype("float32"), draft=(params, spec))


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return drawn(make(), *mixed())


@pytest.mark.parametrize("num_speculative_tokens", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"num_pages": 5}, marks=pytest.mark.slow),
        pytest.param({"batch_invariant": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_looked_up_draft_tokens_change_no_token(
    expected: list[list[int]], num_speculative_tokens: int, changes: dict
) -> None:
    engine = make(num_speculative_tokens=num_speculative_tokens, **changes)
    assert drawn(engine, *mixed()) == expected
    assert engine.counts.drafted > engine.counts.accepted >= 0


def test_a_draft_model_changes_no_token(expected: list[list[int]]) -> None:
    engine = with_draft(init_params(SMALL, seed=1), SMALL)
    assert drawn(engine, *mixed()) == expected
    assert 0 < engine.stats().acceptance_rate < 0.5  # another random model: mostly wrong


@pytest.mark.slow
def test_the_model_as_its_own_draft_is_always_right(expected: list[list[int]]) -> None:
    """Greedy or sampled, alike: the draft draws with the same random numbers."""
    engine = with_draft(PARAMS, SPEC)
    requests = mixed()
    assert drawn(engine, *requests) == expected
    # Draft tokens are refused only after the token that ends a request early; none of these does.
    assert engine.counts.drafted == engine.counts.accepted > 0


def test_a_repetitive_text_takes_fewer_launches() -> None:
    text = prompt(7) * 9
    biased = {text[0]: 60.0}
    request = Request(text, greedy(40, logit_bias=biased))  # goes on with one token for ever
    engine = make(num_speculative_tokens=4, max_steps=1)
    (ids,) = drawn(engine, request)
    assert ids == [text[0]] * 40
    assert engine.counts.rounds < 15
    assert engine.stats().acceptance_rate > 0.6


@pytest.mark.parametrize("num_speculative_tokens", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_stop_tokens_and_limits_end_inside_of_accepted_draft_tokens(
    expected: list[list[int]], num_speculative_tokens: int
) -> None:
    engine = partial(with_draft, PARAMS, SPEC, num_speculative_tokens=num_speculative_tokens)
    whole = expected[1]
    at = next(i for i in range(2, 11) if whole[i] not in whole[:i])
    request = Request(prompt(31, seed=31), greedy(11), stop_ids=frozenset([whole[at]]))
    assert drawn(engine(), request) == [whole[: at + 1]]
    assert request.finish_reason == "stop"
    for count in (1, 2, 5, 9):
        request = Request(prompt(31, seed=31), greedy(count))
        assert drawn(engine(), request) == [whole[:count]]
    full = Request(prompt(250), greedy(50))
    assert drawn(engine(), full) == drawn(make(), Request(prompt(250), greedy(50)))


def test_logprobs_are_those_of_the_tokens() -> None:
    requests = [[Request(prompt(40), sampled(3, 12, logprobs=2))] for _ in range(2)]
    finish(make(), *requests[0])
    finish(with_draft(PARAMS, SPEC), *requests[1])
    (alone,), (speculated,) = requests
    np.testing.assert_allclose(alone.logprobs, speculated.logprobs, atol=1e-5)
    assert [[i for i, _ in top] for top in alone.top] == [
        [i for i, _ in top] for top in speculated.top
    ]


@pytest.mark.slow
def test_the_distribution_is_the_models_own() -> None:
    """The second and third tokens after a different draft model's token, over many seeds."""
    engine = with_draft(
        init_params(SMALL, seed=1),
        SMALL,
        num_speculative_tokens=2,
        max_batch_size=64,
        prefill_chunk=16,
    )
    text, count = prompt(9), 1024
    bias = dict.fromkeys(range(6, VOCAB), -1e9)  # six tokens, so that counts are large
    requests = [Request(text, sampled(i, 3, logit_bias=bias)) for i in range(count)]
    finish(engine, *requests)
    assert engine.counts.accepted > count / 10
    seen = np.zeros((6, 6), int)
    for request in requests:
        first, second, _ = request.token_ids
        seen[first, second] += 1
    apply = jax.jit(lambda ids: _next(ids))
    first = np.asarray(apply(np.array([text]))[0], np.float64)
    second = np.asarray(apply(np.array([[*text, token] for token in range(6)])), np.float64)
    probabilities = (first[:, None] * second).ravel()
    probabilities /= probabilities.sum()
    likely = probabilities * count > 5
    observed = np.append(seen.ravel()[likely], seen.ravel()[~likely].sum())
    wanted = np.append(probabilities[likely], probabilities[~likely].sum()) * count
    assert chisquare(observed, wanted).pvalue > 1e-3


def _next(ids):
    from llama_jax.model.llama import Llama

    logits = Llama(SPEC).apply({"params": PARAMS}, ids)[:, -1, :6]
    return jax.nn.softmax(logits, axis=-1)


@pytest.mark.slow
def test_nothing_compiles_after_warm_up() -> None:
    for engine in (make(num_speculative_tokens=2), with_draft(init_params(SMALL), SMALL)):
        engine.warmup()
        with forbid_compile():
            finish(engine, *mixed())


def naive_look_up(text: list[int], num_speculative_tokens: int) -> list[int]:
    """The latest place that shares the longest end with the text, and what followed, repeated."""
    best, common_most = None, 0
    for place in range(len(text) - 1):
        common = 0
        while common < min(LONGEST_NGRAM, place + 1) and text[place - common] == text[-1 - common]:
            common += 1
        if common and common >= common_most:
            best, common_most = place, common
    if best is None:
        return []
    following = text[best + 1 :]
    return [following[i % len(following)] for i in range(num_speculative_tokens)]


def test_look_up_against_a_plain_search() -> None:
    rng = np.random.default_rng(0)
    for size in (2, 3, 8):
        texts = [rng.integers(0, size, length).tolist() for length in range(1, 33)]
        history = rng.integers(0, size, (32, 40))  # what stands after a text must not matter
        for row, text in enumerate(texts):
            history[row, : len(text)] = text
        last = np.array([len(text) - 1 for text in texts])
        drafts, is_any = jax.jit(look_up, static_argnums=2)(history, last, 5)
        for text, ours, found in zip(texts, drafts.tolist(), is_any.tolist(), strict=True):
            plain = naive_look_up(text, 5)
            assert found == bool(plain) and (not found or ours == plain)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens must be at least 0, got -1"):
        Speculation(-1)
    with pytest.raises(ValueError, match="num_speculative_tokens must be at least 1, got 0"):
        with_draft(PARAMS, SPEC, num_speculative_tokens=0)
    for change, message in (
        ({"vocab_size": 10}, "10 tokens in its vocabulary, the model 64"),
        ({"max_position_embeddings": 255}, "context of 255 tokens is shorter than max_seq_len 256"),
    ):
        with pytest.raises(ValueError, match=message):
            with_draft({}, ModelSpec(replace(SPEC.config, **change), {}, "float32"))
