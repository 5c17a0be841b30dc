"""This module sends answers in pieces, as server-sent events.

Each is `data: {...}`, and the last one `data: [DONE]`.
"""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llama_jax.serve.engine_thread import Submission
from llama_jax.serve.errors import ApiError

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


def event(value: dict[str, Any]) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


class EventStream(StreamingResponse):
    """Sends events of a submission, and closes it after the last one or when the client leaves."""

    def __init__(self, submission: Submission, events: AsyncIterator[dict[str, Any]]) -> None:
        super().__init__(_told(events), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self._submission = submission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._submission.close()


async def _told(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Yields the events as bytes. What is raised between them is the last one."""
    try:
        async for each in events:
            yield event(each)
    except ApiError as error:
        yield event(error.as_dict())
    yield DONE
