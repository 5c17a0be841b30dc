"""tokenizer.json of every form, with ids that the tokenizers library gave (`make_tokenizer_ids`),
and merging by rank beside a plain loop."""

import itertools
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.text import tokenizer_json
from llama_jax.text.bpe import bpe, merge, tiktoken_ranks
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from tests.make_tokenizer_ids import PATH
from tests.tokenizer_forms import FORMS, llama2, llama3, llama3_early, merges_of, with_specials

STORED = json.loads(PATH.read_text(encoding="utf-8"))


def load(directory: Path, content: dict) -> Tokenizer:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(path)


@pytest.mark.parametrize("name", FORMS)
def test_ids_and_text_are_those_of_the_library(tmp_path: Path, name: str) -> None:
    content = FORMS[name]()
    tokenizer = load(tmp_path, content)
    texts = with_specials(content)
    assert len(texts) == len(STORED[name]) > 30
    special = {token["id"] for token in content["added_tokens"] if token["normalized"]}
    for text, (ids, decoded) in zip(texts, STORED[name], strict=True):
        assert tokenizer.encode(text, bos=True, eos=True, parse_special=True) == ids, text
        stream = StreamDecoder(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
        if special.isdisjoint(ids):  # the library forgets that these are special
            assert tokenizer.decode(ids) == decoded, text


@pytest.mark.parametrize("name", FORMS)
def test_text_never_becomes_a_special_token(tmp_path: Path, name: str) -> None:
    tokenizer = load(tmp_path, FORMS[name]())
    for special in tokenizer.special_tokens:
        ids = tokenizer.encode(f"a{special} {special}b")
        assert not set(ids) & set(tokenizer.special_tokens.values())


def test_a_token_that_no_merge_makes_is_never_drawn_from_text(tmp_path: Path) -> None:
    """Llama 3 as tokenizers before 0.19 saved it (robertknight/rten #453)."""
    content = llama3_early()
    number = content["model"]["vocab"]["xyz"]
    tokenizer = load(tmp_path, content)
    assert number not in tokenizer.encode("xyz xyz")
    assert tokenizer.decode([number]) == "xyz"
    content["model"]["ignore_merges"] = True
    assert load(tmp_path, content).encode("xyz") == [number]


words = st.text("abcd", max_size=12)


@given(words=st.lists(words, min_size=1, max_size=6), text=st.text("abcd", max_size=40))
def test_merging_by_rank(words: list[str], text: str) -> None:
    merges = sorted(merges_of(words), key=lambda pair: hash_of(pair))
    vocab = {character: i for i, character in enumerate("abcd")}
    for left, right in merges:
        for token in (left, right, left + right):
            vocab.setdefault(token, len(vocab))
    ranks = {
        (vocab[left], vocab[right]): (rank, vocab[left + right])
        for rank, (left, right) in enumerate(merges)
    }
    expected = list(text)
    while True:
        order = [(merges.index(pair), i) for i, pair in pairs(expected) if pair in merges]
        if not order:
            break
        at = min(order)[1]
        expected[at : at + 2] = [expected[at] + expected[at + 1]]
    ids = [vocab[token] for token in expected]
    assert merge([vocab[character] for character in text], ranks) == ids
    assert bpe(vocab, merges, ignore_merges=False, byte_fallback=False)(text) == ids


def pairs(parts: list[str]) -> list[tuple[int, tuple[str, str]]]:
    return list(enumerate(itertools.pairwise(parts)))


def hash_of(pair: tuple[str, str]) -> int:
    """An order that is neither that of the words nor that of the alphabet."""
    return sum(ord(c) * 31**i for i, c in enumerate("".join(pair))) % 1009


@given(words=st.lists(words, min_size=1, max_size=8), text=words, ignore=st.booleans())
def test_tiktoken_merges_alike_where_it_may(words: list[str], text: str, ignore: bool) -> None:
    """By lowest id, as tiktoken does, after a lookup of the whole word."""
    merges = merges_of(words)
    vocab = {character: i for i, character in enumerate("abcd")}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    vocab["ddc"] = vocab.get("ddc", len(vocab))  # which perhaps no merge makes
    ranks = tiktoken_ranks(vocab, merges, ignore)
    if ranks is None:
        return
    parts = [text] if text in ranks else list(text)
    while True:
        order = [(ranks[a + b], i) for i, (a, b) in pairs(parts) if a + b in ranks]
        if not order:
            break
        at = min(order)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    expected = bpe(vocab, merges, ignore_merges=ignore, byte_fallback=False)(text)
    assert [ranks[part] for part in parts] == (expected if text else [])


def test_tiktoken_is_used_where_it_may_be(tmp_path: Path) -> None:
    content = llama3()
    model = content["model"]
    order = [tuple(pair.split(" ")) for pair in model["merges"]]
    assert tiktoken_ranks(model["vocab"], order, True) == model["vocab"]
    assert tiktoken_ranks(model["vocab"], order[::-1], True) is None
    without = [pair for pair in order if "".join(pair) != "he"]
    assert tiktoken_ranks(model["vocab"], without, True) is None


def test_a_long_text_without_words_is_quick(tmp_path: Path) -> None:
    """Llama 2's form merges a text as a whole: 2 s if that were quadratic, 0.1 s as it is."""
    tokenizer = load(tmp_path, llama2())
    began = time.process_time()
    ids = tokenizer.encode("the" * 10_000)
    assert time.process_time() - began < 1
    assert tokenizer.decode(ids) == "the" * 10_000


def test_a_pattern_that_takes_for_ever_is_stopped(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer_json, "_SECONDS", 0.1)
    tokenizer = load(tmp_path, llama3("(a|a)+$", ignore_merges=False))
    assert tokenizer.encode("aaaa") == [97] * 4
    with pytest.raises(ValueError, match="takes too long for a text of 41 characters"):
        tokenizer.encode("a" * 40 + "b")
    replaced = llama2(normalizer={
        "type": "Replace", "pattern": {"Regex": "(a|a)+$"}, "content": "b"
    })  # fmt: skip
    tokenizer = load(tmp_path, replaced)
    assert tokenizer.encode("aaa") == tokenizer.encode("b")
    with pytest.raises(ValueError, match="takes too long for a text of 41 characters"):
        tokenizer.encode("a" * 40 + "b")
