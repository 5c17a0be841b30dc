"""What a reply must look like, as a setting: a JSON schema, a regular expression, a list of choices
or a grammar. Needs no JAX and no llguidance, so that a wrong setting is told at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

# Of a schema, an expression, choices or a grammar, as text.
MAX_CHARACTERS = 256 * 1024
# What llguidance is told about white space in JSON, which is as Python's json writes it, and as
# models do. Where any would do, hardly a token would be forced, and a small model might draw white
# space for ever.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class StructuredOutputError(ValueError):
    """A schema, expression or grammar that cannot be used, or that leaves nothing to draw."""


class GrammarsBusyError(StructuredOutputError):
    """Grammars of others take long to compile, so that this one has not been tried."""


@dataclass(frozen=True)
class StructuredOutput:
    """What a reply must look like; exactly one of the fields.

    json_schema: a JSON schema, also as text (its "x-guidance" are llguidance's options, which say
    what white space there is); json_object: any JSON object; regex: a regular
    expression that the whole reply matches (Rust's syntax, without look-around and references);
    choice: one of these texts; grammar: Lark with llguidance's additions, or GBNF, which is
    llama.cpp's EBNF.
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
                f"structured: exactly one of {', '.join(names)} is to be given, got "
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
                f"structured.{name}: {len(self.text):,} characters of text, at most "
                f"{MAX_CHARACTERS:,} are possible"
            )

    @property
    def kind(self) -> str:
        """The name of the field that is given."""
        return next(each.name for each in fields(self) if _is_given(getattr(self, each.name)))

    @property
    def text(self) -> str:
        """Return what is given, as text: a JSON schema, a list in JSON, an expression or a
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
    """A JSON schema as text, its properties in their order."""
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
