"""Makes the grammar of a reply that must be a tool call, in the checkpoint's format of calls."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.structured import JSON_FORM, StructuredOutput, StructuredOutputError
from llama_jax.text.chat import choose_template
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tools import ToolFormat, tool_format, tool_schema


@dataclass(frozen=True)
class _Form:
    """A format of calls: `begin` call `between` call ... `end`, where a call is `before` name
    `middle` arguments `after`.

    is_json: whether the name is a JSON string.
    """

    before: str
    middle: str
    after: str
    between: str
    begin: str = ""
    end: str = ""
    is_json: bool = True


_FORMS: dict[ToolFormat, _Form] = {
    "llama": _Form('{"name": "', '", "parameters": ', "}", "; "),
    "hermes": _Form('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n"),
    "nemotron": _Form('{"name": "', '", "arguments": ', "}", ", ", "<TOOLCALL>[", "]</TOOLCALL>"),
    "deepseek": _Form(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",  # noqa: RUF001
        "\n```json\n",
        "\n```<｜tool▁call▁end｜>",  # noqa: RUF001
        "\n",
        "<｜tool▁calls▁begin｜>",  # noqa: RUF001
        "<｜tool▁calls▁end｜>",  # noqa: RUF001
        is_json=False,
    ),
}


def tool_call_output(
    tools: Sequence[Callable[..., Any] | Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    is_parallel: bool = False,
) -> StructuredOutput:
    """Return the structured output that makes a reply a call of one of `tools` with arguments that
    fit its schema.

    tools: as in `LLM.chat`.
    tokenizer: its chat template determines the format of calls.
    name: of the only tool that may be called.
    is_parallel: whether there may be several calls.

    Raises ValueError without tools, or for an unknown name.
    """
    functions = [tool_schema(tool)["function"] for tool in tools]
    names = [each["name"] for each in functions]
    if name is not None:
        functions = [each for each in functions if each["name"] == name]
    if not functions:
        raise ValueError(f"tool_choice: no tool is named {name!r}; there are {names}")
    form = _FORMS[tool_format(choose_template(tokenizer, tools=True))]

    def literal(text: str) -> str:
        return _literal(text, tokenizer.special_tokens)

    call = f"{literal(form.before)} (%s) {literal(form.after)}"
    calls = f"call ({literal(form.between)} call)*" if is_parallel else "call"
    rules = [
        f"start: {literal(form.begin)} {calls} {literal(form.end)}",
        "call: " + call % " | ".join(f"tool{i}" for i in range(len(functions))),
    ]
    for i, function in enumerate(functions):
        inside = function["name"]
        if form.is_json:
            inside = json.dumps(inside, ensure_ascii=False)[1:-1]
        rules += [
            f"tool{i}: {literal(inside + form.middle)} arguments{i}",
            f"arguments{i}: %json {_arguments(function)}",
        ]
    return StructuredOutput(grammar="\n".join(rules))


def _literal(text: str, special_tokens: Mapping[str, int]) -> str:
    """Write a text in Lark, with added tokens by name."""
    for name, token_id in special_tokens.items():
        if name in text:
            before, _, after = text.partition(name)
            parts = (_literal(before, special_tokens), _literal(after, special_tokens))
            return f"{parts[0]} <[{token_id}]> {parts[1]}".strip()
    return json.dumps(text, ensure_ascii=False) if text else ""


def _arguments(function: Mapping[str, Any]) -> str:
    """Return the schema of a tool's arguments, without additional ones unless it allows them."""
    parameters = function.get("parameters") or {}
    schema = {"type": "object", "properties": {}, "additionalProperties": False, **parameters}
    try:
        return json.dumps({**schema, "x-guidance": JSON_FORM}, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise StructuredOutputError(f"tool {function['name']}: parameters: {error}") from None
