"""Reads `tokenizer.model`: Llama 3's in tiktoken's format (lines of "base64 rank"), and Llama 2's,
which is a SentencePiece model."""

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from llama_jax.errors import CheckpointError
from llama_jax.text.added_tokens import AddedToken
from llama_jax.text.vocabulary import (
    LLAMA3_PATTERN,
    MAX_ID,
    SPACE,
    Vocabulary,
    check_ids,
    tiktoken_encoder,
)

# Names of the ids after the last rank in Llama 3.1, as in Hugging Face's files.
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
# Meta's code splits a text at these lengths before tiktoken encodes it.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_LONG_RUN = re.compile(rf"\s{{{_MAX_RUN + 1},}}|\S{{{_MAX_RUN + 1},}}")
# Appended to a SentencePiece model, these bytes set normalizer_spec.add_dummy_prefix = false: in
# protobuf the last value of a field wins (https://protobuf.dev/programming-guides/encoding/
# #last-one-wins). Field numbers: sentencepiece_model.proto in https://github.com/google/sentencepiece.
_NO_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])


def read_tokenizer_model(
    path: Path, data: bytes, declared: Sequence[AddedToken], prefix_space: bool, legacy: bool
) -> Vocabulary:
    """Read the vocabulary from the contents of a tokenizer.model of either format.

    declared: the added tokens that other files name.
    prefix_space: whether SentencePiece prepends a space to a text, if the model asks for it.
    legacy: whether it also prepends one after each added token in the text.

    Raises `CheckpointError`, which names the line.
    """
    if data[:1] == b"\n":  # the protobuf tag of the first piece
        return _sentencepiece(path, data, declared, prefix_space, legacy)
    ranks = _parse_ranks(path, data)
    specials = tuple(declared) or tuple(
        AddedToken(len(ranks) + i, name) for i, name in enumerate(LLAMA31_SPECIAL_TOKENS)
    )
    encode = tiktoken_encoder(path, ranks, LLAMA3_PATTERN)
    pieces = {rank: token for token, rank in ranks.items()}
    check_ids(path, {token.decode("latin-1"): rank for token, rank in ranks.items()}, specials)
    return Vocabulary(
        kind="tiktoken",
        pieces=pieces,
        ids={},
        added=specials,
        encode_words=lambda text, is_first: [
            i for piece in split_long_text(text) for i in encode(piece)
        ],
        adds_bos=True,
    )


def _parse_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines()):
        where = f"{path}: line {number + 1}"
        token, _, rank = line.partition(b" ")
        try:
            token_bytes, rank_value = base64.b64decode(token, validate=True), int(rank)
        except (binascii.Error, ValueError):
            raise CheckpointError(
                f'{where}: expected "base64 rank", found {line[:40]!r}; the file is truncated or '
                "not a tokenizer, download it again"
            ) from None
        if rank_value != number or not token_bytes or token_bytes in ranks or number > MAX_ID:
            raise CheckpointError(
                f"{where}: expected a new token with rank {number}, found {line[:40]!r}; the file "
                "is damaged, download it again"
            )
        ranks[token_bytes] = rank_value
    return ranks


def split_long_text(text: str) -> Iterator[str]:
    """Split `text` like Meta's Llama 3 tokenizer: after every 400,000 characters, and within those
    after every 25,000 of a run of white space or of other characters."""
    for start in range(0, len(text), _MAX_CHARS):
        chunk = text[start : start + _MAX_CHARS]
        begin = 0
        for run in _LONG_RUN.finditer(chunk):
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield chunk[begin:cut]
                begin = cut
        yield chunk[begin:]


def _sentencepiece(
    path: Path, data: bytes, declared: Sequence[AddedToken], prefix_space: bool, legacy: bool
) -> Vocabulary:
    model, inner = _processor(path, data), _processor(path, data + _NO_PREFIX)
    if not 0 < model.vocab_size() <= MAX_ID:
        raise CheckpointError(f"{path} has {model.vocab_size()} tokens; it is damaged")
    pieces: dict[int, bytes] = {}
    ids: dict[str, int] = {}
    added = {token.content: token for token in declared}
    taken = {token.id for token in declared}
    for token_id in range(model.vocab_size()):
        piece = model.IdToPiece(token_id)
        if model.IsControl(token_id) or model.IsUnknown(token_id):
            if token_id not in taken:
                added.setdefault(piece, AddedToken(token_id, piece))
            continue
        ids[piece] = token_id
        if model.IsByte(token_id):
            pieces[token_id] = bytes([int(piece[3:5], 16)])  # "<0x0A>"
        else:
            pieces[token_id] = piece.replace(SPACE, " ").encode()
    # The model may have a piece for an added token that other files name.
    for token in declared:
        ids.pop(model.IdToPiece(token.id) if token.id < model.vocab_size() else "", None)
    check_ids(path, ids, tuple(added.values()))
    adds_space = prefix_space and model.EncodeAsPieces("a")[0].startswith(SPACE)
    outer = model if adds_space else inner
    # SentencePiece finds user-defined pieces in any text. If they are added tokens, a text with
    # such a name is split inside it, so that it stays text.
    found = [name for name, token in added.items() if token.id in inner.EncodeAsIds(name)]
    cut = re.compile("|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in found))

    def encode(text: str, is_first: bool) -> list[int]:
        first, *others = cut.split(text) if found else [text]
        ids = (outer if is_first or legacy else inner).EncodeAsIds(first)
        return [*ids, *(i for other in others for i in inner.EncodeAsIds(other))]

    names = {token.id: name for name, token in added.items()}
    return Vocabulary(
        kind="sentencepiece",
        pieces=pieces,
        ids=ids,
        added=tuple(added.values()),
        encode_words=encode,
        name_bytes=lambda name: name.replace(SPACE, " ").encode(),
        strip_spaces=int(adds_space),
        adds_bos=True,
        bos=names.get(model.bos_id()),
        eos=names.get(model.eos_id()),
        pad=names.get(model.pad_id()),
    )


def _processor(path: Path, data: bytes) -> "sentencepiece.SentencePieceProcessor":
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: not a complete SentencePiece model ({error}); the file is truncated or "
            "damaged, download it again"
        ) from None
    return model
