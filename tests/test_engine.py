"""The engine on a random tiny model: what a request gets depends on nothing but the request.

Logits of the same tokens differ by 1e-6 with the order of sums, when a prompt goes through in other
chunks or beside others. The distributions are so uneven that no choice here hangs on that.
"""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.engine.compile_cache import forbid_compile
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Request
from llama_jax.engine.scheduler import QueueFullError
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.model.llama import Llama
from llama_jax.model.params import init_params
from llama_jax.model.spec import ModelSpec
from llama_jax.sampling_params import SamplingParams
from tests.tiny import config, tokens

VOCAB = 64
SPEC = ModelSpec(
    config(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1),
    {},
    "float32",
)
OPTIONS = EngineOptions(max_batch_size=3, max_seq_len=256, prefill_chunk=32, max_steps=4)


def make_params():
    params = init_params(SPEC)
    params["lm_head"]["weight"] = params["lm_head"]["weight"] * 20
    return params


PARAMS = make_params()


def make(**changes) -> Engine:
    return Engine(PARAMS, SPEC, replace(OPTIONS, **changes), jnp.dtype("float32"))


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(length, seed=seed, vocab_size=VOCAB).tolist()


def greedy(count: int = 8, **settings) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=count, **settings)


def sampled(seed: int, count: int = 8, **settings) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, seed=seed, **settings)


def finish(engine: Engine, *requests: Request) -> tuple[Request, ...]:
    for _ in engine.run(requests):
        engine.pages.check()
    while engine.has_work:  # a launch may be on its way that nobody waits for any more
        engine.step()
    assert not engine.has_work and all(
        engine.pages.owners(p) == 0 for p in range(engine.options.pool_size)
    )
    return requests


def drawn(engine: Engine, *requests: Request) -> list[list[int]]:
    return [request.token_ids for request in finish(engine, *requests)]


def mixed() -> list[Request]:
    """Prompts of every length about the edges of chunks and pages, with all kinds of settings."""
    lengths = (1, 31, 32, 33, 63, 64, 65, 100, 128, 200)
    params = (greedy(1), greedy(11), sampled(1, 20), sampled(2, 5, top_k=5, logprobs=2),
              sampled(3, 17, repetition_penalty=1.3, frequency_penalty=0.2))  # fmt: skip
    return [Request(prompt(n, seed=n), params[i % 5]) for i, n in enumerate(lengths)]


def alone() -> Engine:
    """One row that shares nothing."""
    return make(max_batch_size=1, share_prefixes=False, max_steps=1)


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """Each of `mixed` on its own."""
    engine = alone()
    return [drawn(engine, request)[0] for request in mixed()]


def test_greedy_tokens_are_the_models_own(expected: list[list[int]]) -> None:
    forward = jax.jit(Llama(SPEC).apply)
    for request, ids in zip(mixed(), expected, strict=True):
        if request.params.temperature == 0:
            whole = request.prompt + ids
            padded = np.zeros((1, 256), np.int32)
            padded[0, : len(whole)] = whole
            logits = forward({"params": PARAMS}, padded)[0]
            likeliest = np.argmax(logits[len(request.prompt) - 1 : len(whole) - 1], axis=-1)
            assert ids == likeliest.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_pages": 5},
        {"batch_invariant": True},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"max_steps": 1},
                {"max_batch_size": 8, "max_steps": 16},
                {"prefill_chunk": 256},
                {"prefill_chunk": 5, "prefill_budget": 5},
                {"share_prefixes": False},
            )
        ),
    ],
    ids=str,
)
def test_company_changes_nothing(expected: list[list[int]], changes: dict) -> None:
    assert drawn(make(**changes), *mixed()) == expected


def test_the_order_of_arrival_changes_nothing(expected: list[list[int]]) -> None:
    engine, requests = make(), mixed()
    for request in requests[::-1]:
        engine.submit(request)
        engine.step()
    while engine.has_work:
        engine.step()
    assert [request.token_ids for request in requests] == expected


