"""This module reads a reply that may call tools, and tells text for the user from calls.

A call is told as soon as its name is there, and its arguments as they are drawn, where it is JSON
with the name in front and the tool is one that was offered. Anything else that could become a call
is held back until the reply has ended and `tools.parse_tool_calls` has read it as a whole. A reply
that turns out to be malformed after its first call was told keeps what was told.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal
from uuid import uuid4

from llama_jax.engine.request import held_back
from llama_jax.text.tools import CALL_OPENINGS, ToolCall, ToolFormat, call_ends, call_marks

# A name and the word before the arguments are found within so many characters, or not at all.
_HEAD_LENGTH = 2048

Delta = dict[str, Any]  # of a message, as in a chunk of a stream


class ToolCallStream:
    """Takes the text of one reply as it grows.

    names: tools that were offered. tag_id: of `<|python_tag|>`, which leaves no text. parallel:
    whether there may be more than one call; others are dropped.
    """

    def __init__(
        self, form: ToolFormat, names: Iterable[str], tag_id: int | None, parallel: bool
    ) -> None:
        self._marks = call_marks(form)
        around = "".join(f"|{re.escape(mark)}" for mark in (*self._marks, *call_ends(form)))
        self._head = re.compile(
            rf"(?:[\s\[\]}};,]{around})*"
            r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]+)"\s*,\s*'
            r'"(?:parameters|arguments)"\s*:\s*(?=\{)'
        )
        self._names = frozenset(names)
        self._tag_id, self._parallel = tag_id, parallel
        self._state: Literal["undecided", "content", "call", "arguments", "held"] = "undecided"
        self._held = ""  # text that has not been told
        self._arguments = _ObjectText()
        self._num_calls = 0  # that have been told, or begun

    def push(self, text: str, token_ids: Sequence[int] = ()) -> list[Delta]:
        """Takes more text and returns what can be told now."""
        deltas: list[Delta] = []
        if self._tag_id in token_ids and self._state in ("undecided", "content"):
            deltas = self._content(self._held.rstrip())
            self._state, self._held = "call", ""
        self._held += text
        while True:
            before = self._state
            deltas += getattr(self, f"_in_{before}")()
            if self._state == before:
                return deltas

    def end(self, calls: Sequence[ToolCall]) -> list[Delta]:
        """Returns what is left to tell when the reply has ended. calls: those that it makes."""
        if not calls:
            return [] if self._num_calls else self._content(self._held)
        unsent = calls[self._num_calls :] if self._parallel else calls[self._num_calls : 1]
        return [self._begin(call.name, arguments_text(call)) for call in unsent]

    def _in_undecided(self) -> list[Delta]:
        text = self._held.lstrip()
        if any(text.startswith(opening) for opening in CALL_OPENINGS):
            self._state = "call"
        elif text and not any(opening.startswith(text) for opening in CALL_OPENINGS):
            self._state = "content"
        return []

    def _in_content(self) -> list[Delta]:
        found = [at for mark in self._marks if (at := self._held.find(mark)) >= 0]
        if found:
            text, self._held = self._held[: min(found)].rstrip(), self._held[min(found) :]
            self._state = "call"
            return self._content(text)
        # White space goes if a call follows, and may be the beginning of what stands before one.
        sure = self._held[: len(self._held) - held_back(self._held, self._marks)].rstrip()
        self._held = self._held[len(sure) :]
        return self._content(sure)

    def _in_call(self) -> list[Delta]:
        head = self._head.match(self._held)
        if head is None:
            if len(self._held) > _HEAD_LENGTH:
                self._state = "held"
            return []
        if head[1] not in self._names or (self._num_calls and not self._parallel):
            self._state = "held"
            return []
        self._held = self._held[head.end() :]
        self._state, self._arguments = "arguments", _ObjectText()
        return [self._begin(head[1], "")]

    def _in_arguments(self) -> list[Delta]:
        piece, self._held = self._arguments.take(self._held)
        if self._arguments.is_closed:
            self._state = "call"
        if not piece:
            return []
        function = {"arguments": piece}
        return [{"tool_calls": [{"index": self._num_calls - 1, "function": function}]}]

    def _in_held(self) -> list[Delta]:
        return []

    def _content(self, text: str) -> list[Delta]:
        return [{"content": text}] if text else []

    def _begin(self, name: str, arguments: str) -> Delta:
        call = {
            "index": self._num_calls,
            "id": f"call_{uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        self._num_calls += 1
        return {"tool_calls": [call]}


class _ObjectText:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._is_escaped = False
        self.is_closed = False

    def take(self, text: str) -> tuple[str, str]:
        """Returns the part of `text` that belongs to the object, and the rest.

        Line breaks inside strings, which models write and JSON has not, are escaped.
        """
        written: list[str] = []
        for at, character in enumerate(text):
            if self._in_string:
                written.append(json.dumps(character)[1:-1] if character < " " else character)
                if self._is_escaped:
                    self._is_escaped = False
                elif character == "\\":
                    self._is_escaped = True
                elif character == '"':
                    self._in_string = False
                continue
            written.append(character)
            if character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.is_closed = True
                    return "".join(written), text[at + 1 :]
        return "".join(written), ""


def arguments_text(call: ToolCall) -> str:
    """Returns a call's arguments as OpenAI sends them: JSON in a string."""
    return json.dumps(call.arguments, ensure_ascii=False)
