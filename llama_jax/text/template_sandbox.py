"""Compiles chat templates in a jinja2 sandbox that counts every operation against a `Budget`.

It has the settings, names and filters that templates get in transformers, except for some that are
expensive and that no chat template needs (`wordwrap`, `lipsum`, ...). jinja2 lets a sandbox
intercept calls, attributes and binary operators. Other expressions (`~`, slices, literals,
comparisons, output) are wrapped in filters by `_Counting`. Operations whose result can be much
larger than their operands (`*`, `center`, `replace`, `join`, `%`, ...) are checked before they are
done (`template_costs`), all others afterwards.
"""

import functools
import json
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from types import BuiltinMethodType
from typing import Any

import jinja2
import markupsafe
from jinja2 import filters, nodes
from jinja2 import tests as jinja2_tests
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from llama_jax.text.template_budget import Budget, OverBudgetError, current_budget
from llama_jax.text.template_costs import (
    FILTER_CHECKS,
    PIECE,
    STR_CHECKS,
    check_join,
    check_percent,
    check_width,
)

_JINJA_ARGUMENTS = ("_loop_vars", "_block_vars")  # which jinja2 passes to its own `call`
_MAX_TIME_FORMAT = 200  # characters in the format of strftime_now
_LEFT_OUT = frozenset({
    "filesizeformat", "pprint", "striptags", "urlencode", "urlize", "wordcount", "wordwrap",
    "xmlattr",
})  # fmt: skip
_ITERATING = frozenset({
    "batch", "groupby", "join", "list", "map", "max", "min", "reject", "rejectattr", "select",
    "selectattr", "slice", "sort", "sum", "unique",
})  # fmt: skip
_LAZY = frozenset({
    "batch", "items", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice",
})  # fmt: skip
_ATTRIBUTE = 200  # characters in the name of an attribute that a filter looks up
_PLAIN_STR_METHODS = frozenset({
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace",
    "istitle", "isupper", "lower", "partition", "removeprefix", "removesuffix", "startswith",
    "swapcase", "title", "upper",
})  # fmt: skip
_METHODS: dict[type, frozenset[str]] = {
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    range: frozenset({"count", "index"}),
    float: frozenset({"is_integer"}),
    int: frozenset(),
    bool: frozenset(),
}


class TemplateRefusalError(Exception):
    """Raised by `raise_exception` in a template, with the template's message."""


