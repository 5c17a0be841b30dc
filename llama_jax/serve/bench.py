"""What a server does under load: a client of any OpenAI-compatible server, and its figures.

Requests stream from /v1/completions, one connection each. Prompts are random token ids, so that no
two share pages, and `ignore_eos` makes every reply as long as was drawn for it. The client reads
lines and looks at clocks, and parses no chunk but the last: it must not be what is measured.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

# Medians and spread (of the logarithm) of tokens in and out, as in conversations of ShareGPT.
_PROMPT, _REPLY = (100.0, 1.1), (150.0, 0.9)
_LEAST, _MOST = 4, 1024
# Ids that every vocabulary has, and that are no special tokens in any.
_FIRST_ID, _LAST_ID = 4, 256
PERCENTILES = (50, 90, 99)
_LINE_LIMIT = 1 << 20


@dataclass(frozen=True)
class Load:
    """requests: how many in all. concurrency: under way at the same time, at most. rate: new ones a
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
        """Each request's prompt, and how many tokens it asks for; together within `context`."""
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
    """One request, in seconds. first: until the first token; total: until the last."""

    prompt_tokens: int
    reply_tokens: int
    first: float
    total: float
    error: str | None = None

    @property
    def per_token(self) -> float:
        """After the first."""
        return (self.total - self.first) / max(1, self.reply_tokens - 1)


@dataclass(frozen=True)
class Report:
    """The figures of a load. Times in milliseconds, by percentile."""

    requests: int
    failed: int
    seconds: float
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


def report(timings: Sequence[Timing], seconds: float) -> Report:
    """seconds: from the first request to the end of the last."""
    done = [each for each in timings if each.error is None]

    def percentiles(values: Sequence[float]) -> dict[int, float]:
        return {p: float(1e3 * np.percentile(values, p)) if values else 0.0 for p in PERCENTILES}

    tokens = sum(each.reply_tokens for each in done)
    return Report(
        requests=len(timings),
        failed=len(timings) - len(done),
        seconds=seconds,
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
    """Put a load on the server at `url`. context: tokens that a sequence may have there."""
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

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for prompt, reply_tokens in load.sequences(context):
            if load.rate is not None:
                await asyncio.sleep(draw.expovariate(load.rate))
            await places.acquire()
            group.create_task(ask_and_leave(prompt, reply_tokens))
    return report(timings, time.perf_counter() - began), timings


async def _timed(url: str, body: dict[str, Any], key: str | None) -> Timing:
    """One streamed request over a connection of its own."""
    began = time.perf_counter()
    first = 0.0
    usage: dict[str, int] = {}
    prompt_tokens = len(body["prompt"])
    try:
        reader, writer = await _post(url + "/v1/completions", body, key)
        try:
            status = (await reader.readline()).decode().split(" ", 2)
            if status[1] != "200":
                text = (await reader.read(2000)).decode(errors="replace")
                return Timing(prompt_tokens, 0, 0.0, 0.0, f"{status[1]}: {text[-300:]}")
            last, ended = b"", 0.0
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                if b'"choices":[{' in line:
                    ended = time.perf_counter()
                    first = first or ended - began
                last = line
            chunk = json.loads(last[6:])
            if "error" in chunk:
                return Timing(prompt_tokens, 0, 0.0, 0.0, str(chunk["error"]["message"]))
            usage = chunk["usage"]
        finally:
            writer.close()
    except (OSError, ValueError, IndexError, KeyError) as error:
        return Timing(prompt_tokens, 0, 0.0, 0.0, f"{type(error).__name__}: {error}"[:300])
    return Timing(prompt_tokens, usage["completion_tokens"], first, ended - began)


async def _post(
    url: str, body: dict[str, Any], key: str | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    head = [
        f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close",
        "Content-Type: application/json", f"Content-Length: {len(data)}",
        *([f"Authorization: Bearer {key}"] if key else []),
    ]  # fmt: skip
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(
        parts.hostname, port, ssl=secure or None, limit=_LINE_LIMIT
    )
    writer.write("\r\n".join([*head, "", ""]).encode() + data)
    await writer.drain()
    return reader, writer
