"""How the news of a step becomes server-sent events, without a server or a model."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram

from llama_jax.engine.request import Request
from llama_jax.serve import engine_thread
from llama_jax.serve.completions import CompletionPieces
from llama_jax.serve.engine_thread import EngineThread, Submission, Update
from llama_jax.serve.errors import ApiError, ClientGone
from llama_jax.serve.events import EventStream
from llama_jax.serve.metrics import PER_TOKEN, TokenIntervals
from llama_jax.serve.schemas import CompletionRequest


def update(text: str, is_last: bool = False) -> Update:
    return Update(0, Request([1]), text, [2], [], [], is_last, 0.0)


class Texts:
    """Pieces with each update's text, and with its length unless that is 0."""

    def of(self, update: Update) -> Iterator[dict]:
        yield {"text": update.text}
        if not update.text:
            raise ApiError(400, "no text")
        yield {"length": len(update.text)}

    def end(self) -> Iterator[dict]:
        yield {"usage": 1}


def bodies(*steps: list[Update]) -> list[bytes]:
    """What is written to the socket, write by write."""

    async def updates() -> AsyncIterator[list[Update]]:
        for each in steps:
            yield each

    async def sent() -> list[bytes]:
        stream = EventStream(Submission([], True, owner := Owner()), updates(), Texts())
        messages: list[dict] = []

        async def send(message: dict) -> None:
            messages.append(message)

        async def receive() -> dict:
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")

        await stream({"type": "http"}, receive, send)
        assert owner.num_closed == 1
        assert messages[0]["status"] == 200 and not messages[-1]["more_body"]
        return [each["body"] for each in messages[1:]]

    return asyncio.run(sent())


class Owner:
    """Counts how often a submission was closed."""

    num_closed = 0

    def close(self, submission: Submission) -> None:
        self.num_closed += 1


def test_what_comes_together_is_written_together_and_stays_separate_events():
    written = bodies([update("a"), update("bc")], [update("d", is_last=True)])
    assert written[:2] == [
        b'data: {"text":"a"}\n\ndata: {"length":1}\n\n'
        b'data: {"text":"bc"}\n\ndata: {"length":2}\n\n',
        b'data: {"text":"d"}\n\ndata: {"length":1}\n\n',
    ]
    assert b"".join(written[2:]) == b'data: {"usage":1}\n\ndata: [DONE]\n\n'


def test_a_mistake_ends_a_stream_after_what_came_before_it():
    written = b"".join(bodies([update("a"), update(""), update("b")], [update("c")]))
    events = written.decode().split("\n\n")
    assert events[:3] == ['data: {"text":"a"}', 'data: {"length":1}', 'data: {"text":""}']
    assert '"message":"no text"' in events[3]
    assert events[4:] == ["data: [DONE]", ""]


def test_the_first_token_of_a_completion_is_an_event_even_without_text():
    """Clients measure the time to it; other tokens without text are none."""
    service = SimpleNamespace(name="m", llm=SimpleNamespace(tokenizer=None))
    stream = Submission([Request([1])], True, Owner())
    pieces = CompletionPieces(service, CompletionRequest(prompt=[1]), stream)
    told = [[each["choices"][0]["text"] for each in pieces.of(update(t))] for t in ("", "", "a")]
    assert told == [[""], [], ["a"]]


def test_a_stream_whose_client_leaves_is_closed_and_says_so():
    async def run() -> None:
        owner = SimpleNamespace(loop=asyncio.get_running_loop(), close=closed.append)
        submission = Submission([], True, owner)

        async def updates() -> AsyncIterator[list[Update]]:
            while True:
                yield await submission.next()

        async def receive() -> dict:
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            pass

        with pytest.raises(ClientGone):
            await EventStream(submission, updates(), Texts())({"type": "http"}, receive, send)
        assert set(closed) == {submission}

    closed: list[Submission] = []
    asyncio.run(run())


def test_an_update_wakes_no_layer_around_the_stream():
    """Bodies are written in a task of their own, since there are two dozen layers."""

    async def run() -> None:
        waiter = asyncio.get_running_loop().create_future()
        around: list[asyncio.Task | None] = []

        async def updates() -> AsyncIterator[list[Update]]:
            await waiter
            yield [update("a", is_last=True)]

        async def receive() -> dict:
            await asyncio.Event().wait()
            raise AssertionError("nobody sets it")

        async def send(message: dict) -> None:
            around.append(asyncio.current_task())
            waiter.done() or waiter.set_result(None)

        submission = Submission([], True, Owner())
        await EventStream(submission, updates(), Texts())({"type": "http"}, receive, send)
        start, *bodies = around
        assert start is asyncio.current_task() and len(set(bodies)) == 1 and start not in bodies

    asyncio.run(run())