def compile_template(source: str) -> jinja2.Template:
    """Compile a template so that it counts its operations. Raises jinja2's errors."""
    environment = _environment()
    tree = _Counting(environment).visit(environment.parse(source))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of the Python code that jinja2 generates
        return environment.from_string(tree)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # no constant folding, which would not be counted
        extensions=[_GenerationTag, loopcontrols],
    )
    chosen = {name: f for name, f in filters.FILTERS.items() if name not in _LEFT_OUT} | {
        "e": _escape,
        "escape": _escape,
        "forceescape": _escape,
        "safe": str,
        "sum": _sum,
        "tojson": _tojson,
        "unique": _unique,
    }
    environment.filters = {name: _counted_filter(name, f) for name, f in chosen.items()} | _INNER
    environment.tests = {name: _counted_test(test) for name, test in jinja2_tests.TESTS.items()} | {
        "divisibleby": _divisible
    }
    del environment.globals["lipsum"]
    environment.globals |= {
        "cycler": _cycler,
        "dict": _dict,
        "joiner": _joiner,
        "namespace": _SafeNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


# ---- expressions that a sandbox cannot intercept ----------------------------------------------


class _Counting(NodeTransformer):
    """Wraps expressions that a sandbox cannot intercept in the filters of `_INNER`."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def _around(self, node: nodes.Node | None, name: str, lineno: int) -> nodes.Filter:
        around = nodes.Filter(node, name, [], [], None, None, lineno=lineno)
        around.set_environment(self._environment)
        return around

    def _made(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return self._around(node, "_made", node.lineno)

    visit_List = visit_Compare = _made

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        if node.ctx != "load":  # targets of an assignment
            return node
        return self._made(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = self._around(pair.key, "_key", pair.lineno)
        return self._around(node, "_made", node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        parts.set_environment(self._environment)
        return self._around(parts, "_concat", node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        if isinstance(node.arg, nodes.Slice):
            return self._made(node)
        self.generic_visit(node)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._around(node.iter, "_taken", node.iter.lineno)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Expr:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = self._around(node.dyn_args, "_taken", node.lineno)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        data = sum(sys.getsizeof(n.data) for n in node.nodes if isinstance(n, nodes.TemplateData))
        written: list[nodes.Expr] = [
            n
            if isinstance(n, nodes.TemplateData)
            else self._around(n, "_written", n.lineno or node.lineno)
            for n in node.nodes
        ]
        if data:
            length = nodes.Const(data, lineno=node.lineno)
            length.set_environment(self._environment)
            written.insert(0, self._around(length, "_data", node.lineno))
        node.nodes = written
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        if node.filter is None:
            node.filter = self._around(None, "_made", node.lineno)
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> None:
        raise jinja2.TemplateSyntaxError("a chat template has no autoescape", node.lineno)


@jinja2.pass_context  # also prevents constant folding by jinja2
def _made(context: Context, value: Any) -> Any:
    budget = current_budget()
    budget.spend()
    return budget.keep(value)


@jinja2.pass_context
def _taken(context: Context, items: Any) -> list[Any]:
    return current_budget().take(items)


@jinja2.pass_context
def _key(context: Context, value: Any) -> Any:
    _check_key(value)
    return value


@jinja2.pass_context
def _concat(context: Context, parts: list[Any]) -> str:
    budget = current_budget()
    budget.spend(len(parts))
    budget.check_arguments(*parts)
    kept: str = budget.keep("".join(map(str, parts)))
    return kept


@jinja2.pass_context
def _written(context: Context, value: Any) -> str:
    budget = current_budget()
    budget.spend()
    budget.measure(value)
    text = str(value)
    budget.write(sys.getsizeof(text))
    return text


@jinja2.pass_context
def _data(context: Context, length: int) -> str:
    """Count `length` bytes of the template's own text, which follows this call."""
    current_budget().spend()
    current_budget().write(PIECE + length)
    return ""


_INNER = {
    "_made": _made,
    "_taken": _taken,
    "_key": _key,
    "_concat": _concat,
    "_written": _written,
    "_data": _data,
}


# ---- operations that a sandbox intercepts ------------------------------------------------------


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = current_budget()
        budget.spend()
        named = {key: value for key, value in kwargs.items() if key not in _JINJA_ARGUMENTS}
        budget.check_arguments(*args, *named.values())
        if isinstance(obj, LoopContext) and args:
            args = (budget.take(args[0]), *args[1:])
        elif isinstance(obj, BuiltinMethodType):
            args = _check_method(budget, obj, *args, **named)
        return budget.keep(super().call(context, obj, *args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        current_budget().spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        current_budget().spend()
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = current_budget()
        budget.spend()
        if operator == "**":
            raise SecurityError("powers are not available to a chat template")
        if operator == "%" and isinstance(left, str):
            check_percent(budget, left, right)
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if isinstance(items, str) and isinstance(times, int):
                    budget.room((sys.getsizeof(items) - sys.getsizeof("")) * times)
                elif isinstance(items, list | tuple) and isinstance(times, int):
                    budget.room(budget.measure(items)[0] * times)
        elif operator != "+" and not (
            isinstance(left, int | float) and isinstance(right, int | float)
        ):
            raise TypeError(
                f"{operator} takes numbers, not {type(left).__name__} and {type(right).__name__}"
            )
        return budget.keep(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        is_format = isinstance(value, BuiltinMethodType) and isinstance(value.__self__, str)
        if not is_format or value.__name__ not in ("format", "format_map"):
            return None
        text = str(value.__self__)
        formatter = _Formatter(self)
        if value.__name__ == "format_map":
            return lambda mapping: formatter.vformat(text, (), mapping)
        return lambda *args, **kwargs: formatter.vformat(text, args, kwargs)


class _Formatter(SandboxedFormatter):
    """Counts the fields of `str.format`."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self._size = 0

    def format_field(self, value: Any, format_spec: str) -> Any:
        budget = current_budget()
        budget.spend()
        check_width(format_spec)
        budget.measure(value)
        text = super().format_field(value, format_spec)
        self._size += sys.getsizeof(text)
        budget.room(self._size)
        return text


def _check_method(
    budget: Budget, method: BuiltinMethodType, *args: Any, **kwargs: Any
) -> tuple[Any, ...]:
    """Check a call of a method of a text, list, ... and return its arguments."""
    owner, name = method.__self__, method.__name__
    if not isinstance(owner, str):
        if name not in _METHODS.get(type(owner), ()):
            raise SecurityError(f"{type(owner).__name__}.{name} is not available")
        return args
    if name in _PLAIN_STR_METHODS:
        return args
    if name == "join" and args:
        items = budget.take(args[0])
        check_join(budget, items, owner)
        return (items,)
    check = STR_CHECKS.get(name)
    if check is None:
        raise SecurityError(f"str.{name} is not available to a chat template")
    check(budget, owner, *args, **kwargs)
    return args


# ---- filters, tests and globals --------------------------------------------------------------


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # after a context or environment
    check = FILTER_CHECKS.get(name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        budget = current_budget()
        budget.spend()
        before, value, rest = args[:first], args[first], args[first + 1 :]
        budget.check_arguments(value, *rest, *kwargs.values())
        if name in _ITERATING:
            _check_attribute_names(rest, kwargs)
            value = budget.take(value)
        if check is not None:
            check(budget, value, *rest, **kwargs)
        result = function(*before, value, *rest, **kwargs)
        if name in _LAZY and not isinstance(result, str):
            return budget.take(result)
        return budget.keep(result)

    if first:
        counted.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return counted


def _counted_test(test: Any) -> Callable[..., Any]:
    @functools.wraps(test)
    def counted(*args: Any, **kwargs: Any) -> Any:
        current_budget().spend()
        return test(*args, **kwargs)

    return counted


def _check_attribute_names(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    # The parts of the name are looked up one by one for each element.
    for name in (*args[:1], *args[2:3], kwargs.get("attribute")):
        if isinstance(name, str) and name.count(".") + name.count(",") > _ATTRIBUTE:
            raise OverBudgetError(f"the name of an attribute has more than {_ATTRIBUTE} parts")


def _check_key(key: Any) -> None:
    # Tuples of -1 and -2 in any order have the same hash, so a dict of them takes quadratic time.
    if not isinstance(key, str | int | float | None):
        raise TypeError(f"a key is a text or a number, not {type(key).__name__}")


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    if len(args) > 1:
        raise TypeError(f"dict takes one argument, got {len(args)}")
    given = args[0] if args else {}
    pairs = list(given.items()) if isinstance(given, Mapping) else current_budget().take(given)
    for key, _ in pairs:
        _check_key(key)
    return dict(pairs, **kwargs)


def _cycler(*items: Any) -> Cycler:
    """Make jinja2's cycler. The class itself is not offered, because its functions can modify any
    object."""
    return Cycler(*items)


def _joiner(sep: str = ", ") -> Joiner:
    return Joiner(sep)


class _SafeNamespace(Namespace):
    """jinja2's namespace with two restrictions: no underscored attributes, which would shadow
    Python's own (`__class__`), and no repr of its contents, which change after being measured."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *data = args
        attributes = _dict(*data, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_attribute(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} starts with an underscore")


def _raise_exception(message: Any) -> None:
    raise TemplateRefusalError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_TIME_FORMAT:
        raise OverBudgetError(f"strftime_now has a format of {len(format)} characters")
    return datetime.now().strftime(format)


def _escape(value: Any) -> str:
    return str(markupsafe.escape(str(value)))


def _divisible(value: Any, number: Any) -> bool:
    current_budget().spend()
    if not isinstance(value, int | float):
        raise TypeError(f"divisibleby takes numbers, not {type(value).__name__}")
    return bool(value % number == 0)


@jinja2.pass_environment
def _sum(
    environment: jinja2.Environment, items: list[Any], attribute: Any = None, start: Any = 0
) -> Any:
    """Compute jinja2's sum, and count the repeated copies that adding lists makes."""
    if attribute is not None:
        items = list(map(filters.make_attrgetter(environment, attribute), items))
    budget = current_budget()
    total = start
    for item in items:
        if isinstance(total, str) or isinstance(item, str):
            raise TypeError("sum takes numbers or lists, not texts; use join")
        total = budget.keep(total + item)
    return total


@jinja2.pass_environment
def _unique(
    environment: jinja2.Environment,
    items: list[Any],
    case_sensitive: bool = False,
    attribute: Any = None,
) -> list[Any]:
    """Compute jinja2's unique, for texts and numbers."""
    case = None if case_sensitive else filters.ignore_case
    key_of = filters.make_attrgetter(environment, attribute, postprocess=case)
    first: dict[Any, Any] = {}
    for item in items:
        key = key_of(item)
        _check_key(key)
        first.setdefault(key, item)
    return list(first.values())


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without jinja2's HTML escaping. `ensure_ascii` does not escape plane 2, which has
    the marks of chat.py."""
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if ensure_ascii:
        text = re.sub(
            r"[^\x00-\x7f\U00020000-\U0002ffff]", lambda match: json.dumps(match[0])[1:-1], text
        )
    return text


class _GenerationTag(Extension):
    """Renders the body of `{% generation %}...{% endgeneration %}`, which marks assistant text for
    training."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 only looks names up

    def filter_stream(self, stream: TokenStream) -> list[Token]:
        # Not lazily: a lexer left halfway by a full Python stack complains on stderr.
        return list(stream)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
