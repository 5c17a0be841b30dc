"""Encodes and decodes text with the tokenizers of Llama checkpoints.

The vocabulary comes from Hugging Face's `tokenizer.json` (`tokenizer_json`) or from Llama 3's or
Llama 2's `tokenizer.model` (`tokenizer_model`); files beside it give tokens their roles
(`tokenizer_config`). Text given to `encode` never becomes a special token unless
`parse_special=True`.
"""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NoReturn

from llama_jax.errors import CheckpointError
from llama_jax.json_file import read_bytes, shown
from llama_jax.model.config import LlamaConfig
from llama_jax.text.added_tokens import AddedToken, added_token_encoder, strip_around
from llama_jax.text.chat_files import DEFAULT, read_chat_templates
from llama_jax.text.tokenizer_config import CONFIG_FILE, TokenizerSettings, read_settings
from llama_jax.text.tokenizer_json import UnigramError, read_tokenizer_json
from llama_jax.text.tokenizer_model import (
    LLAMA31_SPECIAL_TOKENS,
    read_tokenizer_model,
    split_long_text,
)
from llama_jax.text.vocabulary import LLAMA3_PATTERN, Vocabulary, check_ids

__all__ = [
    "LLAMA3_PATTERN", "LLAMA31_SPECIAL_TOKENS", "StreamDecoder", "Tokenizer", "load_tokenizer",
    "split_long_text",
]  # fmt: skip

# Llama 3.2's tokenizer.json has 17 MB.
_MAX_BYTES = 128 * 1024 * 1024
# Llama 3's names for tokens with a role.
_BOS, _PAD = "<|begin_of_text|>", "<|finetune_right_pad_id|>"
_TURN_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its special tokens, made by `load_tokenizer`.

    vocab_size: the highest id + 1.
    eos_id: the tokenizer's own end of text.
    eos_ids: all ids that end a turn, ascending.
    prefix_ids, suffix_ids: ids before and after a text for the model, usually BOS and none.
    special_tokens: the id of every added token, by name.
    visible_ids: added tokens that are part of the reply and stay in decoded text, such as
        `</think>`.
    named_tokens: maps "bos_token", "eos_token" and so on to names, for templates.
    chat_template: the checkpoint's Jinja source, or None.
    named_templates: its further templates, such as "tool_use".

    >>> from llama_jax.abacus import SHIPPED_MODEL
    >>> tokenizer = load_tokenizer(SHIPPED_MODEL)
    >>> tokenizer.decode(tokenizer.encode("What is 47 + 85?", bos=True))
    'What is 47 + 85?'
    """

    kind: Literal["tiktoken", "sentencepiece"]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    special_tokens: Mapping[str, int] = field(repr=False)
    visible_ids: frozenset[int] = field(repr=False)
    named_tokens: dict[str, str] = field(repr=False)
    chat_template: str | None = field(repr=False)
    named_templates: Mapping[str, str] = field(repr=False)
    _encode: Callable[[str, bool, bool], list[int]] = field(repr=False)
    _added: Mapping[str, AddedToken] = field(repr=False)
    _bytes: tuple[bytes, ...] = field(repr=False)  # by id; empty for an unused id
    _hidden_ids: frozenset[int] = field(repr=False)
    _strip_spaces: int = field(repr=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Tokenizer cannot be pickled or copied: pass the checkpoint's path on, and call "
            "load_tokenizer(path) in the other process"
        )

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Encode `text` as token ids.

        A lone surrogate, which UTF-8 cannot encode, becomes U+FFFD.

        bos, eos: whether to add `prefix_ids` and `suffix_ids`. The tokenizer's files define these:
            often BOS and nothing, or nothing at all.
        parse_special: whether names of added tokens become their ids; otherwise they are text.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, got {type(text).__name__}")
        return [
            *(self.prefix_ids if bos else ()),
            *self._encode(_without_surrogates(text), parse_special, True),
            *(self.suffix_ids if eos else ()),
        ]

    def encode_continuation(self, text: str) -> list[int]:
        """Encode text that continues other text, without the space that SentencePiece prepends to a
        text."""
        if not self._strip_spaces:
            return self.encode(text)
        line = self.encode("\n")
        ids = self.encode("\n" + text)
        return ids[len(line) :] if ids[: len(line)] == line else self.encode(text)

    def encode_pair(
        self, prompt: str | Sequence[int], completion: str | Sequence[int]
    ) -> tuple[list[int], int]:
        """Encode a prompt and its completion so that no token contains parts of both.

        Token ids are taken as they are. Returns all ids, and the index of the completion's first.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            before, ids = self.encode(prompt, bos=True), self.encode(prompt + completion, bos=True)
            if ids[: len(before)] != before:
                ids = before + self.encode_continuation(completion)
            return ids, len(before)
        before = self.encode(prompt, bos=True) if isinstance(prompt, str) else list(prompt)
        if isinstance(completion, str):
            encode = self.encode_continuation if self.decode(before) else self.encode
            completion = encode(completion)
        return [*before, *completion], len(before)

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Encode a text given as pieces: (text, False) is text, (name, True) is an added token."""
        known = [self._added[text] if special else text for text, special in pieces]
        ids: list[int] = []
        for i, piece in enumerate(strip_around(known)):
            if isinstance(piece, AddedToken):
                ids.append(piece.id)
            else:
                ids += self._encode(_without_surrogates(piece), False, i == 0)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Decode `ids`. Bytes that are not UTF-8 become U+FFFD, and unused ids become nothing.

        The space that SentencePiece prepends to a text is removed.

        skip_special: whether to leave out special tokens; otherwise they appear by name.
        """
        stream = StreamDecoder(self, skip_special=skip_special)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def token_text(self, token_id: int) -> str:
        """Return the text of one token, including its space, or its name. Independent of
        context."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token: the name of a special token, and nothing for an unused id,
        such as those that pad a model's vocabulary. Raises ValueError for a negative id."""
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        return self._bytes[token_id] if token_id < self.vocab_size else b""

    def special_stops(self, stops: Sequence[str]) -> dict[int, str]:
        """Return the special tokens that are named by stop strings, by id.

        Raises ValueError for a name with text around it, because the token is not in the text, and
        so the string would never be found.
        """
        for stop in stops:
            for name, token_id in self.special_tokens.items():
                is_hidden = token_id not in self.visible_ids
                if name in stop and stop not in self.special_tokens and is_hidden:
                    raise ValueError(
                        f"stop: {stop!r} contains the special token {name!r}, which does not "
                        "appear in the text, so it would never be found: name the token alone"
                    )
        return {self.special_tokens[stop]: stop for stop in stops if stop in self.special_tokens}


