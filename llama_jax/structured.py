"""Defines the setting for structured output: a JSON schema, a regular expression, a list of choices
or a grammar. Imports neither JAX nor llguidance, so that a wrong setting is reported at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

# The longest schema, expression, list of choices or grammar, as text.
MAX_CHARACTERS = 256 * 1024
# llguidance's options for white space in JSON: as Python's json writes it, which is how models do.
# If any white space were allowed, few tokens would be forced, and a small model might draw white
# space for ever.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class StructuredOutputError(ValueError):
    """Raised for a schema, expression or grammar that cannot be used or allows no token."""


class GrammarsBusyError(StructuredOutputError):
    """Raised if other grammars take so long to compile that this one could not be tried."""


@dataclass(frozen=True)
class StructuredOutput:
    """The form that a reply must have, given by exactly one of these fields.

    json_schema: a JSON schema, as an object or as text. Its "x-guidance" may hold llguidance's
        options for white space.
    json_object: any JSON object.
    regex: a regular expression that matches the whole reply (Rust's syntax, without look-around and
        backreferences).
    choice: a list of texts, one of which is the reply.
    grammar: Lark with llguidance's additions, or GBNF (llama.cpp's EBNF).

    >>> StructuredOutput(choice=["yes", "no"]).kind
    'choice'
    """

    json_schema: Mapping[str, Any] | str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        names = [each.name for each in fields(self)]
        given = [name for name in names if _is_given(getattr(self, name))]
        if len(given) != 1:
            raise ValueError(
                f"structured: give exactly one of {', '.join(names)}, got "
                f"{' and '.join(given) or 'none'}"
            )
        (name,) = given
        value = getattr(self, name)
        if name == "json_schema":
            object.__setattr__(self, name, _schema_text(value))
        elif name == "choice":
            object.__setattr__(self, name, _choices(value))
        elif not isinstance(value, bool if name == "json_object" else str):
            kind = "a bool" if name == "json_object" else "a text"
            raise TypeError(f"structured.{name}: expected {kind}, got {type(value).__name__}")
        if len(self.text) > MAX_CHARACTERS:
            raise StructuredOutputError(
                f"structured.{name}: {len(self.text):,} characters of text, expected at most "
                f"{MAX_CHARACTERS:,}"
            )

    @property
    def kind(self) -> str:
        """Return the name of the field that is given."""
        return next(each.name for each in fields(self) if _is_given(getattr(self, each.name)))

    @property
    def text(self) -> str:
        """Return the given field as text: a JSON schema, a list in JSON, an expression or a
        grammar."""
        if self.json_object:
            return json.dumps({"type": "object", "x-guidance": JSON_FORM})
        if self.choice is not None:
            return json.dumps(self.choice, ensure_ascii=False)
        return str(getattr(self, self.kind))


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"structured.choice: expected a list of texts, got {type(value).__name__}")
    for each in value:
        if not isinstance(each, str):
            raise TypeError(f"structured.choice: expected texts, got {each!r:.200}")
    if not value or not all(value):
        raise ValueError(
            f"structured.choice: expected texts, none of them empty, got {value!r:.200}"
        )
    return tuple(value)


def _bounded_json(value: Any) -> str:
    """Return a value as JSON, of which no more is written than may be.

    In pieces, between which other threads have their turn.
    """
    pieces: list[str] = []
    size = 0
    for piece in json.JSONEncoder(ensure_ascii=False, allow_nan=False).iterencode(value):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_CHARACTERS:
            raise StructuredOutputError(
                f"structured.json_schema: more than {MAX_CHARACTERS:,} characters of text"
            )
    return "".join(pieces)


def _schema_text(schema: Any) -> str:
    """Return a JSON schema as text, with its properties in their order."""
    where = "structured.json_schema"
    if not isinstance(schema, str | Mapping):
        raise TypeError(f"{where}: expected a JSON schema, got {type(schema).__name__}")
    if isinstance(schema, str) and len(schema) > MAX_CHARACTERS:
        return schema  # refused for its length
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
        if isinstance(read, Mapping):
            read = {"x-guidance": JSON_FORM, **read}
        text = _bounded_json(read)
    except StructuredOutputError:
        raise
    except RecursionError:
        raise StructuredOutputError(f"{where}: nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise StructuredOutputError(f"{where}: expected JSON, but {error}") from None
    if not isinstance(read, Mapping):
        raise TypeError(f"{where}: expected an object, got {text[:200]}")
    return text
