"""Defines `Vocabulary`, the contents of a tokenizer's vocabulary file of any format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tiktoken

from llama_jax.errors import CheckpointError
from llama_jax.json_file import shown
from llama_jax.text.added_tokens import AddedToken

# SentencePiece's character for a space.
SPACE = "\u2581"
# Llama 3's split into words, as in Meta's code and in tokenizer.json.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Bounds the table of all ids; the largest vocabularies have a quarter of this.
MAX_ID = (1 << 20) - 1


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A vocabulary and its rules.

    kind: whether tokens consist of bytes ("tiktoken") or characters ("sentencepiece").
    pieces: the bytes of ordinary tokens, by id.
    ids: the ids of ordinary tokens, by their names in the file.
    added: the added tokens that the file names.
    normalize: changes a text before anything else.
    encode_words: encodes normalized text without added tokens, given whether it begins a text.
    name_bytes: returns the bytes of an added token, by name.
    strip_spaces: the number of spaces that decoding removes at the beginning of a text.
    around: the ids before and after a text; None if the file does not define them.
    adds_bos: whether BOS is prepended if `around` is None.
    bos, eos, pad: the names that the file gives these tokens.
    """

    kind: Literal["tiktoken", "sentencepiece"]
    pieces: Mapping[int, bytes]
    ids: Mapping[str, int]
    added: tuple[AddedToken, ...]
    encode_words: Callable[[str, bool], list[int]]
    normalize: Callable[[str], str] = str
    name_bytes: Callable[[str], bytes] = str.encode
    strip_spaces: int = 0
    around: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    adds_bos: bool = False
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None


def tiktoken_encoder(
    path: Path, ranks: Mapping[bytes, int], pattern: str
) -> Callable[[str], list[int]]:
    """Return tiktoken's function from text to ids. pattern: its matches cover every text.

    Raises `CheckpointError` where a byte has no token.
    """
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(
            f"{path}: no token for the single byte {missing[0]:#04x} ({len(missing)} of 256 are "
            "missing); a byte-level vocabulary needs all of them"
        )
    encoding = tiktoken.Encoding(
        path.name, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={}
    )
    return encoding.encode_ordinary


def check_ids(path: Path, ids: Mapping[str, int], added: Sequence[AddedToken]) -> None:
    """Refuse two tokens with one id, unless one is the other as an added token.

    ids: of ordinary tokens, by name.
    """
    names = {token_id: name for name, token_id in ids.items()}
    if len(names) < len(ids):
        name = next(name for name, token_id in ids.items() if names[token_id] != name)
        other = names[ids[name]]
        raise CheckpointError(
            f"{path}: id {ids[name]} belongs to {shown(name)} and to {shown(other)}"
        )
    found: dict[int, str] = {}
    for token in added:
        if found.setdefault(token.id, token.content) != token.content:
            raise CheckpointError(
                f"{path}: id {token.id} belongs to the added tokens {shown(found[token.id])} and "
                f"{shown(token.content)}"
            )
        if token.id in names and names[token.id] != token.content:
            raise CheckpointError(
                f"{path}: id {token.id} belongs to the added token {shown(token.content)} and to "
                f"an ordinary one, {shown(names[token.id])}"
            )
        if ids.get(token.content, token.id) != token.id:
            raise CheckpointError(
                f"{path}: the added token {shown(token.content)} has id {token.id}, and "
                f"{ids[token.content]} as an ordinary one"
            )
