import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.engine.sampling import host_rows, init_sampling, record, set_rows
from llama_jax.engine.sampling import sample as sampled
from llama_jax.sampling_params import SamplingParams
from pallas_kernels.fp8_matmul.logits import likeliest

sample = jax.jit(sampled)

VOCAB = 50


def state(*params, prompts=None, stops=None):
    count = len(params)
    rows = host_rows(params, prompts or [()] * count, stops or [()] * count, VOCAB)
    return jax.tree.map(jnp.asarray, rows)


def logits(rows=1, seed=0):
    return jax.random.normal(jax.random.key(seed), (rows, VOCAB)) * 3


@jax.jit
def draw_many(row, settings, steps):
    one = lambda step: sampled(row, settings.replace(step=step[None])).tokens[0]  # noqa: E731
    return jax.vmap(one)(steps)


def draws(params, row, count=4000):
    """Tokens drawn from one row of logits at `count` successive steps."""
    return np.asarray(draw_many(row, state(params), jnp.arange(4000)))[:count]


def test_plain_rows_are_set_as_whole_ones_are():
    used = SamplingParams(repetition_penalty=1.2, logit_bias={1: 2.0}, seed=1)
    before = state(*[used] * 3, prompts=[(1, 2)] * 3, stops=[(3, 4)] * 3)
    before = before.replace(counts=before.counts + 5)
    params = [SamplingParams(temperature=0.5, top_k=3, seed=7), SamplingParams(seed=8)]
    slots = jnp.array([2, 0, 3])  # the last is padding
    whole, plain = (
        set_rows(before, slots, host_rows([*params, used], [()] * 3, [(5,), (), ()], VOCAB,
                                          plain=plain))
        for plain in (False, True)
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, plain, whole)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), plain, before)
    assert plain.stop_mask[2].nonzero()[0].tolist() == [5] and plain.top_k.tolist() == [0, 0, 3]


def test_setting_rows_copies_no_others():
    vocab, batch, rows = 4096, 64, 2
    before = init_sampling(batch, vocab)
    new = host_rows([SamplingParams(seed=0)] * rows, [()] * rows, [()] * rows, vocab, plain=True)
    program = jax.jit(set_rows, donate_argnums=0).lower(before, jnp.arange(rows), new).compile()
    memory = program.memory_analysis()
    of_a_row = sum(a.nbytes for a in jax.tree.leaves(before)) / batch
    assert memory.alias_size_in_bytes >= batch * of_a_row
    assert memory.temp_size_in_bytes <= 1.1 * rows * of_a_row


def test_greedy_is_argmax_and_ties_take_the_first():
    row = jnp.zeros((1, VOCAB)).at[0, jnp.array([7, 30])].set(5.0)
    assert sample(row, state(SamplingParams(temperature=0))).tokens[0] == 7


@pytest.mark.parametrize("rows", [1, 8, 19])
def test_the_likeliest_is_the_first_of_the_largest(rows):
    # Few values, so that there are equals; and a row of which nothing may be drawn.
    scores = np.random.default_rng(0).integers(0, 9, (rows, VOCAB)).astype(np.float32)
    scores[-1] = -np.inf
    np.testing.assert_array_equal(jax.jit(likeliest)(scores), scores.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-4, 1e-12, 1e-37, 1e-38, 1e-44])
