"""This module answers OpenAI's batch files, a request in each line, as the server would."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from llama_jax.serve import chat, completions, tokens
from llama_jax.serve.errors import ApiError, bad_request, internal_error, invalid
from llama_jax.serve.options import ServeOptions
from llama_jax.serve.replies import new_id
from llama_jax.serve.schemas import ChatRequest, CompletionRequest, ScoreRequest, check_unknown
from llama_jax.serve.service import Service

if TYPE_CHECKING:
    from llama_jax.llm import LLM

_Whole = Callable[[Service, Any, float], Awaitable[BaseModel]]
ENDPOINTS: Mapping[str, tuple[type[BaseModel], _Whole]] = {
    "/v1/chat/completions": (ChatRequest, chat.whole),
    "/v1/completions": (CompletionRequest, completions.whole),
    "/v1/score": (ScoreRequest, tokens.score),
}
# Lines under way for each row of the engine: enough that none is ever empty.
_PER_ROW = 4
# A line has no deadline, as nobody waits for it; a server's request has one, which this is.
_SECONDS = 10.0**7


async def answer_lines(
    llm: "LLM", name: str, lines: Iterable[dict[str, Any] | ValueError]
) -> AsyncIterator[dict[str, Any]]:
    """Yields the answer to each line of a batch file, in order, as soon as those before are there.

    lines: {"custom_id", "method": "POST", "url", "body"}, or the error that stands for one. name:
    what bodies may call the model. Raises RuntimeError where the engine fails.
    """
    options = ServeOptions(names=(name,), max_waiting=1 << 20, request_timeout=_SECONDS)
    service = Service(llm, options, name, warms_up=False)
    service.thread.start()
    ahead = _PER_ROW * llm.engine.options.max_batch_size
    try:
        if not await service.ready():
            raise RuntimeError("the engine failed") from service.thread.failure
        async for answer in answers(service, lines, lambda _: ahead):
            yield answer
    finally:
        await asyncio.to_thread(service.thread.stop, 60.0)


async def answers(
    service: Service,
    lines: Iterable[dict[str, Any] | ValueError],
    most: Callable[[int], int],
) -> AsyncIterator[dict[str, Any]]:
    """Yields the answers of `answer_lines` from a service that is ready.

    most: returns how many lines may run, given how many do.
    Raises RuntimeError if the engine fails or the server shuts down.
    """
    under_way: deque[asyncio.Task[dict[str, Any]]] = deque()
    source = iter(lines)
    try:
        while True:
            while len(under_way) < most(len(under_way)):
                if (line := next(source, None)) is None:
                    break
                under_way.append(asyncio.create_task(_answer(service, line)))
            if not under_way:
                return
            answer = await under_way.popleft()
            if service.thread.failure:
                raise RuntimeError("the engine failed") from service.thread.failure
            yield answer
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _answer(service: Service, line: dict[str, Any] | ValueError) -> dict[str, Any]:
    """Returns one line of the output."""
    answer: dict[str, Any] = {
        "id": new_id("batch_req"),
        "custom_id": None,
        "response": None,
        "error": None,
    }
    if isinstance(line, ValueError):
        return answer | {"error": {"code": "invalid_line", "message": str(line)}}
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str):
        message = f'"custom_id" must be a text, got {custom_id!r:.100}'
        return answer | {"error": {"code": "invalid_line", "message": message}}
    try:
        status, body = 200, (await _patient_reply(service, line)).model_dump(mode="json")
    except ApiError as error:
        if service.is_draining:  # the batch continues when the server is back
            raise RuntimeError("the server is going down") from error
        status, body = error.status, error.as_dict()
    except Exception as error:
        status, body = 500, internal_error(error).as_dict()
    response = {"status_code": status, "request_id": new_id("req"), "body": body}
    return answer | {"custom_id": custom_id, "response": response}


async def _patient_reply(service: Service, line: Mapping[str, Any]) -> BaseModel:
    """Returns a reply. Waits while the queue, or the compiler of grammars, has no room for it."""
    while True:
        try:
            return await _reply(service, line)
        except ApiError as error:
            if error.body.error.code not in ("queue_full", "busy"):
                raise
            await asyncio.sleep(error.retry_after or 1)


async def _reply(service: Service, line: Mapping[str, Any]) -> BaseModel:
    url, method = line.get("url"), line.get("method", "POST")
    if url not in ENDPOINTS or method != "POST":
        raise bad_request(f'"url" must be one of {", ".join(ENDPOINTS)}, "method" POST', "url")
    kind, whole = ENDPOINTS[str(url)]
    try:
        body = kind.model_validate(line.get("body"))
    except ValidationError as error:
        raise invalid(error) from error
    check_unknown(body)
    if getattr(body, "stream", None):
        raise bad_request("stream: a batch has no streams; leave it out", "stream")
    return await whole(service, body, time.perf_counter())
