"""This module makes the FastAPI application, which maps paths to endpoints.

Its OpenAPI document is at /openapi.json.
"""

import asyncio
import re
from collections.abc import Coroutine
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from llama_jax.serve import chat, completions, tokens
from llama_jax.serve.batch_api import add_batches
from llama_jax.serve.batch_runs import BatchRuns
from llama_jax.serve.bodies import BodyRoute
from llama_jax.serve.errors import (
    ApiError,
    ClientGone,
    engine_failed,
    invalid,
    not_json,
    not_ready,
    unreadable,
)
from llama_jax.serve.events import EventStream
from llama_jax.serve.middleware import BEGAN, Gate
from llama_jax.serve.replies import (
    ChatCompletion,
    Completion,
    ErrorReply,
    Health,
    ModelCard,
    ModelList,
    ScoreReply,
    Text,
    TokenizerInfo,
    Tokens,
)
from llama_jax.serve.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ScoreRequest,
    TokenizeRequest,
    check_unknown,
)
from llama_jax.serve.service import Service

# The error that FastAPI raises for a body that it cannot read.
_FASTAPIS_400 = "There was an error parsing the body"
_JSON = re.compile(r"application/([\w.-]+\+)?json\b", re.IGNORECASE)
_STATUSES = {
    400: "The request is wrong; `param` names the field",
    401: "No valid API key",
    404: "There is no such model, or path",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not said to be JSON",
    429: "Too many requests are waiting; `Retry-After` says when to come back",
    500: "The server failed",
    503: "The server is starting or going down",
    504: "The request's deadline has passed",
    507: "The server's disk is full",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text} for status, text in _STATUSES.items()
}


def create_app(service: Service, runs: BatchRuns | None = None) -> FastAPI:
    """Returns the application that serves a model. `service.thread` must have been started.

    runs: runs batches; None for a server without them.
    """
    app = FastAPI(
        title="llama-jax",
        version=_version(),
        description="OpenAI's endpoints, with vLLM's additional fields.",
        responses=_ERRORS,
        redoc_url=None,
    )
    app.router.route_class = BodyRoute
    _add_error_handlers(app)
    _add_completions(app, service)
    _add_tokens(app, service)
    _add_monitoring(app, service)
    if runs:
        add_batches(app, runs)
    _correct_document(app)
    app.add_middleware(Gate, options=service.options)
    if service.options.allowed_origins:  # around the gate, so that its refusals can be read too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.options.allowed_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
    return app


def _add_completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion, tags=["OpenAI"])
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Writes the assistant's next message; with `stream: true` as server-sent events."""
        return await _answer(service, request, body, chat)

    @app.post("/v1/completions", response_model=Completion, tags=["OpenAI"])
    async def text_completions(body: CompletionRequest, request: Request) -> Response:
        """Continues one or several prompts, texts or token ids."""
        return await _answer(service, request, body, completions)


async def _answer(service: Service, request: Request, body: Any, endpoint: Any) -> Response:
    """Answers a request, in one piece or as a stream.

    endpoint: a module with `prepare`, `whole` and `pieces`, as `chat` has them.
    """
    check_unknown(body)
    began = request.scope[BEGAN]
    if not body.stream:
        return _reply(await while_connected(request, endpoint.whole(service, body, began)))
    job = await while_connected(request, endpoint.prepare(service, body))
    submission = service.admit(job.requests, began, is_streamed=True)
    updates = service.updates(submission)
    return EventStream(submission, updates, endpoint.pieces(service, body, submission))


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", response_model=ModelList, tags=["OpenAI"])
    async def models() -> Response:
        """Lists the names that the model answers to."""
        return _reply(tokens.models(service))

    @app.get("/v1/models/{name:path}", response_model=ModelCard, tags=["OpenAI"])
    async def model(name: str) -> Response:
        service.check_model(name)
        cards = tokens.models(service).data
        return _reply(next(card for card in cards if card.id == name))

    @app.get("/tokenizer_info", response_model=TokenizerInfo, tags=["Tokens"])
    async def tokenizer_info() -> Response:
        """Returns the names of tokens with a role, and the chat template."""
        return _reply(tokens.tokenizer_info(service))

    @app.post("/tokenize", response_model=Tokens, tags=["Tokens"])
    async def tokenize(body: TokenizeRequest) -> Response:
        """Tokenises a prompt or a conversation."""
        check_unknown(body)
        return _reply(await tokens.tokenize(service, body))

    @app.post("/detokenize", response_model=Text, tags=["Tokens"])
    async def detokenize(body: DetokenizeRequest) -> Response:
        """Decodes token ids to text."""
        check_unknown(body)
        return _reply(await tokens.detokenize(service, body))

    @app.post("/v1/score", response_model=ScoreReply, tags=["Tokens"])
    async def score(body: ScoreRequest, request: Request) -> Response:
        """Computes the probability of each of several completions after a prompt."""
        check_unknown(body)
        asked = tokens.score(service, body, request.scope[BEGAN])
        return _reply(await while_connected(request, asked))


def _add_monitoring(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=Health, tags=["Monitoring"])
    async def health() -> Response:
        """Answers 200 while the engine has not failed."""
        if service.thread.failure:
            raise engine_failed(service.thread.failure)
        return _reply(Health(status="ok"))

    @app.get("/ready", response_model=Health, tags=["Monitoring"])
    async def ready() -> Response:
        """Answers 200 when everything is compiled, the engine steps, and the server stays up."""
        if service.thread.failure:
            raise engine_failed(service.thread.failure)
        if not service.is_ready:
            raise not_ready("warming up, going down, or a step takes suspiciously long")
        return _reply(Health(status="ready"))

    @app.get("/metrics", tags=["Monitoring"])
    async def metrics() -> Response:
        """Returns metrics for Prometheus."""
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "")
        is_of_body = error.errors()[0]["loc"][:1] == ("body",)
        if is_of_body and not _JSON.match(kind):
            return not_json(kind).response()
        return invalid(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def refuse_path(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400 and error.detail == _FASTAPIS_400:
            return unreadable().response()
        refusal = ApiError(error.status_code, str(error.detail)).response()
        refusal.headers.update(error.headers or {})
        return refusal


def _correct_document(app: FastAPI) -> None:
    """Corrects what FastAPI writes about wrong bodies and streams.

    A wrong body gets a 400, as from OpenAI, and no 422. Replies may be streams.
    """
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for path in ("/v1/chat/completions", "/v1/completions"):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        content["text/event-stream"] = {"schema": {"type": "string"}}
    document["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = {
        "text/plain": {"schema": {"type": "string"}}
    }
    app.openapi_schema = document


async def while_connected[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`. Cancels it and raises `ClientGone` if the client leaves."""

    async def until_gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.Task(work, loop=asyncio.get_running_loop(), eager_start=True)
    if task.done():  # it had nothing to wait for
        return task.result()
    gone = asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def _reply(model: BaseModel) -> Response:
    return Response(model.model_dump_json(), media_type="application/json")


def _version() -> str:
    try:
        return version("llama-jax")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
