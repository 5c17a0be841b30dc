"""What a request says about the form of its text, for `SamplingParams.structured`."""

from dataclasses import fields
from typing import Any

from llama_jax.sampling_params import SamplingParams
from llama_jax.serve.errors import bad_request
from llama_jax.serve.schemas import Asked, ChatRequest, NamedTool

_IS_THERE = "structured" in {field.name for field in fields(SamplingParams)}


def structured_settings(body: Asked) -> dict[str, Any]:
    """The field of `SamplingParams`, if the request asks for a form.

    Raises `ApiError` where two fields ask for different ones, or none can be kept to.
    """
    asked = []
    if body.response_format and body.response_format.type != "text":
        asked.append("response_format")
    if body.structured_outputs:
        asked.append("structured_outputs")
    if isinstance(body, ChatRequest) and (
        isinstance(body.tool_choice, NamedTool) or body.tool_choice == "required"
    ):
        asked.append("tool_choice")
    if len(asked) > 1:
        raise bad_request(f"{asked[0]} and {asked[1]} exclude each other", asked[1])
    if asked and not _IS_THERE:
        raise bad_request(f"{asked[0]}: not supported by this server; leave it out", asked[0])
    return {}
