"""This module has errors as OpenAI's clients read them.

They are {"error": {"message", "type", "param", "code"}}.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from llama_jax.serve.replies import ErrorBody, ErrorReply
from llama_jax.structured import StructuredOutputError

_FIELD = re.compile("[a-z0-9_]+")
_NAMED = re.compile("([a-z0-9_]+): (.*)", re.DOTALL)
_TYPES = {"str", "int", "float", "bool", "list", "dict"}
_PARAM_LENGTH = 200


class ApiError(Exception):
    """Says that a request is not answered: the HTTP status, and what the client is told.

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


def not_json(kind: str) -> ApiError:
    """Refuses a body that is not said to be JSON. kind: what Content-Type says, if anything."""
    got = f"got {kind[:100]!r}" if kind else "which is missing"
    return ApiError(415, f"the header Content-Type has to be application/json, {got}")


def unreadable() -> ApiError:
    """Refuses a body that Python's parser of JSON gives up on."""
    return bad_request("the body is no JSON in UTF-8, or nested too deeply")


def internal_error(error: BaseException | None = None) -> ApiError:
    """Tells the type of an error of the server's own, and no text of anybody's."""
    kind = f" ({type(error).__name__})" if error else ""
    return ApiError(
        500, f"the server failed on this request{kind}", type="server_error", code="internal_error"
    )


def request_failed(error: BaseException) -> ApiError:
    """Tells of an error that the engine met in its work for one request.

    A form that turns out in the middle of a reply to be too complex, or to leave nothing that may
    be drawn, is the client's.
    """
    if isinstance(error, StructuredOutputError):
        return bad_request(str(error))
    return internal_error(error)


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
    """Tells the first field in which pydantic found a mistake, and none of the client's values."""
    found = error.errors() if isinstance(error, ValidationError) else error
    first: Mapping[str, Any] = found[0] if found else {"loc": (), "msg": "invalid", "type": ""}
    if first["type"] == "json_invalid":
        where = f"{first['ctx']['error']} at character {first['loc'][-1]}"
        return bad_request(f"the body is not JSON: {where}")
    fields = {_path(each)[:1] for each in found}
    same_field = [each for each in found if _path(each)[:1] == _path(first)[:1]]
    best = max(same_field, key=_closeness, default=first)
    param = _dotted(_path(best))
    message = str(best["msg"]).removeprefix("Value error, ")
    if not param and (named := _NAMED.match(message)):  # by a check of several fields together
        param, message = named.groups()
    if not _path(best) and best["type"] in ("missing", "model_attributes_type"):
        message = "the body has to be a JSON object"
    more = f" (and {len(fields) - 1} more fields)" if len(fields) > 1 else ""
    return bad_request(f"{param}: {message}{more}" if param else f"{message}{more}", param)


def _path(mistake: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Returns where a mistake is; FastAPI puts "body" or "query" in front."""
    path = mistake["loc"]
    return path[1:] if path[:1] in (("body",), ("query",)) else path


def _closeness(mistake: Mapping[str, Any]) -> tuple[bool, int]:
    """Says how near a value came to the alternative that a mistake is about.

    A field may have several, and pydantic tells what is wrong with each. A wrong kind of value is
    far off, and a mistake deep inside is near.
    """
    return not mistake["type"].endswith("_type"), len(mistake["loc"])


def _dotted(path: Sequence[str | int]) -> str | None:
    """Returns messages[0].content for ("messages", 0, "content").

    Leaves out the names of types, which pydantic puts after a field that has several, since no
    client knows them.
    """
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _FIELD.fullmatch(part) and part not in _TYPES:
            text += f".{part}" if text else part
    return text[:_PARAM_LENGTH] or None
