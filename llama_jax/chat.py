"""A conversation becomes the prompt that the model was trained on.

The checkpoint's own Jinja template is used where there is one, rendered as transformers renders it;
otherwise Meta's format for the tokenizer's family. Either way the prompt is a list of pieces that
are each either a special token that the format wrote, or text: text from messages and tools never
becomes a special token. For a template this is done by putting a pair of characters that occur
nowhere else around the names of special tokens in what the user supplied, before rendering.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_jax.chat_template import ChatTemplateError, render_template
from llama_jax.meta_chat import Piece, llama2_pieces, llama3_pieces
from llama_jax.tokenizer import Tokenizer
from llama_jax.tools import ToolCall, tool_schema

__all__ = ["ROLES", "ChatTemplateError", "encode_chat", "render_chat"]

ROLES = ("system", "user", "assistant", "tool", "ipython")
_MAX_DEPTH = 100  # of nested lists and objects in a message
# Where the two marks are taken from: the first that the input does not hold. These are rare
# ideographs, which unlike private-use characters come through Python's repr() unescaped.
_MARKS = range(0x20000, 0x2A6D0)

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Callable[..., Any] | Mapping[str, Any]]


def render_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = True,
    **template_kwargs: Any,
) -> str:
    """The prompt as text, to look at. Give the model `encode_chat`: in text a special token that a
    user wrote looks like one that the template wrote.

    Each message is a mapping with a "role" (one of `ROLES`) and a "content": a string or a list of
    {"type": "text", "text": ...}, and for a tool's result any JSON value. An assistant message may
    have "tool_calls" instead: `ToolCall`s or {"type": "function", "function": {"name",
    "arguments"}}. `tools` are functions or JSON schemas (see `tool_schema`). `template_kwargs`
    reach the template (`date_string`, `builtin_tools`, ...); without a template, Llama 3 takes
    `tool_prompt_format`: "json", "function_tag" or "python_list".

    Raises ValueError naming the message and field that cannot be used, ChatTemplateError from the
    template.
    """
    pieces = _pieces(tokenizer, messages, tools, add_generation_prompt, template_kwargs)
    return "".join(piece.text for piece in pieces)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = True,
    **template_kwargs: Any,
) -> list[int]:
    """The prompt as token ids; arguments and errors as in `render_chat`.

    Only what the template itself wrote becomes a special token, and all of it does: a prompt has
    the begin-of-text that its template writes, or none.
    """
    pieces = _pieces(tokenizer, messages, tools, add_generation_prompt, template_kwargs)
    return tokenizer.encode_pieces((piece.text, piece.special) for piece in pieces)


def _pieces(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any],
) -> list[Piece]:
    checked = _check_messages(messages)
    schemas = (
        [_plain(tool_schema(tool), f"tools[{i}]") for i, tool in enumerate(tools)]
        if tools
        else None
    )
    if tokenizer.chat_template is not None:
        variables = {key: _plain(value, key) for key, value in template_kwargs.items()}
        variables = {"documents": None, **variables, "messages": checked, "tools": schemas}
        return _template_pieces(
            tokenizer, tokenizer.chat_template, variables, add_generation_prompt
        )
    allowed = {"tool_prompt_format"} if tokenizer.kind == "tiktoken" else set()
    if unknown := sorted(template_kwargs.keys() - allowed):
        raise ValueError(
            f"{unknown[0]}: this checkpoint has no chat template, and Meta's format takes no such "
            "argument"
        )
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    if tokenizer.kind == "tiktoken":
        pieces = llama3_pieces(checked, schemas, add_generation_prompt, **template_kwargs)
    elif schemas or tokenizer.bos_id is None or not tokenizer.eos_ids:
        raise ValueError(
            "tools: Llama 2's chat format has none; leave them out or add a chat_template.jinja"
        )
    else:
        bos, eos = names[tokenizer.bos_id], names[tokenizer.eos_ids[0]]
        pieces = llama2_pieces(checked, add_generation_prompt, bos, eos)
    for piece in pieces:
        if piece.special and piece.text not in tokenizer.special_tokens:
            raise ValueError(
                f"no chat template, and the tokenizer lacks {piece.text} of Meta's format; add a "
                "chat_template.jinja"
            )
    return pieces


def _template_pieces(
    tokenizer: Tokenizer, template: str, variables: Mapping[str, Any], add_generation_prompt: bool
) -> list[Piece]:
    given = json.dumps(variables, ensure_ascii=False) + template
    opening, closing = itertools.islice((c for c in map(chr, _MARKS) if c not in given), 2)
    names = (
        "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))) or "(?!)"
    )
    marked = _mark(variables, re.compile(names), rf"{opening}\g<0>{closing}")
    rendered = render_template(
        template, tokenizer.named_tokens | marked | {"add_generation_prompt": add_generation_prompt}
    )
    # One half of a pair is enough to know a user's text: a template may have cut off the other.
    written = re.compile(f"{opening}(?:{names})|(?:{names}){closing}|({names})")
    pieces: list[Piece] = []
    position = 0
    for match in written.finditer(rendered):
        if match[1] is not None:
            pieces += [Piece(rendered[position : match.start()], False), Piece(match[1], True)]
            position = match.end()
    pieces.append(Piece(rendered[position:], False))
    unmark = str.maketrans("", "", opening + closing)
    pieces = [Piece(text.translate(unmark), special) for text, special in pieces]
    return [piece for piece in pieces if piece.text]


def _mark(value: Any, names: re.Pattern[str], replacement: str) -> Any:
    if isinstance(value, str):
        return names.sub(replacement, value)
    if isinstance(value, dict):
        return {
            _mark(key, names, replacement): _mark(item, names, replacement)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_mark(item, names, replacement) for item in value]
    return value


def _check_messages(messages: Messages) -> list[dict[str, Any]]:
    """The messages as plain data: text parts joined, tool calls in one form, everything else as
    given."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f'messages: expected a list of {{"role", "content"}}, got {type(messages).__name__}'
        )
    if not messages:
        raise ValueError("messages: empty; give at least one message")
    checked = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(
                f'{where}: expected {{"role", "content"}}, got {type(message).__name__}'
            )
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"{where}: role: expected one of {', '.join(ROLES)}, got {role!r}")
        calls = message.get("tool_calls")
        if calls and role != "assistant":
            raise ValueError(
                f"{where}: tool_calls: only an assistant message has them, this one is from "
                f"{role!r}"
            )
        clean = {
            key: value for key, value in message.items() if key not in ("content", "tool_calls")
        }
        clean = _plain(clean, where)
        if calls:
            if not isinstance(calls, Sequence) or isinstance(calls, str):
                raise ValueError(
                    f"{where}: tool_calls: expected a list, got {type(calls).__name__}"
                )
            clean["tool_calls"] = [
                _check_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
            ]
        if message.get("content") is not None:
            clean["content"] = _check_content(message["content"], role, f"{where}: content")
        elif not calls:
            raise ValueError(f"{where}: content: missing; give a string")
        checked.append(clean)
    return checked


