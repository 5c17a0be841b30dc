"""Reads the small files beside a vocabulary: tokenizer_config.json, special_tokens_map.json and
added_tokens.json. If they contradict each other, the first of them wins."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from llama_jax.errors import CheckpointError
from llama_jax.json_file import read_json, shown
from llama_jax.text.added_tokens import AddedToken
from llama_jax.text.vocabulary import MAX_ID

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
# Tokens with a role in these files and in chat templates.
NAMED = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
# The classes of transformers that prepend BOS by default.
_LLAMA_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")

TokenId = Annotated[int, Meta(ge=0, le=MAX_ID)]
Content = Annotated[str, Meta(min_length=1)]


class _Token(Struct, frozen=True):
    content: Content
    special: bool | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None


_Name = str | _Token | None  # "" means none, in LLaMA 1's first files
_Names = list[Content | _Token]


class _SpecialTokens(Struct, frozen=True):
    bos_token: _Name = None
    eos_token: _Name = None
    unk_token: _Name = None
    sep_token: _Name = None
    pad_token: _Name = None
    cls_token: _Name = None
    mask_token: _Name = None
    additional_special_tokens: _Names | None = None
    # The new name of additional_special_tokens.
    extra_special_tokens: _Names | dict[str, Content | _Token] | None = None


class NamedTemplate(Struct, frozen=True):
    name: str
    template: str


class _Config(_SpecialTokens, frozen=True):
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    added_tokens_decoder: dict[str, _Token] | None = None
    chat_template: str | list[NamedTemplate] | None = None
    tokenizer_class: str | None = None


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings in the files beside a vocabulary.

    named: maps "bos_token" and so on to names, if the files give them.
    special: names of all special tokens.
    declared: added tokens with their ids, by file.
    adds_bos, adds_eos: whether a text gets them; None if no file says so.
    is_llama_class: whether transformers' class for it prepends BOS by default.
    prefix_space, legacy: see `tokenizer_model.read_tokenizer_model`.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    special: frozenset[str] = frozenset()
    declared: Mapping[Path, tuple[AddedToken, ...]] = field(default_factory=dict)
    adds_bos: bool | None = None
    adds_eos: bool | None = None
    is_llama_class: bool = False
    prefix_space: bool = True
    legacy: bool = True
    chat_template: str | list[NamedTemplate] | None = None


def read_settings(directory: Path) -> TokenizerSettings:
    """Read those of the files that are in a checkpoint's directory.

    Raises `CheckpointError`, which names the file and the field.
    """
    config = _read(directory / CONFIG_FILE, _Config)
    special_map = _read(directory / SPECIAL_FILE, _SpecialTokens)
    named = {}
    for key in NAMED:
        token = getattr(config, key) or getattr(special_map, key)
        if token:
            named[key] = _content(token)
    special = {*named.values(), *_extra(config), *_extra(special_map)}
    added = directory / ADDED_FILE
    old = read_json(added, dict[Content, TokenId]) if added.exists() else {}
    return TokenizerSettings(
        named=named,
        special=frozenset(special),
        declared=_declared(directory, config.added_tokens_decoder or {}, old, special),
        adds_bos=config.add_bos_token,
        adds_eos=config.add_eos_token,
        is_llama_class=(config.tokenizer_class or "").removesuffix("Fast") in _LLAMA_CLASSES,
        prefix_space=config.add_prefix_space is not False,
        legacy=config.legacy is not False,
        chat_template=config.chat_template,
    )


def _read[T: Struct](path: Path, schema: type[T]) -> T:
    return read_json(path, schema) if path.exists() else schema()


def _content(token: Any) -> str:
    return token if isinstance(token, str) else str(token.content)


def _extra(tokens: _SpecialTokens) -> list[str]:
    extra = tokens.extra_special_tokens or []
    values = list(extra.values()) if isinstance(extra, dict) else extra
    return [_content(token) for token in [*(tokens.additional_special_tokens or []), *values]]


def _declared(
    directory: Path, by_id: Mapping[str, _Token], old: Mapping[str, int], special: set[str]
) -> dict[Path, tuple[AddedToken, ...]]:
    for key in by_id:
        if not (key.isascii() and key.isdigit() and len(key) < 8 and int(key) <= MAX_ID):
            raise CheckpointError(
                f"{directory / CONFIG_FILE}: added_tokens_decoder has {shown(key)}, expected token "
                f"ids up to {MAX_ID}"
            )
    names = {token.content for token in by_id.values()}
    tokens = {int(key): token for key, token in by_id.items()}
    older = {token_id: _Token(name) for name, token_id in old.items() if name not in names}
    return {
        directory / CONFIG_FILE: tuple(_added(i, token, special) for i, token in tokens.items()),
        directory / ADDED_FILE: tuple(_added(i, token, special) for i, token in older.items()),
    }


def _added(token_id: int, token: _Token, special: set[str]) -> AddedToken:
    is_special = token.special or token.content in special
    normalized = not is_special if token.normalized is None else token.normalized
    return AddedToken(
        token_id, token.content, is_special, token.lstrip, token.rstrip, token.single_word,
        normalized,
    )  # fmt: skip
