"""What a server does when clients, limits or its engine misbehave."""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import openai
import pytest

from llama_jax import LLM, SamplingParams
from llama_jax.abacus.tasks import CALCULATOR
from llama_jax.cli.serve import curl_line
from llama_jax.engine.compile_cache import CompileReport
from llama_jax.serve import middleware
from llama_jax.serve import server as server_module
from llama_jax.serve.bench import Load, measure
from tests.served import PATIENCE, Served, serving

needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
ROOT = Path(__file__).parents[1]
SUM = [{"role": "user", "content": "What is 47 + 85?"}]
LONG = {"messages": SUM, "ignore_eos": True, "max_tokens": 400}


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Without the warm-up, see tests/test_serve.py."""
    llm = LLM.load(max_batch_size=4, max_seq_len=512, prefill_chunk=128, verbose=False)
    llm.warmup = lambda output_kinds, structured: CompileReport(0, 0, 0.0)
    return llm


@pytest.fixture(scope="module")
def server(llm):
    with serving(llm, max_waiting=4, api_keys=("right",)) as served:
        yield served


def eventually(holds: Callable[[], bool]) -> bool:
    ends = time.monotonic() + PATIENCE
    while not holds() and time.monotonic() < ends:
        time.sleep(0.02)
    return holds()


def assert_idle(served: Served) -> None:
    """Nothing is left of any request: no row, no page, no job."""
    thread, engine = served.service.thread, served.llm.engine
    assert eventually(lambda: thread.num_open == 0 and not engine.has_work)
    assert (thread.open_tokens, thread._submissions, thread._inbox) == (0, set(), [])
    assert engine.num_running == engine.num_waiting == 0
    assert engine.pages.num_available == engine.pages.num_pages
    engine.pages.check()


@contextmanager
def steps(llm: LLM, instead: Callable[[Callable[[], list]], list]) -> Iterator[None]:
    """Each step of the engine is `instead(step)`."""
    step = llm.engine.step
    llm.engine.step = lambda: instead(step)
    try:
        yield
    finally:
        llm.engine.step = step


def connection(served: Served) -> socket.socket:
    return socket.create_connection(served.url.removeprefix("http://").split(":"))


def slowly(step: Callable[[], list]) -> list:
    time.sleep(0.02)
    return step()


def stream(served: Served, key: str = "right", **changes) -> httpx2.Response:
    body = {**LONG, "stream": True, **changes}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.stream(
        "POST", f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE
    )


@needs_curl
def test_curl_is_answered(server):
    """The line that `llama-jax serve` prints, a stream, and a call of a tool."""

    def run(command: str) -> str:
        environment = os.environ | {"LLAMA_JAX_API_KEY": "right"}
        return subprocess.run(
            command, shell=True, check=True, capture_output=True, text=True, env=environment
        ).stdout

    printed = curl_line(server.service, server.url)
    assert json.loads(run(printed))["choices"][0]["message"]["content"] == "132"
    lines = run(printed.replace('{"model"', '{"stream": true, "model"') + " -N").split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "132"
    tools = f'{{"tools": {json.dumps([CALCULATOR])}, "tool_choice": "required", "model"'
    reply = json.loads(run(printed.replace('{"model"', tools)))
    (call,) = reply["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]).keys() == {"expression"}


@needs_curl
def test_a_client_killed_in_the_middle_of_a_stream(server, llm):
    """What it asked for ends, and others go on as if nothing were."""
    drawn = llm.engine.counts.drawn
    body = json.dumps(LONG | {"stream": True, "n": 3})
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-d", body]
    command += ["-H", "Content-Type: application/json", "-H", "Authorization: Bearer right"]
    with steps(llm, slowly), ThreadPoolExecutor(1) as pool:
        other = pool.submit(
            server.client(api_key="right").chat.completions.create,
            model="abacus", messages=SUM, max_tokens=60, extra_body={"ignore_eos": True},
        )  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
            assert client.stdout and client.stdout.readline().startswith(b"data: {")
            client.kill()
        assert other.result().usage.completion_tokens == 60
        assert_idle(server)
    assert llm.engine.counts.drawn - drawn < 3 * LONG["max_tokens"]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nA: ", 431),
        (b"GET /", 431),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer right\r\n"
         b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)  # fmt: skip
def test_what_is_no_http_is_refused(server, sent, status):
    """Headers without an end too, and in the shape in which everything is refused."""
    with connection(server) as sender:
        sender.settimeout(PATIENCE)
        with suppress(ConnectionError):  # it does not read on
            sender.sendall(sent)
            for _ in range(200 if status == 431 else 0):
                sender.sendall(b"a" * 10_000)
        reply = b""
        with suppress(ConnectionError):
            while part := sender.recv(1000):
                reply += part
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_requests_sent_at_once_are_answered_in_turn_and_dropped_with_their_client(server):
    body = json.dumps({"prompt": "2, 4, 6,", "max_tokens": 3}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\n"
    request += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with connection(server) as sender:
        sender.settimeout(PATIENCE)
        sender.sendall(5 * request)
        replies = b""
        while replies.count(b'"usage"') < 5:
            replies += sender.recv(1 << 16)
        assert replies.count(b"HTTP/1.1 200") == 5
        sender.sendall(500 * request)

    def none_follows() -> bool:
        """Whether no request begins for a while: between two of them the engine is idle, too."""
        before = server.llm.engine.pages.counts.queried
        time.sleep(0.5)
        return server.llm.engine.pages.counts.queried == before

    assert eventually(none_follows)
    assert_idle(server)


def test_a_key_is_needed_where_one_was_set(server):
    for key in ("wrong", "righ", "rightright", "Right", "right\u00e9"):
        refused = server.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
        assert refused.status_code == 401
    assert server.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert server.post("/tokenize", {"prompt": "a"}).status_code == 401
    for path in ("/health", "/ready", "/metrics"):
        assert server.get(path).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").models.list()


def test_a_full_queue_answers_429_and_the_others_are_served(server, llm):
    client = server.client(api_key="right")

    refused: list[openai.RateLimitError] = []

    def ask(number: int) -> str | None:
        try:
            reply = client.chat.completions.create(
                model="abacus", messages=SUM, max_tokens=12, extra_body={"ignore_eos": True}
            )
        except openai.RateLimitError as error:
            refused.append(error)
            return None
        return reply.choices[0].finish_reason

    with steps(llm, slowly), ThreadPoolExecutor(30) as pool:
        replies = list(pool.map(ask, range(30)))
    assert set(replies) == {None, "length"}
    assert replies.count("length") >= 8
    assert {error.code for error in refused} == {"queue_full"}
    waits = [int(error.response.headers["Retry-After"]) for error in refused]
    assert min(waits) >= 1 and max(waits) <= 60
    assert_idle(server)
    too_many = server.post(
        "/v1/completions", {"prompt": ["a"] * 9}, headers={"Authorization": "Bearer right"}
    )
    assert too_many.status_code == 400 and "at most 8" in too_many.json()["error"]["message"]


def test_a_client_that_leaves_is_cancelled(server, llm):
    drawn, aborted = llm.engine.counts.drawn, num_aborted(server)
    with steps(llm, slowly):
        with stream(server, n=3) as response:
            for line in response.iter_lines():
                if "content" in line:
                    break
        assert_idle(server)
        assert eventually(lambda: num_aborted(server) == aborted + 3)
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(
                f"{server.url}/v1/chat/completions", json=LONG, timeout=0.5,
                headers={"Authorization": "Bearer right"},
            )  # fmt: skip
        assert_idle(server)
    assert eventually(lambda: num_aborted(server) == aborted + 4)
    assert llm.engine.counts.drawn - drawn < 4 * LONG["max_tokens"] - 100


def test_a_burst_of_disconnects_leaves_nothing(server):
    draw = random.Random(5)

    async def visit(client: httpx2.AsyncClient, patience: float, body: dict) -> int:
        path = f"{server.url}/v1/chat/completions"
        try:
            async with asyncio.timeout(patience):
                async with client.stream("POST", path, json=body) as response:
                    async for _ in response.aiter_bytes():
                        pass
                return response.status_code
        except (TimeoutError, httpx2.HTTPError):
            return 0

    async def burst() -> list[int]:
        headers = {"Authorization": "Bearer right"}
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(headers=headers, timeout=PATIENCE, limits=limits) as client:
            visits = []
            for number in range(80):  # ten times what may run and wait
                body = {**LONG, "max_tokens": 60, "stream": number % 2 == 0, "n": 1 + number % 3}
                visits.append(visit(client, draw.uniform(0.01, 1.5), body))
            return await asyncio.gather(*visits)

    statuses = asyncio.run(burst())
    assert 0 in statuses and 429 in statuses
    assert_idle(server)
    reply = server.client(api_key="right").chat.completions.create(model="abacus", messages=SUM)
    assert reply.choices[0].message.content == "132"


def test_a_client_that_leaves_after_it_sent_two_requests_is_no_failure(server, llm, caplog):
    """Only the second one was told."""
    drawn, aborted = llm.engine.counts.drawn, num_aborted(server)
    body = json.dumps(LONG | {"stream": True}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\n"
    request += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with steps(llm, slowly):
        with connection(server) as client:
            client.sendall(2 * request)
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        assert eventually(lambda: num_aborted(server) == aborted + 1)
    assert llm.engine.counts.drawn - drawn < LONG["max_tokens"]
    assert "RuntimeError" not in caplog.text and "cut off" not in caplog.text
    assert_idle(server)


@pytest.mark.slow
def test_a_slow_reader_keeps_nobody_waiting(server):
    lines = [
        "POST /v1/chat/completions HTTP/1.1", "Host: x", "Authorization: Bearer right",
        "Content-Type: application/json",
    ]  # fmt: skip
    body = '{"messages": [{"role": "user", "content": "hi"}], "stream": true, "max_tokens": 300,'
    body += ' "ignore_eos": true, "logprobs": true, "top_logprobs": 20}'
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])
    with connection(server) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall((head + body).encode())
        slow.recv(10)
        reply = server.client(api_key="right").chat.completions.create(model="abacus", messages=SUM)
        assert reply.choices[0].message.content == "132"
        assert eventually(lambda: not server.llm.engine.has_work)  # pages do not wait for it
    assert_idle(server)


@pytest.mark.parametrize("sent", [b"GET / HT", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nA: "])
def test_headers_have_to_arrive_in_time(server, monkeypatch, sent):
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.2)
    with connection(server) as slow:
        slow.settimeout(PATIENCE)
        slow.sendall(sent)
        assert slow.recv(100) == b""


def test_bodies_may_not_be_larger_than_16_mib(server):
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right\r\n"
    for declared in (b"Content-Length: 20000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
        with connection(server) as sender:
            sender.settimeout(PATIENCE)
            sender.sendall(head + declared)
            if b"chunked" in declared:
                part = b"100000\r\n" + b"a" * (1 << 20) + b"\r\n"
                for _ in range(17):
                    sender.sendall(part)
            assert sender.recv(1000).startswith(b"HTTP/1.1 413")


def keys(count: int) -> str:
    return ",".join(f'"{i:x}":0' for i in range(count))


# Of the largest size: what is refused, and what the most of is that is not.
MESSAGES = f'"messages": {json.dumps(SUM)}'
LARGE = [
    (413, f'{{{MESSAGES}, "x": [{"[]," * 5_000_000}0]}}'),
    (413, f'{{{MESSAGES}, "x": {{{keys(1_500_000)}}}}}'),
    (413, f'{{"messages": [{{"role": "user", "x": [{"{},".join([""] * 5_000_000)}0]}}]}}'),
    (413, f'{{"prompt": [[{"1," * 8_000_000}0]]}}'),
    (400, f'{{"prompt": [{",".join(["[" + "1," * 2000 + "0]"] * 1024)}]}}'),
    (400, f'{{"messages": [{{"role": "bob", "x": [{"{}," * 900_000}0]}}]}}'),
    (400, f'{{{MESSAGES}, "n": 0, "x": {{{keys(480_000)}}}}}'),
    (400, f'{{"messages": [{{"role": "bob", "content": "{"a, [b]: " * 1_000}"}}]}}'),
]


@pytest.mark.parametrize(("status", "body"), LARGE, ids=range(len(LARGE)))
def test_no_body_keeps_the_event_loop(llm, status, body):
    """For longer than a few times what Python takes to read two million numbers."""
    numbers = f"[{'1,' * 2_000_000}0]"
    began = time.perf_counter()
    json.loads(numbers)
    unit = time.perf_counter() - began
    path = "/v1/completions" if '"prompt"' in body[:20] else "/v1/chat/completions"
    with serving(llm) as served:
        gaps: list[float] = []

        async def watch() -> None:
            while True:
                began = time.perf_counter()
                await asyncio.sleep(0)
                gaps.append(time.perf_counter() - began)

        loop = served.service.thread.loop
        watching = asyncio.run_coroutine_threadsafe(watch(), loop)
        reply = served.post_text(path, body)
        watching.cancel()
    assert reply.status_code == status, reply.text[:300]
    assert max(gaps) < 8 * unit


def test_a_deadline_ends_a_request(llm):
    with serving(llm, request_timeout=0.3) as served, steps(llm, slowly):
        reply = served.post("/v1/chat/completions", LONG)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        with stream(served) as response:
            lines = [line for line in response.iter_lines() if line]
        assert "deadline_exceeded" in lines[-2] and lines[-1] == "data: [DONE]"
        with pytest.raises(openai.APIError, match=r"longer than 0\.3 seconds"):
            for _ in served.client().chat.completions.create(
                model="abacus", messages=SUM, stream=True, extra_body=LONG
            ):
                pass
        assert_idle(served)
        assert 'reason="timeout"} 3.0' in served.get("/metrics").text


@pytest.fixture
def small_buffers(monkeypatch):
    """Sockets of a server and of the machine below it hold little, so writers wait for readers."""
    listen = server_module.listen

    def listening(host: str, port: int) -> socket.socket:
        listener = listen(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of those it accepts, too
        return listener

    monkeypatch.setattr(server_module, "listen", listening)


@contextmanager
def unread(served: Served, body: dict, head: str = "") -> Iterator[socket.socket]:
    """Ask for a chat and read nothing of the reply."""
    text = json.dumps(body)
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
    with connection(served) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asked = "\r\n".join([*lines, f"{head}Content-Length: {len(text)}", "", text])
        client.sendall(asked.encode())
        yield client


WIDE = LONG | {"logprobs": True, "top_logprobs": 20}  # some kilobytes for each token


def compile_wide(llm: LLM) -> None:
    with serving(llm) as served:
        assert served.post("/v1/chat/completions", WIDE | {"n": 4}).status_code == 200


def num_aborted(served: Served) -> int:
    (found,) = re.findall(r'finished_reason="abort".* (\d+)\.0', served.get("/metrics").text)
    return int(found)


def test_a_deadline_frees_the_rows_of_a_reader_that_never_reads(llm, monkeypatch, small_buffers):
    """Though its connection gets longer. No end of a reply is invented for it."""
    monkeypatch.setattr(middleware, "_GRACE", PATIENCE)
    compile_wide(llm)
    drawn = llm.engine.counts.drawn
    with serving(llm, request_timeout=1.0) as served, steps(llm, slowly):
        with unread(served, WIDE | {"stream": True, "n": 4}) as client:
            assert eventually(lambda: llm.engine.counts.drawn > drawn + 4)
            assert eventually(lambda: served.service.thread.num_open == 0)
            assert llm.engine.counts.drawn - drawn < 4 * LONG["max_tokens"] - 400
            client.settimeout(PATIENCE)
            reply = b""
            while b"[DONE]" not in reply:
                reply += client.recv(1 << 16)
        assert b"deadline_exceeded" in reply and b'"finish_reason":"stop"' not in reply
        assert num_aborted(served) == 4
        assert_idle(served)


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("head", ["", "Connection: close\r\n"])
def test_a_connection_whose_reply_is_not_read_ends(llm, monkeypatch, small_buffers, is_whole, head):
    """A complete reply some time after it was written, a stream after its deadline."""
    monkeypatch.setattr(middleware, "_GRACE", 0.2)
    monkeypatch.setattr(server_module, "_IDLE_SECONDS", 0.3)
    lost: list[object] = []
    protocol = server_module._Protocol
    ended = protocol.connection_lost
    monkeypatch.setattr(
        protocol, "connection_lost", lambda self, error: (lost.append(self), ended(self, error))
    )
    compile_wide(llm)
    lost.clear()
    drawn = llm.engine.counts.drawn
    with serving(llm, request_timeout=PATIENCE if is_whole else 0.5) as served:
        with unread(served, WIDE | {"stream": not is_whole}, head):
            assert eventually(lambda: len(lost) == 1)
        assert llm.engine.counts.drawn - drawn > 50
        assert_idle(served)


def test_going_down_lets_what_runs_end_and_takes_nothing_new(llm):
    with serving(llm, drain_timeout=PATIENCE) as served, steps(llm, slowly):
        with stream(served, max_tokens=40) as response:
            lines = response.iter_lines()
            next(lines)
            served.service.thread.loop.call_soon_threadsafe(served.service.end_server)
            assert eventually(lambda: not served.service.is_ready)
            rest = [line for line in lines if line]
        assert '"finish_reason":"length"' in rest[-2] and rest[-1] == "data: [DONE]"
        assert served.end() == 0
        with pytest.raises(httpx2.ConnectError):
            served.get("/health")


def test_an_exception_in_a_step_is_told_to_everybody_and_ends_the_server(llm, caplog, monkeypatch):
    count = 0

    launch = llm.engine._launch

    def fail_later(plan) -> None:
        nonlocal count
        count += 1
        if count == 8:
            raise RuntimeError(SUM[0]["content"])
        launch(plan)

    monkeypatch.setattr(llm.engine, "_launch", fail_later)
    with serving(llm, drain_timeout=PATIENCE) as served, steps(llm, slowly):
        with ThreadPoolExecutor(8) as pool, stream(served) as response:
            whole = [pool.submit(served.post, "/v1/chat/completions", LONG) for _ in range(6)]
            lines = [line for line in response.iter_lines() if line]
            replies = [each.result() for each in whole]
        assert "engine_failed" in lines[-2]
        failed = [each for each in replies if each.status_code == 500]
        assert failed and all(each.json()["error"]["code"] == "engine_failed" for each in failed)
        assert all(each.status_code in (500, 503) for each in replies)
        assert served.end() == 1
        assert not served.service.is_ready
    assert_idle(served)
    assert "the engine failed: RuntimeError" in caplog.text
    assert SUM[0]["content"] not in caplog.text
    with serving(llm) as again:
        assert again.post("/v1/chat/completions", {"messages": SUM}).status_code == 200


def test_origins_are_allowed_where_they_were_named(llm):
    origin = {"Origin": "https://a.example"}
    with serving(llm, allowed_origins=("https://a.example",)) as served:
        allowed = served.get("/v1/models", headers=origin).headers
        assert allowed["access-control-allow-origin"] == "https://a.example"
        other = served.get("/v1/models", headers={"Origin": "https://b.example"}).headers
        assert "access-control-allow-origin" not in other


@pytest.mark.slow
def test_preemption_in_every_third_step_changes_no_reply(llm):
    count = 0

    def preempting(step: Callable[[], list]) -> list:
        nonlocal count
        count += 1
        engine = llm.engine
        if count % 3 == 0 and engine.num_running:
            engine._collect_all()
            if engine.num_running:
                engine._scheduler.preempt(engine._scheduler.running[-1])
        return step()

    def ask(served: Served) -> list[str]:
        client = served.client()

        def one(seed: int) -> str:
            reply = client.chat.completions.create(
                model="abacus", messages=SUM, seed=seed, temperature=1.3, max_tokens=40,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            return reply.choices[0].message.content

        with ThreadPoolExecutor(12) as pool:
            return list(pool.map(one, range(24)))

    with serving(llm) as served:
        expected = ask(served)
        preempted = llm.engine.counts.preempted
        with steps(llm, preempting):
            assert ask(served) == expected
        assert llm.engine.counts.preempted > preempted + 8
        assert_idle(served)


@pytest.mark.slow
def test_a_thousand_streams_hold(llm):
    load = Load(requests=1000, concurrency=1000, prompt_tokens=12, reply_tokens=4)
    with serving(llm) as served:
        found, _ = asyncio.run(measure(served.url, "abacus", 512, load))
        assert (found.failed, found.reply_tokens) == (0, 4000), found.first_error
        assert_idle(served)


@pytest.mark.slow
def test_hostile_schemas_keep_nobody_waiting(llm):
    hostile = [
        {"json": {"$ref": "#"}}, {"regex": "(a{1,1000}){1,1000}"},
        {"regex": "(((a?){30}){30}){30}"},
        {"grammar": "start: start start | /a/"}, {"json": {"enum": ["a" * 300_000]}},
        {"json": {"properties": {f"p{i}": {"pattern": f"x{{1,{i}}}"} for i in range(2000)}}},
    ]  # fmt: skip
    with serving(llm) as served, ThreadPoolExecutor(24) as pool:
        asked = [
            pool.submit(
                served.post,
                "/v1/chat/completions",
                {"messages": SUM, "structured_outputs": form, "max_tokens": 8},
            )
            for form in hostile * 3
        ]
        client = served.client()
        for _ in range(5):
            reply = client.chat.completions.create(model="abacus", messages=SUM)
            assert reply.choices[0].message.content == "132"
        statuses = [each.result().status_code for each in asked]
        assert set(statuses) <= {200, 400} and 400 in statuses
        assert_idle(served)


@contextmanager
def running(
    directory: Path, port: int, *options: str, **environment: str
) -> Iterator[tuple[subprocess.Popen, list[str]]]:
    """`llama-jax serve` in a process of its own, when it is ready, and the lines that it prints."""
    command = [sys.executable, "-m", "llama_jax.cli", "serve", "--port", str(port)]
    environment = {"PYTHONPATH": str(ROOT), "LLAMA_JAX_API_KEY": "k", **environment}
    with subprocess.Popen(
        [*command, "--max-num-seqs", "2", *options],
        env=os.environ | environment, stderr=subprocess.PIPE, text=True, cwd=directory,
    ) as process:  # fmt: skip
        lines: list[str] = []

        def read() -> None:
            assert process.stderr
            lines.extend(iter(process.stderr.readline, ""))

        threading.Thread(target=read, daemon=True).start()
        try:
            assert eventually(lambda: any(line.startswith("curl") for line in lines)), lines
            yield process, lines
        finally:
            process.kill()


def port_in(lines: list[str]) -> int:
    line = next(line for line in lines if line.startswith("curl"))
    return int(line.split("/v1")[0].rpartition(":")[2])


@pytest.mark.slow
def test_two_devices_give_the_tokens_of_one(tmp_path):
    prompts = ["2, 4, 6,", "What is 47 + 85?"]
    settings = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
    alone = LLM.load(max_batch_size=2, max_seq_len=256, dtype="float32", verbose=False)
    expected = [each.text for each in alone.generate(prompts, settings)]
    options = ["--num-devices", "2", "--dtype", "float32", "--max-model-len", "256"]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    with running(tmp_path, 0, *options, XLA_FLAGS=flags, JAX_PLATFORMS="cpu") as (_, lines):
        assert any("each of 2 devices" in line for line in lines), lines
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port_in(lines)}/v1", api_key="k")
        reply = client.completions.create(
            model="abacus", prompt=prompts, max_tokens=24, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
    assert [choice.text for choice in reply.choices] == expected


@pytest.mark.slow
def test_a_server_killed_and_started_again_and_told_to_end(tmp_path):
    """In the middle of a stream each time: it breaks off, and goes on to its end."""

    def begin(port: int) -> openai.Stream:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0)
        chunks = client.chat.completions.create(
            model="abacus", messages=SUM, stream=True, extra_body=LONG | {"max_tokens": 300}
        )
        next(iter(chunks))
        return chunks

    with running(tmp_path, 0) as (process, lines):
        port = port_in(lines)
        chunks = begin(port)
        process.kill()
        with pytest.raises((openai.APIError, httpx2.TransportError)):
            list(chunks)
    with running(tmp_path, port) as (process, lines):
        chunks = begin(port)
        process.send_signal(signal.SIGTERM)
        *_, last = chunks
        assert last.choices[0].finish_reason == "length"
        assert process.wait(PATIENCE) == 0
    assert not any("Traceback" in line for line in lines), lines
