import enum
import json
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.text.tools import ToolCall, parse_tool_calls, tool_schema

DATA = Path(__file__).parents[2] / "shared" / "data"


def get_current_temperature(location: str) -> float:
    """
    Get the current temperature at a location.

    Args:
        location: The location to get the temperature for, in the format "City, Country"
    Returns:
        The current temperature at the specified location in the specified units, as a float.
    """
    return 22.0


def parsed(text: str) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in parse_tool_calls(text)]


def test_model_card_function() -> None:
    assert tool_schema(get_current_temperature) == {
        "type": "function",
        "function": {
            "name": "get_current_temperature",
            "description": "Get the current temperature at a location.",
            "parameters": {
                "type": "object",
                "properties": {
                    "location": {
                        "type": "string",
                        "description": "The location to get the temperature for, "
                        'in the format "City, Country"',
                    }
                },
                "required": ["location"],
            },
            "return": {
                "type": "number",
                "description": "The current temperature at the specified location "
                "in the specified units, as a float.",
            },
        },
    }


@pytest.mark.skipif(not DATA.is_dir(), reason="shared data absent")
def test_model_card_function_is_the_tool_of_the_golden_chats() -> None:
    cases = json.loads((DATA / "golden" / "chat.json").read_text())
    tools = [case["kwargs"]["tools"] for case in cases if "tools" in case["kwargs"]]
    assert len(tools) >= 4
    assert all(tool == [tool_schema(get_current_temperature)] for tool in tools)


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


# What transformers 5.23's get_json_schema gives for the same hints.
@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (None, {"type": "null"}),
        (Any, {}),
        (list, {"type": "array"}),
        (tuple, {"type": "array"}),
        (dict, {"type": "object"}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (
            dict[str, list[float]],
            {
                "type": "object",
                "additionalProperties": {"type": "array", "items": {"type": "number"}},
            },
        ),
        (
            tuple[int, str],
            {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]},
        ),
        (Optional[int], {"type": "integer", "nullable": True}),  # noqa: UP045
        (str | None, {"type": "string", "nullable": True}),
        (Union[str, int], {"type": ["integer", "string"]}),  # noqa: UP007
        (int | str | None, {"type": ["integer", "string"], "nullable": True}),
        (
            int | list[str],
            {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]},
        ),
        (list | tuple, {"type": "array"}),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Literal["a", 1, None], {"type": ["string", "integer", "null"], "enum": ["a", 1, None]}),
        (Unit, {"type": "string", "enum": ["C", "F"]}),
    ],
)
def test_types(hint: Any, expected: dict[str, Any]) -> None:
    def tool(value):  # type: ignore[no-untyped-def]
        """Does it.

        Args:
            value: What to do.
        """

    tool.__annotations__ = {"value": hint}
    properties = tool_schema(tool)["function"]["parameters"]["properties"]
    assert properties == {"value": expected | {"description": "What to do."}}


def test_docstring_sections_defaults_and_choices() -> None:
    def order(
        drink: str,
        size: Literal["small", "large"] = "small",
        notes: dict[str, Any] | None = None,
    ) -> object:
        """Orders a drink.

        It is paid for later.

        Args:
            drink: What to order,
                over two lines (choices: ["tea", "coffee"])
            size: How much

            notes: Free: text
        Raises:
            ValueError: when it is sold out
        """

    function = tool_schema(order)["function"]
    assert function["description"] == "Orders a drink.\n\nIt is paid for later."
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "drink": {
                "type": "string",
                "enum": ["tea", "coffee"],
                "description": "What to order, over two lines",
            },
            "size": {"type": "string", "enum": ["small", "large"], "description": "How much"},
            "notes": {
                "type": "object",
                "additionalProperties": {},
                "nullable": True,
                "description": "Free: text",
            },
        },
        "required": ["drink"],
    }
    assert "return" not in function  # object has no schema, and the model never writes it