def test_intervals_are_counted_as_prometheus_client_counts_them():
    draw = np.random.default_rng(0)
    waits = [*draw.lognormal(-3, 3, 300).tolist(), *PER_TOKEN]  # a bound belongs to its bucket
    counts = [*draw.integers(1, 5, 300).tolist(), *[1] * len(PER_TOKEN)]
    labels = ["model_name", "engine"]
    ours, theirs = TokenIntervals(("abacus", "0")), CollectorRegistry()
    histogram = Histogram(
        "vllm:inter_token_latency_seconds", "", labels, buckets=PER_TOKEN, registry=theirs
    ).labels("abacus", "0")
    for seconds, tokens in zip(waits, counts, strict=True):
        ours.observe(seconds, tokens)
        for _ in range(tokens):
            histogram.observe(seconds / tokens)
    (found,), (expected,) = ours.collect(), theirs.collect()

    def values(metric) -> dict:
        samples = [each for each in metric.samples if not each.name.endswith("_created")]
        return {(each.name, tuple(sorted(each.labels.items()))): each.value for each in samples}

    assert values(found) == pytest.approx(values(expected))


class Clock(SimpleNamespace):
    """Stands for `time` in `engine_thread`."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(engine_thread, "time", made)
    return made


def idle_thread() -> EngineThread:
    """Return a thread that was not started, whose event loop does at once what it is told."""
    engine = SimpleNamespace(
        pages=SimpleNamespace(num_pages=1, num_available=1),
        stats=lambda: None,
        num_running=0,
        num_waiting=0,
        has_work=True,
    )
    thread = EngineThread(engine, *[lambda *arguments: None] * 5)

    def call_now(call, *arguments) -> None:
        call(*arguments)

    thread.loop = SimpleNamespace(call_soon_threadsafe=call_now, call_soon=call_now)
    return thread


class Letters:
    """Decodes a token to the letter of that number, and those below 10 to nothing."""

    def push(self, token_id: int) -> str:
        return chr(token_id) if token_id >= 10 else ""

    def flush(self) -> str:
        return ""


def streamed() -> Request:
    return Request([1], decoder=Letters(), is_streamed=True)


def draw(thread: EngineThread, stream: Submission, token_ids: list[int], ends: bool) -> None:
    """Let the only request of a stream have more tokens, by one launch."""
    (request,) = stream.requests
    count = len(request.token_ids) + len(token_ids)
    request.extend(token_ids, count if ends else 1000)
    thread._note(stream, 0, request)


def test_tokens_between_wait_while_there_are_many_streams(clock):
    """20 streams get 625 writes a second together, so each waits for 32 ms; first and last tokens
    do not, and nothing is lost or out of order. What has waited is one update."""
    thread = idle_thread()
    streams = [Submission([streamed()], True, thread, _remaining=1) for _ in range(20)]
    told, ids = [""] * 20, [list[int]() for _ in streams]

    def step(seconds: float, token: str, ends: int | None = None) -> list[int]:
        """Draw a token for each stream; return how many tokens each is told."""
        clock.now += seconds
        for i, stream in enumerate(streams):
            if not stream.requests[0].finish_reason:
                draw(thread, stream, [ord(token)], i == ends)
        thread._flush()
        counts = [sum(len(each.token_ids) for each in stream._updates) for stream in streams]
        for i, stream in enumerate(streams):
            assert len(stream._updates) <= 1
            told[i] += "".join(each.text for each in stream._updates)
            ids[i] += [token for each in stream._updates for token in each.token_ids]
            assert [each.is_last for each in stream._updates] in ([], [i == ends])
            stream._updates.clear()
        return counts

    assert step(0.0, "a") == [1] * 20
    assert step(0.010, "b") == [0] * 20
    assert step(0.010, "c", ends=7) == [0] * 7 + [2] + [0] * 12
    assert step(0.013, "d") == [3] * 7 + [0] + [3] * 12
    assert told == ["abcd"] * 7 + ["abc"] + ["abcd"] * 12
    assert ids == [[ord(letter) for letter in each] for each in told]
    assert step(0.031, "e") == [1] * 7 + [0] + [1] * 12  # 19 streams wait for 30.4 ms


@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_a_token_without_text_begins_an_update(clock, num_steps):
    """Otherwise the text before the token with which a tool call begins would be taken for the
    call's, however many tokens a launch draws."""
    thread = idle_thread()
    stream = Submission([streamed()], True, thread, _remaining=1)
    tag, end = 9, 8
    drawn = [ord("m"), ord("e"), tag, ord("{"), ord("}"), end]
    for start in range(0, len(drawn), num_steps):
        draw(thread, stream, drawn[start : start + num_steps], start + num_steps >= len(drawn))
    thread._flush()
    assert [(each.text, each.token_ids, each.is_last) for each in stream._updates] == [
        ("me", drawn[:2], False), ("{}", drawn[2:5], False), ("", [end], True),
    ]  # fmt: skip


