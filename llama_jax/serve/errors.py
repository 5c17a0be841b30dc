"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from llama_jax.serve.replies import ErrorBody, ErrorReply


class ApiError(Exception):
    """A request that is not answered: the HTTP status, and what the client is told.

    param: the field that is wrong. code: a word for programs. retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.body = ErrorReply(error=ErrorBody(message=message, type=type, param=param, code=code))

    def as_dict(self) -> dict[str, Any]:
        return self.body.model_dump()

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.as_dict(), self.status, headers)


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def internal_error(error: BaseException | None = None) -> ApiError:
    """What is told of an error of the server's own: its type, and no text of anybody's."""
    kind = f" ({type(error).__name__})" if error else ""
    return ApiError(
        500, f"the server failed on this request{kind}", type="server_error", code="internal_error"
    )


def engine_failed(error: BaseException) -> ApiError:
    return ApiError(
        500,
        f"the engine failed in a step ({type(error).__name__}); the server is going down",
        type="server_error",
        code="engine_failed",
    )


def not_ready(message: str) -> ApiError:
    return ApiError(503, message, type="server_error", code="not_ready", retry_after=5)


def too_late(seconds: float) -> ApiError:
    return ApiError(
        504,
        f"the request took longer than {seconds:g} seconds",
        type="timeout_error",
        code="deadline_exceeded",
    )


def invalid(error: ValidationError | Sequence[Mapping[str, Any]]) -> ApiError:
    """What pydantic found, the first mistake of it. The client's values are not repeated."""
    found = error.errors() if isinstance(error, ValidationError) else error
    first = found[0] if found else {"loc": (), "msg": "invalid"}
    # FastAPI puts "body" in front; for a union pydantic names the alternative that was tried.
    path = [part for part in first["loc"] if part != "body"]
    param = _dotted(path)
    message = str(first["msg"]).removeprefix("Value error, ")
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return bad_request(f"{param}: {message}{more}" if param else f"{message}{more}", param)


def _dotted(path: Sequence[str | int]) -> str | None:
    """messages[0].content for ("messages", 0, "content")."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.replace("_", "").isalnum():
            text += f".{part}" if text else part
        else:
            break  # the name of a type, such as `list[str]`, which no client knows
    return text or None