class StreamDecoder:
    """Decodes one token at a time. The texts of all `push` and the final `flush` together are
    `tokenizer.decode(ids)`.

    Bytes of a character that later tokens may complete are held back.

    after: tokens before the text, such as a prompt's.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, after: Iterable[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer._hidden_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        begins = all(i in tokenizer._hidden_ids or not tokenizer.token_bytes(i) for i in after)
        self._strip_spaces = tokenizer._strip_spaces if begins else 0

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; none within a multi-byte character."""
        data = self._tokenizer.token_bytes(token_id)
        if token_id in self._skipped:
            return ""
        if self._strip_spaces and data:
            spaces = min(self._strip_spaces, len(data) - len(data.lstrip(b" ")))
            self._strip_spaces = self._strip_spaces - spaces if spaces == len(data) else 0
            data = data[spaces:]
        return self._utf8.decode(data)

    def flush(self) -> str:
        """End the stream and return the text held back: U+FFFD for an incomplete character, or
        nothing."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | Path, config: LlamaConfig | None = None) -> Tokenizer:
    """Read a tokenizer from a checkpoint directory, or from a `tokenizer.json` or `tokenizer.model`
    file.

    In a directory `tokenizer.json` is preferred to `tokenizer.model` (unless it holds a unigram
    model), `tokenizer_config` reads the roles of tokens, and `chat_files` the chat templates. A
    single tiktoken file gets Llama 3.1's 256 special tokens after its last rank.

    config: of the model; it names BOS and EOS if the tokenizer's files do not.

    Raises FileNotFoundError if there is no tokenizer, and `CheckpointError`, which names the file
    and the line or field, if it cannot be used.
    """
    path = Path(path)
    if not path.is_dir():
        settings = TokenizerSettings()
        return _joined(path, _read_vocabulary(path, settings), settings, {}, config)
    json_file, model_file = path / "tokenizer.json", path / "tokenizer.model"
    if not json_file.exists() and not model_file.exists():
        raise FileNotFoundError(
            f"{path}: no tokenizer.json and no tokenizer.model; copy one of them from the original "
            "checkpoint"
        )
    settings = read_settings(path)
    templates = read_chat_templates(path, settings.chat_template)
    file = json_file if json_file.exists() else model_file
    try:
        vocabulary = _read_vocabulary(file, settings)
    except UnigramError:
        if not model_file.exists():
            raise
        file = model_file
        vocabulary = _read_vocabulary(file, settings)
    return _joined(file, vocabulary, settings, templates, config)


def _read_vocabulary(path: Path, settings: TokenizerSettings) -> Vocabulary:
    data = read_bytes(path, _MAX_BYTES)
    if path.suffix == ".json" or data.lstrip()[:1] == b"{":
        return read_tokenizer_json(path, data)
    declared = [token for tokens in settings.declared.values() for token in tokens]
    return read_tokenizer_model(path, data, declared, settings.prefix_space, settings.legacy)


def _joined(
    path: Path,
    vocabulary: Vocabulary,
    settings: TokenizerSettings,
    templates: Mapping[str, str],
    config: LlamaConfig | None,
) -> Tokenizer:
    """Make a tokenizer from a vocabulary and the roles of its tokens. path: of its file."""
    added = _all_added(vocabulary, settings)
    ids = {**vocabulary.ids, **{name: token.id for name, token in added.items()}}
    named = _named_tokens(path, vocabulary, settings, config, ids)
    # An ordinary token with a role becomes a special one; added tokens keep their flags.
    for name in ((settings.special | set(named.values())) & ids.keys()) - added.keys():
        added[name] = AddedToken(ids[name], name)
    bos, eos, pad = (
        ids.get(named.get(role, "")) for role in ("bos_token", "eos_token", "pad_token")
    )
    turn_ends = {ids[name] for name in _TURN_ENDS if name in added}
    if eos is not None:
        turn_ends.add(eos)
    if not turn_ends and config:
        turn_ends.update(config.eos_token_ids)
    prefix, suffix = _around(vocabulary, settings, bos, eos, config)
    table = [b""] * (max([*vocabulary.pieces, *ids.values()]) + 1)
    for token_id, data in vocabulary.pieces.items():
        table[token_id] = data
    for name, token in added.items():
        table[token.id] = vocabulary.name_bytes(name)
    hidden = frozenset(token.id for token in added.values() if token.special)
    return Tokenizer(
        kind=vocabulary.kind,
        vocab_size=len(table),
        bos_id=bos,
        eos_id=eos,
        eos_ids=tuple(sorted(turn_ends)),
        pad_id=pad,
        prefix_ids=prefix,
        suffix_ids=suffix,
        special_tokens=MappingProxyType({name: token.id for name, token in added.items()}),
        visible_ids=frozenset(token.id for token in added.values()) - hidden,
        named_tokens=named,
        chat_template=templates.get(DEFAULT),
        named_templates={name: each for name, each in templates.items() if name != DEFAULT},
        _encode=added_token_encoder(added.values(), vocabulary.normalize, vocabulary.encode_words),
        _added=added,
        _bytes=tuple(table),
        _hidden_ids=hidden,
        _strip_spaces=vocabulary.strip_spaces,
    )


def _all_added(vocabulary: Vocabulary, settings: TokenizerSettings) -> dict[str, AddedToken]:
    """Return added tokens by name: those of the vocabulary's file, and those of other files whose
    name and id are new."""
    added = {token.content: token for token in vocabulary.added}
    taken = {token.id for token in vocabulary.added}
    found = dict(added)
    for file, tokens in settings.declared.items():
        beside = [t for t in tokens if t.id not in taken and t.content not in added]
        check_ids(file, vocabulary.ids, beside)
        found |= {token.content: token for token in beside}
    return found


def _named_tokens(
    path: Path,
    vocabulary: Vocabulary,
    settings: TokenizerSettings,
    config: LlamaConfig | None,
    ids: Mapping[str, int],
) -> dict[str, str]:
    """Return the names of tokens with a role, by role: from the files beside the vocabulary, else
    from the vocabulary, else from the model's config."""
    names = {token_id: name for name, token_id in ids.items()}
    last_end = next((name for name in reversed(_TURN_ENDS) if name in ids), None)
    named = {
        "bos_token": vocabulary.bos or (_BOS if _BOS in ids else None),
        "eos_token": vocabulary.eos or last_end,
        "pad_token": vocabulary.pad or (_PAD if _PAD in ids else None),
    }
    if config:
        ends = config.eos_token_ids
        named["bos_token"] = named["bos_token"] or names.get(_id_or(config.bos_token_id))
        named["eos_token"] = named["eos_token"] or names.get(_id_or(ends[-1] if ends else None))
    elif named["bos_token"] is None and vocabulary.around and vocabulary.around[0]:
        named["bos_token"] = names.get(vocabulary.around[0][0])
    found = {role: name for role, name in named.items() if name is not None}
    for role, name in settings.named.items():
        if name in ids or role not in ("bos_token", "eos_token"):  # others matter to templates
            found[role] = name
        else:
            raise CheckpointError(
                f"{path.parent / CONFIG_FILE}: {role} is {shown(name)}, which is not a token of "
                f"{path.name}; correct the name or add the token"
            )
    return found


def _id_or(token_id: int | None) -> int:
    return -1 if token_id is None else token_id


def _around(
    vocabulary: Vocabulary,
    settings: TokenizerSettings,
    bos: int | None,
    eos: int | None,
    config: LlamaConfig | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids before and after a text.

    `add_bos_token` and `add_eos_token` decide, else the vocabulary's file, else the convention of
    its kind. A model without a BOS token gets none.
    """
    before: tuple[int, ...] = () if bos is None else (bos,)
    after: tuple[int, ...] = () if eos is None else (eos,)
    prefix, suffix = vocabulary.around or ((), ())
    if vocabulary.around is None and (vocabulary.adds_bos or settings.is_llama_class):
        prefix = before
    if bos is None and config:
        prefix = ()
    if settings.adds_bos is not None:
        prefix = before if settings.adds_bos else ()
    if settings.adds_eos is not None:
        suffix = after if settings.adds_eos else ()
    return prefix, suffix


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
