"""Reads a Hugging Face `tokenizer.json` without the tokenizers library.

It supports the byte-pair encodings of Llama's two families: byte-level (Llama 3, SmolLM2), and
SentencePiece in this format (Llama 2). The file describes five steps: a normalizer changes the
text, a pre-tokenizer splits it into words, the model turns each into tokens, a post-processor adds
special tokens around them, and a decoder turns tokens back into text
(https://huggingface.co/docs/tokenizers/pipeline). The classes below declare the supported steps,
field by field; anything else is refused by name.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import regex
from msgspec import Meta, Struct

from llama_jax.errors import CheckpointError
from llama_jax.json_file import convert, parse, shown
from llama_jax.text.added_tokens import AddedToken
from llama_jax.text.bpe import Merge, bpe, tiktoken_ranks
from llama_jax.text.vocabulary import (
    LLAMA3_PATTERN,
    MAX_ID,
    SPACE,
    Vocabulary,
    check_ids,
    tiktoken_encoder,
)

TokenId = Annotated[int, Meta(ge=0, le=MAX_ID)]

# GPT-2's split into words (https://github.com/openai/gpt-2, src/encoder.py), ByteLevel's default.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Patterns whose matches cover every text; tiktoken would drop what a pattern does not match.
_COVERING = (LLAMA3_PATTERN, GPT2_PATTERN)
# Syntax that Oniguruma and the package regex interpret differently: escapes other than those for
# categories, white space, digits and punctuation; nested sets; comments and names of groups.
_UNSURE = re.compile(
    r"\\[a-oqt-zA-OQRT-Z0-9](?<!\\[rntd])|&&|\[\[|\(\?[^:=!<i]|\(\?<[^=!]|--|~~|\|\|"
)
# The time that a pattern may take to search a text; some take exponential time.
_SECONDS, _CHARS_PER_SECOND = 5, 20_000
# A repeated group is compiled once per repetition, so nested counts multiply.
_MAX_PATTERN, _MAX_REPEATS = 10_000, 10_000
_COUNT = re.compile(r"\{(\d{0,9}),?(\d{0,9})")
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
# A space that follows something else; runs of spaces with what follows them.
_CROSSING = re.compile(f"[^{SPACE}]{SPACE}")
_RUNS = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")


class UnigramError(CheckpointError):
    """Raised if tokenizer.json holds a unigram model, which is read from tokenizer.model
    instead."""


class _Pattern(Struct, frozen=True, forbid_unknown_fields=True):
    """A pattern; exactly one field is set."""

    String: str | None = None
    Regex: str | None = None


class _Step(Struct, forbid_unknown_fields=True, tag_field="type"):
    pass


# Normalizers.


class _Prepend(_Step, tag="Prepend"):
    prepend: str


class _Replace(_Step, tag="Replace"):
    pattern: _Pattern
    content: str


class _NFC(_Step, tag="NFC"):
    pass


class _NFD(_Step, tag="NFD"):
    pass


class _NFKC(_Step, tag="NFKC"):
    pass


class _NFKD(_Step, tag="NFKD"):
    pass


_UnicodeForm = _NFC | _NFD | _NFKC | _NFKD
_PlainNormalizer = _Prepend | _Replace | _UnicodeForm


class _Normalizers(_Step, tag="Sequence"):
    normalizers: list["_PlainNormalizer | _Normalizers"]


# Pre-tokenizers.


class _Split(_Step, tag="Split"):
    pattern: _Pattern
    behavior: Literal["Isolated"]
    invert: Literal[False] = False


class _Digits(_Step, tag="Digits"):
    individual_digits: bool = False


class _ByteLevel(_Step, tag="ByteLevel"):
    add_prefix_space: bool = True
    trim_offsets: bool = True
    use_regex: bool = True


class _Metaspace(_Step, tag="Metaspace"):
    replacement: Annotated[str, Meta(min_length=1, max_length=1)] = SPACE
    prepend_scheme: Literal["always", "first", "never"] | None = None
    add_prefix_space: bool | None = None  # the older form of prepend_scheme
    split: bool = True
    str_rep: str | None = None


_PlainPreTokenizer = _Split | _Digits | _ByteLevel | _Metaspace


class _PreTokenizers(_Step, tag="Sequence"):
    pretokenizers: list["_PlainPreTokenizer | _PreTokenizers"]


# Post-processors.


class _Name(Struct, frozen=True):
    id: str
    type_id: int = 0


class _Piece(Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a template; exactly one field is set."""

    SpecialToken: _Name | None = None
    Sequence: _Name | None = None


