"""Makes JSON schemas of tools from Python functions, and parses the tool calls in a reply."""

import ast
import enum
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from uuid import uuid4

# Tools that Llama 3.1 was trained to call as `name.call(query="...")`, besides running code.
BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", "photogen")
CODE_INTERPRETER = "code_interpreter"

_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_SECTION = re.compile(r"[ \t]*(Args|Returns|Raises):[ \t]*")
_PARAMETER = re.compile(r"([ \t]*)(\w+):[ \t]*(.*)")
_CHOICES = re.compile(r"\s*\(choices:\s*(\[.*\])\)\s*$", re.IGNORECASE)


def tool_schema(tool: Callable[..., Any] | Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool as chat templates expect it: {"type": "function", "function":
    {name, description, ...}}.

    A mapping must be such a schema already (a bare {"name", "parameters"} is wrapped). A function
    needs type hints and a docstring in Google's style that describes every argument. The result
    equals that of transformers' `get_json_schema`, including "return". `(choices: ["a", "b"])` at
    the end of a description becomes an enum.

    Raises ValueError, which names the function and the argument that cannot be described.
    """
    if isinstance(tool, Mapping):
        return _checked_schema(tool)
    if not callable(tool):
        raise TypeError(f"tools: expected a function or a JSON schema, got {type(tool).__name__}")
    name = getattr(tool, "__name__", type(tool).__name__)
    doc = inspect.getdoc(tool)
    if not doc:
        raise ValueError(
            f"tool {name}: has no docstring; describe it and each of its arguments (Args:)"
        )
    description, arguments, returns = _parse_docstring(doc)
    hints = get_type_hints(tool)
    properties: dict[str, Any] = {}
    required = []
    for position, parameter in enumerate(inspect.signature(tool).parameters.values()):
        if parameter.name not in hints:
            if position == 0 and parameter.name in ("self", "cls"):
                continue
            raise ValueError(f"tool {name}: argument {parameter.name!r} has no type hint; add one")
        if parameter.name not in arguments:
            raise ValueError(
                f"tool {name}: the docstring does not describe argument {parameter.name!r}; add it "
                "to Args:"
            )
        schema = _type_schema(hints[parameter.name], f"tool {name}: argument {parameter.name!r}")
        text = arguments[parameter.name]
        if choices := _CHOICES.search(text):
            try:
                schema["enum"] = [
                    c.strip() if isinstance(c, str) else c for c in json.loads(choices[1])
                ]
            except json.JSONDecodeError:
                raise ValueError(
                    f"tool {name}: argument {parameter.name!r}: choices {choices[1]} is not a JSON "
                    "list; use double quotes"
                ) from None
            text = text[: choices.start()]
        properties[parameter.name] = schema | {"description": text}
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    function: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if "return" in hints:
        try:
            function["return"] = _type_schema(hints["return"], f"tool {name}: return value")
        except ValueError:
            pass  # the model never writes the result: a type without a schema is left out
        else:
            if returns is not None:
                function["return"]["description"] = returns
    return {"type": "function", "function": function}


def _checked_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    schema = (
        dict(schema) if "function" in schema else {"type": "function", "function": dict(schema)}
    )
    function = schema["function"]
    if (
        not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not function["name"]
    ):
        raise ValueError(
            "tools: expected "
            '{"type": "function", "function": {"name", "description", "parameters"}}, '
            f"got {json.dumps(schema, default=str)[:200]}"
        )
    if not isinstance(function.get("parameters", {}), Mapping):
        raise ValueError(f"tool {function['name']}: parameters: expected a JSON schema object")
    return schema


def _type_schema(hint: Any, where: str) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in (list, tuple):
        return {"type": "array"}
    if hint is dict:
        return {"type": "object"}
    if isinstance(hint, type) and hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum_schema([member.value for member in hint], where)
    if origin is Literal:
        return _enum_schema(list(args), where)
    if origin in (Union, types.UnionType):
        return _union_schema(args, where)
    if origin is list:
        return {"type": "array", "items": _type_schema(args[0], where)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(args[1], where)}
    if origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [_type_schema(arg, where) for arg in args]}
    raise ValueError(
        f"{where}: {hint!r} has no JSON schema; use str, int, float, bool, list, dict, Literal, "
        "Enum, unions of these, "
        "or pass the tool as a JSON schema"
    )


def _union_schema(members: tuple[Any, ...], where: str) -> dict[str, Any]:
    schemas = [_type_schema(member, where) for member in members if member is not type(None)]
    schema: dict[str, Any]
    if len(schemas) == 1:
        schema = schemas[0]
    elif all(s.keys() == {"type"} and isinstance(s["type"], str) for s in schemas):
        names = sorted({s["type"] for s in schemas})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": schemas}
    return schema | {"nullable": True} if type(None) in members else schema


def _enum_schema(values: list[Any], where: str) -> dict[str, Any]:
    names = list(dict.fromkeys(_SCALARS.get(type(value)) for value in values))
    if not values or None in names:
        raise ValueError(
            f"{where}: choices {values!r}: expected at least one, each a str, int, float, bool or "
            "None"
        )
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _parse_docstring(doc: str) -> tuple[str, dict[str, str], str | None]:
    """Parse a Google docstring into its description, the arguments' descriptions (each on one line)
    and the result's."""
    sections: dict[str, list[str]] = {"": []}
    current = ""
    for line in doc.strip().splitlines():
        if (header := _SECTION.fullmatch(line)) and header[1] not in sections:
            current = header[1]
            sections[current] = []
        else:
            sections[current].append(line)
    arguments: dict[str, str] = {}
    name, depth = "", 0
    for line in filter(str.strip, sections.get("Args", [])):
        start = _PARAMETER.fullmatch(line)
        if start and (not arguments or len(start[1]) <= depth):
            depth, name = len(start[1]), start[2]
            arguments[name] = start[3].strip()
        elif name:
            arguments[name] = f"{arguments[name]} {line.strip()}".strip()
    returns = "\n".join(sections["Returns"]).strip() if "Returns" in sections else None
    return "\n".join(sections[""]).strip(), arguments, returns


@dataclass(frozen=True)
class ToolCall:
    """One call in a reply. `id` is unique; the tool message with the result refers to it."""

    name: str
    arguments: dict[str, Any]
    id: str


# Tokens that may surround a reply without being part of it.
_FRAME = re.compile(
    r"\A\s*<\|start_header_id\|>assistant<\|end_header_id\|>|(?:<\|(?:eot_id|eom_id|end_of_text)\|>\s*)+\Z"
)
_BUILTIN_CALL = re.compile(r'(\w+)\.call\(query="([^"]*)"\)')
_BUILTIN_CALL_WITH_QUOTES = re.compile(r'(\w+)\.call\(query="(.*)"\)', re.DOTALL)
_ANY_CALL = re.compile(r"(\w+)\.call\(.*\)", re.DOTALL)
_FUNCTION_TAG = re.compile(r"<function=([^>{}\s]+)>\s*")
_DECODER = json.JSONDecoder(strict=False)  # not strict, as models write line breaks in strings


ToolFormat = Literal["llama", "hermes", "deepseek", "nemotron"]


def tool_format(template: str | None) -> ToolFormat:
    """Find the model's format of calls from the marks that its chat template writes around them."""
    for name, (_, begin, _) in _TAGGED.items():
        if template is not None and begin in template:
            return name
    return "llama"


def parse_tool_calls(text: str, form: ToolFormat = "llama") -> tuple[ToolCall, ...]:
    """Return the calls in a reply, in order; () if it is plain text or any call is malformed.

    text: the reply, decoded with its special tokens.
    form: the format of calls, see `tool_format`. "hermes" is `<tool_call>{...}</tool_call>`,
        "nemotron" `<TOOLCALL>[{...}, ...]</TOOLCALL>`, and "deepseek" that of R1 and its distilled
        models, a name and JSON between special marks. There may be other text around calls, but
        they count only after `</think>`, and the last JSON needs no closing mark, as in vLLM. A
        reply without the format's marks is parsed as Llama's.

    Llama 3.1's formats are: JSON objects {"name", "parameters" or "arguments"} that make up the
    whole reply, alone, in a list, or separated by ";" or white space;
    `<function=name>{...}</function>` anywhere; a whole reply `[f(a=1), g()]`; and after
    `<|python_tag|>` any of these, a built-in `name.call(query="...")`, or code, which is a call of
    code_interpreter with the argument "code".
    """
    body = _FRAME.sub("", text).strip()
    if form in _TAGGED and _TAGGED[form][1] in body:
        return _as_calls(_between_tags(body.rpartition("</think>")[2], form))
    return _as_calls(_llama_calls(body))


def call_marks(form: ToolFormat) -> tuple[str, ...]:
    """Return the marks before a call inside a reply; the text before them is for the user. Llama's
    other forms make up the whole reply, see `CALL_OPENINGS`."""
    if form in _TAGGED:
        return (_TAGGED[form][1], *(("<｜tool▁calls▁begin｜>",) if form == "deepseek" else ()))  # noqa: RUF001
    return ("<function=",)


def call_ends(form: ToolFormat) -> tuple[str, ...]:
    """Return the marks after a call."""
    return (_TAGGED[form][2],) if form in _TAGGED else ()


# Beginnings of a reply that consists of calls.
CALL_OPENINGS = ("{", "[", *(f"{name}.call(" for name in BUILTIN_TOOLS))


def _llama_calls(body: str) -> "_Calls | None":
    calls = _json_calls(body)
    if calls is None:
        before, tag, tagged = body.partition("<|python_tag|>")
        if tag and not _FUNCTION_TAG.search(before):
            calls = _tagged_calls(tagged.strip())
        else:
            calls = _untagged_calls(body)
    return calls


def _as_calls(calls: "_Calls | None") -> tuple[ToolCall, ...]:
    return tuple(
        ToolCall(name, arguments, f"call_{uuid4().hex[:24]}") for name, arguments in calls or []
    )


_Calls = list[tuple[str, dict[str, Any]]]
_ARGUMENTS = {"parameters", "arguments"}
# The end of a reply whose last tag is not closed: nothing but perhaps the stop token.
_END = re.compile(r"\s*(?:<\|\w+\|>|</s>)?\s*")


# For each form, the parser of a tag's content, and the tag.
_DEEPSEEK_CALL = re.compile(
    r"\s*function<｜tool▁sep｜>([^\n]+)\n+```json\s*(.*?)\s*```\s*",  # noqa: RUF001
    re.DOTALL,
)
_TAGGED: dict[ToolFormat, tuple[Literal["json", "deepseek"], str, str]] = {
    "hermes": ("json", "<tool_call>", "</tool_call>"),
    "nemotron": ("json", "<TOOLCALL>", "</TOOLCALL>"),
    "deepseek": ("deepseek", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),  # noqa: RUF001
}


def _between_tags(body: str, form: ToolFormat) -> _Calls | None:
    """Return the calls in all tags of a form, ignoring tags inside JSON strings."""
    inside, begin, end = _TAGGED[form]
    calls: _Calls = []
    position = body.find(begin)
    while position >= 0:
        position += len(begin)
        if inside == "json":
            position += len(body[position:]) - len(body[position:].lstrip())
            try:
                value, position = _DECODER.raw_decode(body, position)
            except (json.JSONDecodeError, RecursionError):
                return None
            found = [_json_call(each) for each in (value if isinstance(value, list) else [value])]
            rest = body[position:].lstrip()
            if not rest.startswith(end) and not _END.fullmatch(rest):
                return None
        else:
            close = body.find(end, position)
            match = _DEEPSEEK_CALL.fullmatch(body, position, max(close, position))
            found = [_json_call({"name": match[1], "arguments": match[2]}) if match else None]
            position = close
        if None in found:
            return None
        calls += [call for call in found if call is not None]
        position = body.find(begin, position)
    return calls


def _untagged_calls(body: str) -> _Calls | None:
    if _FUNCTION_TAG.search(body):
        return _function_tags(body)
    builtin = _builtin_call(body)
    if builtin is not None and builtin[0] in BUILTIN_TOOLS:
        return [builtin]
    return _python_list(body)


def _tagged_calls(body: str) -> _Calls | None:
    if _FUNCTION_TAG.match(body):
        return _function_tags(body)
    for calls in (_json_calls(body), _python_list(body)):
        if calls is not None:
            return calls
    if builtin := _builtin_call(body):
        return [builtin]
    if not body or (body.startswith(("{", "[{")) and '"name"' in body):
        return None
    return [(CODE_INTERPRETER, {"code": body})]


def _json_calls(body: str) -> _Calls | None:
    values: list[Any] = []
    position = 0
    while position < len(body):
        try:
            value, position = _DECODER.raw_decode(body, position)
        except (json.JSONDecodeError, RecursionError):
            return None
        values += value if isinstance(value, list) else [value]
        separator = re.compile(r"\s*;?\s*").match(body, position)
        position = separator.end() if separator else position
    calls = [_json_call(value) for value in values]
    return [call for call in calls if call is not None] if calls and None not in calls else None


def _json_call(value: Any) -> tuple[str, dict[str, Any]] | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        return _json_call(value["function"])
    name = value.get("name", value.get("function"))
    says_so = value.get("type") == "function" or not _ARGUMENTS.isdisjoint(value)
    arguments = value.get("parameters", value.get("arguments"))
    if says_so and (arguments is None or arguments == ""):
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments)
        except json.JSONDecodeError:
            return None
    return (
        (name, arguments)
        if isinstance(name, str) and name and isinstance(arguments, dict)
        else None
    )


