"""Reads and writes JSON lines. A line that is not an object becomes a ValueError."""

import io
import json
import math
import string
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO


def json_line(value: Any) -> str:
    """Return valid JSON on one line. Numbers that JSON lacks become null."""
    finite = _finite(value)
    text = json.dumps(finite, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which needs an escape
        return json.dumps(finite)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_jsonl(path: str) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yield the objects of a JSONL file, "-" for stdin, with their line numbers.

    Blank lines are skipped. A line that is not a JSON object in UTF-8 becomes a ValueError.
    """
    return _parsed(_lines(path, "surrogateescape"))


def parse_jsonl(
    lines: bytes, first_number: int
) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Parse some lines of a file as `read_jsonl` does. first_number: of the first of them."""
    text = io.TextIOWrapper(io.BytesIO(lines), "utf-8", "surrogateescape", newline="\n")
    return _parsed(_numbered(text, first_number))


def _parsed(
    lines: Iterable[tuple[int, str]],
) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    for number, line in lines:
        try:
            line.encode()
            value = json.loads(line, parse_constant=_refuse_constant)
        except UnicodeEncodeError:
            yield number, ValueError("not valid UTF-8")
        except (ValueError, RecursionError) as error:
            yield number, ValueError(f"not valid JSON ({error})")
        else:
            if isinstance(value, dict):
                yield number, value
            else:
                yield number, ValueError(f"expected an object, got {type(value).__name__}")


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file that are not blank, "-" for stdin, with their numbers."""
    try:
        yield from _lines(path, "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error


def _lines(path: str, errors: str) -> Iterator[tuple[int, str]]:
    if path == "-":
        yield from _numbered(sys.stdin)
        return
    with open(path, encoding="utf-8", errors=errors, newline="\n") as file:
        yield from _numbered(file)


def _numbered(file: TextIO, first_number: int = 1) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, first_number):
        if line.strip(string.whitespace):
            # Windows' editors begin a file with U+FEFF to say that it is UTF-8.
            text = line.removeprefix("\ufeff") if number == 1 else line
            yield number, text.rstrip("\r\n")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