class _TemplateToken(Struct, frozen=True):
    ids: list[TokenId]


class _Template(_Step, tag="TemplateProcessing"):
    single: list[_Piece]
    special_tokens: dict[str, _TemplateToken]
    pair: list[_Piece] = []


_PlainPostProcessor = _Template | _ByteLevel


class _PostProcessors(_Step, tag="Sequence"):
    processors: list["_PlainPostProcessor | _PostProcessors"]


# Decoders.


class _ByteFallback(_Step, tag="ByteFallback"):
    pass


class _Fuse(_Step, tag="Fuse"):
    pass


class _Strip(_Step, tag="Strip"):
    content: str
    start: Annotated[int, Meta(ge=0)]
    stop: Annotated[int, Meta(ge=0)]


_PlainDecoder = _Replace | _ByteFallback | _Fuse | _Strip | _ByteLevel


class _Decoders(_Step, tag="Sequence"):
    decoders: list[_PlainDecoder]


# The file.


class _Added(Struct, frozen=True):
    id: TokenId
    content: Annotated[str, Meta(min_length=1)]
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None


class _Model(Struct, frozen=True, forbid_unknown_fields=True):
    vocab: dict[str, TokenId]
    merges: list[str | tuple[str, str]]
    type: str | None = None  # absent before 2020
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool | None = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None


class _ModelType(Struct, frozen=True):
    type: str | None = None


class _File(Struct, frozen=True):
    model: _Model
    added_tokens: list[_Added] | None = None
    normalizer: _PlainNormalizer | _Normalizers | None = None
    pre_tokenizer: _PlainPreTokenizer | _PreTokenizers | None = None
    post_processor: _PlainPostProcessor | _PostProcessors | None = None
    decoder: _PlainDecoder | _Decoders | None = None


class _FileType(Struct, frozen=True):
    model: _ModelType


def read_tokenizer_json(path: Path, data: bytes) -> Vocabulary:
    """Read the vocabulary from the contents of a tokenizer.json.

    Raises `CheckpointError`, which names the unsupported field, and `UnigramError` for a unigram
    model.
    """
    value = parse(data, path)
    if convert(value, _FileType, path).model.type == "Unigram":
        raise UnigramError(
            f"{path}: model.type is Unigram, expected BPE; put the checkpoint's tokenizer.model "
            "beside it, which is read instead"
        )
    file = convert(value, _File, path)
    if "" in file.model.vocab:
        raise CheckpointError(f"{path}: model.vocab has an empty token; remove it")
    merges = _merges(path, file.model)
    added = tuple(map(_added_token, file.added_tokens or ()))
    check_ids(path, file.model.vocab, added)
    steps = list(_flat(file.pre_tokenizer, "pretokenizers"))
    is_byte_level = any(isinstance(step, _ByteLevel) for step in steps)
    made = {left + right for left, right in merges}
    # Names of added tokens are matched before the model sees a text, or not at all.
    names = {token.content for token in added if token.content not in made}
    vocab = {token: i for token, i in file.model.vocab.items() if token not in names}
    if is_byte_level:
        encode_words = _byte_level_encoder(path, file.model, steps, vocab, merges)
    else:
        encode_words = _character_encoder(path, file.model, steps, vocab, merges)
    name_bytes = _byte_level_bytes if is_byte_level else _character_bytes
    normalizers = [_normalizer(path, step) for step in _flat(file.normalizer, "normalizers")]
    return Vocabulary(
        kind="tiktoken" if is_byte_level else "sentencepiece",
        pieces={i: name_bytes(token) for token, i in file.model.vocab.items()},
        ids=file.model.vocab,
        added=added,
        encode_words=encode_words,
        normalize=lambda text: reduce(lambda text, step: step(text), normalizers, text),
        name_bytes=name_bytes,
        strip_spaces=_stripped_spaces(path, file.decoder, is_byte_level),
        around=_around(path, file.post_processor),
    )


