"""What is raised in the work for one request ends that request: at random places, beside healthy
requests, whose tokens must not change, and with an engine that goes on."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Request
from llama_jax.sampling_params import SamplingParams
from tests.test_engine import VOCAB, alone, drawn, finish, greedy, make, prompt, sampled

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PLACES = ("push", "flush", "stop string", "on_change", "settings")


@dataclass
class Fault:
    """Raises `error` at the `after`-th call of `place`, from 0, and at each one after it; an
    interrupt only once."""

    place: str = ""
    after: int = 0
    error: BaseException = field(default_factory=ValueError)
    was_raised: bool = False

    def pass_by(self, place: str) -> None:
        if place == self.place:
            self.after -= 1
            is_over = self.was_raised and isinstance(self.error, KeyboardInterrupt)
            if self.after < 0 and not is_over:
                self.was_raised = True
                raise self.error


class Decoder:
    """A letter for each token."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def push(self, token_id: int) -> str:
        self.fault.pass_by("push")
        return LETTERS[token_id % len(LETTERS)]

    def flush(self) -> str:
        self.fault.pass_by("flush")
        return ""


class StopString(str):
    fault: Fault | None = None

    def __len__(self) -> int:
        if self.fault:
            self.fault.pass_by("stop string")
        return super().__len__()


class Bias(Mapping[int, float]):
    fault: Fault | None = None

    def __getitem__(self, token_id: int) -> float:
        raise KeyError(token_id)

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[int]:
        if self.fault:
            self.fault.pass_by("settings")
        return iter(())


def faulty(fault: Fault, params: SamplingParams, is_streamed: bool, has_stop: bool) -> Request:
    """A request that passes each place of `PLACES`."""
    stop, bias = StopString("~"), Bias()
    params = replace(params, stop=(stop,) if has_stop else (), logit_bias=bias)
    stop.fault = bias.fault = fault
    return Request(
        prompt(30), params, Decoder(fault), is_streamed=is_streamed,
        on_change=lambda _: fault.pass_by("on_change"),
    )  # fmt: skip


HEALTHY = [
    (prompt(20, seed=1), greedy(12)),
    (prompt(70, seed=2), sampled(1, 9)),
    (prompt(40, seed=3), sampled(2, 20, logprobs=1)),
    (prompt(5, seed=4), greedy(3)),
]


@cache
def undisturbed() -> list[list[int]]:
    engine = alone()
    return [drawn(engine, Request(*each))[0] for each in HEALTHY]


ERRORS = st.sampled_from((ValueError, MemoryError, KeyError, KeyboardInterrupt))
FAULTS = st.lists(
    st.tuples(
        st.sampled_from(PLACES), st.integers(0, 8), ERRORS, st.booleans(), st.booleans(),
        st.sampled_from((False, False, True)),  # whether it is cancelled on the way
    ),
    min_size=1, max_size=4,
)  # fmt: skip


@settings(max_examples=30, deadline=None, derandomize=True)
@given(faults=FAULTS, order=st.randoms(use_true_random=False), steps=st.integers(0, 6))
def test_an_error_ends_its_own_request_alone(faults, order, steps) -> None:
    engine = shared_engine()
    healthy = [Request(*each, decoder=Decoder(Fault()), is_streamed=i == 0)
               for i, each in enumerate(HEALTHY)]  # fmt: skip
    broken = [
        (Fault(place, after, error()), faulty_params, is_cancelled)
        for place, after, error, *faulty_params, is_cancelled in faults
    ]
    broken = [(fault, faulty(fault, greedy(6, seed=0), *how), last) for fault, how, last in broken]
    requests = [*healthy, *(request for _, request, _ in broken)]
    order.shuffle(requests)
    for request in requests:
        engine.submit(request)
    for _ in range(steps):
        with suppress(KeyboardInterrupt):
            engine.step()
    for _, request, is_cancelled in broken:
        was_there = request.finish_reason is None
        if is_cancelled:
            with suppress(KeyboardInterrupt):
                assert engine.cancel(request.id) == was_there
            assert request.finish_reason
    finish_all(engine)
    assert [request.token_ids for request in healthy] == undisturbed()
    for fault, request, _ in broken:
        assert request.finish_reason in ("length", "cancelled", "error")
        if request.finish_reason == "error":
            assert request.error is fault.error and fault.was_raised
        elif request.finish_reason == "length":
            assert request.error is None and len(request.token_ids) == 6
            # An interrupt of what holds nothing of the request half done costs it nothing.
            is_interrupt = isinstance(fault.error, KeyboardInterrupt)
            assert not fault.was_raised or is_interrupt


