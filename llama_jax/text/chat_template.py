"""Renders a checkpoint's Jinja chat template in a sandbox.

The template gets plain data alone, cannot reach Python's internals, and has a budget of time and
memory (`template_budget`).
"""

import json
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2

from llama_jax.text.chat_files import TemplateSource
from llama_jax.text.template_budget import OverBudgetError, budgeted
from llama_jax.text.template_sandbox import TemplateRefusalError, compile_template

_MAX_SOURCE = 64 << 10  # characters of a template; the longest in use have 40,000
_MAX_OUTPUT = 1 << 20  # characters; more for each byte of input:
_OUTPUT_PER_GIVEN = 8
_MAX_WORDS = 1000  # characters of an error message


class ChatTemplateError(ValueError):
    """Raised if a chat template refuses the conversation or cannot be rendered."""


class ChatTemplateBudgetError(ChatTemplateError):
    """Raised if a chat template needs more time or memory than it may use."""


def render_template(template: str, variables: Mapping[str, Any]) -> str:
    """Render Jinja source with variables, which are plain JSON data.

    Raises ChatTemplateError, which names file and line: with the template's own message if it calls
    `raise_exception`, and otherwise with the reason (syntax, an undefined name, a sandbox
    violation, ...). Raises ChatTemplateBudgetError if rendering takes too much time or memory.
    """
    given = sys.getsizeof(json.dumps(variables, ensure_ascii=False))
    limit = _MAX_OUTPUT + _OUTPUT_PER_GIVEN * given
    pieces = []
    try:
        compiled = _compiled(str(template))
        with budgeted(given):
            for piece in compiled.generate(variables):
                limit -= len(piece)
                if limit < 0:
                    raise OverBudgetError("it writes far more than its input")
                pieces.append(piece)
    except TemplateRefusalError as error:
        raise ChatTemplateError(
            f"{_place(template, error)}: the template itself refuses this conversation: "
            f"{_words(error)}"
        ) from error
    except OverBudgetError as error:
        raise ChatTemplateBudgetError(
            f"{_place(template, error)}: the template is stopped: {_words(error)}"
        ) from error
    except Exception as error:  # a template can raise whatever Python can
        raise ChatTemplateError(
            f"{_place(template, error)}: cannot be rendered: {type(error).__name__}: "
            f"{_words(error)}"
        ) from error
    return "".join(pieces)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > _MAX_SOURCE:
        raise OverBudgetError(f"it has more than {_MAX_SOURCE:,} characters")
    return compile_template(source)


def _place(template: str, error: Exception) -> str:
    """Return the template's file and the line that raised the error."""
    line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if "__jinja_exception__" in trace.tb_frame.f_globals:  # jinja2's stand-in for a template
            line = trace.tb_lineno
        trace = trace.tb_next
    where = template.where if isinstance(template, TemplateSource) else "the chat template"
    return where if line is None else f"{where}, line {line}"


def _words(error: Exception) -> str:
    words = str(error)
    return words if len(words) <= _MAX_WORDS else words[:_MAX_WORDS] + "..."
