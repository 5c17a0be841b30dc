"""Text to token ids and back, for every tokenizer that a Llama checkpoint ships with.

Three files are read: Llama 3's `tokenizer.model` (lines of "base64 rank", the tiktoken format),
Hugging Face's `tokenizer.json` for the same byte-level BPE, and Llama 2's `tokenizer.model`
(SentencePiece). The first two run on tiktoken, the third on sentencepiece. Text given to `encode`
never turns into a special token unless the caller says `parse_special=True`.
"""

import base64
import binascii
import codecs
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import sentencepiece
import tiktoken

from llama_jax.tokenizer_json import SentencePieceJsonError, read_json, read_vocabulary

# Llama 3's split into words, the same in Meta's code and in tokenizer.json.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names of the ids after the last rank in Llama 3.1, as Hugging Face writes them.
LLAMA31_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)
_TURN_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
# Meta cuts a text at these lengths before tiktoken sees it, whose regular expression is quadratic
# in long runs.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"\s{{{_MAX_RUN + 1},}}|\S{{{_MAX_RUN + 1},}}")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its special tokens; made by `load_tokenizer`.

    `vocab_size` is the highest id + 1. `eos_ids` are all ids that end a turn, ascending.
    `special_tokens` maps the name of every added token to its id; those in `visible_ids` (for
    example `</think>`) are part of the reply and stay in decoded text. `chat_template` is the
    checkpoint's Jinja source, None when it has none.
    """

    kind: Literal["tiktoken", "sentencepiece"]
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    special_tokens: Mapping[str, int] = field(repr=False)
    visible_ids: frozenset[int] = field(repr=False)
    named_tokens: dict[str, str] = field(
        repr=False
    )  # "bos_token", "eos_token", "pad_token" -> name, for templates
    chat_template: str | None = field(repr=False)
    _encode_text: Callable[[str], list[int]] = field(repr=False)
    _bytes: tuple[bytes, ...] = field(repr=False)  # by id; an id that nothing uses is empty
    _hidden_ids: frozenset[int] = field(repr=False)
    _special_pattern: re.Pattern[str] = field(repr=False)

    def encode(self, text: str, *, bos: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; `bos` puts the begin-of-text id in front.

        With `parse_special` the names of special tokens become their ids, otherwise they are text
        like any other. A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, got {type(text).__name__}")
        if bos and self.bos_id is None:
            raise ValueError(
                "bos=True, but this tokenizer has no begin-of-text token; leave bos out"
            )
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        pieces = self._special_pattern.split(text) if parse_special else [text]
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append(self.special_tokens[piece])
            elif piece:
                ids += self._encode_text(piece)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids that nothing uses decode to
        nothing.

        With `skip_special` special tokens leave no trace, otherwise they appear by name.
        SentencePiece marks the start of a text with a space that was not in it; this space is
        dropped again.
        """
        stream = StreamDecoder(self, skip_special=skip_special)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for: its name for a special token, empty for an id that
        nothing uses.

        Raises ValueError for an id outside `range(vocab_size)`.
        """
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(
                f"token id {token_id} is outside this tokenizer's vocabulary of {self.vocab_size}"
            )
        return self._bytes[token_id]


class StreamDecoder:
    """Decodes one token at a time; what `push` and the final `flush` return adds up to
    `tokenizer.decode(ids)`.

    The bytes of a character that later tokens may complete are held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer._hidden_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drop_space = tokenizer.kind == "sentencepiece"

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often empty in the middle of a multi-byte
        character."""
        data = self._tokenizer.token_bytes(token_id)
        if token_id in self._skipped:
            return ""
        if self._drop_space and token_id not in self._tokenizer._hidden_ids:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is held back at the end of the stream: U+FFFD for an incomplete character, otherwise
        nothing."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer from a checkpoint directory, or from a `tokenizer.json` or
    `tokenizer.model` file.

    In a directory `tokenizer.json` is taken before `tokenizer.model` (unless it restates a
    SentencePiece model that is there as well), `tokenizer_config.json` names begin, end, padding
    and added tokens, and the chat template is that of `chat_template.jinja` or else of
    `tokenizer_config.json` (the one named "default" where there are several). A lone tiktoken file
    gets Llama 3.1's 256 special tokens after its last rank. Raises FileNotFoundError when there is
    no tokenizer, ValueError naming the file and the line or field when one cannot be used.
    """
    path = Path(path)
    if path.is_file():
        return _load_file(path, {}, None)
    json_file, model_file = path / "tokenizer.json", path / "tokenizer.model"
    if not json_file.is_file() and not model_file.is_file():
        raise FileNotFoundError(
            f"{path}: no tokenizer.json and no tokenizer.model; copy one of them from the original "
            "checkpoint"
        )
    config_file, template_file = path / "tokenizer_config.json", path / "chat_template.jinja"
    config = read_json(config_file) if config_file.is_file() else {}
    template = (
        template_file.read_text("utf-8")
        if template_file.is_file()
        else _chat_template(config, config_file)
    )
    try:
        return _load_file(json_file if json_file.is_file() else model_file, config, template)
    except SentencePieceJsonError:
        if not model_file.is_file():
            raise
        return _load_file(model_file, config, template)


