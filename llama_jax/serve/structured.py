"""This module reads what a request says about the form of its text."""

from llama_jax.serve.errors import bad_request
from llama_jax.serve.schemas import Asked, ChatRequest
from llama_jax.structured import StructuredOutput


def structured_output(body: Asked) -> StructuredOutput | None:
    """Returns the form that a request asks for, if any; calls that it has to make are `LLM.chat`'s.

    Raises `ApiError` where two fields ask for different ones, ValueError for one that cannot be.
    """
    asked: dict[str, StructuredOutput] = {}
    form = body.response_format
    if form and form.json_schema and form.json_schema.schema_ is not None:
        asked["response_format"] = StructuredOutput(json_schema=form.json_schema.schema_)
    elif form and form.type == "json_object":
        asked["response_format"] = StructuredOutput(json_object=True)
    if given := body.structured_outputs:
        asked["structured_outputs"] = StructuredOutput(
            json_schema=given.json_,
            json_object=bool(given.json_object),
            regex=given.regex,
            choice=given.choice,
            grammar=given.grammar,
        )
    if len(asked) > 1:
        first, second, *_ = asked
        raise bad_request(f"{first} and {second} exclude each other", second)
    return next(iter(asked.values()), None)


def field_of_form(body: Asked) -> str | None:
    """Names the field by which a request asks for a form, whose grammar may take seconds."""
    if body.response_format and body.response_format.type != "text":
        return "response_format"
    if body.structured_outputs:
        return "structured_outputs"
    return "tool_choice" if isinstance(body, ChatRequest) and body.must_call else None