def _function_tags(body: str) -> _Calls | None:
    calls: _Calls = []
    position = 0
    while tag := _FUNCTION_TAG.search(body, position):
        try:
            arguments, position = _DECODER.raw_decode(body, tag.end())
        except (json.JSONDecodeError, RecursionError):
            return None
        if not isinstance(arguments, dict):
            return None
        calls.append((tag[1], arguments))
    return calls


def _builtin_call(body: str) -> tuple[str, dict[str, Any]] | None:
    if match := _BUILTIN_CALL.fullmatch(body):
        return match[1], {"query": match[2]}
    if not (general := _ANY_CALL.fullmatch(body)):
        return None
    if call := _python_call(_parse_python(body)):
        return general[1], call[1]
    if match := _BUILTIN_CALL_WITH_QUOTES.fullmatch(body):
        return match[1], {"query": match[2]}
    return None


def _python_list(body: str) -> _Calls | None:
    tree = _parse_python(body) if body.startswith("[") and body.endswith("]") else None
    if not isinstance(tree, ast.List) or not tree.elts:
        return None
    calls = [_python_call(element) for element in tree.elts]
    return [call for call in calls if call is not None] if None not in calls else None


def _parse_python(source: str) -> ast.expr | None:
    try:
        return ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _python_call(node: ast.expr | None) -> tuple[str, dict[str, Any]] | None:
    """Return the name and arguments of `f(a=1, b=[...])`, which may only have literal keyword
    arguments."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
        return None
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        return None
    try:
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
        json.dumps(arguments)
    except (ValueError, TypeError, RecursionError):
        return None
    return ast.unparse(node.func), arguments