def test_first_tokens_do_not_wait_for_the_snapshot_but_ends_do(clock):
    """Whoever has been told of an end finds it in /metrics, also while others go on."""
    thread, order = idle_thread(), list[str]()
    thread._look = lambda: order.append("look")
    thread._post = lambda *arguments: order.append("tell")
    for has_work in (True, False):
        stream = Submission([streamed()], True, thread, _remaining=1)
        for ends in (False, True):
            clock.now += 1.0
            thread._engine.has_work = has_work or not ends
            draw(thread, stream, [ord("a")], ends)
            thread._flush()
        assert order == ["tell", "look", "look", "tell"]
        order.clear()


def test_what_has_no_requests_is_not_kept():
    thread = idle_thread()
    thread._submit(Submission([], False, thread))
    assert not thread._submissions


def test_launches_take_as_long_as_tokens_wait_for_their_write():
    thread = idle_thread()
    engine = thread._engine
    engine.stream_steps, engine.options = 1, SimpleNamespace(max_steps=8, max_batch_size=4)
    engine.num_running = 4
    thread._wait = 0.0205
    steps = []
    for seconds in (0.006, 0.012, 0.018, 0.2, 0.001, 0.001, 0.001, 0.001):
        thread._set_steps(seconds)
        steps.append(engine.stream_steps)
    assert steps == [2, 3, 3, 1, 2, 4, 8, 8]
    engine.num_running = 3  # with a free slot a launch has one step, whatever it takes
    thread._set_steps(0.2)
    assert engine.stream_steps == 8
    engine.num_running = 4
    thread._wait = 0.0
    thread._set_steps(0.001)
    assert engine.stream_steps == 1


def test_a_token_without_text_that_was_told_of_begins_no_other_update(clock):
    thread = idle_thread()
    stream = Submission([streamed()], True, thread, _remaining=1)
    for token_ids in ([9], [ord("a")], [ord("b"), 9, ord("c")], [9]):
        draw(thread, stream, token_ids, ends=False)
        thread._urgent.add(stream)
        thread._flush()
    told = [(each.text, each.token_ids) for each in stream._updates]
    assert told == [("", [9]), ("a", [97]), ("b", [98]), ("c", [9, 99]), ("", [9])]


def test_a_cancelled_request_has_a_single_last_update_which_is_counted_and_not_read(clock):
    """Otherwise a stream that is past its deadline would have an end and then an error."""
    thread = idle_thread()
    stream = Submission([request := streamed()], True, thread, _remaining=1)
    ended: list[Request] = []
    thread._on_end = lambda submission, request: ended.append(request)
    made: list[Update] = []
    take = stream._take
    stream._take = lambda: made.extend(take()) or made
    draw(thread, stream, [ord("a")], False)
    request.cancel()
    thread._note(stream, 0, request)
    thread._flush()
    assert [(each.text, each.token_ids, each.is_last) for each in made] == [("a", [ord("a")], True)]
    assert ended == [request] and not stream._updates


def test_what_fails_is_cancelled_at_once_and_gets_no_more(clock):
    """Not when its reader looks, which may wait for a socket."""
    thread = idle_thread()
    thread._inbox = told = []
    stream = Submission([streamed()], True, thread, _remaining=1, num_open=1)
    draw(thread, stream, [ord("a")], False)
    thread._flush()
    stream.fail(ClientGone())
    assert [(each.func, each.args) for each in told] == [(thread._cancel, (stream,))]
    draw(thread, stream, [ord("b")], False)
    thread._urgent.add(stream)
    thread._flush()
    assert [each.text for each in stream._updates] == ["a"]