def test_a_prompt_is_computed_once(expected: list[list[int]]) -> None:
    engine = make()
    first, second = mixed()[-1], mixed()[-1]
    assert drawn(engine, first) == expected[-1:]
    before = engine.counts.prefilled
    assert drawn(engine, second) == expected[-1:]
    assert engine.counts.prefilled - before == 1  # its last token, whose output is wanted
    assert second.num_cached == 199 and first.num_cached == 0
    assert engine.pages.counts.hit == 199


def test_samples_of_one_prompt_share_its_pages() -> None:
    engine = make()
    samples = [Request(prompt(130), sampled(i)) for i in range(3)]
    finish(engine, *samples)
    assert engine.counts.prefilled == 130 + 2  # the others compute the last token alone
    single = alone()
    for request in samples:
        assert drawn(single, Request(request.prompt, request.params)) == [request.token_ids]
    assert len({tuple(request.token_ids) for request in samples}) == 3


def test_a_page_is_copied_where_two_part() -> None:
    """The second continues in the middle of the first's page while that one is still growing."""
    prefix = prompt(100)
    first = Request(prefix, greedy(60))
    second = Request([*prefix[:90], *prompt(20, seed=5)], greedy(60))
    engine = make()
    engine.submit(first)
    for _ in range(4):
        engine.step()
    finish_both = list(engine.run([second]))
    while engine.has_work:
        engine.step()
    assert finish_both and second.num_cached == 90
    single = alone()
    for request in (first, second):
        assert drawn(single, Request(request.prompt, request.params)) == [request.token_ids]


def test_a_reply_is_found_again_as_the_prefix_of_the_next_prompt() -> None:
    engine = make()
    (first,) = finish(engine, Request(prompt(50), greedy(30)))
    follow_up = Request([*first.prompt, *first.token_ids, *prompt(10, seed=1)], greedy(5))
    finish(engine, follow_up)
    assert follow_up.num_cached == 50 + 30 - 1  # the last token drawn was never fed


def test_shared_prefixes_change_no_logprob() -> None:
    context = prompt(150)
    texts = [[*context, *prompt(n, seed=n)] for n in (1, 20, 64, 100)]

    def score(engine: Engine) -> list[np.ndarray]:
        requests = [Request(text, output_kind="logprobs", score_from=150) for text in texts]
        return [request.prompt_logprobs for request in finish(engine, *requests)]

    shared, engine = make(), make(share_prefixes=False)
    for ours, alone in zip(score(shared), score(engine), strict=True):
        np.testing.assert_allclose(ours, alone, atol=1e-5)
    assert shared.pages.counts.hit >= 3 * 128
    assert shared.counts.prefilled < engine.counts.prefilled - 300


def test_logprobs_are_those_of_the_forward_pass() -> None:
    text = prompt(100)
    logits = jax.jit(Llama(SPEC).apply)({"params": PARAMS}, np.array([text], np.int32))[0]
    exact = np.asarray(jax.nn.log_softmax(logits))[np.arange(99), text[1:]]
    for start in (1, 33, 99):
        engine = make()
        (request,) = finish(engine, Request(text, output_kind="logprobs", score_from=start))
        np.testing.assert_allclose(request.prompt_logprobs, exact[start - 1 :], atol=1e-5)
        (again,) = finish(engine, Request(text, output_kind="logprobs", score_from=start))
        assert again.num_cached == start - 1
        np.testing.assert_allclose(again.prompt_logprobs, exact[start - 1 :], atol=1e-5)
        assert again.prompt_is_likeliest.shape == exact[start - 1 :].shape


def test_all_kinds_of_requests_at_once(expected: list[list[int]]) -> None:
    generated = mixed()
    scored = [Request(prompt(n, seed=n), output_kind="logprobs") for n in (2, 40, 200)]
    seen = Request(prompt(70), output_kind="logits")
    finish(make(), *[each for trio in zip(generated[:3], scored, strict=True) for each in trio],
           seen, *generated[3:])  # fmt: skip
    assert [request.token_ids for request in generated] == expected
    assert [len(request.prompt_logprobs) for request in scored] == [1, 39, 199]
    logits = jax.jit(Llama(SPEC).apply)({"params": PARAMS}, np.array([seen.prompt], np.int32))
    np.testing.assert_allclose(seen.prompt_logits, logits[0], atol=1e-4)