def _merges(path: Path, model: _Model) -> list[Merge]:
    """Return the merges of a model as pairs. Raises if its other fields are not those of plain
    BPE."""
    found = {
        "type": (model.type, (None, "BPE"), "BPE"),
        "dropout": (model.dropout, (None, 0), "null"),
        "continuing_subword_prefix": (model.continuing_subword_prefix, (None, ""), "null"),
        "end_of_word_suffix": (model.end_of_word_suffix, (None, ""), "null"),
    }
    for name, (value, accepted, expected) in found.items():
        if value not in accepted:
            raise CheckpointError(
                f"{path}: model.{name} is {shown(value)}, expected {expected}: only a plain BPE is "
                "read"
            )
    vocab, merges = model.vocab, []
    for i, pair in enumerate(model.merges):
        left, right = pair if isinstance(pair, tuple) else pair.partition(" ")[::2]
        if not (left in vocab and right in vocab and left + right in vocab):
            raise CheckpointError(
                f"{path}: model.merges[{i}] is {shown(pair)}, expected two tokens of model.vocab "
                "that make a third"
            )
        merges.append((left, right))
    return merges


def _added_token(token: _Added) -> AddedToken:
    normalized = not token.special if token.normalized is None else token.normalized
    return AddedToken(
        token.id, token.content, token.special, token.lstrip, token.rstrip, token.single_word,
        normalized,
    )  # fmt: skip


def _flat(step: Any, field: str) -> Iterator[Any]:
    """Yield the parts of a step, which may be nested sequences; none for None."""
    if hasattr(step, field):
        for part in getattr(step, field):
            yield from _flat(part, field)
    elif step is not None:
        yield step


# From text to words.


def _byte_level_encoder(
    path: Path, model: _Model, steps: Sequence[Any], vocab: Mapping[str, int], merges: list[Merge]
) -> Callable[[str, bool], list[int]]:
    missing = [byte for byte, character in enumerate(_BYTE_CHARACTERS) if character not in vocab]
    if missing:
        raise CheckpointError(
            f"{path}: no token for the single byte {missing[0]:#04x} ({len(missing)} of 256 are "
            "missing); a byte-level vocabulary needs all of them"
        )
    cuts = _byte_level_cuts(path, steps)
    ignore_merges, ranks = bool(model.ignore_merges), None
    if cuts and cuts[-1] in _COVERING:
        ranks = tiktoken_ranks(vocab, merges, ignore_merges)
    if ranks is not None:
        by_bytes = {_byte_level_bytes(token): i for token, i in ranks.items()}
        encode = tiktoken_encoder(path, by_bytes, str(cuts.pop()))
    else:
        to_ids = bpe(vocab, merges, ignore_merges=ignore_merges, byte_fallback=False)

        def encode(word: str) -> list[int]:
            return to_ids(word.encode().decode("latin-1").translate(_WRITTEN))

    patterns = [None if cut is None else _compiled(path, cut) for cut in cuts]

    def encode_words(text: str, is_first: bool) -> list[int]:
        words = [text]
        for pattern in patterns:
            if pattern is None:
                words = [word if word.startswith(" ") else f" {word}" for word in words]
            else:
                words = [part for word in words for part in _isolated(pattern, word)]
        return [i for word in words for i in encode(word)]

    return encode_words


def _byte_level_cuts(path: Path, steps: Sequence[Any]) -> list[str | None]:
    """Return patterns that split a text into words: their matches and the text between them. None
    means to prepend a space to each word that has none."""
    cuts: list[str | None] = []
    for i, step in enumerate(steps):
        if isinstance(step, _Split):
            cuts.append(_source(step.pattern))
        elif isinstance(step, _Digits):
            cuts.append(r"\p{N}" if step.individual_digits else r"\p{N}+")
        elif isinstance(step, _ByteLevel) and i == len(steps) - 1:
            cuts += [None] if step.add_prefix_space else []
            cuts += [GPT2_PATTERN] if step.use_regex else []
        else:
            raise CheckpointError(
                f"{path}: pre_tokenizer has {type(step).__name__[1:]} beside ByteLevel, expected "
                "ByteLevel as the last step, and Split or Digits before it"
            )
    return cuts


