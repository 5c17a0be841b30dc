"""Programs that leave out what no row of a launch needs, and launches of fixed numbers of steps, as
on a GPU: every token is the same, and nothing compiles after warm-up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.engine.compile_cache import forbid_compile
from llama_jax.engine.draw_kinds import KINDS, kind_of
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Request
from llama_jax.engine.sampling import sample
from llama_jax.sampling_params import SamplingParams
from tests.test_engine import OPTIONS, alone, finish, greedy, make, prompt, sampled
from tests.test_sampling import logits, state

PLAIN = (greedy(9), sampled(1, 12), sampled(2, 7, top_k=5), sampled(3, 20, top_p=0.8))
OTHERS = (sampled(4, 9, repetition_penalty=1.3), greedy(6, logprobs=2),
          sampled(5, 11, top_p=0.9, min_new_tokens=8), greedy(5, logit_bias={3: 2.0}))  # fmt: skip


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, **options) -> Engine:
    monkeypatch.setattr("llama_jax.engine.engine.has_free_conditions", lambda: False)
    return make(**options)


def requests(settings=(*PLAIN, *OTHERS)) -> list[Request]:
    return [
        Request(prompt(20 + 9 * i, seed=i), params, stop_ids=frozenset([i]))
        for i, params in enumerate(settings)
    ]


@pytest.fixture(scope="module")
def expected() -> list[Request]:
    return list(finish(alone(), *requests()))


def test_what_rows_need() -> None:
    assert [kind_of(each) for each in PLAIN] == ["greedy", "sampled", "truncated", "truncated"]
    assert {kind_of(each) for each in OTHERS} == {"everything"}
    assert kind_of(greedy(top_p=0.5)) == "greedy"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_same_bit_for_bit(kind) -> None:
    params = [SamplingParams(temperature=t, seed=i, top_k=k, top_p=p) for i, (t, k, p) in enumerate(
        ((0, 0, 1), (0, 5, 1), (0.8, 0, 1), (1.5, 0, 1), (0.8, 4, 1), (1.0, 0, 0.7)))]  # fmt: skip
    params = [each for each in params if KINDS.index(kind_of(each)) <= KINDS.index(kind)]
    draw = jax.jit(sample, static_argnums=2)
    for seed in range(20):
        rows, settings = logits(len(params), seed), state(*params)
        settings = settings.replace(step=jnp.full(len(params), seed, jnp.int32))
        whole, part = draw(rows, settings, "everything"), draw(rows, settings, kind)
        np.testing.assert_array_equal(whole.tokens, part.tokens)


@pytest.mark.parametrize(
    "kinds",
    [("sampled", "everything"), pytest.param(KINDS, marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_tokens_of_a_gpus_launches(expected, monkeypatch, kinds) -> None:
    engine, launched = as_on_a_gpu(monkeypatch), set()
    launch_decode = engine._launch_decode

    def noted(call, page_table):
        launched.add((call.kind, call.steps))
        return launch_decode(call, page_table)

    monkeypatch.setattr(engine, "_launch_decode", noted)
    for request, same in zip(requests(), expected, strict=True):
        if kind_of(request.params) not in kinds:
            continue
        finish(engine, request)
        assert request.token_ids == same.token_ids
        assert request.finish_reason == same.finish_reason
        np.testing.assert_allclose(request.logprobs, same.logprobs, atol=1e-5)
    assert launched == {(kind, steps) for kind in kinds for steps in (1, OPTIONS.max_steps)}


@pytest.mark.slow
def test_company_changes_nothing(expected, monkeypatch) -> None:
    for options in ({}, {"num_pages": 5}, {"num_speculative_tokens": 2}):
        found = finish(as_on_a_gpu(monkeypatch, **options), *requests())
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(monkeypatch) -> None:
    engine = as_on_a_gpu(monkeypatch, max_steps=3, prefill_chunk=16)
    engine.warmup()
    with forbid_compile():
        finish(engine, *requests(), Request(prompt(40), greedy(5), is_streamed=True))


def test_a_cpus_greedy_launches_are_without_the_sampler(expected, monkeypatch) -> None:
    engine, launched = make(), []
    launch_decode = engine._launch_decode

    def noted(call, page_table):
        launched.append(call.kind)
        return launch_decode(call, page_table)

    monkeypatch.setattr(engine, "_launch_decode", noted)
    for index, kind in ((0, "greedy"), (1, "everything"), (5, "everything")):
        request, same = requests()[index], expected[index]
        finish(engine, request)
        assert request.token_ids == same.token_ids
        assert set(launched) == {kind}
        launched.clear()


def test_batch_invariant_engines_draw_with_one_program(monkeypatch) -> None:
    engine = as_on_a_gpu(monkeypatch, batch_invariant=True)
    scheduler = engine._scheduler
    assert scheduler.draw_kinds == ("everything",) and scheduler.step_counts == (1,)