def test_requests_give_their_pages_back_when_none_are_left() -> None:
    """Three sequences of four pages in a pool of five."""
    engine = make(num_pages=5)
    requests = [Request(prompt(60 + n, seed=n), sampled(n, 150)) for n in range(3)]
    finish(engine, *requests)
    assert engine.counts.preempted > 0
    single = alone()
    for request in requests:
        assert drawn(single, Request(request.prompt, request.params)) == [request.token_ids]
        assert request.finish_reason == "length" and len(request.token_ids) == 150


def test_a_full_row_ends() -> None:
    (request,) = finish(make(), Request(prompt(250), greedy(50)))
    assert len(request.token_ids) == 6 and request.finish_reason == "length"
    (request,) = finish(make(), Request(prompt(256), output_kind="logits"))
    assert request.prompt_logits is not None and request.prompt_logits.shape == (256, VOCAB)


def test_stop_tokens_end_a_row_between_visits_of_the_host(expected: list[list[int]]) -> None:
    whole = expected[1]
    at = next(i for i in range(2, 11) if whole[i] not in whole[:i])
    for stop in (whole[at], whole[0]):
        request = Request(prompt(31, seed=31), greedy(11), stop_ids=frozenset([stop]))
        (ids,) = drawn(make(max_steps=16), request)
        assert ids == whole[: whole.index(stop) + 1]
        assert request.finish_reason == "stop"


def test_cancelled_requests_leave_and_the_others_do_not_notice(expected: list[list[int]]) -> None:
    engine, requests = make(), mixed()
    for request in requests:
        engine.submit(request)
    for _ in range(3):
        engine.step()
    running = [row.request for row in engine._scheduler.running]
    assert running and engine.num_waiting
    victims = [running[0], requests[-1]]
    for victim in victims:
        assert engine.cancel(victim.id)
        assert victim.finish_reason == "cancelled"
        assert not engine.cancel(victim.id)
    while engine.has_work:
        engine.step()
        engine.pages.check()
    for request, ids in zip(requests, expected, strict=True):
        known = victims if request in victims else []
        assert request.token_ids == (ids[: len(request.token_ids)] if known else ids)


def test_a_closed_run_cancels_what_is_left() -> None:
    engine, requests = make(), mixed()
    run = engine.run(requests)
    next(run)
    run.close()
    assert not engine.num_waiting and not engine.num_running
    assert drawn(engine, Request(prompt(5), greedy(3)))


def test_streamed_requests_get_each_token_as_it_is_drawn() -> None:
    engine, request = make(max_steps=16), Request(prompt(40), greedy(9), is_streamed=True)
    lengths = [len(each.token_ids) for each in engine.run([request])]
    assert lengths == list(range(1, 10))
    request = engine.submit(Request(prompt(40), greedy(9), is_streamed=True))
    rounds = engine.counts.rounds
    assert not engine.step() and engine.step() == [request] and len(request.token_ids) == 1
    assert engine.counts.rounds == rounds  # it did not wait for another launch
    finish(engine)


def test_streams_that_share_launches_of_several_steps_get_the_same_tokens() -> None:
    engine = make(max_steps=16)

    def draw() -> tuple[list[list[int]], int]:
        rounds = engine.counts.rounds
        streams = [Request(prompt(40, seed=i), sampled(i, 9), is_streamed=True) for i in range(3)]
        return drawn(engine, *streams), engine.counts.rounds - rounds

    one_by_one, _ = draw()
    engine.stream_steps = 4
    assert draw() == (one_by_one, 2)