def _load_file(path: Path, config: Mapping[str, Any], template: str | None) -> Tokenizer:
    data = path.read_bytes()
    if data.lstrip()[:1] == b"{":
        ranks, pattern, specials = read_vocabulary(path)
        taken = {token_id for token_id, _ in specials.values()}
        specials |= {
            name: token for name, token in _declared_tokens(config).items() if token[0] not in taken
        }
        return _from_ranks(path, ranks, pattern, specials, config, template)
    if data[:1] == b"\n":  # the protobuf tag of the first piece
        return _from_sentencepiece(path, data, config, template)
    ranks = _parse_ranks(path, data)
    declared = _declared_tokens(config)
    specials = declared or {
        name: (len(ranks) + i, True) for i, name in enumerate(LLAMA31_SPECIAL_TOKENS)
    }
    return _from_ranks(path, ranks, LLAMA3_PATTERN, specials, config, template)


def _parse_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        where = f"{path}: line {number + 1}"
        token, _, rank = line.partition(b" ")
        try:
            token_bytes, rank_value = base64.b64decode(token, validate=True), int(rank)
        except (binascii.Error, ValueError):
            raise ValueError(
                f'{where}: expected "base64 rank", found {line[:40]!r}; the file is truncated or '
                "not a tokenizer, "
                "download it again"
            ) from None
        if rank_value != number or not token_bytes or token_bytes in ranks:
            raise ValueError(
                f"{where}: expected a new token with rank {number}, found {line[:40]!r}; the file "
                "is damaged, "
                "download it again"
            )
        ranks[token_bytes] = rank_value
    return ranks


def _from_ranks(
    path: Path,
    ranks: dict[bytes, int],
    pattern: str,
    specials: Mapping[str, tuple[int, bool]],
    config: Mapping[str, Any],
    template: str | None,
) -> Tokenizer:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path}: no token for the single byte {missing[0]:#04x} ({len(missing)} of 256 are "
            "missing); "
            "a byte-level vocabulary needs all of them"
        )
    clash = sorted(set(ranks.values()) & {token_id for token_id, _ in specials.values()})
    if clash:
        raise ValueError(f"{path}: id {clash[0]} belongs to a special token and to an ordinary one")
    try:
        encoding = tiktoken.Encoding(
            path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
    except ValueError as error:
        raise ValueError(
            f"{path}: tiktoken does not understand the split pattern {pattern!r}: {error}"
        ) from None

    def encode_text(text: str) -> list[int]:
        return [
            token_id
            for piece in split_long_text(text)
            for token_id in encoding.encode_ordinary(piece)
        ]

    pieces = {rank: token for token, rank in ranks.items()}
    bos = "<|begin_of_text|>"
    ends = [specials[name][0] for name in _TURN_ENDS if name in specials]
    pad = "<|finetune_right_pad_id|>"
    return _tokenizer(
        "tiktoken", path, encode_text, pieces, specials, (bos, ends, pad), config, template
    )


def split_long_text(text: str) -> Iterator[str]:
    """Cuts `text` as Meta's Llama 3 tokenizer does: each 400,000 characters, and in those each run
    of more than 25,000 characters that are all white space, or all not, after every 25,000 of
    them."""
    for start in range(0, len(text), _MAX_CHARS):
        chunk = text[start : start + _MAX_CHARS]
        begin = 0
        for run in _LONG_RUN.finditer(chunk):
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield chunk[begin:cut]
                begin = cut
        yield chunk[begin:]


def _from_sentencepiece(
    path: Path, data: bytes, config: Mapping[str, Any], template: str | None
) -> Tokenizer:
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: not a complete SentencePiece model ({error}); the file is truncated or "
            "damaged, download it again"
        ) from None
    pieces: dict[int, bytes] = {}
    specials: dict[str, tuple[int, bool]] = {}
    for token_id in range(model.vocab_size()):
        piece = model.IdToPiece(token_id)
        if model.IsControl(token_id) or model.IsUnknown(token_id):
            specials[piece] = (token_id, True)
        elif model.IsByte(token_id):
            pieces[token_id] = bytes([int(piece[3:5], 16)])  # "<0x0A>"
        else:
            pieces[token_id] = piece.replace("\u2581", " ").encode()
    declared = _declared_tokens(config).items()
    specials |= {name: token for name, token in declared if token[0] >= model.vocab_size()}
    names = {token_id: name for name, (token_id, _) in specials.items()}
    ends = [model.eos_id()] if model.eos_id() >= 0 else []
    defaults = (names.get(model.bos_id()), ends, names.get(model.pad_id()))
    return _tokenizer(
        "sentencepiece", path, model.EncodeAsIds, pieces, specials, defaults, config, template
    )