def _character_encoder(
    path: Path, model: _Model, steps: Sequence[Any], vocab: Mapping[str, int], merges: list[Merge]
) -> Callable[[str, bool], list[int]]:
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocab]
    if missing or not model.byte_fallback:
        found = f"<0x{missing[0]:02X}> is missing" if missing else "byte_fallback is not set"
        raise CheckpointError(
            f"{path}: model: {found}, expected byte_fallback and a token for each of the 256 "
            "bytes, or ByteLevel among the pre-tokenizers"
        )
    to_ids = bpe(vocab, merges, ignore_merges=bool(model.ignore_merges), byte_fallback=True)
    cuts = [_character_cut(path, step) for step in steps]
    # If no token crosses the beginning of a run of spaces, no merge does either: the parts can then
    # be encoded one by one, and cached.
    if not model.ignore_merges and not any(_CROSSING.search(a + b) for a, b in merges):
        cuts.append(lambda text, is_first: _RUNS.findall(text))

    def encode_words(text: str, is_first: bool) -> list[int]:
        words = [text]
        for cut in cuts:
            words = [
                part for i, word in enumerate(words) for part in cut(word, is_first and i == 0)
            ]
        return [i for word in words for i in to_ids(word)]

    return encode_words


def _character_cut(path: Path, step: Any) -> Callable[[str, bool], list[str]]:
    """Return a function that splits a text into words, given whether it begins a text."""
    if isinstance(step, _Split | _Digits):
        (source,) = _byte_level_cuts(path, [step])
        pattern = _compiled(path, str(source))
        return lambda text, is_first: _isolated(pattern, text)
    scheme = step.prepend_scheme or ("never" if step.add_prefix_space is False else "always")
    mark = step.replacement
    each = re.compile(f"{re.escape(mark)}?[^{re.escape(mark)}]+|{re.escape(mark)}")

    def metaspace(text: str, is_first: bool) -> list[str]:
        text = text.replace(" ", mark)
        if scheme == "always" or (scheme == "first" and is_first):
            text = text if text.startswith(mark) else mark + text
        return each.findall(text) if step.split else [text]

    return metaspace


def _source(pattern: _Pattern) -> str:
    return re.escape(pattern.String or "") if pattern.Regex is None else pattern.Regex


def _compiled(path: Path, source: str) -> "regex.Pattern[str]":
    """Compile a pattern. Raises unless Oniguruma, which the tokenizers library uses, and the
    package regex interpret it alike."""
    unsure = _UNSURE.search(source)
    if unsure:
        raise CheckpointError(
            f"{path}: the pattern {shown(source)} has {shown(unsure[0])}, which engines of regular "
            "expressions read differently; only patterns without it are read"
        )
    counts = [max(int(n or 1) for n in found) for found in _COUNT.findall(source[:_MAX_PATTERN])]
    if len(source) > _MAX_PATTERN or math.prod(max(n, 1) for n in counts) > _MAX_REPEATS:
        raise CheckpointError(
            f"{path}: the pattern {shown(source)} is too large: at most {_MAX_PATTERN:,} "
            f"characters, and counts of repeats whose product is at most {_MAX_REPEATS:,}, are read"
        )
    try:
        compiled = regex.compile(source)
        is_empty = compiled.match("", timeout=_SECONDS)
    except TimeoutError as error:
        raise CheckpointError(f"{path}: the pattern {shown(source)} takes too long") from error
    except (regex.error, OverflowError, RecursionError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {shown(source)} is not a regular expression: {error}"
        ) from error
    if is_empty:
        raise CheckpointError(
            f"{path}: the pattern {shown(source)} matches an empty text, expected one that finds "
            "words"
        )
    return compiled


def _isolated(pattern: "regex.Pattern[str]", text: str) -> list[str]:
    """Split a text into a pattern's matches and the text between them, without empty strings."""
    parts, done = [], 0
    for start, stop in _spans(pattern, text):
        parts += [text[done:start], text[start:stop]]
        done = stop
    return [part for part in (*parts, text[done:]) if part]