def test_a_stream_has_the_same_text_however_many_tokens_come_at_once() -> None:
    def streamed(num_at_once: int) -> tuple[str, list[tuple[int, int]], list[int]]:
        texts = {1: "a", 2: "", 3: "bc"}
        decoder = SimpleNamespace(push=texts.__getitem__, flush=lambda: "")
        request = Request([1], greedy(9), decoder, stop_ids=frozenset([4]), is_streamed=True)
        ids, released = [2, 1, 3, 2, 2, 1, 4], []
        for start in range(0, len(ids), num_at_once):
            request.extend(ids[start : start + num_at_once], 9)
            released.append(request.released)
        assert (request.finish_reason, request.token_ids) == ("stop", ids)
        return request.text, request.silent, released

    one_by_one = streamed(1)
    assert one_by_one == ("abca", [(0, 0), (3, 3), (4, 3), (6, 4)], [0, 1, 3, 3, 3, 4, 4])
    for num in (2, 3, 7):
        text, silent, released = streamed(num)
        assert (text, silent) == one_by_one[:2]
        assert released == [*one_by_one[2][num - 1 :: num], 4][: len(released)]


def test_several_tokens_are_drawn_per_launch() -> None:
    engine = make(max_steps=16)
    finish(engine, Request(prompt(40), greedy(33)))
    assert engine.counts.rounds == 2 and engine.counts.drawn == 33


@pytest.mark.parametrize("with_error", [RuntimeError, KeyboardInterrupt], ids=str)
def test_a_failed_step_loses_nothing(
    expected: list[list[int]], monkeypatch: pytest.MonkeyPatch, with_error: type[BaseException]
) -> None:
    engine, requests, calls = make(), mixed(), []

    def fail(*arguments, **settings):
        calls.append(1)
        if len(calls) % 4 == 0:
            raise with_error
        return program(*arguments, **settings)

    from llama_jax.engine import batches as module

    engine.warmup(["tokens"])
    program = module.decode_steps
    monkeypatch.setattr(module, "decode_steps", fail)
    for request in requests:
        engine.submit(request)
    failed = 0
    with forbid_compile():
        while engine.has_work:
            try:
                engine.step()
            except with_error:
                failed += 1
    assert failed > 1
    assert [request.token_ids for request in requests] == expected


@pytest.mark.parametrize("num_speculative_tokens", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_bit_equal_alone_and_in_any_company(num_speculative_tokens: int) -> None:
    def run(engine: Engine, requests: list[Request]) -> list[tuple]:
        finish(engine, *requests)
        return [(tuple(r.token_ids), tuple(r.logprobs)) for r in requests]

    def requests() -> list[Request]:
        lengths = (3, 33, 64, 65, 150, 200)
        return [
            Request(prompt(n, seed=i), sampled(i, 20 + i, logprobs=0))
            for i, n in enumerate(lengths)
        ]

    options = {"batch_invariant": True, "num_speculative_tokens": num_speculative_tokens}
    together = run(make(**options), requests())
    assert together[::-1] == run(make(**options), requests()[::-1])
    engine = make(**options)
    assert together == [run(engine, [request])[0] for request in requests()]


@pytest.mark.slow
def test_nothing_compiles_after_warm_up() -> None:
    engine = make(num_pages=6, max_steps=3)
    assert engine.warmup().seconds > 0
    with forbid_compile():
        finish(engine, *mixed(), Request(prompt(70), output_kind="logits"),
               Request(prompt(200), output_kind="logprobs"))  # fmt: skip
    assert engine.counts.preempted + engine.pages.counts.evicted > 0


def test_the_queue_is_bounded() -> None:
    engine = make(max_waiting=2)
    first, second = (engine.submit(Request(prompt(4), greedy(2))) for _ in range(2))
    with pytest.raises(QueueFullError, match="2 requests are waiting already"):
        engine.submit(Request(prompt(4)))
    while engine.has_work:
        engine.step()
    assert first.token_ids == second.token_ids


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "a prompt of 0 tokens: between 1 and 255"),
        (Request(prompt(256)), "a prompt of 256 tokens: between 1 and 255"),
        (Request([1], output_kind="logprobs"), "a prompt of 1 tokens: between 2 and 256"),
        (Request([1, 2], output_kind="logprobs", score_from=3), "score_from 3 is not inside"),
        (Request(prompt(257), output_kind="logits"), "between 1 and 256"),
    ],
    ids=["empty", "long", "nothing to score", "score_from", "long for logits"],
)
def test_impossible_requests(request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().submit(request_)
