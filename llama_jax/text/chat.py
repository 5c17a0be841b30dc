"""Turns a conversation into a prompt in the checkpoint's chat format.

The checkpoint's own Jinja template is used if there is one, rendered as in transformers, and
otherwise Meta's format for the tokenizer's family. The prompt is a list of pieces, each of which is
a special token of the format or text, so text from messages and tools never becomes a special
token. With a template this works by marking: before rendering, names of special tokens in the
user's input are put between two characters that occur nowhere else.
"""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_jax.text.chat_files import DEFAULT, TOOL_USE
from llama_jax.text.chat_habits import takes_text_arguments, template_habits
from llama_jax.text.chat_template import ChatTemplateError, render_template
from llama_jax.text.meta_chat import Piece, llama2_pieces, llama3_pieces
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tools import ToolCall, tool_schema

__all__ = ["ROLES", "ChatTemplateError", "choose_template", "encode_chat", "render_chat"]

ROLES = ("system", "user", "assistant", "tool", "ipython")
_MAX_DEPTH = 100  # of nested lists and objects in a message
# The two marks are the first characters of this range that the input does not contain. They are
# rare ideographs because, unlike private-use characters, Python's repr() does not escape them.
_MARKS = range(0x20000, 0x2A6D0)

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Callable[..., Any] | Mapping[str, Any]]


def render_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **template_kwargs: Any,
) -> str:
    """Render the prompt as text, for people to read.

    The model should get `encode_chat` instead: in the text, a special token that the user wrote
    looks like one of the template.

    messages: mappings with a "role" (one that the template knows, or one of `ROLES` without a
        template) and a "content": a string, a list of {"type": "text", "text": ...}, or any JSON
        value for a tool's result. An assistant message may have "tool_calls" instead: `ToolCall`s
        or {"type": "function", "function": {"name", "arguments"}}.
    tools: functions or JSON schemas, see `tool_schema`.
    continue_final_message: whether the last message is left open for the model to continue.
    chat_template: the name of one of the checkpoint's templates, or Jinja source; by default
        "tool_use" with tools, if there is one, or else "default".
    template_kwargs, chat_template_kwargs: variables for the template, such as `date_string` or
        `enable_thinking`. Without a template, Llama 3 takes `tool_prompt_format`: "json",
        "function_tag" or "python_list".

    Raises ValueError, which names the message and field, and ChatTemplateError from the template.
    """
    pieces = _pieces(
        tokenizer, messages, tools, add_generation_prompt, continue_final_message, chat_template,
        template_kwargs | dict(chat_template_kwargs or {}),
    )  # fmt: skip
    return "".join(piece.text for piece in pieces)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    tools: Tools | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **template_kwargs: Any,
) -> list[int]:
    """Encode the prompt as token ids; arguments and errors are those of `render_chat`.

    Special tokens that the template writes become special tokens, and no others do. If the template
    omits the begin-of-text token that the tokenizer's files require, it is prepended.
    """
    pieces = _pieces(
        tokenizer, messages, tools, add_generation_prompt, continue_final_message, chat_template,
        template_kwargs | dict(chat_template_kwargs or {}),
    )  # fmt: skip
    return tokenizer.encode_pieces((piece.text, piece.special) for piece in pieces)


def _pieces(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
    chat_template: str | None,
    template_kwargs: Mapping[str, Any],
) -> list[Piece]:
    template = choose_template(tokenizer, tools=bool(tools), chat_template=chat_template)
    checked = _check_messages(messages, ROLES if template is None else None)
    schemas = (
        [_plain(tool_schema(tool), f"tools[{i}]") for i, tool in enumerate(tools)]
        if tools
        else None
    )
    end, continued = "", ""
    if continue_final_message:
        end = _unused_characters(json.dumps([checked, schemas], ensure_ascii=False), 1)
        continued = _mark_end(checked, end)
        add_generation_prompt = False
    if template is None:
        joined = [_joined(message) for message in checked]
        pieces = _meta_pieces(tokenizer, joined, schemas, add_generation_prompt, template_kwargs)
    else:
        variables = {key: _plain(value, key) for key, value in template_kwargs.items()}
        formed = _formed(checked, template)
        variables = {"documents": None, **variables, "messages": formed, "tools": schemas}
        pieces = _template_pieces(tokenizer, template, variables, add_generation_prompt)
    return _cut_at(pieces, end, continued) if end else pieces


def choose_template(
    tokenizer: Tokenizer, *, tools: bool, chat_template: str | None = None
) -> str | None:
    """Choose the template for a conversation with or without tools, as transformers does. Returns
    None if the checkpoint has none."""
    named = tokenizer.named_templates
    if chat_template is None:
        return named.get(TOOL_USE, tokenizer.chat_template) if tools else tokenizer.chat_template
    if chat_template in named:
        return named[chat_template]
    if chat_template == DEFAULT and tokenizer.chat_template is not None:
        return tokenizer.chat_template
    if "{" in chat_template:
        return chat_template
    known = [*([DEFAULT] if tokenizer.chat_template is not None else []), *sorted(named)]
    raise ValueError(
        f"chat_template: {chat_template!r} is not a template of this checkpoint, which has "
        f"{', '.join(known) or 'none'}"
    )


