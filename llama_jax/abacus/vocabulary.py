"""Builds Abacus's tokenizer: Llama 3's splitting rule with a vocabulary of complete words.

768 ranks (the 256 bytes, then 512 pieces) are followed by Llama 3.1's 256 special tokens. The
pieces are the words, the punctuation and the indentation that questions, answers and tool
descriptions share. Operands stay out: a number is one token per digit and a word that a question
is about is one token per letter, because no two letters and no two digits ever merge.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import tiktoken

from llama_jax.abacus import data, tasks, words
from llama_jax.text.tokenizer import LLAMA3_PATTERN, LLAMA31_SPECIAL_TOKENS

NUM_RANKS = 768
NUM_SPECIAL_TOKENS = 256
_ASCII_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\na-zA-Z0-9]?[a-zA-Z]+|[0-9]{1,3}|"
    r" ?[^\sa-zA-Z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LONE_ROLES = ("system", "user", "assistant")


def build(seed: int = 0, samples: int = 1500) -> list[bytes]:
    """Return the tokens of all ranks: 256 bytes, then the most frequent pieces of ``samples``
    questions of each kind in the first stage of training."""
    rng = random.Random(seed)
    fixed = [*_LONE_ROLES, *(f" {word}" for word in words.COMMON)]
    counts: Counter[str] = Counter(dict.fromkeys(fixed, 10 * samples))
    first_kinds = [kind for kind, (_, shares) in tasks.KINDS.items() if shares[0]]
    for kind in [*first_kinds, "calculator"]:
        for _ in range(samples):
            messages = data.exchange(tasks.draw(kind, rng, held_out=False))
            messages.insert(0, {"role": "system", "content": rng.choice(words.SYSTEM_MESSAGES)})
            tools = [data.draw_calculator(rng)] if kind == "calculator" else None
            for _, text in data.segments(messages, date=tasks.random_date(rng), tools=tools):
                counts.update(re.findall(_ASCII_PATTERN, text))
    pieces = sorted((p for p in counts if _is_shared(p)), key=lambda p: (-counts[p], p))
    return [bytes([i]) for i in range(256)] + [p.encode() for p in pieces[: NUM_RANKS - 256]]


def _is_shared(piece: str) -> bool:
    """Return False for digits, single characters and words that are the subject of questions."""
    bare = piece.strip(' "').lower()
    if len(piece) < 2 or bare.isnumeric() or bare in words.WORDS or bare[::-1] in words.WORDS:
        return False
    is_word = any(character.isalpha() for character in piece)
    return not is_word or len(piece) > 2 or piece.istitle()


def encoding(tokens: list[bytes]) -> tiktoken.Encoding:
    """Make the tokenizer for ``tokens`` of :func:`build`, including special tokens."""
    return tiktoken.Encoding(
        "abacus",
        pat_str=LLAMA3_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={name: NUM_RANKS + i for i, name in enumerate(LLAMA31_SPECIAL_TOKENS)},
    )


def _printable_bytes() -> dict[int, str]:
    """Return the character of ByteLevel tokenizers (GPT-2's scheme) for each byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def _merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return all splits of a token into two tokens, lowest rank first, as BPE would join them."""
    rank = {token: i for i, token in enumerate(tokens)}
    pairs = [
        (token[:i], token[i:])
        for token in tokens
        for i in range(1, len(token))
        if token[:i] in rank and token[i:] in rank
    ]
    return sorted(pairs, key=lambda pair: (rank[pair[0] + pair[1]], rank[pair[0]], rank[pair[1]]))


def _special(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, **flags, "special": True}


def tokenizer_files(tokens: list[bytes], chat_template: str) -> dict[str, Any]:
    """Return the files of a Hugging Face tokenizer: contents, for JSON, by name."""
    shown = _printable_bytes()
    text = ["".join(shown[byte] for byte in token) for token in tokens]
    merges = [
        " ".join("".join(shown[byte] for byte in part) for part in pair) for pair in _merges(tokens)
    ]
    bos = LLAMA31_SPECIAL_TOKENS[0]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [first, sequence],
        "pair": [first, sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [NUM_RANKS], "tokens": [bos]}},
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": LLAMA3_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": NUM_RANKS + i, **_special(name)}
                for i, name in enumerate(LLAMA31_SPECIAL_TOKENS)
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [split, {**byte_level, "use_regex": False}],
            },
            "post_processor": template,
            "decoder": {**byte_level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {piece: rank for rank, piece in enumerate(text)},
                "merges": merges,
            },
        },
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(NUM_RANKS + i): _special(name) for i, name in enumerate(LLAMA31_SPECIAL_TOKENS)
            },
            "bos_token": bos,
            "chat_template": chat_template,
            "clean_up_tokenization_spaces": True,
            "eos_token": "<|eot_id|>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "special_tokens_map.json": {"bos_token": bos, "eos_token": "<|eot_id|>"},
    }


def write_tokenizer(directory: Path, tokens: list[bytes], chat_template: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    for name, content in tokenizer_files(tokens, chat_template).items():
        (directory / name).write_text(json.dumps(content, ensure_ascii=False) + "\n")
