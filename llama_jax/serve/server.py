"""This module runs the process: sockets, the engine's thread, signals, and how it ends.

It answers /health as soon as the model is loaded, is /ready after the warm-up, and ends with 0 when
it was told to by a signal, with 1 when the engine failed or a second signal came.
"""

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Response
from uvicorn.loops.auto import auto_loop_factory
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from llama_jax.serve.app import create_app
from llama_jax.serve.batch_runs import BatchRuns
from llama_jax.serve.batch_store import BatchStore
from llama_jax.serve.errors import ApiError
from llama_jax.serve.middleware import CUT
from llama_jax.serve.options import HEADER_SECONDS, MAX_HEADER_BYTES, ServeOptions
from llama_jax.serve.service import Service
from llama_jax.serve.sockets import BACKLOG, listen, url_of

if TYPE_CHECKING:
    from llama_jax.llm import LLM

_log = logging.getLogger(__name__)

# Python lets a thread that computes run for so long before another gets its turn: with the usual
# 5 ms the event loop would wait that long for the engine's thread, for each of several turns.
_SWITCH_SECONDS = 0.0005
_CONNECTIONS = 1 << 16
# How long a connection may be idle, or its client read nothing of a complete reply.
_IDLE_SECONDS = 30
# What is left to uvicorn for closing connections after the last request was ended.
_CLOSING_SECONDS = 3


def serve(
    llm: "LLM",
    options: ServeOptions,
    root: str,
    on_ready: Callable[[Service, str], None] = lambda service, url: None,
) -> int:
    """Serves until a signal or a failure; returns the process' exit status.

    root: what was loaded. on_ready: called with the URL when requests are answered. The engine's
    thread may still be at work afterwards, where it was stuck or still compiling. Raises OSError
    where a port or `options.batch_dir` cannot be had.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    _allow_connections()
    with contextlib.ExitStack() as stack:
        stack.callback(gc.unfreeze)
        sockets = [stack.enter_context(listen(options.host, options.port))]
        if options.metrics_port is not None:
            sockets.append(stack.enter_context(listen(options.host, options.metrics_port)))
        store = None
        if options.batch_dir is not None:
            store = stack.enter_context(contextlib.closing(BatchStore(options.batch_dir)))
        return asyncio.run(
            _serve(llm, options, root, sockets, store, on_ready), loop_factory=auto_loop_factory()
        )


def _allow_connections() -> None:
    """Asks for as many open sockets as this process may have; often it has only 1024."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _CONNECTIONS if most == resource.RLIM_INFINITY else min(_CONNECTIONS, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


async def _serve(
    llm: "LLM",
    options: ServeOptions,
    root: str,
    sockets: list[socket.socket],
    store: BatchStore | None,
    on_ready: Callable[[Service, str], None],
) -> int:
    service = Service(llm, options, root)
    runs = BatchRuns(service, store) if store else None
    servers = [_Server(create_app(service, runs), options, sockets[0])]
    if options.metrics_port is not None:
        servers.append(_Server(_metrics_app(service), options, sockets[1]))
    ending = Ending(service, servers)
    service.end_server = ending.begin
    url = url_of(options.host, sockets[0])
    with ending.handling_signals():
        service.thread.start()
        beside = [asyncio.create_task(_announce(service, url, on_ready))]
        if runs:
            beside.append(asyncio.create_task(runs.run()))
        await asyncio.gather(*(server.serve() for server in servers))
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    is_stopped = await asyncio.to_thread(service.thread.stop, _CLOSING_SECONDS)
    is_stuck = service.thread.is_ready and not is_stopped
    return int(service.thread.failure is not None or ending.is_forced or is_stuck)


async def _announce(service: Service, url: str, on_ready: Callable[[Service, str], None]) -> None:
    if await service.ready():
        # Otherwise the collector looks through the model's objects and all modules again and again,
        # and holds Python's lock for 0.1 s and more.
        gc.collect()
        gc.freeze()
        on_ready(service, url)


class Ending:
    """Leads from the first signal, or a failure, to the end.

    Nothing new is taken meanwhile, and what runs gets a while.
    """

    def __init__(self, service: Service, servers: "list[_Server]") -> None:
        self._service, self._servers = service, servers
        self.is_forced = False

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread gets signals: whoever runs this ends it
            return
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.getsignal(number) for number in numbers]
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _on_signal(self) -> None:
        if self._service.is_draining:
            self.is_forced = True
            for server in self._servers:
                server.force_exit = True
            return
        seconds = self._service.options.drain_timeout
        _log.warning("going down: running requests have %g seconds; again to stop at once", seconds)
        asyncio.get_running_loop().call_later(seconds, self._end_requests)
        self.begin()

    def begin(self) -> None:
        """Takes no new connections; the servers end when there are no requests."""
        self._service.is_draining = True
        for server in self._servers:
            server.should_exit = True

    def _end_requests(self) -> None:
        self._service.thread.fail_all(
            ApiError(
                503, "the server is going down", type="server_error", code="shutting_down",
                retry_after=5,
            )
        )  # fmt: skip


class _Server(uvicorn.Server):
    """A uvicorn server without its own handling of signals, which would end the process."""

    def __init__(self, app: FastAPI, options: ServeOptions, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_IDLE_SECONDS,
                timeout_graceful_shutdown=int(options.drain_timeout) + _CLOSING_SECONDS,
                backlog=BACKLOG,
            )
        )
        self._listener = listener

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super().serve(sockets or [self._listener])

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's protocol with limits on the time and size of a request's headers, an end for
    connections whose client reads nothing, and errors in OpenAI's shape."""

    _running: Any = None  # the request that is being answered
    _unread = 0  # bytes of complete replies, when they were last looked at
    _headers_timer: asyncio.TimerHandle | None = None
    _is_in_headers = False
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_headers()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CUT] = self.transport.abort
        self._is_in_headers, self._header_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        if self._is_in_headers:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse(431, f"headers are larger than {MAX_HEADER_BYTES >> 10} KiB")
                return
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_headers()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)
        # uvicorn tells the latest request, of several sent at once. Another one may be running.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self._watch_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Closes an idle connection. Closing waits until the client has read what was written; one
        that has read nothing since the last time is cut."""
        unread = self.transport.get_write_buffer_size()
        if unread and unread == self._unread:
            self.transport.abort()
            return
        super().timeout_keep_alive_handler()
        if unread:
            self._watch_reader()

    def _watch_reader(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        """Answers and closes; or only closes, where an answer is on its way."""
        cycle = self.cycle
        if cycle is not None and cycle.more_body and not cycle.response_started:
            cycle.disconnected = True  # nobody waits for an answer to a body that is broken
            cycle.message_event.set()
        if cycle is None or cycle.response_complete or cycle.disconnected:
            body = bytes(ApiError(status, message).response().body)
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _await_headers(self) -> None:
        if self._headers_timer is None:
            self._headers_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None


def _metrics_app(service: Service) -> FastAPI:
    """Returns an application with /metrics alone, for a port of its own."""
    app = FastAPI(openapi_url=None)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4")

    return app
