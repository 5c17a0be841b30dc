"""Reads a checkpoint's JSON files and checks them against a schema, with errors that name fields.

A schema is any type that msgspec converts to, usually a `msgspec.Struct`. Types are strict: "1" and
true are no numbers, and 1.0 is no integer. `json` parses and msgspec only checks, so that NaN,
Infinity and numbers of any length are reported with the name of their field.
"""

import json
import os
import re
import stat
from collections import Counter
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from llama_jax.errors import CheckpointError

# Parsed JSON can take twenty times the memory of its text, so this is 350 MB. The largest files are
# the tokenizer.json of large vocabularies, and they are mostly text.
MAX_BYTES = 16 * 1024 * 1024
_MAX_DEPTH = 64
_SHOWN = 80
_CONTAINERS = (dict, list)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_FIELD = re.compile(r"Object (missing required|contains unknown) field (.*)")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")


def is_there(path: Path) -> bool:
    """Return whether anything is at a path, even a dangling link.

    Raises `CheckpointError` if the directory may not be read.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(f"{path.parent} cannot be read: {error.strerror}") from error
    return True


def read_json[T](path: Path, schema: type[T], max_bytes: int = MAX_BYTES) -> T:
    """Read a JSON file as `schema`.

    Raises `CheckpointError`, which names the file, the field, what was found and what was expected.
    """
    return convert(parse(read_bytes(path, max_bytes), path), schema, path)


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read the JSON object in a file without checking its values. Raises as `read_json` does."""
    return read_json(path, dict[str, Any], max_bytes)


def read_text(path: Path, max_bytes: int = MAX_BYTES) -> str:
    """Read a text file in UTF-8. Raises `CheckpointError`, which names the file."""
    return _decoded(read_bytes(path, max_bytes), path)


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a file.

    Raises `CheckpointError`, which names the file, if it is missing, unreadable, too large or not a
    regular file (reading a FIFO or a device might never end).
    """
    try:
        # O_NONBLOCK, because opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is {kind(status.st_mode)}, expected a file")
            if status.st_size > max_bytes:
                raise CheckpointError(
                    f"{path} has {status.st_size} bytes; such a file has at most {max_bytes}"
                )
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(max_bytes)
        finally:
            os.close(descriptor)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def parse(raw: bytes, where: Path | str) -> Any:
    """Parse a JSON text in UTF-8. where: names the text in errors.

    Raises `CheckpointError` if it is not JSON, is nested deeper than 64 levels, has a key twice in
    an object, or holds half a surrogate pair, which UTF-8 cannot encode.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            name = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{where}: {name!a:.80} appears twice in the JSON")
        return found

    text = _decoded(raw, where)
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where} is not valid JSON: {error}. It is truncated or damaged: download it again."
        ) from error
    except CheckpointError:
        raise
    except RecursionError:
        value = None
        depth = _MAX_DEPTH + 1
    except ValueError as error:  # Python's limit on the digits of an integer
        raise CheckpointError(f"{where}: bad JSON: a number of thousands of digits") from error
    else:
        depth = _depth(value)
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{where}: bad JSON: nested more than {_MAX_DEPTH} levels deep")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise CheckpointError(f"{where} holds {half!a}, half a character") from error
    return value


def convert[T](value: Any, schema: type[T], where: Path | str) -> T:
    """Convert a parsed value to `schema`. where: names the file in errors.

    Raises `CheckpointError`, which names the field, what was found and what was expected.
    """
    if is_dataclass(schema) and isinstance(value, dict):  # msgspec does this for a Struct
        for name in value.keys() - {field.name for field in fields(schema)}:
            raise CheckpointError(f"{where}: {shown(name)} is not known")
    try:
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{where}: {_explained(str(error), value)}") from error


def check_fields(instance: Any) -> None:
    """Check a dataclass's fields against their annotated types, as `convert` does.

    Raises `CheckpointError`, which names the field.
    """
    values = {field.name: getattr(instance, field.name) for field in fields(instance)}
    try:
        hints = get_type_hints(type(instance), include_extras=True)
        msgspec.convert(values, msgspec.defstruct("Fields", list(hints.items())))
    except msgspec.ValidationError as error:
        raise CheckpointError(_explained(str(error), values)) from error


def shown(value: Any) -> str:
    """Format a value for a message: short, on one line, in characters that any terminal shows."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # deep nesting, or thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _decoded(raw: bytes, where: Path | str) -> str:
    if raw.startswith(_UTF16) or b"\0" in raw[:4]:
        raise CheckpointError(f"{where} is UTF-16 or UTF-32, expected UTF-8")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise CheckpointError(f"{where} begins with a byte order mark, expected UTF-8 without one")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8: byte {error.start} is no text") from error


def _depth(value: Any) -> int:
    """Return the depth of nested objects and lists, counted up to one more than is allowed."""
    level = [value] if type(value) in _CONTAINERS else []
    for depth in range(_MAX_DEPTH + 1):
        children = (node.values() if type(node) is dict else node for node in level)
        level = [node for each in children for node in each if type(node) in _CONTAINERS]
        if not level:
            return depth
    return _MAX_DEPTH + 1


def _explained(message: str, value: Any) -> str:
    """Reword msgspec's message, and add the offending value."""
    what, _, place = message.partition(" - at ")
    steps = place.strip("`").removeprefix("$")
    found, rest = value, steps
    while match := _STEP.match(rest):
        found = found[match[1]] if match[1] else found[int(match[2])]
        rest = rest[match.end() :]
    name = steps.removeprefix(".")
    what = what.replace("`", "").replace(" | ", " or ").replace("array", "list")
    if named := _FIELD.fullmatch(what):
        field = f"{name}.{named[2]}" if name else named[2]
        return f"{field} is {'missing' if named[1] == 'missing required' else 'not known'}"
    expected, _, got = what.removeprefix("Expected ").partition(", got ")
    if what == "Number out of range":
        expected = "a smaller number"
    elif what.startswith("Invalid "):  # a tag or a literal that the schema does not have
        return f"{name} is {shown(found)}, which is not known"
    elif not what.startswith("Expected "):  # a message of `__post_init__`
        return f"{name}: {what}" if name else what
    # msgspec names no place inside an object of arbitrary keys.
    shown_value = got or "out of range" if rest else shown(found)
    return f"{name or 'its JSON'} is {shown_value}, expected {expected}"


def kind(mode: int) -> str:
    """Describe `st_mode` of something that is not a regular file."""
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a FIFO" if stat.S_ISFIFO(mode) else "a device or socket"