def _tokenizer(
    kind: Literal["tiktoken", "sentencepiece"],
    path: Path,
    encode_text: Callable[[str], list[int]],
    pieces: Mapping[int, bytes],
    specials: Mapping[str, tuple[int, bool]],
    defaults: tuple[str | None, list[int], str | None],
    config: Mapping[str, Any],
    template: str | None,
) -> Tokenizer:
    """Joins a vocabulary (`pieces`, by id) with its special tokens (name -> id, whether decoding
    hides it)."""
    ids = {name: token_id for name, (token_id, _) in specials.items()}

    bos, ends, pad = defaults
    last_end = (
        next((name for name, token_id in ids.items() if token_id == ends[-1]), None)
        if ends
        else None
    )

    def name_of(key: str, default: str | None) -> str | None:
        value = config.get(key)
        name = value.get("content") if isinstance(value, Mapping) else value
        if name is not None and name not in ids:
            raise ValueError(
                f"{path.parent / 'tokenizer_config.json'}: {key} is {name!r}, which is no added "
                f"token of {path.name}; correct the name or add the token"
            )
        return default if name is None else str(name)

    defaults_by_key = {"bos_token": bos, "eos_token": last_end, "pad_token": pad}
    named = {key: name_of(key, default) for key, default in defaults_by_key.items()}
    named_ids = {key: ids[name] for key, name in named.items() if name in ids}
    table = [b""] * (max([*pieces, *ids.values()]) + 1)
    for token_id, token in pieces.items():
        table[token_id] = token
    for name, token_id in ids.items():
        table[token_id] = name.encode()
    names = sorted(ids, key=len, reverse=True)  # the longest name that fits wins
    return Tokenizer(
        kind=kind,
        vocab_size=len(table),
        bos_id=named_ids.get("bos_token"),
        eos_ids=tuple(
            sorted({*ends, *([named_ids["eos_token"]] if "eos_token" in named_ids else [])})
        ),
        pad_id=named_ids.get("pad_token"),
        special_tokens=MappingProxyType(ids),
        visible_ids=frozenset(token_id for token_id, hidden in specials.values() if not hidden),
        named_tokens={key: name for key, name in named.items() if name is not None and name in ids},
        chat_template=template,
        _encode_text=encode_text,
        _bytes=tuple(table),
        _hidden_ids=frozenset(token_id for token_id, hidden in specials.values() if hidden),
        _special_pattern=re.compile(f"({'|'.join(map(re.escape, names))})" if names else "((?!))"),
    )


def _declared_tokens(config: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """`added_tokens_decoder` of tokenizer_config.json: name -> (id, hidden in decoded text)."""
    declared = config.get("added_tokens_decoder", {})
    return {
        token["content"]: (int(token_id), token.get("special", False))
        for token_id, token in declared.items()
    }


def _chat_template(config: Mapping[str, Any], path: Path) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(
                f'{path}: chat_template has {sorted(named)} but none named "default"; name one so'
            )
        return str(named["default"])
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: chat_template: expected a string, got {type(template).__name__}")
    return template
