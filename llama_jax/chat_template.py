"""Renders a checkpoint's Jinja chat template in a sandbox, with the names and filters that
transformers offers it.

A template is code from whoever published the checkpoint. It sees plain data only, cannot reach
Python's internals, and is stopped after a fixed number of loop steps and calls.
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_MAX_STEPS = 200_000  # loop steps and calls in one rendering; a message takes a few
_MAX_REPEATED = 1_000_000  # elements that one `sequence * n` may make
_steps_left: ContextVar[list[int]] = ContextVar("_steps_left")


class ChatTemplateError(ValueError):
    """A chat template that refuses the conversation (the message is the template's own) or cannot
    be rendered."""


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """The text that template `source` writes for `variables`, which are plain JSON data.

    Raises ChatTemplateError: with the template's own words when it calls `raise_exception`, else
    saying why it cannot be rendered (syntax, an undefined name, a sandbox violation, too many
    steps).
    """
    token = _steps_left.set([_MAX_STEPS])
    try:
        return _compiled(source).render(**variables)
    except ChatTemplateError:
        raise
    except Exception as error:  # a template can raise whatever Python can
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ChatTemplateError(
            f"the chat template cannot be rendered{line}: {type(error).__name__}: {error}"
        ) from error
    finally:
        _steps_left.reset(token)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters |= {"tojson": _tojson, "_counted": _counted}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "namespace": _SafeNamespace,
    }
    tree = environment.parse(source)
    for loop in list(tree.find_all(nodes.For)):
        counted = nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        counted.set_environment(environment)
        loop.iter = counted
    return environment.from_string(tree)


def _spend(steps: int) -> None:
    budget = _steps_left.get()
    budget[0] -= steps
    if budget[0] < 0:
        raise jinja2.TemplateRuntimeError(f"it takes more than {_MAX_STEPS:,} loop steps and calls")


def _counted(items: Iterable[Any]) -> list[Any]:
    listed = list(items)
    _spend(len(listed) + 1)
    return listed


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _spend(1)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.exceptions.SecurityError("powers are not available to a chat template")
        for items, times in ((left, right), (right, left)):
            repeats = isinstance(items, str | list | tuple) and isinstance(times, int)
            if repeats and len(items) * times > _MAX_REPEATED:
                raise jinja2.exceptions.SecurityError(
                    f"a repetition makes over {_MAX_REPEATED:,} elements"
                )
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; here it only
    renders its body."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # jinja2 only looks names up

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """jinja2's namespace without underscored attributes, which would shadow Python's own
    (`__class__`)."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *data = args
        for name in dict(*data, **kwargs):
            _check_attribute(name)
        Namespace.__init__(self, *data, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)


def _check_attribute(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"namespace attribute {name!r} starts with an underscore"
        )


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escaping. `ensure_ascii` spares plane 2 with chat.py's marks."""
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if ensure_ascii:
        text = re.sub(
            r"[^\x00-\x7f\U00020000-\U0002ffff]", lambda match: json.dumps(match[0])[1:-1], text
        )
    return text
