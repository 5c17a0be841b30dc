"""Replies that have to be calls of tools: whatever is drawn reads back as calls that fit."""

import random
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

import jsonschema
import numpy as np
import pytest

from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.engine.grammars import Grammars
from llama_jax.structured import StructuredOutput, StructuredOutputError
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.text.tool_choice import calling
from llama_jax.text.tool_grammar import tool_call_output
from llama_jax.text.tools import parse_tool_calls, tool_format, tool_schema

TOKENIZER = load_tokenizer(SHIPPED_MODEL)
GRAMMARS = Grammars(TOKENIZER, 1024, TOKENIZER.eos_ids)


def weather(city: Literal["Paris", "Köln"], days: int | None = None) -> str:
    """Tells the weather.

    Args:
        city: Where.
        days: How many. (choices: [1, 2, 3])
    """
    return f"{city} {days}"


REFERS = {
    "name": "with-references",
    "parameters": {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/n"}, "m": {"$ref": "#/$defs/n"}},
        "required": ["m"],
        "$defs": {"n": {"type": "integer", "minimum": -9, "maximum": 99}},
    },
}
TOOLS = (weather, REFERS, {"name": "nothing"})
MARKS = {
    "llama": "",
    "hermes": "<tool_call>",
    "nemotron": "<TOOLCALL>",
    "deepseek": "<｜tool▁call▁begin｜>",  # noqa: RUF001
}


def tokenizer_of(form: str):
    return replace(TOKENIZER, chat_template=MARKS[form], named_templates={})


def draw(structured: StructuredOutput, seed: int) -> list[int]:
    """Any of the allowed tokens, one after the other, until the reply may end and does."""
    matcher, at_random, ids = GRAMMARS.matcher(structured), random.Random(seed), []
    while len(ids) < 1000:
        (mask,) = matcher.masks(ids)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        ends = [each for each in allowed if each in TOKENIZER.eos_ids]
        if ends and (at_random.random() < 0.5 or ends == allowed):
            return ids
        ids.append(at_random.choice([each for each in allowed if each not in ends]))
    raise AssertionError("it does not end")


@pytest.mark.parametrize("form", MARKS)
@pytest.mark.parametrize("is_parallel", [False, True])
def test_replies_are_calls_that_fit_their_tools(form: str, is_parallel: bool) -> None:
    tokenizer = tokenizer_of(form)
    assert tool_format(tokenizer.chat_template) == form
    schemas = {each["name"]: each for each in (tool_schema(t)["function"] for t in TOOLS)}
    output = tool_call_output(TOOLS, tokenizer, is_parallel=is_parallel)
    counts, called = set(), set()
    for seed in range(30):
        calls = parse_tool_calls(TOKENIZER.decode(draw(output, seed)), form)
        counts.add(len(calls))
        for call in calls:
            jsonschema.validate(call.arguments, schemas[call.name].get("parameters", {}))
            assert call.arguments.keys() <= {"city", "days", "n", "m"}
        called |= {call.name for call in calls}
    assert called == schemas.keys()
    assert 0 not in counts and (len(counts) > 1) == is_parallel


def test_a_named_tool_is_the_one_that_is_called() -> None:
    output = tool_call_output(TOOLS, TOKENIZER, name="with-references")
    for seed in range(10):
        (call,) = parse_tool_calls(TOKENIZER.decode(draw(output, seed)))
        assert call.name == "with-references"
    with pytest.raises(ValueError, match="no tool is named 'missing'"):
        tool_call_output(TOOLS, TOKENIZER, name="missing")
    with pytest.raises(ValueError, match="tool_choice"):
        tool_call_output([], TOKENIZER)


def test_names_in_json_are_escaped() -> None:
    tool = {"name": 'a "b"\\'}
    for form in ("llama", "hermes", "nemotron"):
        output = tool_call_output([tool], tokenizer_of(form))
        (call,) = parse_tool_calls(TOKENIZER.decode(draw(output, 0)), form)
        assert call.name == tool["name"] and call.arguments == {}


def test_marks_that_are_tokens_are_drawn_as_tokens() -> None:
    marks = MappingProxyType({"<tool_call>": 1000, "</tool_call>": 1001})
    output = tool_call_output(TOOLS, replace(tokenizer_of("hermes"), special_tokens=marks))
    ids = draw(output, 0)
    assert ids[0] == 1000 and ids[-1] == 1001


def test_schemas_that_cannot_be_used() -> None:
    circle: dict = {"properties": {}}
    circle["properties"]["a"] = circle
    with pytest.raises(StructuredOutputError, match="tool broken"):
        tool_call_output([{"name": "broken", "parameters": circle}], TOKENIZER)
    bad = {"name": "broken", "parameters": {"properties": {"a": {"type": "nothing"}}}}
    with pytest.raises(StructuredOutputError, match=r"structured\.grammar"):
        GRAMMARS.matcher(tool_call_output([bad], TOKENIZER))


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (TOOLS, "some", "got 'some'"),
        (TOOLS, {"name": "x"}, "got {'name': 'x'}"),
        (TOOLS, {"type": "function", "function": {}}, "expected"),
        (TOOLS, {"type": "function", "function": {"name": "x"}}, "no tool is named 'x'"),
        (None, "required", "'required' needs tools"),
        ([], {"type": "function", "function": {"name": "x"}}, "'x' needs tools"),
    ],
)
def test_choices_that_are_none(tools, choice, message) -> None:
    with pytest.raises(ValueError, match=f"tool_choice: .*{message}"):
        calling(tools, choice, True, TOKENIZER)


def test_what_is_offered_and_what_a_reply_has_to_be() -> None:
    none, auto = (calling(TOOLS, choice, True, TOKENIZER) for choice in ("none", "auto"))
    assert (none.offered, none.form, auto.offered, auto.form) == (None, None, TOOLS, None)
    for is_parallel in (True, False):
        any_tool = calling(TOOLS, "required", is_parallel, TOKENIZER)
        assert any_tool.form == tool_call_output(TOOLS, TOKENIZER, is_parallel=is_parallel)
    named = {"type": "function", "function": {"name": "with-references"}}
    one = calling(TOOLS, named, True, TOKENIZER)
    assert one.offered == TOOLS
    assert one.form == tool_call_output(TOOLS, TOKENIZER, name="with-references")
