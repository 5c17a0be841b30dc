"""Finds the chat templates of a checkpoint, by the names that transformers gives them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from llama_jax.errors import CheckpointError
from llama_jax.json_file import read_json, read_text

DEFAULT, TOOL_USE = "default", "tool_use"
TEMPLATE_FILE = "chat_template.jinja"
# The directory of further templates, NAME.jinja.
TEMPLATE_DIRECTORY = "additional_chat_templates"
# Written by processors of images and text until 2025.
_JSON_FILE = "chat_template.json"
_CONFIG_FILE = "tokenizer_config.json"


class TemplateSource(str):
    """The Jinja source of a template, and `where` it comes from (file and field), for messages."""

    where: str

    def __new__(cls, source: str, where: str) -> "TemplateSource":
        made = super().__new__(cls, source)
        made.where = where
        return made


def said_to_lie_in(directory: str | Path, template: str, found_in: Path) -> str:
    """Make error messages about a template of `found_in` name `directory` instead."""
    if not isinstance(template, TemplateSource):
        return template
    return TemplateSource(template, template.where.replace(str(found_in), str(directory)))


class _Named(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def template(self) -> str: ...


class _JsonFile(Struct, frozen=True):
    chat_template: str


def read_chat_templates(
    directory: Path, listed: str | Iterable[_Named] | None
) -> dict[str, TemplateSource]:
    """Read the templates in a checkpoint's directory, by name; {} if there are none.

    listed: `chat_template` of tokenizer_config.json, which is used if there are no files, as in
        transformers.

    Raises `CheckpointError` for a file that cannot be read, and for several templates of which none
    is named "default".
    """
    templates = {
        file.stem: TemplateSource(read_text(file), str(file))
        for file in sorted((directory / TEMPLATE_DIRECTORY).glob("*.jinja"))
    }
    main = directory / TEMPLATE_FILE
    if main.exists():
        templates[DEFAULT] = TemplateSource(read_text(main), str(main))
    where = f"{directory / _CONFIG_FILE}: chat_template"
    if DEFAULT not in templates:
        if isinstance(listed, str):
            templates[DEFAULT] = TemplateSource(listed, where)
        elif listed is not None:
            in_config = {
                each.name: TemplateSource(each.template, f"{where} {each.name!r}")
                for each in listed
            }
            templates = in_config | templates
    file = directory / _JSON_FILE
    if not templates and file.exists():
        templates[DEFAULT] = TemplateSource(
            read_json(file, _JsonFile).chat_template, f"{file}: chat_template"
        )
    if templates and DEFAULT not in templates:
        raise CheckpointError(
            f'{where} has {sorted(templates)} but none named "{DEFAULT}"; name one so'
        )
    return templates
