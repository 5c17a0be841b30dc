"""The engine driven at random: whatever is submitted, stepped and cancelled in whatever order,
every token is the one that the request gets on its own, and no page is lost. So too with
speculation, with texts scored in between, and when steps fail."""

from contextlib import suppress
from functools import cache

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llama_jax.engine import batches as batches_module
from llama_jax.engine import engine as engine_module
from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Request
from llama_jax.engine.scheduler import QueueFullError
from llama_jax.model.params import init_params
from llama_jax.sampling_params import SamplingParams
from tests.test_engine import alone, drawn, finish, make, prompt
from tests.test_speculation import SMALL, with_draft

MAX_WAITING = 5
POOL = 5  # pages; each of the three rows may come to need four
SIZES = {"num_pages": POOL, "max_waiting": MAX_WAITING, "prefill_budget": 40}

PREFIXES = st.tuples(st.sampled_from((0, 20, 64, 90, 128)), st.sampled_from((0, 1)))
ENDINGS = st.tuples(st.sampled_from((1, 7, 40)), st.integers(2, 4))
SETTINGS = st.tuples(
    st.sampled_from((1, 3, 10, 60)),  # tokens to draw
    st.sampled_from((0.0, 1.0)),  # temperature
    st.sampled_from((None, 3)),  # a token that stops
)


alone_engine = cache(alone)


@cache
def tokens_alone(text: tuple[int, ...], count: int, temperature: float, stop: int | None):
    request = build(text, count, temperature, stop)
    return tuple(drawn(alone_engine(), request)[0])


@cache
def logprobs_alone(text: tuple[int, ...]) -> np.ndarray:
    (request,) = finish(alone_engine(), Request(list(text), output_kind="logprobs"))
    return request.prompt_logprobs


def build(text, count: int, temperature: float, stop: int | None, is_streamed=False) -> Request:
    params = SamplingParams(max_new_tokens=count, temperature=temperature, seed=7)
    stops = frozenset() if stop is None else frozenset([stop])
    return Request(list(text), params, stop_ids=stops, is_streamed=is_streamed)


class EngineMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engine = self.make()
        self.expected: dict[int, tuple[Request, tuple[int, ...]]] = {}

    def make(self) -> Engine:
        return make(**SIZES)

    @rule(prefix=PREFIXES, ending=ENDINGS, how=SETTINGS, is_streamed=st.booleans())
    def submit(self, prefix, ending, how, is_streamed) -> None:
        text = (*prompt(*prefix), *prompt(*ending))
        self.hand_in(build(text, *how, is_streamed), tokens_alone(text, *how))

    def hand_in(self, request: Request, wanted: tuple[int, ...]) -> None:
        if self.engine.num_waiting >= MAX_WAITING:
            with pytest.raises(QueueFullError):
                self.engine.submit(request)
            return
        self.engine.submit(request)
        self.expected[request.id] = request, wanted

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        chosen = data.draw(st.sampled_from(sorted(self.expected)))
        request, _ = self.expected[chosen]
        was_running = request.finish_reason is None
        assert self.engine.cancel(chosen) == was_running
        assert (request.finish_reason == "cancelled") >= was_running

    @invariant()
    def tokens_are_right_so_far(self) -> None:
        for request, ids in self.expected.values():
            assert tuple(request.token_ids) == ids[: len(request.token_ids)]
            if request.finish_reason in ("stop", "length"):
                assert tuple(request.token_ids) == ids

    @invariant()
    def pages_are_accounted_for(self) -> None:
        self.engine.pages.check()
        rows = self.engine._scheduler.running
        owned = [page for row in rows for page in row.pages]
        for page in range(POOL):
            assert self.engine.pages.owners(page) == owned.count(page)
        assert len(rows) <= 3 and len({row.slot for row in rows}) == len(rows)
        assert self.engine.num_waiting <= MAX_WAITING + 3  # preempted, or running as a step failed

    def teardown(self) -> None:
        while self.engine.has_work:
            self.engine.step()
        self.pages_are_accounted_for()
        assert not self.engine.num_running and self.engine.pages.num_available == POOL
        for request, ids in self.expected.values():
            assert request.finish_reason
            if request.finish_reason != "cancelled":
                assert tuple(request.token_ids) == ids


class SpeculatingMachine(EngineMachine):
    """Draft tokens are looked up; texts are scored in between, and steps fail."""

    def make(self) -> Engine:
        return make(**SIZES, num_speculative_tokens=3)

    @rule(prefix=PREFIXES, ending=ENDINGS, start=st.integers(1, 8))
    def score(self, prefix, ending, start) -> None:
        text = (*prompt(8), *prompt(*prefix), *prompt(*ending))
        self.hand_in(Request(list(text), output_kind="logprobs", score_from=start), ())

    @rule()
    def fail(self) -> None:
        def failing(*_, **__) -> None:
            raise ConnectionError

        failing.lower = failing  # a first launch compiles it in a thread
        with pytest.MonkeyPatch.context() as patch, suppress(ConnectionError):
            patch.setattr(batches_module, "decode_steps", failing)
            self.engine.step()

    @invariant()
    def logprobs_are_right(self) -> None:
        for request, _ in self.expected.values():
            if request.output_kind == "logprobs" and request.finish_reason == "length":
                alone = logprobs_alone(tuple(request.prompt))[request.score_from - 1 :]
                np.testing.assert_allclose(request.prompt_logprobs, alone, atol=1e-5)


class DraftMachine(SpeculatingMachine):
    def make(self) -> Engine:
        return with_draft(init_params(SMALL, seed=1), SMALL, **SIZES)


class FixedStepsMachine(SpeculatingMachine):
    """Launches have a fixed number of steps, as on a GPU."""

    def make(self) -> Engine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "has_free_conditions", lambda: False)
            return super().make()


for machine in (EngineMachine, SpeculatingMachine, DraftMachine, FixedStepsMachine):
    machine.TestCase.settings = settings(
        max_examples=15, stateful_step_count=25, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
TestEngine = EngineMachine.TestCase
TestSpeculatingEngine = pytest.mark.slow(SpeculatingMachine.TestCase)
TestDraftingEngine = pytest.mark.slow(DraftMachine.TestCase)
TestEngineOfFixedSteps = pytest.mark.slow(FixedStepsMachine.TestCase)