def _spans(pattern: "regex.Pattern[str]", text: str) -> list[tuple[int, int]]:
    """Return the spans of a pattern's matches. Raises ValueError if that takes too long."""
    try:
        seconds = _SECONDS + len(text) / _CHARS_PER_SECOND
        return [match.span() for match in pattern.finditer(text, timeout=seconds)]
    except TimeoutError:
        raise ValueError(
            f"the tokenizer's pattern {shown(pattern.pattern)} takes too long for a text of "
            f"{len(text)} characters"
        ) from None


def _replaced(pattern: "regex.Pattern[str]", content: str, text: str) -> str:
    parts, done = [], 0
    for start, stop in _spans(pattern, text):
        parts += [text[done:start], content]
        done = stop
    return "".join([*parts, text[done:]])


def _normalizer(path: Path, step: Any) -> Callable[[str], str]:
    if isinstance(step, _Prepend):
        return lambda text: step.prepend + text if text else text
    if isinstance(step, _Replace):
        pattern = _compiled(path, _source(step.pattern))
        return lambda text: _replaced(pattern, step.content, text)
    form: Any = type(step).__name__[1:]
    return lambda text: unicodedata.normalize(form, text)


# Special tokens around a text, and decoding.


def _around(path: Path, step: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if step is None:
        return None
    templates = [each for each in _flat(step, "processors") if isinstance(each, _Template)]
    if not templates:
        return (), ()
    where = f"{path}: post_processor"
    if len(templates) > 1:
        raise CheckpointError(f"{where} has several TemplateProcessing, expected one")
    parts: list[list[int]] = [[]]
    for piece in templates[0].single:
        if piece.SpecialToken is None:
            parts.append([])
        elif piece.SpecialToken.id in templates[0].special_tokens:
            parts[-1] += templates[0].special_tokens[piece.SpecialToken.id].ids
        else:
            name = shown(piece.SpecialToken.id)
            raise CheckpointError(f"{where}: {name} in single is not among its special_tokens")
    if len(parts) != 2:
        raise CheckpointError(f"{where}: single has {len(parts) - 1} sequences, expected one")
    return tuple(parts[0]), tuple(parts[1])


def _stripped_spaces(path: Path, decoder: Any, is_byte_level: bool) -> int:
    """Return the number of spaces that decoding removes at the beginning. Raises unless the decoder
    otherwise yields `Vocabulary.pieces`."""
    steps = list(_flat(decoder, "decoders"))
    kinds = [type(step) for step in steps]
    if is_byte_level and kinds == [_ByteLevel]:
        return 0
    if not is_byte_level and kinds[:3] == [_Replace, _ByteFallback, _Fuse]:
        spaces = steps[0].pattern.String == SPACE and steps[0].content == " "
        if spaces and len(steps) == 3:
            return 0
        strip = steps[3]
        if spaces and kinds[3:] == [_Strip] and strip.content == " " and strip.stop == 0:
            return int(strip.start)
    found = ", ".join(kind.__name__[1:] for kind in kinds) or "nothing"
    expected = "ByteLevel" if is_byte_level else f"Replace of {SPACE!a}, ByteFallback, Fuse, Strip"
    raise CheckpointError(f"{path}: decoder is {found}, expected {expected}")


def _character_bytes(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(match[1])
    return token.replace(SPACE, " ").encode()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return token.translate(_READ).encode("latin-1")
    except UnicodeEncodeError:  # an added token with a space, for example
        return token.encode()


def _byte_characters() -> list[str]:
    """Return the character of byte-level BPE for each byte: itself if printable, else one from
    U+0100 on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()
# For str.translate, between Latin-1, in which a byte is a character, and these characters. Any
# other character is mapped to one that Latin-1 lacks.
_WRITTEN = dict(enumerate(_BYTE_CHARACTERS))
_READ = dict.fromkeys(range(256), "\uffff") | {
    ord(character): chr(byte) for byte, character in enumerate(_BYTE_CHARACTERS)
}
