"""A server on a free port of this machine, in a thread, for tests that talk to it over a socket."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from llama_jax import LLM
from llama_jax.serve.options import ServeOptions
from llama_jax.serve.server import serve
from llama_jax.serve.service import Service

# Seconds, long enough for any machine: tests wait for an event, they do not time it.
PATIENCE = 120.0


@dataclass(eq=False)
class Served:
    url: str
    service: Service
    ended: threading.Event
    status: list[int]

    @property
    def llm(self) -> LLM:
        return self.service.llm

    def client(self, **settings: Any) -> openai.OpenAI:
        given = {"api_key": "none", "timeout": PATIENCE, "max_retries": 0}
        return openai.OpenAI(base_url=f"{self.url}/v1", **(given | settings))

    def async_client(self, **settings: Any) -> openai.AsyncOpenAI:
        given = {"api_key": "none", "timeout": PATIENCE, "max_retries": 0}
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **(given | settings))

    def post(self, path: str, body: Any, **settings: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=PATIENCE, **settings)

    def post_text(self, path: str, text: str) -> httpx2.Response:
        headers = {"Content-Type": "application/json"}
        content = text.encode("latin-1")
        return httpx2.post(self.url + path, content=content, headers=headers, timeout=PATIENCE)

    def get(self, path: str, **settings: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=PATIENCE, **settings)

    def end(self) -> int:
        """End the server as a signal does, and return its exit status."""
        if not self.ended.is_set():
            self.service.thread.loop.call_soon_threadsafe(self.service.end_server)
        assert self.ended.wait(PATIENCE)
        return self.status[0]


@contextmanager
def serving(llm: LLM, **options: Any) -> Iterator[Served]:
    """Serve a loaded model on a free port. It can be used again afterwards.

    options: fields of `ServeOptions`.
    """
    ready, ended = threading.Event(), threading.Event()
    found: list[tuple[Service, str]] = []
    status: list[int] = []

    def on_ready(service: Service, url: str) -> None:
        found.append((service, url))
        ready.set()

    def run() -> None:
        try:
            asked = ServeOptions(**{"port": 0, "drain_timeout": 5.0, **options})
            status.append(serve(llm, asked, "tests", on_ready=on_ready))
        finally:
            ended.set()
            ready.set()

    threading.Thread(target=run, daemon=True).start()
    assert ready.wait(PATIENCE) and found, "the server did not start"
    service, url = found[0]
    served = Served(url, service, ended, status)
    try:
        yield served
    finally:
        served.end()
