"""The scheduler alone, with a device that is played: nothing is compiled, and its pages hold
tokens, so that a call that reads what is not there is found out."""

from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.engine.plan import DecodeCall, Plan, PrefillCall
from llama_jax.engine.request import Request
from llama_jax.engine.scheduler import QueueFullError, Scheduler
from llama_jax.engine.scheduling import EngineCounts, EngineOptions
from llama_jax.engine.slots import PendingDraws, RunningSequence
from llama_jax.model.config import PAGE_SIZE
from llama_jax.sampling_params import SamplingParams

OPTIONS = EngineOptions(max_batch_size=3, max_seq_len=256, prefill_chunk=32, max_steps=4)
STOP = 999


class Grammar:
    """Stands for a matcher; the scheduler asks only whether there is one."""


@dataclass(eq=False)
class Ending(Request):
    """A request whose reply ends by a stop token after `length` tokens."""

    length: int = 10**9

    def reply(self, index: int) -> int:
        return STOP if index == self.length - 1 else 1000 + (7 * self.prompt[0] + index) % 50


def ask(prompt: list[int], count: int = 8, length: int = 10**9, **fields) -> Ending:
    params = SamplingParams(temperature=0, seed=0, max_new_tokens=count)
    return Ending(prompt, params, stop_ids=frozenset([STOP]), length=length, **fields)


def text(size: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, size).tolist()


