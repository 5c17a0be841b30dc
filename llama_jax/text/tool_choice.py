"""Interprets `tool_choice`: which tools a prompt offers, and whether the reply must call one.

The values are OpenAI's: "none" offers no tools, "auto" lets the model decide, "required" demands a
call of any tool, and {"type": "function", "function": {"name": ...}} a call of this one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama_jax.structured import StructuredOutput
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tool_grammar import tool_call_output

Tools = Sequence[Callable[..., Any] | Mapping[str, Any]]
ToolChoice = Literal["none", "auto", "required"] | Mapping[str, Any]


@dataclass(frozen=True)
class Calling:
    """The ways in which a reply may call tools.

    offered: the tools in its prompt.
    form: the structured output of a reply that must be a call.
    is_parallel: whether it may make several calls.
    """

    offered: Tools | None
    form: StructuredOutput | None
    is_parallel: bool


def calling(
    tools: Tools | None, choice: ToolChoice, is_parallel: bool, tokenizer: Tokenizer
) -> Calling:
    """Interpret `choice` for these tools, which may be functions or JSON schemas.

    Raises ValueError for an unknown choice or tool, and if there are no tools to choose from.
    """
    if choice in ("none", "auto"):
        return Calling(tools if choice == "auto" else None, None, is_parallel)
    name = _name(choice)
    if not tools:
        raise ValueError(f"tool_choice: {name or choice!r} needs tools")
    form = tool_call_output(tools, tokenizer, name=name, is_parallel=is_parallel and name is None)
    return Calling(tools, form, is_parallel)


def _name(choice: Any) -> str | None:
    """Return the name of the only tool that may be called, or None for any."""
    if choice == "required":
        return None
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        function = choice.get("function")
        if isinstance(function, Mapping) and isinstance(name := function.get("name"), str):
            return name
    raise ValueError(
        'tool_choice: expected "none", "auto", "required" or '
        f'{{"type": "function", "function": {{"name": ...}}}}, got {choice!r:.200}'
    )
