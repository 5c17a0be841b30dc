"""tokenizer.json files of every form, beside the tokenizers library."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer_forms import FORMS, TEXTS, with_specials

pytestmark = pytest.mark.parity

PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
SPECIAL = {**PLAIN, "special": True}


@pytest.fixture(scope="module", params=FORMS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    from tokenizers import Tokenizer as Reference

    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    content = FORMS[request.param]()
    path.write_text(json.dumps(content), encoding="utf-8")
    return load_tokenizer(path), Reference.from_file(str(path)), with_specials(content)


def check(tokenizer: Tokenizer, reference, text: str) -> None:
    expected = reference.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text, parse_special=True) == expected, text
    whole = reference.encode(text).ids
    assert tokenizer.encode(text, bos=True, eos=True, parse_special=True) == whole, text
    added = reference.get_added_tokens_decoder()
    # The library (0.23) forgets that a special token is special if it normalized its name, and
    # decodes it as the normalized name.
    if any(i in added and added[i].special and added[i].normalized for i in expected):
        return
    for skip in (True, False):
        decoded = reference.decode(expected, skip_special_tokens=skip)
        assert tokenizer.decode(expected, skip_special=skip) == decoded, text


def test_ids_and_text_are_the_librarys(pair) -> None:
    tokenizer, reference, texts = pair
    for text in texts:
        check(tokenizer, reference, text)
    assert tokenizer.vocab_size == max(reference.get_vocab().values()) + 1


def test_a_long_text_is_not_cut(pair) -> None:
    """As Meta's tokenizer would cut it, after 25,000 characters of a run and after 400,000."""
    tokenizer, reference, _ = pair
    for text in ("the" * 20_000, " " * 30_000, "hello world " * 40_000):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids, text[:12]


@settings(max_examples=150)
@given(data=st.data())
def test_any_text(pair, data) -> None:
    tokenizer, reference, _ = pair
    # JSON and UTF-8 have no lone surrogates.
    characters = st.characters(exclude_categories=["Cs"])
    parts = st.sampled_from([*TEXTS, *tokenizer.special_tokens]) | st.text(characters, max_size=8)
    text = "".join(data.draw(st.lists(parts, max_size=5)))
    check(tokenizer, reference, text)


@pytest.mark.parametrize("adds", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_is_transformers(
    sentencepiece_model: bytes, tmp_path: Path, legacy: bool, adds: tuple[bool, bool]
) -> None:
    """tokenizer.model, read by sentencepiece here and turned into a tokenizer.json there, which
    puts no space before a text that begins with one."""
    from transformers import LlamaTokenizer

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    declared = {str(i): {"content": name} for i, name in enumerate(("<unk>", "<s>", "</s>"))}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": legacy,
            "tokenizer_class": "LlamaTokenizer", "add_bos_token": adds[0],
            "add_eos_token": adds[1],
            "added_tokens_decoder": {i: {**t, **SPECIAL} for i, t in declared.items()},
        })
    )  # fmt: skip
    reference = LlamaTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in (*TEXTS, "hello</s>world", "hello</s>world</s>\n", "<s>hello"):
        if text.startswith(" ") or "\u2581" in text:
            continue
        ids = reference.encode(text)
        assert tokenizer.encode(text, bos=True, eos=True, parse_special=True) == ids, text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special=skip) == reference.decode(
                ids, skip_special_tokens=skip
            )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pad_token": {"__type": "AddedToken", "content": "<|im_end|>", **SPECIAL}},
        {"additional_special_tokens": ["<tool_call>"]},
        {"added_tokens_decoder": {"600": {"content": "word", "special": False, **PLAIN}}},
    ],
)
@pytest.mark.parametrize("form", ["hermes3", "smollm2"])
def test_settings_are_transformers(tmp_path: Path, settings: dict, form: str) -> None:
    """Without add_bos_token and add_eos_token, which transformers 5 reads beside a tokenizer.model
    alone; its users, and transformers 4, mean them beside a tokenizer.json too."""
    from transformers import AutoTokenizer

    content = FORMS[form]()
    names = [token["content"] for token in content["added_tokens"]]
    roles = {"bos_token": names[0], "eos_token": names[1]}
    settings = {
        **roles, "tokenizer_class": "PreTrainedTokenizerFast", **settings
    }  # fmt: skip
    if settings.get("bos_token") not in names or not set(
        settings.get("additional_special_tokens", ())
    ) <= set(names):
        return
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    number = max(token["id"] for token in content["added_tokens"]) + 1
    if "added_tokens_decoder" in settings:
        (token,) = settings["added_tokens_decoder"].values()
        settings["added_tokens_decoder"] = {str(number): token}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    reference = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_token_id, reference.eos_token_id)
    for text in [*with_specials(content), "a word, words"]:
        ids = reference.encode(text)
        assert tokenizer.encode(text, bos=True, eos=True, parse_special=True) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), text