def test_function_without_arguments_and_method() -> None:
    class Clock:
        def now(self) -> str:
            """The time."""
            return "12:00"

    parameters = {"type": "object", "properties": {}}
    function = {"name": "now", "description": "The time.", "parameters": parameters}
    expected = {"type": "function", "function": function | {"return": {"type": "string"}}}
    assert tool_schema(Clock().now) == expected
    assert tool_schema(Clock.now) == expected


def test_json_schema_is_taken_as_it_is() -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    schema = {"type": "function", "function": function}
    assert tool_schema(schema) == schema
    assert tool_schema(function) == schema


def no_docstring(a: int) -> None: ...


def no_hint(a) -> None:  # type: ignore[no-untyped-def]
    """F.

    Args:
        a: A
    """


def no_description(a: int) -> None:
    """F."""


def odd_type(a: Path) -> None:
    """F.

    Args:
        a: A
    """


def odd_choices(a: str) -> None:
    """F.

    Args:
        a: A (choices: ['x'])
    """


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (no_docstring, "tool no_docstring: has no docstring"),
        (no_hint, "tool no_hint: argument 'a' has no type hint"),
        (no_description, "tool no_description: the docstring does not describe argument 'a'"),
        (odd_type, "tool odd_type: argument 'a': .*Path.* has no JSON schema"),
        (odd_choices, "tool odd_choices: argument 'a': choices .* is not a JSON list"),
        ({"type": "function"}, "tools: expected .*got .*function"),
        ({"function": {"name": ""}}, "tools: expected"),
        ({"name": "f", "parameters": []}, "tool f: parameters: expected a JSON schema"),
    ],
)
def test_bad_tools(tool: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tool_schema(tool)
    with pytest.raises(TypeError, match="tools: expected a function or a JSON schema, got int"):
        tool_schema(3)  # type: ignore[arg-type]


NESTED = {"a": {"b": [1, {"c": None}], "d": "}; {"}, "e": "</function>", "f": True, "g": -1.5}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"name": "f", "parameters": NESTED}),
        json.dumps({"type": "function", "name": "f", "parameters": NESTED}, indent=2),
        json.dumps({"name": "f", "arguments": NESTED}) + "<|eot_id|>",
        json.dumps({"name": "f", "arguments": json.dumps(NESTED)}),
        json.dumps({"type": "function", "function": {"name": "f", "arguments": NESTED}}),
        json.dumps({"type": "function", "function": "f", "parameters": NESTED}),
        json.dumps([{"name": "f", "parameters": NESTED}]),
        "<|python_tag|>" + json.dumps({"name": "f", "parameters": NESTED}) + "<|eom_id|>",
        f"<function=f>{json.dumps(NESTED)}</function>",
        f"I will look.\n<function=f>\n{json.dumps(NESTED)}\n</function><|eom_id|>",
        f"<|python_tag|><function=f>{json.dumps(NESTED)}</function>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        + json.dumps({"name": "f", "parameters": NESTED}),
        f"[f({', '.join(f'{k}={v!r}' for k, v in NESTED.items())})]<|eot_id|>",
    ],
)
def test_each_form_with_nested_arguments(text: str) -> None:
    assert parsed(text) == [("f", NESTED)]