@cache
def shared_engine() -> Engine:
    return make(prefill_budget=40)


def finish_all(engine: Engine) -> None:
    for _ in range(500):
        if not engine.has_work:
            break
        with suppress(KeyboardInterrupt):
            engine.step()
    assert not engine.has_work and not engine.num_running and not engine.num_waiting
    engine.pages.check()
    assert engine.pages.num_available == engine.pages.num_pages


@pytest.mark.parametrize("place", PLACES)
def test_the_error_is_the_result(place: str) -> None:
    engine, fault = shared_engine(), Fault(place)
    request = faulty(fault, greedy(6, seed=0), is_streamed=place != "flush", has_stop=True)
    (last,) = [each for each in engine.run([request]) if each.finish_reason] or [request]
    if place == "on_change":  # `run` has its own
        request = faulty(fault, greedy(6, seed=0), is_streamed=True, has_stop=True)
        engine.submit(request)
    else:
        assert last is request
    finish_all(engine)
    assert request.finish_reason == "error" and request.error is fault.error


def test_what_a_request_with_bad_settings_leaves_in_the_cache_is_right() -> None:
    """Its pages were planned with: one is copied for it and the others filled, though it ends."""
    engine, prefix = make(), prompt(100)
    finish(engine, Request(prefix, greedy(5)))
    fault, text = Fault("settings"), [*prefix[:90], *prompt(60, seed=5)]
    broken = faulty(fault, greedy(6, seed=0), is_streamed=False, has_stop=False)
    broken.prompt = text
    finish(engine, broken)
    assert broken.error is fault.error and broken.num_cached == 90
    again = Request([*text, *prompt(5, seed=6)], greedy(8))
    (tokens,) = drawn(engine, again)
    assert again.num_cached == 149
    single = alone()
    assert [tokens] == drawn(single, Request(again.prompt, again.params))


def test_whoever_was_not_told_because_of_an_interrupt_is_told_next_time() -> None:
    engine, told = shared_engine(), []
    first = Request(prompt(5), greedy(1), on_change=Interrupts())
    second = Request(prompt(6), greedy(1), on_change=told.append)
    for request in (first, second):
        engine.submit(request)
    with pytest.raises(KeyboardInterrupt):
        list(iter(engine.step, None))
    assert second.finish_reason == "length" and not told and engine.has_work
    finish_all(engine)
    assert told == [second] and first.finish_reason == "length"


class Interrupts:
    """Raises KeyboardInterrupt the first time."""

    def __init__(self) -> None:
        self.was_called = False

    def __call__(self, _: Request) -> None:
        if not self.was_called:
            self.was_called = True
            raise KeyboardInterrupt


def test_a_callback_may_cancel() -> None:
    engine = shared_engine()
    other = Request(prompt(9), greedy(50))
    request = Request(prompt(8), greedy(50), is_streamed=True)

    def cancel(changed: Request) -> None:
        if changed.finish_reason is None:
            assert engine.cancel(changed.id) and engine.cancel(other.id)

    request.on_change = cancel
    for each in (other, request):
        engine.submit(each)
    finish_all(engine)
    assert request.finish_reason == other.finish_reason == "cancelled"
    assert len(request.token_ids) == 1


@pytest.mark.parametrize("ids", [[VOCAB], [-1], [2**40], [1.5], ["a"]], ids=str)
def test_a_prompt_that_the_model_cannot_read_is_refused(ids: list) -> None:
    with pytest.raises(ValueError, match=r"token ids in \[0, 64\)"):
        shared_engine().submit(Request([1, *ids]))
