"""This module reads JSON bodies as FastAPI does, in half the time.

FastAPI prepares for dependencies, forms and streams that no endpoint here has, and has `email` read
the content type, which a short reply's first token would notice.
"""

import inspect
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

from llama_jax.serve.errors import invalid, unreadable


class BodyRoute(APIRoute):
    """A route that reads the body itself, if its endpoint takes a model called `body`, perhaps the
    `request`, and nothing else. FastAPI has all other routes, and bodies of other content types."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        usual, endpoint = super().get_route_handler(), self.endpoint
        takes = inspect.signature(endpoint).parameters
        model = takes["body"].annotation if "body" in takes else None
        if not inspect.isclass(model) or not issubclass(model, BaseModel):
            return usual
        if not takes.keys() <= {"body", "request"}:
            return usual

        async def handle(request: Request) -> Response:
            is_json = request.headers.get("content-type") == "application/json"
            if not is_json or not await request.body():
                return await usual(request)
            given: dict[str, Any] = {"body": await _read(request, model), "request": request}
            response: Response = await endpoint(**{name: given[name] for name in takes})
            return response

        return handle


async def _read(request: Request, model: type[BaseModel]) -> BaseModel:
    try:
        given = await request.json()
    except json.JSONDecodeError as error:
        mistake = {"type": "json_invalid", "loc": (error.pos,), "ctx": {"error": error.msg}}
        raise invalid([mistake]) from error
    except (ValueError, RecursionError) as error:
        raise unreadable() from error
    try:
        return model.model_validate(given, from_attributes=True)
    except ValidationError as error:
        raise invalid(error) from error
