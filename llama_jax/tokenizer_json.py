"""Reads a Hugging Face `tokenizer.json` that holds a byte-level BPE as Llama 3 has it, without the
tokenizers library.

tiktoken merges whatever pair makes the token of lowest id; `tokenizer.json` lists its merges
instead. The two give the same ids for every text when `_check_merges` passes, so that is checked
and anything else is refused by name.
"""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class SentencePieceJsonError(ValueError):
    """The tokenizer.json restates a SentencePiece model (Llama 2), which is read from
    tokenizer.model instead."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the line where it is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: line {error.lineno}: not valid JSON ({error.msg}); the file is truncated or "
            "damaged, "
            "download it again"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8; the file is damaged, download it again"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_vocabulary(path: Path) -> tuple[dict[bytes, int], str, dict[str, tuple[int, bool]]]:
    """Ranks (bytes -> id), the split pattern, and added tokens (name -> id, whether decoding hides
    it).

    The layout is that of https://huggingface.co/docs/tokenizers. Raises ValueError naming the field
    that differs from a byte-level BPE that tiktoken can run, SentencePieceJsonError for a restated
    SentencePiece model.
    """
    content = read_json(path)
    model = content.get("model")
    if not isinstance(model, Mapping):
        raise ValueError(
            f"{path}: model: missing; this is not a tokenizer.json, or it is incomplete"
        )
    if model.get("byte_fallback") or model.get("type") == "Unigram":
        raise SentencePieceJsonError(
            f"{path}: model: a SentencePiece model (type {model.get('type')!r}, byte_fallback "
            f"{model.get('byte_fallback')!r}); put the checkpoint's tokenizer.model beside it, "
            "which is read instead"
        )
    _check_fields(path, content, model)
    if not isinstance(model.get("vocab"), Mapping) or not isinstance(model.get("merges"), list):
        raise ValueError(
            f"{path}: model: expected an object vocab and a list merges; the file is incomplete"
        )
    vocab = dict(model["vocab"])
    specials = _added_tokens(path, content.get("added_tokens") or [])
    for name in specials:
        vocab.pop(name, None)
    merges = [
        tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair)
        for pair in model["merges"]
    ]
    _check_merges(path, vocab, merges, bool(model.get("ignore_merges")))
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
    try:
        ranks = {
            bytes([byte_of[character] for character in token]): rank
            for token, rank in vocab.items()
        }
    except KeyError as error:
        raise ValueError(
            f"{path}: model.vocab: {error} stands for no byte, so the vocabulary is not byte-level"
        ) from None
    return ranks, _split_pattern(path, content), specials


def _check_fields(path: Path, content: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    decoder = content.get("decoder") or {}
    found = {
        "model.type": (model.get("type", "BPE"), ("BPE",)),
        "model.dropout": (model.get("dropout"), (None, 0)),
        "model.unk_token": (model.get("unk_token"), (None,)),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix"), (None, "")),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix"), (None, "")),
        "normalizer": (content.get("normalizer"), (None,)),
        "decoder.type": (decoder.get("type"), ("ByteLevel",)),
    }
    for name, (value, accepted) in found.items():
        if value not in accepted:
            raise ValueError(
                f"{path}: {name}: found {value!r}, expected {accepted[0]!r} as in Llama 3; only "
                "its byte-level BPE is read"
            )


def _split_pattern(path: Path, content: Mapping[str, Any]) -> str:
    """The regular expression of the pre-tokenizer Split(isolated) + ByteLevel(no regex of its
    own)."""
    pre = content.get("pre_tokenizer") or {}
    match pre.get("pretokenizers", []):
        case [
            {
                "type": "Split",
                "pattern": {"Regex": str(pattern)},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
    raise ValueError(
        f"{path}: pre_tokenizer: found {json.dumps(pre)[:200]}, expected Split by a Regex "
        "(Isolated) and then "
        "ByteLevel without regex and prefix space, as in Llama 3"
    )


def _added_tokens(path: Path, tokens: list[Mapping[str, Any]]) -> dict[str, tuple[int, bool]]:
    added = {}
    for token in tokens:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise ValueError(
                    f"{path}: added_tokens: {token['content']!r} has {flag}=true, which is not "
                    "supported"
                )
        added[token["content"]] = (token["id"], bool(token.get("special")))
    return added


def _check_merges(
    path: Path, vocab: Mapping[str, int], merges: list[tuple[str, ...]], ignore_merges: bool
) -> None:
    """Refuses merges that tiktoken, which knows only the ids, would not follow.

    1. Merges come in the order of the ids that they make, so both sides give them the same
       priority.
    2. Inside a token's bytes merging runs the same alone as in any context where the token comes
       about, so the only pair that ever makes the token is the last one when it is encoded alone:
       that pair must be listed.
    3. A token that merging never makes is reached only as a whole word, which needs
       `ignore_merges`.
    """
    listed = set(merges)
    previous = -1
    for index, pair in enumerate(merges):
        made = vocab.get("".join(pair), -1)
        if len(pair) != 2 or made < 0 or pair[0] not in vocab or pair[1] not in vocab:
            raise ValueError(
                f"{path}: model.merges[{index}]: {' '.join(pair)!r} does not join two tokens into "
                "a third"
            )
        if made < previous:
            raise ValueError(
                f"{path}: model.merges[{index}]: {' '.join(pair)!r} makes id {made} after a merge "
                "that makes id "
                f"{previous}; merges must come in the order of ids, as in Llama 3"
            )
        previous = made
    for token in vocab:
        if len(token) == 1:
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        if ignore_merges and all(s in listed for s in splits if s[0] in vocab and s[1] in vocab):
            continue
        last = _last_merge(token, vocab)
        if last is None and not ignore_merges:
            raise ValueError(
                f"{path}: model.vocab: no merges lead to {token!r}, and model.ignore_merges is not "
                "set"
            )
        if last is not None and last not in listed:
            raise ValueError(
                f"{path}: model.merges: {' '.join(last)!r} is missing, although {token!r} is in "
                "the vocabulary"
            )


def _last_merge(token: str, vocab: Mapping[str, int]) -> tuple[str, str] | None:
    """The pair that makes `token` when its bytes are merged by lowest id, None when merging stops
    short of it."""
    parts = list(token)
    while len(parts) > 2:
        ids = [vocab.get(left + right, math.inf) for left, right in itertools.pairwise(parts)]
        best = min(range(len(ids)), key=ids.__getitem__)
        if ids[best] == math.inf:
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte: itself where printable, else from
    U+0100 on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
