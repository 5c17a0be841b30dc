"""This module measures an OpenAI-compatible server under load.

Requests stream from /v1/completions, one connection each. Prompts are random token ids, so that no
two share pages, and `ignore_eos` makes every reply as long as was drawn for it. The client
looks at clocks and parses no event but the last: it must not be what is measured.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np

# Medians and spread (of the logarithm) of tokens in and out, as in conversations of ShareGPT.
_PROMPT, _REPLY = (100.0, 1.1), (150.0, 0.9)
_LEAST, _MOST = 4, 1024
# Ids that every vocabulary has, and that are no special tokens in any.
_FIRST_ID, _LAST_ID = 4, 256
PERCENTILES = (50, 90, 99)
# What an event with a token has, and how many bytes of a reply's beginning and end are kept.
_TOKEN = b'"choices":[{'
_KEPT = 8192


@dataclass(frozen=True)
class Load:
    """A load says what a client asks for, and when.

    requests: how many in all. concurrency: under way at the same time, at most. rate: new ones a
    second, at random times; None sends the next when one has ended. seed: of everything that is
    drawn. prompt_tokens, reply_tokens: of each, instead of a mix like ShareGPT's.
    """

    requests: int = 200
    concurrency: int = 32
    rate: float | None = None
    seed: int = 0
    prompt_tokens: int | None = None
    reply_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests", "concurrency", "prompt_tokens", "reply_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")

    def sequences(self, context: int) -> list[tuple[list[int], int]]:
        """Draws each request's prompt and length, together within `context` tokens."""
        draw = np.random.default_rng(self.seed)

        def mix(median: float, spread: float) -> np.ndarray:
            drawn = draw.lognormal(np.log(median), spread, self.requests)
            return np.clip(drawn, _LEAST, min(_MOST, context // 2 - 1)).astype(int)

        prompts, replies = mix(*_PROMPT), mix(*_REPLY)
        if self.prompt_tokens is not None:
            prompts[:] = self.prompt_tokens
        if self.reply_tokens is not None:
            replies[:] = self.reply_tokens
        return [
            (draw.integers(_FIRST_ID, _LAST_ID, count).tolist(), reply)
            for count, reply in zip(prompts.tolist(), replies.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Timing:
    """A timing holds what one request took, in seconds.

    first: until the first token; total: until the last.
    """

    prompt_tokens: int
    reply_tokens: int
    first: float
    total: float
    error: str | None = None

    @property
    def per_token(self) -> float:
        """Seconds for each token after the first."""
        return (self.total - self.first) / max(1, self.reply_tokens - 1)


@dataclass(frozen=True)
class Report:
    """A report holds the figures of a load. Times are milliseconds, by percentile.

    seconds: from the first request to the end of the last. client_seconds: processor time that the
    client itself took meanwhile.
    """

    requests: int
    failed: int
    seconds: float
    client_seconds: float
    prompt_tokens: int
    reply_tokens: int
    requests_per_second: float
    tokens_per_second: float
    first_token_ms: dict[int, float]
    per_token_ms: dict[int, float]
    total_ms: dict[int, float]
    first_error: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(timings: Sequence[Timing], seconds: float, client_seconds: float) -> Report:
    """Sums timings up. seconds, client_seconds: as in `Report`."""
    done = [each for each in timings if each.error is None]

    def percentiles(values: Sequence[float]) -> dict[int, float]:
        return {p: float(1e3 * np.percentile(values, p)) if values else 0.0 for p in PERCENTILES}

    tokens = sum(each.reply_tokens for each in done)
    return Report(
        requests=len(timings),
        failed=len(timings) - len(done),
        seconds=seconds,
        client_seconds=client_seconds,
        prompt_tokens=sum(each.prompt_tokens for each in done),
        reply_tokens=tokens,
        requests_per_second=len(done) / seconds,
        tokens_per_second=tokens / seconds,
        first_token_ms=percentiles([each.first for each in done]),
        per_token_ms=percentiles([each.per_token for each in done if each.reply_tokens > 1]),
        total_ms=percentiles([each.total for each in done]),
        first_error=next((each.error for each in timings if each.error), None),
    )


async def measure(
    url: str,
    model: str,
    context: int,
    load: Load,
    key: str | None = None,
    on_done: Callable[[Timing], None] = lambda timing: None,
) -> tuple[Report, list[Timing]]:
    """Puts a load on the server at `url`. context: tokens that a sequence may have there."""
    draw = random.Random(load.seed)
    places = asyncio.Semaphore(load.concurrency)
    timings: list[Timing] = []

    async def ask(prompt: list[int], reply_tokens: int) -> None:
        body = {
            "model": model, "prompt": prompt, "max_tokens": reply_tokens, "stream": True,
            "ignore_eos": True, "temperature": 0, "stream_options": {"include_usage": True},
        }  # fmt: skip
        timing = await _timed(url, body, key)
        timings.append(timing)
        on_done(timing)

    async def ask_and_leave(prompt: list[int], reply_tokens: int) -> None:
        try:
            await ask(prompt, reply_tokens)
        finally:
            places.release()

    began, client_began = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for prompt, reply_tokens in load.sequences(context):
            if load.rate is not None:
                await asyncio.sleep(draw.expovariate(load.rate))
            await places.acquire()
            group.create_task(ask_and_leave(prompt, reply_tokens))
    seconds = time.perf_counter() - began
    return report(timings, seconds, time.process_time() - client_began), timings


async def _timed(url: str, body: dict[str, Any], key: str | None) -> Timing:
    """Sends one request, over a connection of its own, and reads its stream."""
    prompt_tokens = len(body["prompt"])
    parts = urlsplit(url)
    is_secure = parts.scheme == "https"
    port = parts.port or (443 if is_secure else 80)
    stream = _Stream(_request(f"{parts.path}/v1/completions", parts.netloc, body, key))
    began = time.perf_counter()
    try:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(
            lambda: stream, parts.hostname or "", port, ssl=is_secure or None
        )
        try:
            await stream.ended
        finally:
            transport.close()
        if stream.status != "200":
            text = stream.beginning[-300:].decode(errors="replace")
            return Timing(prompt_tokens, 0, 0.0, 0.0, f"{stream.status}: {text}")
        chunk = stream.last_event()
        if "error" in chunk:
            return Timing(prompt_tokens, 0, 0.0, 0.0, str(chunk["error"]["message"]))
        count = int(chunk["usage"]["completion_tokens"])
    except (OSError, ValueError, IndexError, KeyError) as error:
        return Timing(prompt_tokens, 0, 0.0, 0.0, f"{type(error).__name__}: {error}"[:300])
    return Timing(prompt_tokens, count, stream.first - began, stream.last - began)


class _Stream(asyncio.Protocol):
    """Notes when tokens arrive, and keeps the beginning and the end of what is read.

    A reader of lines would take several times as long for a token, on the processor that the server
    may need. first, last: when the first and the last token came, of `time.perf_counter`.
    """

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.beginning, self._end = b"", bytearray()
        self.first = self.last = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        cast("asyncio.WriteTransport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if len(self.beginning) < _KEPT:
            self.beginning += data
        unsearched = max(0, len(self._end) - len(_TOKEN) + 1)  # a mark may lie across two parts
        self._end += data
        if self._end.find(_TOKEN, unsearched) >= 0:
            self.first, self.last = self.first or now, now
        if len(self._end) > 2 * _KEPT:
            del self._end[:-_KEPT]

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended.done():
            return
        if exc:
            self.ended.set_exception(exc)
        else:
            self.ended.set_result(None)

    @property
    def status(self) -> str:
        """Returns the HTTP status."""
        return self.beginning.split(b" ", 2)[1].decode()

    def last_event(self) -> dict[str, Any]:
        """Reads the last event with JSON in it. Raises ValueError where there is none."""
        begins = self._end.rindex(b"data: {") + len(b"data: ")
        event: dict[str, Any] = json.loads(self._end[begins : self._end.index(b"\n", begins)])
        return event


def _request(path: str, host: str, body: dict[str, Any], key: str | None) -> bytes:
    data = json.dumps(body).encode()
    head = [
        f"POST {path} HTTP/1.1", f"Host: {host}", "Connection: close",
        "Content-Type: application/json", f"Content-Length: {len(data)}",
        *([f"Authorization: Bearer {key}"] if key else []),
    ]  # fmt: skip
    return "\r\n".join([*head, "", ""]).encode() + data
