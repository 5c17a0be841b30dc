"""Finds out by trial which form of messages a chat template expects.

Templates differ in three ways that no file describes: whether the arguments of a tool call are an
object or JSON text, whether content is text or a list of parts, and what a null key means. So a
short conversation is rendered in both forms, and a word of it is searched in the result.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llama_jax.text.chat_template import (
    ChatTemplateBudgetError,
    ChatTemplateError,
    render_template,
)

_WORD = "needle7"
_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "F.",
        "parameters": {"type": "object", "properties": {}},
    },
}
_ASKS_FOR_KEY = re.compile(r"""(['"])tool_calls\1\s+in\s|tool_calls['"]?\]?\s+is\s+defined""")
_ASKS_FOR_NULL = re.compile(r"""tool_calls['"]?\]?\s+is\s+(?:not\s+)?none""")
_CONTENT_NULL = re.compile(r"""content['"]?\]?\s+is\s+(?:not\s+)?none""")


@dataclass(frozen=True)
class Habits:
    """The forms of messages that a template expects.

    takes_lists: whether it writes the texts of a list of parts.
    needs_lists: whether it drops content that is text.
    drops_null_calls: whether "tool_calls": null has to be dropped, because it would read as calls.
    fills_content: whether a message with calls needs "content": null.
    """

    takes_lists: bool
    needs_lists: bool
    drops_null_calls: bool
    fills_content: bool


@lru_cache(maxsize=16)
def template_habits(source: str) -> Habits:
    """Find out which content and keys a template expects. Raises ChatTemplateBudgetError."""
    parts = [{"type": "text", "text": _WORD}]
    listed, text = _tried(source, _user(parts)), _tried(source, _user(_WORD))
    takes_lists = _WORD in listed and "'text'" not in listed and '"text"' not in listed
    return Habits(
        takes_lists=takes_lists,
        needs_lists=takes_lists and _WORD not in text,
        drops_null_calls=bool(_ASKS_FOR_KEY.search(source) and not _ASKS_FOR_NULL.search(source)),
        fills_content=bool(_CONTENT_NULL.search(source)),
    )


@lru_cache(maxsize=16)
def takes_text_arguments(source: str) -> bool:
    """Return whether a template writes a call's arguments only if they are JSON text."""

    def works(arguments: Any) -> bool:
        call = {"type": "function", "id": "call00001"}
        call["function"] = {"name": "f", "arguments": arguments}  # type: ignore[assignment]
        # Some templates refuse null, or a conversation without a system message or a tool's result.
        return any(
            f'"{_WORD}"' in _tried(source, [*before, *_user("a"), message, *after])
            for content in (None, "")
            for message in [{"role": "assistant", "content": content, "tool_calls": [call]}]
            for before in ([], [{"role": "system", "content": "a"}])
            for after in ([], [{"role": "tool", "tool_call_id": "call00001", "content": "a"}])
        )

    return not works({_WORD: 1}) and works(f'{{"{_WORD}": 1}}')


def _user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _tried(source: str, messages: list[dict[str, Any]]) -> str:
    variables = {"messages": messages, "tools": [_TOOL], "add_generation_prompt": False}
    for tools in ([_TOOL], None):
        try:
            return render_template(source, variables | {"tools": tools})
        except ChatTemplateBudgetError:
            raise
        except ChatTemplateError:
            continue
    return ""
