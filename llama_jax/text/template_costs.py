"""Checks the cost of a chat template's operations before they are done.

The result of an operation on text (`center`, `replace`, `join`, `%`, ...) can be much larger than
its operands. Each check takes the budget and then the arguments of its method or filter, and raises
`OverBudgetError` if the budget has no room for the largest possible result.
"""

import re
import sys
from collections.abc import Callable
from typing import Any

from llama_jax.text.template_budget import Budget, OverBudgetError

_WIDEST = 4  # bytes that a character may take
PIECE = 64  # bytes that a short text takes
_ESCAPED = 6  # characters of ASCII JSON per byte of a text
_MAX_FIELD = 999  # width and precision in a format
_MAX_SEARCH = 1 << 28  # for searches that take Python time quadratic in length
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_WORD_STARTS = "-({[< \t"


def check_width(spec: str) -> None:
    if re.search(r"\d{4}", spec):
        raise OverBudgetError(f"a format has a width of more than {_MAX_FIELD}")


def _check_padding(budget: Budget, text: str, width: int = 0, *fill: Any) -> None:
    budget.room(_WIDEST * max(len(text), width))


def _check_tabs(budget: Budget, text: str, tabsize: int = 8) -> None:
    budget.room(_WIDEST * (len(text) + text.count("\t") * tabsize))


def _check_replace(budget: Budget, text: Any, old: Any, new: Any, count: int | None = None) -> None:
    found = str(text).count(str(old))
    if count is not None and 0 <= count < found:
        found = count
    budget.room(_WIDEST * (len(str(text)) + found * len(str(new))))


def _check_split(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> None:
    at_most = budget.largest // PIECE
    pieces = text.count(sep) + 1 if sep else len(text.split(None, at_most))
    if 0 <= maxsplit < pieces:
        pieces = maxsplit + 1
    _check_pieces(budget, text, pieces)


def _check_pieces(budget: Budget, text: str, pieces: int) -> None:
    size = PIECE * pieces + sys.getsizeof(text)
    budget.room(size)
    budget.create(size)


def _check_rsplit(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> None:
    _check_search(budget, text, sep)
    _check_split(budget, text, sep, maxsplit)


def _check_search(budget: Budget, text: Any, sought: Any = None, *between: Any) -> None:
    if isinstance(sought, str) and len(str(text)) * len(sought) > _MAX_SEARCH:
        raise OverBudgetError("a long text is stripped of, or searched backwards for, a long text")


def _check_lines(budget: Budget, text: str, *args: Any, **kwargs: Any) -> None:
    _check_pieces(budget, text, _lines(text))


def _lines(text: str) -> int:
    return 1 + sum(map(text.count, _LINE_ENDS))


STR_CHECKS: dict[str, Callable[..., None]] = {
    "center": _check_padding,
    "ljust": _check_padding,
    "rjust": _check_padding,
    "zfill": _check_padding,
    "expandtabs": _check_tabs,
    "replace": _check_replace,
    "split": _check_split,
    "rsplit": _check_rsplit,
    "rfind": _check_search,
    "rindex": _check_search,
    "rpartition": _check_search,
    "strip": _check_search,
    "lstrip": _check_search,
    "rstrip": _check_search,
    "splitlines": _check_lines,
}


def check_percent(budget: Budget, text: str, values: Any) -> None:
    """Check `text % values` as if every field had the largest width and all values in it."""
    fields, position = 0, text.find("%")
    while position >= 0:
        budget.spend()
        fields += 1
        spec = _PERCENT_SPEC.match(text, _after_key(text, position + 1))
        assert spec is not None  # it may be empty
        if "*" in spec[0]:
            raise OverBudgetError("a format takes its width from an argument")
        check_width(spec[0])
        position = text.find("%", spec.end() + 1)
    size = budget.measure(values)[0]
    budget.room(_WIDEST * len(text) + fields * (_WIDEST * _MAX_FIELD + size))


def _after_key(text: str, position: int) -> int:
    """Return where the "(name)" of a format ends, if it begins at `position`."""
    depth = 0
    for end in range(position, min(len(text), position + _MAX_FIELD)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if depth == 0:
            return end + 1 if text[end] == ")" else end
    raise OverBudgetError(f"a format has a name of more than {_MAX_FIELD} characters")


_PERCENT_SPEC = re.compile(r"[#0\- +]*(?:\*|\d*)(?:\.(?:\*|\d*))?[hlL]?")


def check_join(budget: Budget, items: list[Any], between: Any = "") -> None:
    size = budget.measure(items)[0]
    budget.room(size + _WIDEST * len(str(between)) * len(items))


def _check_elements(budget: Budget, items: Any, count: int, fill_with: Any = None) -> None:
    budget.room(count * (PIECE + budget.measure(fill_with)[0]))


def _check_indent(budget: Budget, text: str, width: int | str = 4, *args: Any, **_: Any) -> None:
    wide = len(width) if isinstance(width, str) else width
    budget.room(_WIDEST * (len(text) + _lines(text) * wide))
    _check_lines(budget, text)


def _check_round(budget: Budget, value: Any, precision: int = 0, method: str = "common") -> None:
    if abs(precision) > _MAX_FIELD // 10:
        raise OverBudgetError(f"round has a precision of {precision}")


def _check_groups(
    budget: Budget, items: list[Any], attribute: Any, default: Any = None, *_: Any, **__: Any
) -> None:
    _check_elements(budget, items, len(items), default)


def _check_title(budget: Budget, text: Any) -> None:
    _check_pieces(budget, str(text), 2 * sum(map(str(text).count, _WORD_STARTS + _LINE_ENDS)) + 1)


def _check_format(budget: Budget, value: Any, *args: Any, **kwargs: Any) -> None:
    check_percent(budget, str(value), kwargs or args)


def _check_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> None:
    size, depth = budget.measure(value)
    wide = len(indent) if isinstance(indent, str) else indent or 0
    wide += sum(map(len, separators or ()))
    budget.room(_ESCAPED * size if ensure_ascii else size)
    budget.room(size + _WIDEST * wide * (depth + 1) * (size // PIECE + 1))


FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "batch": lambda budget, items, linecount, fill_with=None: _check_elements(
        budget, items, linecount, fill_with
    ),
    "center": lambda budget, text, width=80: _check_padding(budget, str(text), width),
    "format": _check_format,
    "indent": _check_indent,
    "join": lambda budget, items, d="", attribute=None: check_join(budget, items, d),
    "replace": _check_replace,
    "round": _check_round,
    "groupby": _check_groups,
    "title": _check_title,
    "trim": lambda budget, text, chars=None: _check_search(budget, text, chars),
    "slice": lambda budget, items, slices, fill_with=None: _check_elements(
        budget, items, slices, fill_with
    ),
    "tojson": _check_json,
}
