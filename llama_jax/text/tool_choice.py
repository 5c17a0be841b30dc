"""What `tool_choice` says: which tools a prompt offers, and whether the reply has to call one.

The values are OpenAI's: "none" offers nothing, "auto" leaves it to the model, "required" asks for a
call of any tool, and {"type": "function", "function": {"name": ...}} for a call of that one.
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
    """How a reply may call tools.

    offered: the tools that its prompt names. form: what it has to look like where it must be a
    call. is_parallel: whether it may make several calls.
    """

    offered: Tools | None
    form: StructuredOutput | None
    is_parallel: bool


def calling(
    tools: Tools | None, choice: ToolChoice, is_parallel: bool, tokenizer: Tokenizer
) -> Calling:
    """Return what `choice` means with these tools, which may be functions or JSON schemas.

    Raises ValueError for a choice that is none, that names no tool, or that needs tools where there
    are none.
    """
    if choice in ("none", "auto"):
        return Calling(tools if choice == "auto" else None, None, is_parallel)
    name = _name(choice)
    if not tools:
        raise ValueError(f"tool_choice: {name or choice!r} needs tools")
    form = tool_call_output(tools, tokenizer, name=name, is_parallel=is_parallel and name is None)
    return Calling(tools, form, is_parallel)


def _name(choice: Any) -> str | None:
    """The name of the only tool that may be called; None where it may be any."""
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
