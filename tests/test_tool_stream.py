"""Replies with tool calls, in pieces of any size: they add up to what the whole reply says."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.serve.tool_stream import ToolCallStream
from llama_jax.text.tools import parse_tool_calls

WEATHER = '{"name": "weather", "parameters": {"city": "Par\\"is}", "days": [1, {"a": "]"}]}}'
SUM = '{"name": "sum", "arguments": {"a": 1}}'
UNKNOWN = '{"name": "unknown", "parameters": {"a": 1}}'

# form, reply, what is for the user, how many calls, whether the first one comes in pieces
REPLIES = [
    ("llama", "It is sunny. ", "It is sunny. ", 0, False),
    ("llama", WEATHER, "", 1, True),
    ("llama", f"\n{WEATHER}; {SUM}", "", 2, True),
    ("llama", f"[{SUM}, {WEATHER}]", "", 2, True),
    ("llama", '{"type": "function", "name": "sum", "parameters": {}}', "", 1, True),
    ("llama", '{"parameters": {"a": 1}, "name": "sum"}', "", 1, False),
    ("llama", UNKNOWN, "", 1, False),
    ("llama", '{"name": "weather", "parameters": "{\\"city\\": 1}"}', "", 1, False),
    ("llama", 'Let me see. <function=sum>{"a": 1}</function>', "Let me see.", 1, False),
    ("llama", 'brave_search.call(query="a b")', "", 1, False),
    ("llama", "brave people", "brave people", 0, False),
    ("llama", '[sum(a=1), weather(city="x")]', "", 2, False),
    ("llama", '{"a": 1}', '{"a": 1}', 0, False),
    ("llama", "[1, 2] are numbers", "[1, 2] are numbers", 0, False),
    ("llama", "1 < 2 <func", "1 < 2 <func", 0, False),
    ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", "", 1, True),
    ("hermes", f"Hm.\n<tool_call>{SUM}</tool_call>\n<tool_call>{WEATHER}</tool_call>", "Hm.", 2,
     True),
    ("hermes", "a <tool_call", "a <tool_call", 0, False),
    ("nemotron", f"<TOOLCALL>[{SUM}, {WEATHER}]</TOOLCALL>", "", 2, True),
]  # fmt: skip


def streamed(form, reply, cuts, parallel=True):
    """Content, calls, and how many pieces the first call's arguments came in."""
    stream = ToolCallStream(form, ["weather", "sum"], None, parallel)
    edges = [0, *sorted(cut % (len(reply) + 1) for cut in cuts), len(reply)]
    parts = [reply[a:b] for a, b in itertools.pairwise(edges)]
    deltas = [delta for part in parts for delta in stream.push(part)]
    calls = parse_tool_calls(reply, form)
    deltas += stream.end(calls if parallel else calls[:1])
    content = "".join(delta.get("content", "") for delta in deltas)
    made: list[list] = []
    pieces = 0
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(made) and call["type"] == "function"
                made.append([call["function"]["name"], call["function"]["arguments"]])
            else:
                assert call["index"] == len(made) - 1
                made[-1][1] += call["function"]["arguments"]
                pieces += call["index"] == 0
    return content, [(name, json.loads(arguments)) for name, arguments in made], pieces


@pytest.mark.parametrize(("form", "reply", "content", "count", "in_pieces"), REPLIES, ids=str)
@given(cuts=st.lists(st.integers(0, 400), max_size=60))
def test_pieces_add_up(form, reply, content, count, in_pieces, cuts):
    expected = [(call.name, call.arguments) for call in parse_tool_calls(reply, form)]
    assert len(expected) == count
    told, calls, pieces = streamed(form, reply, cuts)
    assert (told, calls) == (content, expected)
    assert bool(pieces) == in_pieces


def test_a_character_at_a_time_is_told_at_once():
    _, _, pieces = streamed("llama", WEATHER, range(len(WEATHER)))
    assert pieces > 30


def test_of_parallel_calls_only_the_first_is_told_where_that_was_asked():
    for reply in (f"{SUM}; {WEATHER}", "[sum(a=1), weather(city=2)]"):
        _, calls, _ = streamed("llama", reply, range(0, 100, 7), parallel=False)
        assert calls == [("sum", {"a": 1})]


def test_line_breaks_in_arguments_are_escaped():
    reply = '{"name": "sum", "parameters": {"a": "x\ny"}}'
    assert streamed("llama", reply, range(50))[1] == [("sum", {"a": "x\ny"})]