@pytest.mark.parametrize("rest", [{}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_hardly_any_temperature_is_greedy(temperature, rest):
    """Divided by it, both logits would be infinite, and the first of them the one that is drawn."""
    row = jnp.zeros((1, VOCAB)).at[0, jnp.array([7, 30])].set(jnp.array([90.0, 100.0]))
    settings = state(SamplingParams(temperature=temperature, seed=1, **rest))
    assert sample(row, settings).tokens[0] == 30


def test_frequencies_follow_the_softmax():
    row = logits()
    drawn = draws(SamplingParams(temperature=0.7, seed=1), row)
    expected = np.asarray(jax.nn.softmax(row[0] / 0.7))
    observed = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    # Four standard deviations of a binomial share.
    bound = 4 * np.sqrt(expected * (1 - expected) / len(drawn)) + 1e-3
    assert np.all(np.abs(observed - expected) < bound)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 3}, lambda p: np.argsort(-p)[:3]),
        ({"top_k": 1}, lambda p: np.argsort(-p)[:1]),
        ({"top_k": 1000}, lambda p: np.arange(VOCAB)),
        (
            {"top_p": 0.6},
            lambda p: np.argsort(-p)[: np.searchsorted(np.cumsum(np.sort(p)[::-1]), 0.6) + 1],
        ),
        ({"top_p": 1e-9}, lambda p: np.argsort(-p)[:1]),
        ({"min_p": 0.3}, lambda p: np.flatnonzero(p >= 0.3 * p.max())),
        ({"min_p": 1.0}, lambda p: np.argsort(-p)[:1]),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_only_the_likeliest_are_drawn(settings, kept):
    row = logits() / 2
    probabilities = np.asarray(jax.nn.softmax(row[0]))
    allowed = set(kept(probabilities).tolist())
    drawn = set(draws(SamplingParams(seed=3, **settings), row).tolist())
    assert drawn <= allowed
    likely = {i for i in allowed if probabilities[i] > 0.01}
    assert likely <= drawn


def test_top_k_keeps_ties():
    row = jnp.full((1, VOCAB), -20.0).at[0, :4].set(1.0)
    assert set(draws(SamplingParams(top_k=2, seed=0), row).tolist()) == {0, 1, 2, 3}


def test_a_row_draws_the_same_alone_and_among_others():
    rows = logits(4)
    params = [SamplingParams(temperature=t, top_k=k, seed=5)
              for t, k in ((0.0, 0), (1.0, 0), (0.5, 4), (1.5, 9))]  # fmt: skip
    together = sample(rows, state(*params)).tokens
    for i, each in enumerate(params):
        assert sample(rows[i : i + 1], state(each)).tokens[0] == together[i]


