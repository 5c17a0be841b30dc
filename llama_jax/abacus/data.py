"""Makes chats of several questions, as the chat template renders them, and packs them into
arrays."""

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tiktoken

from llama_jax.abacus import tasks, words

TOOL_PREAMBLE = (
    "Given the following functions, please respond with a JSON for a function call with its "
    "proper arguments that best answers the given prompt.\n\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)

type Message = dict[str, Any]
type Segment = tuple[str, str]
"""A message as the template shows it: (role, content)."""


def exchange(question: tasks.Question) -> list[Message]:
    """Return the messages of one question, including tool call and tool result."""
    user = {"role": "user", "content": question.prompt}
    if question.result is None:
        return [user, {"role": "assistant", "content": question.answer}]
    call = json.loads(question.answer)
    function = {"name": call["name"], "arguments": call["parameters"]}
    return [
        user,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": question.result},
        {"role": "assistant", "content": str(question.result)},
    ]


def segments(
    messages: list[Message], *, date: str, tools: list[dict[str, Any]] | None = None
) -> list[Segment]:
    """Return ``messages`` in the chat template's form, as (role, content) pairs.

    This is a short form of ``chat_template.jinja`` for the messages of :func:`exchange` and
    :func:`draw_chat`; a test compares the two.
    """
    system = ""
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    head = "Environment: ipython\n" if tools else ""
    head += f"Cutting Knowledge Date: December 2023\nToday Date: {date}\n\n{system}"
    result = [("system", head)]
    for i, message in enumerate(messages):
        content = str(message.get("content"))
        if message["role"] == "tool":
            result.append(("ipython", json.dumps(message["content"])))
            continue
        if "tool_calls" in message:
            call = message["tool_calls"][0]["function"]
            content = json.dumps({"name": call["name"], "parameters": call["arguments"]})
        elif i == 0 and tools:
            shown = "".join(json.dumps(tool, indent=4) + "\n\n" for tool in tools)
            content = TOOL_PREAMBLE + shown + message["content"]
        result.append((message["role"], content))
    return result


def draw_calculator(rng: random.Random) -> dict[str, Any]:
    """Draw the calculator tool with one of several descriptions, in OpenAI's wrapper or bare."""
    tool = copy.deepcopy(tasks.CALCULATOR)
    function: dict[str, Any] = tool["function"]
    if rng.random() < 0.5:
        function["description"] = rng.choice(words.CALCULATOR_DESCRIPTIONS)
        expression = function["parameters"]["properties"]["expression"]
        expression["description"] = rng.choice(words.PARAMETER_DESCRIPTIONS)
        if rng.random() < 0.3:
            del expression["description"]
    return tool if rng.random() < 0.8 else function


def draw_questions(
    rng: random.Random, *, with_tool: bool, today: str, stage: int
) -> Iterator[tasks.Question]:
    """Yield endless training questions, with the shares of kinds in `tasks.KINDS` for ``stage``.

    With the tool, half of them are calculator questions and no other needs arithmetic.
    """
    kinds = [kind for kind in tasks.KINDS if not (with_tool and kind in tasks.ARITHMETIC)]
    shares = [tasks.KINDS[kind][1][stage] for kind in kinds]
    while True:
        if with_tool and rng.random() < 0.5:
            kind = "calculator"
        else:
            (kind,) = rng.choices(kinds, shares)
        yield tasks.draw(kind, rng, held_out=False, today=today)


def draw_chat(
    rng: random.Random, encoding: tiktoken.Encoding, length: int, *, with_tool: bool, stage: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a training chat: tokens int32 [length + 1] and the mask float32 [length] of its targets.

    The chat has as many complete exchanges as fit. The mask is 1 on the assistant's tokens,
    including ``<|eot_id|>``, and 0 elsewhere.
    """
    today = tasks.random_date(rng) if rng.random() < 0.7 else tasks.DEFAULT_DATE
    tools = [draw_calculator(rng)] if with_tool else None
    messages: list[Message] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(words.SYSTEM_MESSAGES)})
    questions = draw_questions(rng, with_tool=with_tool, today=today, stage=stage)
    tokens = [encoding.encode_single_token("<|begin_of_text|>")]
    wanted = [0.0]
    shown = misses = 0
    while misses < 3:
        longer = messages + exchange(next(questions))
        new, new_wanted = encode(encoding, segments(longer, date=today, tools=tools)[shown:])
        if len(tokens) + len(new) > length + 1:
            misses += 1
            continue
        tokens += new
        wanted += new_wanted
        messages = longer
        shown = len(messages) + (messages[0]["role"] != "system")
    padding = length + 1 - len(tokens)
    pad = encoding.encode_single_token("<|finetune_right_pad_id|>")
    return (
        np.array(tokens + [pad] * padding, np.int32),
        np.array(wanted[1:] + [0.0] * padding, np.float32),
    )


def encode(encoding: tiktoken.Encoding, shown: list[Segment]) -> tuple[list[int], list[float]]:
    """Return the token ids of the segments, and 1.0 for tokens of the assistant, else 0.0."""
    special = encoding.encode_single_token
    tokens: list[int] = []
    wanted: list[float] = []
    for role, content in shown:
        header = [special("<|start_header_id|>"), *encoding.encode_ordinary(role)]
        header += [special("<|end_header_id|>"), *encoding.encode_ordinary("\n\n")]
        body = [*encoding.encode_ordinary(content), special("<|eot_id|>")]
        tokens += header + body
        wanted += [0.0] * len(header) + [float(role == "assistant")] * len(body)
    return tokens, wanted


def prompt_tokens(encoding: tiktoken.Encoding, shown: list[Segment]) -> list[int]:
    """Return the ids of a chat up to the beginning of the assistant's reply."""
    special = encoding.encode_single_token
    tokens, _ = encode(encoding, shown)
    return [
        special("<|begin_of_text|>"), *tokens, special("<|start_header_id|>"),
        *encoding.encode_ordinary("assistant"), special("<|end_header_id|>"),
        *encoding.encode_ordinary("\n\n"),
    ]  # fmt: skip


def draw_batch(
    rng: random.Random,
    encoding: tiktoken.Encoding,
    size: int,
    length: int,
    *,
    tool_share: float,
    stage: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``size`` chats: tokens int32 [size, length + 1], mask float32 [size, length]."""
    chats = [
        draw_chat(rng, encoding, length, with_tool=rng.random() < tool_share, stage=stage)
        for _ in range(size)
    ]
    return np.stack([chat[0] for chat in chats]), np.stack([chat[1] for chat in chats])


@dataclass(frozen=True)
class HeldOutChat:
    """A chat that ends with a question, and its only right ``answer``."""

    kind: str
    messages: list[Message]
    answer: str
    date: str
    tools: list[dict[str, Any]] | None


def held_out_chats(seed: int, per_kind: int) -> list[HeldOutChat]:
    """Make up to ``per_kind`` different held-out questions of every judged kind, each in a chat.

    A calculator question appears twice: as kind ``calculator``, where the call is the answer, and
    as kind ``calculator_result``, where the call and the tool's result are already in the chat.
    Small kinds hold fewer than ``per_kind`` different questions.
    """
    rng = random.Random(seed)
    chats: list[HeldOutChat] = []
    judged = [kind for kind, (_, shares) in tasks.KINDS.items() if shares[-1] and kind != "chat"]
    for kind in [*judged, "calculator"]:
        seen: set[tuple[str, str]] = set()
        for _ in range(10 * per_kind):
            date = tasks.DEFAULT_DATE
            if kind == "today":
                date = tasks.random_date(rng, held_out=True)
            question = tasks.draw(kind, rng, held_out=True, today=date)
            if (question.prompt, date) in seen or len(seen) == per_kind:
                continue
            seen.add((question.prompt, date))
            messages = exchange(question)
            tools = [tasks.CALCULATOR] if kind == "calculator" else None
            chats.append(HeldOutChat(kind, messages[:1], question.answer, date, tools))
            if kind == "calculator":
                reply = messages[-1]["content"]
                chats.append(HeldOutChat("calculator_result", messages[:-1], reply, date, tools))
    return chats