class Device:
    """Plays the engine and its device: carries plans out, and takes results in a round later.

    drafts: numbers of draft tokens that are accepted at a step, in turn. waits: whether results are
    taken in within their own round.
    """

    def __init__(
        self,
        stops_early: bool = True,
        drafts: tuple[int, ...] = (0,),
        waits: bool = False,
        **changes,
    ) -> None:
        self.options = replace(OPTIONS, **changes)
        self.counts = EngineCounts()
        self.scheduler = Scheduler(self.options, self.counts, stops_early)
        self.stops_early, self.waits = stops_early, waits
        self.drafts, self.num_steps = drafts, 0
        self.pages = np.full((self.options.pool_size, PAGE_SIZE), -1)
        batch = self.options.max_batch_size
        self.cached_lens, self.remaining = np.zeros((2, batch), int)
        self.drawn = np.zeros(batch, int)  # tokens of the reply so far
        self.results: deque[tuple] = deque()
        self.plans: list[Plan] = []

    def submit(self, *requests: Ending) -> None:
        for request in requests:
            self.scheduler.add(request)

    def round(self) -> Plan:
        latest = self.results[-1] if self.results else None
        while not (plan := self.scheduler.schedule(bool(self.results))):
            assert self.results  # it is not asked for twice
            self.collect_all()
        self.plans.append(plan)
        for admission in plan.admissions:
            if admission.page_copy:
                source, target = admission.page_copy
                self.pages[target] = self.pages[source]
            slot = admission.sequence.slot
            self.cached_lens[slot], self.remaining[slot] = admission.num_cached, 0
        for decode in plan.decodes:
            self.decode(decode, plan)
        for prefill in plan.prefills:
            self.prefill(prefill, plan)
        while latest in self.results or (self.waits and self.results):
            self.collect()
        self.check()
        return plan

    def finish(self) -> None:
        for _ in range(5000):
            if not (self.scheduler.num_waiting or self.scheduler.running or self.results):
                break
            self.round()
        assert not self.scheduler.num_waiting and not self.scheduler.running
        assert self.scheduler.pages.num_available == self.options.pool_size
        assert not self.scheduler.slots.starting and not self.scheduler.slots.num_streamed

    # The device.

    def write(self, table: np.ndarray, slot: int, tokens: list[int]) -> None:
        """Store tokens after those that a slot has."""
        for token in tokens:
            place = self.cached_lens[slot]
            page = table[slot, place // PAGE_SIZE]
            assert page < self.options.pool_size, "no page for a token"
            self.pages[page, place % PAGE_SIZE] = token
            self.cached_lens[slot] += 1

    def read(self, table: np.ndarray, slot: int) -> list[int]:
        length = int(self.cached_lens[slot])
        return self.pages[table[slot, : -(-length // PAGE_SIZE)]].ravel()[:length].tolist()

    def prefill(self, call: PrefillCall, plan: Plan) -> None:
        assert len(call.chunks) <= call.shape[0]
        for chunk in call.chunks:
            sequence = chunk.sequence
            assert sequence.request.output_kind == call.output_kind
            assert 0 < chunk.stop - chunk.start <= call.shape[1]
            assert self.cached_lens[sequence.slot] == chunk.start
            part = sequence.tokens[chunk.start : chunk.stop]
            self.write(plan.page_table, sequence.slot, part)
            assert self.read(plan.page_table, sequence.slot) == sequence.tokens[: chunk.stop]
        if call.output_kind == "tokens":
            for _, sequence in call.ended:
                slot, request = sequence.slot, sequence.request
                self.drawn[slot] = len(request.token_ids)
                self.remaining[slot] = sequence.max_new_tokens - len(request.token_ids)
                self.results.append(("first", sequence, self.draw(sequence, 1)))
        else:
            self.results.append(("prompts", [each for _, each in call.ended]))

    def draw(self, sequence: RunningSequence, count: int) -> list[int]:
        slot, request = sequence.slot, sequence.request
        tokens: list[int] = []
        while len(tokens) < count and self.remaining[slot]:
            tokens.append(request.reply(int(self.drawn[slot])))
            self.drawn[slot] += 1
            self.remaining[slot] = 0 if tokens[-1] == STOP else self.remaining[slot] - 1
        return tokens

    def decode(self, call: DecodeCall, plan: Plan) -> None:
        draws, steps = call.draws, call.steps
        slots = np.flatnonzero(draws.max_counts)
        assert len(slots) and (draws.max_counts >= 0).all()
        if not self.stops_early and not call.structured:
            assert steps in self.scheduler.step_counts
        self.check_structured(call)
        most = 1 + self.options.num_speculative_tokens
        if call.structured:
            self.collect_all()
            most = 1 + (self.options.max_forced_tokens if self.drafts[0] else 0)
            draws, steps = self.scheduler.slots.limit(draws, most), 1
        tokens = {}
        for slot in np.flatnonzero(draws.max_counts).tolist():
            sequence, drawn = draws.sequences[slot], []
            for _ in range(steps):
                if not self.remaining[slot]:
                    break
                accepted = self.drafts[self.num_steps % len(self.drafts)]
                self.num_steps += 1
                newest = sequence.request.reply(int(self.drawn[slot]) - 1)
                new = self.draw(sequence, min(1 + accepted, most))
                self.write(plan.page_table, slot, [newest, *new[:-1]])
                drawn += new
            reply = [sequence.request.reply(i) for i in range(int(self.drawn[slot]) - 1)]
            assert self.read(plan.page_table, slot) == sequence.request.prompt + reply
            tokens[slot] = drawn
        self.results.append(("draws", draws, tokens))

    def check_structured(self, call: DecodeCall) -> None:
        with_grammar = [
            sequence
            for slot in np.flatnonzero(call.draws.max_counts)
            if (sequence := call.draws.sequences[slot]).request.matcher
        ]
        assert list(call.structured) == with_grammar
        if call.structured:
            assert call.steps == 1 and call.kind == "everything"
            if self.options.batch_invariant:
                assert len(with_grammar) == np.count_nonzero(call.draws.max_counts)

    # The host.

    def collect(self) -> None:
        kind, *result = self.results.popleft()
        if kind == "first":
            sequence, tokens = result
            self.scheduler.slots.starting.discard(sequence)
            self.extend(sequence, tokens)
        elif kind == "draws":
            self.take_draws(*result)
        else:
            for sequence in result[0]:
                if not sequence.request.finish_reason:
                    sequence.request.finish_reason = "length"
                    self.scheduler.leave(sequence)

    def take_draws(self, draws: PendingDraws, tokens: dict[int, list[int]]) -> None:
        counts = np.array([len(tokens.get(i, ())) for i in range(self.options.max_batch_size)])
        self.scheduler.slots.settle(draws, counts)
        for slot, ids in tokens.items():
            self.extend(draws.sequences[slot], ids)

    def extend(self, sequence: RunningSequence, tokens: list[int]) -> None:
        request = sequence.request
        if request.finish_reason or not tokens:
            return
        assert request.extend(tokens, sequence.max_new_tokens) == len(tokens)
        if request.finish_reason:
            self.scheduler.leave(sequence)

    def collect_all(self) -> None:
        while self.results:
            self.collect()

    def check(self) -> None:
        """What holds after every round."""
        scheduler, slots = self.scheduler, self.scheduler.slots
        scheduler.pages.check()
        owned = [page for each in scheduler.running for page in each.pages]
        for page in range(self.options.pool_size):
            assert scheduler.pages.owners(page) == owned.count(page)
        assert len({each.slot for each in scheduler.running}) == len(scheduler.running)
        assert len(scheduler.running) <= self.options.max_batch_size
        if not self.results:  # bounds are exact when nothing is on its way
            for each in scheduler.running:
                if not each.is_prefilling and each.request.output_kind == "tokens":
                    drawn = len(each.request.token_ids)
                    assert slots.min_remaining[each.slot] == each.max_new_tokens - drawn
                    for more in (1, PAGE_SIZE, 2 * PAGE_SIZE):  # the newest is not stored yet
                        pages = -(-(len(each.request.prompt) + drawn - 1 + more) // PAGE_SIZE)
                        counts = np.full(self.options.max_batch_size, more)
                        missing = slots.num_missing_pages(counts)[each.slot]
                        assert missing == max(0, pages - len(each.pages))
        plan = self.plans[-1]
        new = sum(call.num_new_tokens for call in plan.prefills)
        steps = max((call.steps for call in plan.decodes), default=1)
        assert new < self.options.prefill_budget * steps + self.options.prefill_chunk
        if any(each.request.is_streamed for each in scheduler.running):
            most = scheduler.stream_steps
            assert all(call.steps <= most for call in plan.decodes) or len(plan.admissions)


def test_first_come_first_served() -> None:
    device = Device()
    requests = [ask(text(10, seed=i)) for i in range(5)]
    device.submit(*requests)
    plan = device.round()
    assert [each.sequence.request for each in plan.admissions] == requests[:3]
    assert device.scheduler.num_waiting == 2 and requests[0].id < requests[1].id
    device.finish()
    admitted = [each.sequence.request for plan in device.plans for each in plan.admissions]
    assert admitted == requests
    assert [len(each.token_ids) for each in requests] == [8] * 5


def test_a_large_request_is_not_overtaken() -> None:
    device = Device(num_pages=4)
    first, large, small = ask(text(100), 20), ask(text(180, seed=1)), ask(text(3, seed=2))
    device.submit(first, large, small)
    assert len(device.round().admissions) == 1  # three more pages are needed, and there are two
    device.finish()
    admitted = [each.sequence.request for plan in device.plans for each in plan.admissions]
    assert admitted == [first, large, small]


def test_admission_leaves_a_page_for_each_that_runs() -> None:
    device = Device(num_pages=4)
    first, second, third = (ask(text(60, seed=i), 10) for i in range(3))
    device.submit(first, second, third)
    device.round()
    assert [each.request for each in device.scheduler.running] == [first, second]  # two are left
    device.finish()
    assert not device.counts.preempted


def test_a_round_takes_its_budget_of_prompts() -> None:
    device = Device(prefill_budget=40)
    device.submit(*(ask(text(100, seed=i)) for i in range(3)))
    plan = device.round()
    taken = [chunk.stop - chunk.start for call in plan.prefills for chunk in call.chunks]
    assert len(plan.admissions) == 3
    assert sum(taken) == 64  # two chunks, of which the second began within the budget
    device.finish()


def test_prompts_of_one_round_share_calls_by_what_is_wanted() -> None:
    device = Device(prefill_chunk=32, max_batch_size=4)
    device.submit(
        ask(text(2)), ask(text(33, seed=1), output_kind="logprobs"), ask(text(2, seed=2)),
        ask(text(40, seed=3), output_kind="logits"),
    )  # fmt: skip
    calls = device.round().prefills
    assert [call.output_kind for call in calls[:3]] == ["tokens", "logprobs", "logits"]
    assert [len(call.chunks) for call in calls[:3]] == [2, 1, 1] and calls[2].shape[0] == 1
    device.finish()


def test_the_last_admitted_gives_its_pages_back() -> None:
    device = Device(num_pages=5)
    requests = [ask(text(60, seed=i), 150) for i in range(3)]
    device.submit(*requests)
    seen = []
    while not device.counts.preempted:
        before = list(device.scheduler.running)
        device.round()
        seen = before
    running = [each.request for each in device.scheduler.running]
    assert len(seen) == 3 and running == requests[:2]
    assert device.scheduler.num_waiting == 1
    device.finish()
    assert [len(each.token_ids) for each in requests] == [150] * 3


def test_results_are_asked_for_before_anyone_is_preempted() -> None:
    device = Device(num_pages=4, max_batch_size=2)
    # Both have ended before they come to need the pages that they might have needed.
    device.submit(ask(text(60), 150, length=5), ask(text(60, seed=1), 150, length=5))
    device.round()
    while device.scheduler.running:
        assert device.scheduler.pages.num_available >= 0
        device.round()
    assert not device.counts.preempted

    scheduler = Scheduler(replace(OPTIONS, num_pages=4, max_batch_size=2), EngineCounts(), True)
    first, second = ask(text(63), 190), ask(text(100, seed=1), 120)
    for request in (first, second):
        scheduler.add(request)
    while scheduler.slots.prefilling or scheduler.num_waiting:
        assert scheduler.schedule(results_are_coming=True)
    plans = [scheduler.schedule(results_are_coming=True) for _ in range(40)]
    assert plans[0] is not None and plans[-1] is None  # the last page is gone
    assert len(scheduler.running) == 2
    plan = scheduler.schedule(results_are_coming=False)
    assert plan is not None and [each.request for each in scheduler.running] == [first]


def test_prefixes_are_shared_and_waited_for() -> None:
    device = Device(prefill_budget=64)
    prefix = text(150)
    first, second = ask([*prefix, 1]), ask([*prefix, 2, 3])
    device.submit(first, second)
    assert [each.sequence.request for each in device.round().admissions] == [first]
    device.finish()
    assert first.num_cached == 0 and second.num_cached == 128  # the full pages
    third = ask([*prefix, 4, 5])
    device.submit(third)
    device.finish()
    assert third.num_cached == 150 and device.scheduler.pages.counts.hit == 128 + 150
    copies = [each.page_copy for plan in device.plans for each in plan.admissions]
    assert copies[0] is None and copies[-1] is not None  # in the middle of the third page


def test_batch_invariant_prompts_go_alone_and_pages_are_reserved() -> None:
    device = Device(batch_invariant=True, num_pages=8)
    requests = [ask(text(40), 100), ask(text(40), 100), ask(text(40), 100)]
    device.submit(*requests)
    plan = device.round()
    assert [len(each.sequence.pages) for each in plan.admissions] == [3, 3]  # 140 tokens
    assert all(call.shape[0] == len(call.chunks) == 1 for call in plan.prefills)
    device.finish()
    assert not device.counts.preempted and not any(each.num_cached for each in requests)


def steps_of(device: Device) -> list[int]:
    return [call.steps for plan in device.plans for call in plan.decodes]


def test_launches_that_may_stop_early_draw_what_is_left() -> None:
    device = Device()
    device.submit(ask(text(5), 12))
    device.finish()
    assert steps_of(device) == [4, 4, 3]
    device = Device()
    device.submit(ask(text(5), 12, is_streamed=True))
    device.finish()
    assert steps_of(device) == [1] * 11


def test_streams_share_a_launch_of_several_steps_while_every_slot_is_taken() -> None:
    device = Device()
    device.scheduler.stream_steps = 3
    device.submit(*[ask(text(5, seed=i), 9, is_streamed=True) for i in range(2)])
    device.finish()
    assert steps_of(device) == [1] * 8  # a third one would not have to wait
    device = Device()
    device.scheduler.stream_steps = 3
    device.submit(*[ask(text(5, seed=i), 9, is_streamed=i == 0) for i in range(3)])
    device.finish()
    assert steps_of(device) == [3, 3, 2]
    device = Device(stops_early=False)
    device.scheduler.stream_steps = 3  # where a launch has one step or all of them
    device.submit(*[ask(text(5, seed=i), 9, is_streamed=True) for i in range(3)])
    device.finish()
    assert set(steps_of(device)) == {1}


def test_first_tokens_of_streams_are_awaited_if_nothing_else_is_to_be_done() -> None:
    def after_prefill(*are_streamed: bool) -> Device:
        device = Device()
        for i, is_streamed in enumerate(are_streamed):
            device.submit(ask(text(5, seed=i), is_streamed=is_streamed))
        device.round()
        return device

    device = after_prefill(True, True)
    assert device.scheduler.awaits_first_tokens
    device.collect_all()
    assert not device.scheduler.awaits_first_tokens  # there is something to draw
    assert not after_prefill(True, False).scheduler.awaits_first_tokens
    assert not after_prefill(*[True] * 4).scheduler.awaits_first_tokens  # one waits for a slot
    device = after_prefill(True)
    device.collect_all()
    device.submit(ask(text(5, seed=1), is_streamed=True))
    device.round()
    assert not device.scheduler.awaits_first_tokens  # the first one draws


def test_launches_of_fixed_length_take_one_step_or_all() -> None:
    device = Device(stops_early=False)
    device.submit(ask(text(5), 12))
    device.finish()
    assert set(steps_of(device)) == {1, 4} and steps_of(device)[0] == 1
    kinds = {call.kind for plan in device.plans for call in plan.decodes}
    assert kinds == {"greedy"}
    invariant = Device(stops_early=False, batch_invariant=True)
    invariant.submit(ask(text(5), 12))
    invariant.finish()
    assert set(steps_of(invariant)) == {1}


def test_requests_that_come_and_go_one_by_one_leave_launches_long() -> None:
    """32 slots, of which one is free at every other step, and somebody always waiting for it."""
    device = Device(stops_early=False, max_batch_size=32, max_steps=8, num_pages=128)
    device.submit(*(ask(text(10, seed=i), 2 + 2 * i) for i in range(32)))
    device.submit(*(ask(text(10, seed=i), 64) for i in range(32, 400)))
    for _ in range(60):
        device.round()
    assert steps_of(device)[-50:] == [8] * 50
    plans = device.plans[-50:]
    assert sum(len(plan.admissions) for plan in plans) == pytest.approx(50 * 8 / 2, rel=0.25)
    drawing = [np.count_nonzero(call.draws.max_counts) for plan in plans for call in plan.decodes]
    assert np.mean(drawing) >= 32 * (1 - 1 / 4)


def test_launches_are_short_where_many_slots_would_idle() -> None:
    device = Device(stops_early=False, max_batch_size=8, max_steps=4, num_pages=32)
    device.submit(*(ask(text(10, seed=i), 40) for i in range(4)))
    device.round()  # the prompts
    device.round()  # first tokens are on their way
    device.round()
    device.submit(*(ask(text(10, seed=i), 40) for i in range(4, 7)))
    device.round()  # three of seven have a prompt to go through
    device.round()  # and wait for their first token
    device.round()
    assert steps_of(device) == [1, 4, 1, 1, 4]


def test_a_structured_reply_goes_step_by_step() -> None:
    device = Device()
    device.submit(ask(text(5), 9, matcher=Grammar()), ask(text(6), 9))
    device.finish()
    assert set(steps_of(device)) == {1}
    device = Device(batch_invariant=True)
    device.submit(ask(text(5), 9, matcher=Grammar()), ask(text(6), 9))
    device.finish()
    assert {len(plan.decodes) for plan in device.plans} >= {2}


def test_a_restart_keeps_requests_in_order() -> None:
    device = Device()
    requests = [ask(text(70, seed=i), 30) for i in range(5)]
    device.submit(*requests)
    for _ in range(4):
        device.round()
    had = [list(each.token_ids) for each in requests]
    device.results.clear()
    device.scheduler.restart()
    assert any(had) and not device.scheduler.running and device.scheduler.num_waiting == 5
    device.finish()
    assert [each.token_ids[: len(ids)] for each, ids in zip(requests, had, strict=True)] == had
    assert all(each.token_ids == [each.reply(i) for i in range(30)] for each in requests)


def test_the_queue_is_bounded() -> None:
    device = Device(max_waiting=1)
    device.submit(ask(text(4)))
    with pytest.raises(QueueFullError, match="1 requests are waiting already"):
        device.submit(ask(text(4)))


def test_a_request_that_cannot_be_admitted_ends_alone() -> None:
    device = Device()
    broken = ask(text(4))
    broken.params = None  # type: ignore[assignment]
    healthy = ask(text(5))
    device.submit(broken, healthy)
    plan = device.round()
    assert plan.failed == (broken,) and broken.finish_reason == "error"
    device.finish()
    assert len(healthy.token_ids) == 8


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from((0, 20, 64, 90, 128)),  # tokens of a common prefix
        st.sampled_from((1, 7, 40, 66)),  # and of its own
        st.sampled_from((1, 3, 10, 60)),  # tokens to draw
        st.sampled_from((2, 9, 10**9)),  # when it stops by itself
        st.booleans(),  # is streamed
        st.sampled_from(("tokens", "tokens", "tokens", "grammar", "logprobs", "logits")),
        st.integers(0, 6),  # rounds before it comes
        st.sampled_from((None, None, None, 1, 5)),  # rounds before it is cancelled
    ),
    min_size=1, max_size=9,
)  # fmt: skip


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    requests=REQUESTS,
    stops_early=st.booleans(),
    num_pages=st.integers(4, 9),
    prefill_chunk=st.sampled_from((5, 32, 256)),
    prefill_budget=st.sampled_from((1, 40, 500)),
    max_steps=st.sampled_from((1, 4, 70)),
    num_speculative_tokens=st.sampled_from((0, 3)),
    rules=st.sampled_from(({}, {"share_prefixes": False}, {"batch_invariant": True})),
    drafts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    waits=st.booleans(),
    stream_steps=st.sampled_from((1, 3)),
)
def test_every_request_ends_with_its_own_tokens(
    requests, stops_early, rules, drafts, waits, stream_steps, **changes
) -> None:
    device = Device(stops_early, tuple(drafts), waits, **changes, **rules)
    device.scheduler.stream_steps = stream_steps
    coming = []
    for i, (common, own, count, length, is_streamed, kind, at, cancelled) in enumerate(requests):
        prompt = [*text(common), *text(own + 1, seed=i + 1)]
        fields = {"matcher": Grammar()} if kind == "grammar" else {"output_kind": kind}
        if kind == "grammar":
            fields["output_kind"] = "tokens"
        request = ask(prompt, count, length, is_streamed=is_streamed, **fields)
        coming.append((at, request, None if cancelled is None else at + cancelled))
    for now in range(12):
        for at, request, cancelled in coming:
            if at == now:
                device.submit(request)
            if cancelled == now and device.scheduler.find(request.id):
                request.cancel()
                device.scheduler.remove(request)
        device.round()
    device.finish()
    for _, request, cancelled in coming:
        assert request.finish_reason in ("stop", "length", "cancelled")
        assert (request.finish_reason == "cancelled") <= (cancelled is not None)
        ids = request.token_ids
        assert ids == [request.reply(i) for i in range(len(ids))]
        if request.output_kind == "tokens" and request.finish_reason != "cancelled":
            assert len(ids) == min(request.params.max_new_tokens, request.length)