def _check_content(content: Any, role: str, where: str) -> Any:
    if isinstance(content, str):
        return str(content)
    is_parts = (
        isinstance(content, list)
        and content
        and all(isinstance(p, Mapping) and "type" in p for p in content)
    )
    if is_parts and all(part["type"] == "text" for part in content):
        for index, part in enumerate(content):
            if not isinstance(part.get("text"), str):
                raise ValueError(
                    f"{where}[{index}]: text: expected a string, got "
                    f"{type(part.get('text')).__name__}"
                )
        return "".join(part["text"] for part in content)
    if role in ("tool", "ipython"):
        return _plain(content, where)
    found = (
        f"parts of type {[part['type'] for part in content]}"
        if is_parts
        else type(content).__name__
    )
    raise ValueError(
        f'{where}: expected a string or a list of {{"type": "text", "text": ...}}, got {found}'
    )


def _check_call(call: Any, where: str) -> dict[str, Any]:
    if isinstance(call, ToolCall):
        call = {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
    if isinstance(call, Mapping) and "function" not in call:
        call = {"type": "function", "function": call}
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(
            f'{where}: expected {{"type": "function", "function": {{"name", "arguments"}}}}, got '
            f"{call!r:.200}"
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: arguments: not valid JSON ({error})") from None
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where}: arguments: expected an object, got {type(arguments).__name__}")
    checked = {**call, "function": {**function, "arguments": arguments}}
    return {key: _plain(value, f"{where}.{key}") for key, value in checked.items()}


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A deep copy of JSON data; anything else is refused, so that a template is never handed a live
    object."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where}: nested more than {_MAX_DEPTH} levels deep")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r}: expected a string")
        return {str(key): _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise ValueError(f"{where}: expected JSON data, got {type(value).__name__}")