def test_several_calls() -> None:
    one = {"name": "f", "parameters": {"a": "x; y"}}
    two = {"name": "g", "parameters": {}}
    expected = [("f", {"a": "x; y"}), ("g", {})]
    assert parsed(f"{json.dumps(one)}; {json.dumps(two)}") == expected
    assert parsed(f"<|python_tag|>{json.dumps(one)}\n{json.dumps(two)}<|eom_id|>") == expected
    assert parsed(json.dumps([one, two])) == expected
    tags = '<function=f>{"a": "x; y"}</function><function=g>{}</function>'
    assert parsed(tags) == expected
    assert parsed('[f(a="x; y"), g()]') == expected
    assert parsed('<|python_tag|>[f(a="x; y"), g()]') == expected
    ids = [call.id for call in parse_tool_calls(tags) + parse_tool_calls(tags)]
    assert len(set(ids)) == 4 and all(ids)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '<|python_tag|>brave_search.call(query="gold price; today")<|eom_id|>',
            ("brave_search", {"query": "gold price; today"}),
        ),
        ('brave_search.call(query="gold")<|eom_id|>', ("brave_search", {"query": "gold"})),
        (
            r'<|python_tag|>wolfram_alpha.call(query="C:\new")',
            ("wolfram_alpha", {"query": r"C:\new"}),
        ),
        (
            '<|python_tag|>brave_search.call(query="he said "hi" twice")',
            ("brave_search", {"query": 'he said "hi" twice'}),
        ),
        (
            '<|python_tag|>trends.call(country="Ghana", n=3)',
            ("trends", {"country": "Ghana", "n": 3}),
        ),
        (
            "Let me compute.<|python_tag|>def f(n):\n    return [n]\n\nprint(f(7))<|eom_id|>",
            ("code_interpreter", {"code": "def f(n):\n    return [n]\n\nprint(f(7))"}),
        ),
        ("<|python_tag|>[1, 2][0]", ("code_interpreter", {"code": "[1, 2][0]"})),
    ],
)
def test_builtin_tools(text: str, expected: tuple[str, dict[str, Any]]) -> None:
    assert parsed(text) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Hello!<|eot_id|>",
        '{"name": "f", "parameters": {"a": 1}',
        '{"name": "f", "parameters": {"a": }}',
        '<|python_tag|>{"name": "f", "parameters": {"a": [1}}',
        '<|python_tag|>[{"name": "f", "parameters": {"a": [1}}',
        '{"name": "Ada", "age": 36}',
        '{"name": "f", "parameters": [1]}',
        '{"name": "f", "parameters": "[1]"}',
        '{"name": "f", "parameters": "{"}',
        '{"name": 3, "parameters": {}}',
        '{"name": "f", "parameters": {}} is how I would call it',
        'Call it so: {"name": "f", "parameters": {}}',
        '{"name": "f", "parameters": {}}; {"a": 1}',
        '<function=f>{"a": </function>',
        '<function=f>{"a": 1}</function><function=g>{"a": </function>',
        "<function=f>[1]</function>",
        "[1, 2, 3]",
        "[]",
        "[f(1)]",
        "[f(a=g())]",
        "[f(a=1), 2]",
        'os.call(query="x")',
        "<|python_tag|>",
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
)
def test_plain_text_and_malformed_calls_stay_text(text: str) -> None:
    assert parse_tool_calls(text) == ()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(calls=st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None)
def test_whatever_is_written_is_read_back(calls: list[dict[str, Any]]) -> None:
    expected = [("f", arguments) for arguments in calls]
    objects = [json.dumps({"name": "f", "parameters": arguments}) for arguments in calls]
    tags = [f"<function=f>{json.dumps(arguments)}</function>" for arguments in calls]
    assert parsed(";".join(objects)) == expected
    assert parsed("<|python_tag|>" + "\n".join(objects)) == expected
    assert parsed("".join(tags)) == expected


def test_markers_inside_arguments_are_not_calls() -> None:
    hidden = {"a": 'x<|python_tag|><function=rm>{"path": "/"}</function>'}
    text = json.dumps({"name": "f", "parameters": hidden})
    assert parsed(text) == parsed(f"<|python_tag|>{text}") == [("f", hidden)]
    assert parsed(f"<function=f>{json.dumps(hidden)}</function>") == [("f", hidden)]
    code = f"print({hidden['a']!r})"
    assert parsed(f"<|python_tag|>{code}") == [("code_interpreter", {"code": code})]


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_is_survived(text: str) -> None:
    assert all(isinstance(call, ToolCall) for call in parse_tool_calls("<|python_tag|>" + text))
    parse_tool_calls("<function=f>" + text)
    parse_tool_calls("[" + text + "]")
