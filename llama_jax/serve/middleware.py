"""This module checks every request before its content is read.

It is plain ASGI, because Starlette's base class would put a task and a queue between each stream
and its socket.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Sequence
from traceback import format_tb
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_jax.serve.errors import ApiError, ClientGone, internal_error, too_late
from llama_jax.serve.options import (
    BODY_SECONDS,
    MAX_BODY_BYTES,
    MAX_BODY_UNITS,
    MAX_FILE_BYTES,
    UNCOUNTED_BODY_BYTES,
    UNITS,
    ServeOptions,
)

_log = logging.getLogger(__name__)

# What monitors ask, without a key. None of it has a user's text.
OPEN_PATHS = ("/health", "/ready", "/metrics")
UPLOADS = "/v1/files"  # whose bodies are larger, and go to a file as they come
# In a scope: when the request came, of `time.perf_counter`; and what sends the bodies of a stream.
# The layers between would take a tenth of the time for a token, and look only at a reply's start.
BEGAN, SEND = "llama_jax.began", "llama_jax.send"
CUT = "llama_jax.cut"  # in a scope: what ends the connection at once, with what is not sent yet
KEY = "llama_jax.key"  # in a scope: the key that was sent, "" where none is needed
# Seconds beyond the deadline after which a response's connection is cut.
_GRACE = 10.0


class Gate:
    """Checks key and size, enforces the deadline, and turns exceptions into replies.

    Log lines have method, path, status and duration; with `options.log_texts` bodies as well.
    Endpoints that monitors poll every second are not logged.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = scope[BEGAN] = time.perf_counter()
        scope[SEND] = send
        request_id = Headers(scope=scope).get("x-request-id", "")[:128] or uuid4().hex
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = _printable(request_id)
            await send(message)

        refusal: ApiError | None = None
        try:
            async with asyncio.timeout(self._options.request_timeout + _GRACE):
                await self._guarded(scope, receive, send_on)
        except ApiError as error:
            refusal = error
        except (ClientGone, ClientDisconnect):
            status = 499
        except TimeoutError:
            refusal = too_late(self._options.request_timeout)
        except Exception as error:
            _log_failure(error)
            refusal = internal_error(error)
        if refusal is not None:
            if status:  # too late for another answer: the client sees a broken one
                scope[CUT]()
                raise _BrokenStreamError
            await refusal.response()(scope, receive, send_on)
        seconds = time.perf_counter() - began
        level = logging.DEBUG if scope["path"] in OPEN_PATHS else logging.INFO
        told = scope["method"], scope["path"][:200], status, 1e3 * seconds
        _log.log(level, "%s %s %s %.0f ms", *told)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scope[KEY] = check_key(headers.get("authorization", ""), self._options.api_keys)
        encoding = headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise ApiError(415, "the header Content-Encoding is not supported; send it as it is")
        if scope["method"] == "POST" and scope["path"] == UPLOADS:
            receive = _bounded(headers, receive)
        elif scope["method"] == "POST":
            body = await _read_body(headers, receive)
            check_structure(body)
            if self._options.log_texts:
                _log.info("%s: %s", scope["path"][:200], body.decode(errors="replace"))
            receive = _after(body, receive)
        await self._app(scope, receive, send)


class _BrokenStreamError(Exception):
    """Raised to end a connection whose reply cannot be completed."""

    def __str__(self) -> str:
        return "a response was cut off"


def check_key(authorization: str, keys: Sequence[str]) -> str:
    """Returns the one of `keys` that was sent, or "" if there are none.

    Takes the same time for any.
    Raises `ApiError` if it was none of them.
    """
    if not keys:
        return ""
    scheme, _, given = authorization.partition(" ")
    given_bytes = given.strip().encode(errors="replace")
    found = [key for key in keys if hmac.compare_digest(given_bytes, key.encode())]
    if scheme.lower() != "bearer" or not found:
        raise ApiError(
            401,
            "a valid API key is needed: Authorization: Bearer KEY",
            type="authentication_error",
            code="invalid_api_key",
        )
    return found[0]


async def _read_body(headers: Headers, receive: Receive) -> bytes:
    """Returns the whole body. Raises `ApiError` if it is too large or too slow."""
    _check_declared(headers, MAX_BODY_BYTES)
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size > MAX_BODY_BYTES:
                    raise _too_large(MAX_BODY_BYTES)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise _too_slow() from error


def check_structure(body: bytes) -> None:
    """Raises `ApiError` if a body has so many values that parsing would block the event loop."""
    if len(body) < UNCOUNTED_BODY_BYTES:
        return
    if sum(units * body.count(sign) for sign, units in UNITS.items()) > MAX_BODY_UNITS:
        raise ApiError(413, "the body has too many JSON values", code="body_too_complex")


def _bounded(headers: Headers, receive: Receive) -> Receive:
    """Returns a `receive` that raises `ApiError` if an upload is too large, or stands still."""
    _check_declared(headers, MAX_FILE_BYTES)
    size = 0

    async def received() -> Message:
        nonlocal size
        try:
            async with asyncio.timeout(BODY_SECONDS):
                message = await receive()
        except TimeoutError as error:
            raise _too_slow() from error
        size += len(message.get("body", b""))
        if size > MAX_FILE_BYTES:
            raise _too_large(MAX_FILE_BYTES)
        return message

    return received


def _check_declared(headers: Headers, most: int) -> None:
    declared = headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most:
        raise _too_large(most)


def _too_slow() -> ApiError:
    return ApiError(
        408,
        f"nothing came for {BODY_SECONDS:g} seconds, or not the whole body",
        code="body_too_slow",
    )


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most >> 20} MiB", code="body_too_large")


def _after(body: bytes, receive: Receive) -> Receive:
    """Returns a `receive` that replays a body that was read, and then continues with the rest."""
    is_given = False

    async def given() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return given


def _printable(text: str) -> str:
    return "".join(c for c in text if c.isascii() and c.isprintable())


def _log_failure(error: BaseException) -> None:
    """Logs an error's type and place, but not its message, which may contain a user's text."""
    trace = "".join(format_tb(error.__traceback__))
    _log.error("%s while a request was answered\n%s", type(error).__name__, trace)