def test_seeds_differ_and_repeat():
    row = jnp.zeros((1, VOCAB))
    first = draws(SamplingParams(seed=1), row, 50)
    np.testing.assert_array_equal(first, draws(SamplingParams(seed=1), row, 50))
    assert np.any(first != draws(SamplingParams(seed=2), row, 50))
    unseeded = [draws(SamplingParams(), row, 50).tolist() for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_penalties_against_their_formulas():
    row = np.asarray(logits())
    params = SamplingParams(
        temperature=0, repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3
    )
    settings = state(params, prompts=[(3, 4)])
    for token in (4, 9, 9):
        settings = record(settings, jnp.array([token]), jnp.array([True]))
    expected = row[0].copy()
    for token in (3, 4, 9):
        expected[token] = expected[token] / 1.7 if expected[token] > 0 else expected[token] * 1.7
    expected[[4, 9]] -= 0.4
    expected[4] -= 0.3
    expected[9] -= 0.6
    # Biasing every other token away shows the penalised value of one after another.
    for token in (3, 4, 9, 11):
        rival = 12
        gap = expected[token] - expected[rival]
        for bias, winner in ((gap - 1e-3, token), (gap + 1e-3, rival)):
            mask = jnp.full((1, VOCAB), -1e9).at[0, token].set(0).at[0, rival].set(bias)
            assert sample(jnp.asarray(row), settings.replace(logit_bias=mask)).tokens[0] == winner


def test_inactive_rows_record_nothing():
    settings = state(SamplingParams(), SamplingParams())
    after = record(settings, jnp.array([4, 5]), jnp.array([False, True]))
    np.testing.assert_array_equal(after.step, [0, 1])
    np.testing.assert_array_equal(np.argwhere(after.counts), [[1, 5]])


def test_logit_bias_and_minimum_length():
    row = jnp.zeros((1, VOCAB)).at[0, 8].set(4.0)
    biased = state(SamplingParams(temperature=0, logit_bias={20: 4.5}))
    assert sample(row, biased).tokens[0] == 20
    settings = state(SamplingParams(temperature=0, min_new_tokens=2), stops=[(8,)])
    assert sample(row, settings).tokens[0] != 8
    assert sample(row, settings.replace(step=jnp.array([2]))).tokens[0] == 8


def test_logprobs_are_the_models_own():
    rows = logits(2)
    params = SamplingParams(temperature=0.3, top_k=2, seed=0, logprobs=5, logit_bias={1: 3.0})
    drawn = sample(rows, state(params, SamplingParams(temperature=0)))
    expected = np.asarray(jax.nn.log_softmax(rows))
    np.testing.assert_allclose(
        drawn.logprobs, expected[np.arange(2), np.asarray(drawn.tokens)], atol=1e-5
    )
    order = np.argsort(-expected[0])[:20]
    np.testing.assert_array_equal(drawn.top_ids[0], order)
    np.testing.assert_allclose(drawn.top_logprobs[0], expected[0, order], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0), ("min_new_tokens", 300), ("temperature", -0.1),
        ("temperature", float("nan")), ("top_k", -2), ("top_p", 0.0), ("top_p", 1.1),
        ("min_p", -0.1), ("repetition_penalty", 0.0), ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")), ("logit_bias", {1: float("nan")}), ("seed", -1),
        ("stop", [""]), ("logprobs", 21),
    ],
)  # fmt: skip
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 2.5), ("max_new_tokens", "3"), ("max_new_tokens", True),
        ("temperature", "0.5"), ("temperature", None), ("top_k", 2.7), ("top_p", "1"),
        ("seed", 1.0), ("n", 2.0), ("logprobs", True), ("ignore_eos", 1), ("ignore_eos", "no"),
        ("stop", 7), ("stop", ["a", 3]), ("stop", [None]), ("stop_token_ids", 7),
        ("stop_token_ids", ["7"]), ("stop_token_ids", [1.5]), ("stop_token_ids", [True]),
        ("logit_bias", [1, 2]), ("logit_bias", {"12": 1.0}), ("logit_bias", {1.5: 1.0}),
        ("logit_bias", {True: 1.0}), ("logit_bias", {3: "x"}), ("logit_bias", {3: None}),
    ],
)  # fmt: skip
def test_settings_of_a_wrong_type_are_named(name, value):
    # `max_new_tokens=2.5` once kept the engine decoding for ever: 2.5 tokens are never reached.
    with pytest.raises(TypeError, match=rf"{name}.*: expected"):
        SamplingParams(**{name: value})


def test_what_is_off_may_be_written_as_for_vllm():
    theirs = SamplingParams(top_k=-1, stop=None, stop_token_ids=None, logit_bias=None)
    assert theirs == SamplingParams()


def test_numbers_of_numpy_are_settings_too():
    params = SamplingParams(
        max_new_tokens=np.int64(3), temperature=np.float32(0.5), top_p=1, seed=np.uint32(7),
        stop_token_ids=np.array([1, 2]).tolist(), logit_bias={np.int32(4): np.float64(1)},
    )  # fmt: skip
    assert state(params).step.shape == (1,)


def test_settings_larger_than_the_device_holds_have_no_limit():
    """Such a `top_k` once failed within the engine, and with it the requests of others."""
    row = logits()
    seeds = {"seed": 1, "temperature": 0.9, "max_new_tokens": 10**30}
    huge = state(SamplingParams(top_k=10**12, **seeds))
    assert sample(row, huge).tokens[0] == sample(row, state(SamplingParams(**seeds))).tokens[0]
    late = state(SamplingParams(min_new_tokens=10**30, **seeds), stops=[[7]])
    likely = row.at[0, 7].set(99.0)
    assert sample(likely, huge).tokens[0] == 7 != sample(likely, late).tokens[0]
    hot = state(SamplingParams(temperature=1e99, seed=1))
    assert np.isfinite(hot.temperature[0])


def test_ids_outside_the_vocabulary_are_named():
    with pytest.raises(ValueError, match=r"logit_bias: token id 50 is not in \[0, 50\)"):
        state(SamplingParams(logit_bias={VOCAB: 1.0}))
