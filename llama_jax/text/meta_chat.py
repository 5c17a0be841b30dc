"""Writes Meta's own chat formats, for checkpoints without a template: Llama 3's headers and Llama
2's [INST] turns.

Sources of the layout: `ChatFormat` and `ToolUtils` of github.com/meta-llama/llama-models
(models/llama3), and `chat_completion` of github.com/meta-llama/llama (llama/generation.py).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from llama_jax.text.tools import BUILTIN_TOOLS, CODE_INTERPRETER

ToolPromptFormat = Literal["json", "function_tag", "python_list"]

_TOOLS_PROMPT = (
    "Given the following functions, please respond with a JSON for a function call with its proper "
    "arguments that best "
    "answers the given prompt.\n\n"
    "Respond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
_LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


class Piece(NamedTuple):
    """A piece of a prompt: a special token by name, or text without special tokens."""

    text: str
    special: bool


def llama3_pieces(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    tool_prompt_format: ToolPromptFormat = "json",
) -> list[Piece]:
    """Write begin-of-text, then each message as its header, its content and end of turn.

    A tool result is an "ipython" message. Tool calls are written in `tool_prompt_format`, except
    that calls of built-in tools have their own form and end with eom. `tools` are described in the
    first user message, as Llama 3.1 is prompted for calls in JSON.
    """
    if tool_prompt_format not in get_args(ToolPromptFormat):
        raise ValueError(
            f"tool_prompt_format: expected one of {get_args(ToolPromptFormat)}, got "
            f"{tool_prompt_format!r}"
        )
    pieces = [Piece("<|begin_of_text|>", True)]
    instructions = _describe(tools) if tools else ""
    for message in messages:
        calls = message.get("tool_calls", [])
        pieces += _header("ipython" if message["role"] == "tool" else message["role"])
        if any(call["function"]["name"] == CODE_INTERPRETER for call in calls[:1]):
            pieces.append(Piece("<|python_tag|>", True))
        if message["role"] == "user":
            pieces.append(Piece(instructions, False))
            instructions = ""
        pieces.append(Piece(_content(message), False))
        pieces += [
            Piece(_write_call(call["function"], tool_prompt_format), False) for call in calls
        ]
        waits = any(
            call["function"]["name"] in (*BUILTIN_TOOLS, CODE_INTERPRETER) for call in calls
        )
        pieces.append(Piece("<|eom_id|>" if waits else "<|eot_id|>", True))
    if instructions:
        raise ValueError(
            "tools: Meta's format describes them in the first user message, and there is none"
        )
    return pieces + (_header("assistant") if add_generation_prompt else [])


def _header(role: str) -> list[Piece]:
    return [
        Piece("<|start_header_id|>", True),
        Piece(role, False),
        Piece("<|end_header_id|>", True),
        Piece("\n\n", False),
    ]


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        return ""
    return content if isinstance(content, str) else json.dumps(content)


def _describe(tools: Sequence[Mapping[str, Any]]) -> str:
    return _TOOLS_PROMPT + "".join(
        json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools
    )


def _write_call(function: Mapping[str, Any], tool_prompt_format: ToolPromptFormat) -> str:
    name, arguments = function["name"], function["arguments"]
    if name == CODE_INTERPRETER and "code" in arguments:
        return str(arguments["code"])
    if name in BUILTIN_TOOLS and "query" in arguments:
        return f'{name}.call(query="{arguments["query"]}")'
    if tool_prompt_format == "function_tag":
        return f"<function={name}>{json.dumps(arguments)}</function>"
    if tool_prompt_format == "python_list":
        return (
            f"[{name}({', '.join(f'{key}={_literal(value)}' for key, value in arguments.items())})]"
        )
    return json.dumps({"type": "function", "name": name, "parameters": arguments})


def _literal(value: Any) -> str:
    """Write a JSON value as a Python literal with double quotes."""
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def llama2_pieces(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, bos: str, eos: str
) -> list[Piece]:
    """Write Llama 2's turns, `[INST] user [/INST] answer`, each between begin and end of text; the
    last one stays open.

    A system message is put before the first user message. Every turn has its own begin of text, as
    in training. The tags are ordinary text to the tokenizer, so messages that contain them are
    refused.
    """
    for index, message in enumerate(messages):
        for tag in _LLAMA2_TAGS:
            if tag in _content(message):
                raise ValueError(
                    f"messages[{index}]: content holds {tag}, which Llama 2's chat format reserves"
                )
    turns = [dict(message) for message in messages]
    if turns[0]["role"] == "system" and len(turns) > 1:
        system = turns.pop(0)["content"]
        turns[0]["content"] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0]['content']}"
    if any(turn["role"] != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        roles = [message["role"] for message in messages]
        raise ValueError(
            "messages: Llama 2 takes an optional system message, then user and assistant in turn; "
            f"got {roles}"
        )
    if add_generation_prompt and turns[-1]["role"] != "user":
        raise ValueError(
            "messages: the last one must be from the user when add_generation_prompt is set"
        )
    pieces: list[Piece] = []
    for start in range(0, len(turns), 2):
        prompt = f"[INST] {turns[start]['content'].strip()} [/INST]"
        pieces.append(Piece(bos, True))
        if start + 1 == len(turns):
            pieces.append(Piece(prompt, False))
        else:
            pieces += [
                Piece(f"{prompt} {turns[start + 1]['content'].strip()} ", False),
                Piece(eos, True),
            ]
    return pieces