def _mark_end(messages: list[dict[str, Any]], end: str) -> str:
    """Append `end` and a space to the last message's text, and return the text without them. A
    template that strips messages removes the space."""
    content: Any = messages[-1].get("content")
    if _is_text_parts(content):
        text = content[-1]["text"]
        messages[-1]["content"] = [*content[:-1], content[-1] | {"text": text + end + " "}]
    elif isinstance(content, str):
        text = content
        messages[-1]["content"] = text + end + " "
    else:
        raise ValueError("continue_final_message: the last message has no text to continue")
    return str(text)


def _cut_at(pieces: list[Piece], end: str, continued: str) -> list[Piece]:
    """Return the pieces up to `end`. If the template strips messages, white space before `end` is
    dropped, except what the template itself wrote before an empty message."""
    for index in reversed(range(len(pieces))):
        before, found, after = pieces[index].text.rpartition(end)
        if found:
            keeps = after.startswith(" ") or not continued.strip()
            text = before if keeps else before.rstrip()
            return [*pieces[:index], *([Piece(text, False)] if text else [])]
    raise ValueError("continue_final_message: the chat template does not write the last message")


def _unused_characters(text: str, count: int) -> str:
    return "".join(itertools.islice((c for c in map(chr, _MARKS) if c not in text), count))


def _formed(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """Convert messages to the form that the template expects, and change nothing else."""
    habits = template_habits(template)
    formed = []
    for given in messages:
        message = dict(given) if habits.takes_lists else _joined(given)
        if habits.needs_lists and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        if not message.get("tool_calls"):
            if habits.drops_null_calls:
                message.pop("tool_calls", None)
        else:
            if habits.fills_content:
                message.setdefault("content", None)
            if takes_text_arguments(template):
                message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
        formed.append(message)
    return formed


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": arguments}}


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """Join text parts by line breaks, as vLLM does."""
    content: Any = message.get("content")
    if not _is_text_parts(content):
        return dict(message)
    return message | {"content": "\n".join(part["text"] for part in content)}


def _is_text_parts(content: Any) -> bool:
    return (
        isinstance(content, list)
        and bool(content)
        and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content)
    )


def _meta_pieces(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    schemas: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any],
) -> list[Piece]:
    """Write the prompt in Meta's own format, for a checkpoint without a template."""
    allowed = {"tool_prompt_format"} if tokenizer.kind == "tiktoken" else set()
    if unknown := sorted(template_kwargs.keys() - allowed):
        raise ValueError(
            f"{unknown[0]}: this checkpoint has no chat template, and Meta's format takes no such "
            "argument"
        )
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    if tokenizer.kind == "tiktoken":
        pieces = llama3_pieces(messages, schemas, add_generation_prompt, **template_kwargs)
    elif schemas or tokenizer.bos_id is None or not tokenizer.eos_ids:
        raise ValueError(
            "tools: Llama 2's chat format has none; leave them out or add a chat_template.jinja"
        )
    else:
        bos, eos = names[tokenizer.bos_id], names[tokenizer.eos_ids[0]]
        pieces = llama2_pieces(messages, add_generation_prompt, bos, eos)
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
    marks = _unused_characters(given, 2)
    opening, closing = marks[0], marks[1]
    names = (
        "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))) or "(?!)"
    )
    marked = _mark(variables, re.compile(names), rf"{opening}\g<0>{closing}")
    rendered = render_template(
        template, tokenizer.named_tokens | marked | {"add_generation_prompt": add_generation_prompt}
    )
    # One mark of a pair is enough to recognise a user's text, as a template may cut off the other.
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
    return _with_bos(tokenizer, [piece for piece in pieces if piece.text])


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


def _with_bos(tokenizer: Tokenizer, pieces: list[Piece]) -> list[Piece]:
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    prefix = [Piece(names[each], True) for each in tokenizer.prefix_ids if each in names]
    return pieces if pieces[: len(prefix)] == prefix else prefix + pieces


def _check_messages(messages: Messages, roles: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """Return the messages as plain data: tool calls in one form, everything else as given.

    roles: the allowed roles; None leaves that to a template.
    """
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
        if not isinstance(role, str) or not role or (roles and role not in roles):
            raise ValueError(
                f"{where}: role: expected one of {', '.join(roles or ROLES)}, got {role!r}"
            )
        calls = message.get("tool_calls")
        if calls and role != "assistant":
            raise ValueError(
                f"{where}: tool_calls: only an assistant message has them, this one is from "
                f"{role!r}"
            )
        clean = {
            key: value if key != "tool_calls" or value is None else []
            for key, value in message.items()
            if key != "content" or value is None
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
        checked.append({key: clean[key] for key in message if key in clean})
    return checked


def _check_content(content: Any, role: str, where: str) -> Any:
    if isinstance(content, str):
        return str(content)
    is_parts = (
        isinstance(content, list)
        and content
        and all(isinstance(p, Mapping) and "type" in p for p in content)
    )
    if _is_text_parts(content):
        for index, part in enumerate(content):
            if not isinstance(part.get("text"), str):
                raise ValueError(
                    f"{where}[{index}]: text: expected a string, got "
                    f"{type(part.get('text')).__name__}"
                )
        return _plain(content, where)
    if role in ("tool", "ipython", "function"):
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
    arguments = function.get("arguments")
    if arguments is None or arguments == "":  # how servers write a call without arguments
        arguments = {}
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
    """Copy JSON data deeply. Anything else is refused, so that a template gets no live object."""
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
