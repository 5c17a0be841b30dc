"""This module sends answers in pieces, as server-sent events.

Each is `data: {...}`, and the last one `data: [DONE]`.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any, Protocol

import msgspec
from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from llama_jax.serve.engine_thread import Submission, Update
from llama_jax.serve.errors import ApiError, ClientGone
from llama_jax.serve.middleware import SEND

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class Pieces(Protocol):
    """Writes the chunks of a reply. Both methods may raise `ApiError`, which ends the stream."""

    def of(self, update: Update) -> Iterable[dict[str, Any]]:
        """Returns the chunks that an update brings."""

    def end(self) -> Iterable[dict[str, Any]]:
        """Returns the chunks that follow those of all updates."""


def event(value: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % _encode(value)


class EventStream(StreamingResponse):
    """Sends events of a submission, and closes it after the last one or when the client leaves.

    What has come at the same time is written together. What is raised between events is the last
    one. A task of its own writes: each update would otherwise wake every layer between the socket
    and here, of which there are two dozen. Starlette's own way of watching for the client takes
    scopes around the stream, which a short reply would notice.
    """

    def __init__(
        self, submission: Submission, updates: AsyncIterator[list[Update]], pieces: Pieces
    ) -> None:
        super().__init__((), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self._submission, self._updates, self._pieces = submission, updates, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watching = asyncio.ensure_future(self._watch(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await asyncio.ensure_future(self._write(scope.get(SEND, send)))
        finally:
            watching.cancel()
            self._submission.close()

    async def _watch(self, receive: Receive) -> None:
        """Ends the stream when the client leaves."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._submission.fail(ClientGone())

    async def _write(self, send: Send) -> None:
        """Sends the events."""
        events = list[bytes]()
        try:
            async for updates in self._updates:
                for update in updates:
                    events.extend(map(event, self._pieces.of(update)))
                if events:
                    await send(_body(events, more_body=True))
                    events = []
            events.extend(map(event, self._pieces.end()))
        except ApiError as error:
            events.append(event(error.as_dict()))
        await send(_body([*events, DONE], more_body=False))


def _body(events: list[bytes], more_body: bool) -> Message:
    return {"type": "http.response.body", "body": b"".join(events), "more_body": more_body}
