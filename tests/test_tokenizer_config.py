"""The files beside a vocabulary: which tokens have a role, and what goes around a text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_jax.text.chat import encode_chat
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from tests.tiny import config
from tests.tokenizer_forms import code_llama, llama2, llama3, next_id, r1_distill, smollm2, yi

Write = Callable[..., Path]
NO_BOS = config(bos_token_id=None, eos_token_ids=())


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A function that writes files into a directory: tokenizer_json=..., tokenizer_config=..."""

    def write(**files: Any) -> Path:
        for name, content in files.items():
            path = tmp_path / f"{name.removesuffix('_json')}.json"
            path.write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return write


def around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    ids, text = tokenizer.encode("the", bos=True, eos=True), tokenizer.encode("the")
    at = next(i for i in range(len(ids)) if ids[i : i + len(text)] == text)
    return ids[:at], ids[at + len(text) :]


def test_bos_and_eos_go_around_a_text_as_the_files_say(write: Write) -> None:
    content = llama3()
    bos, eos = next_id(content), next_id(content) + 4
    assert around(load_tokenizer(write(tokenizer_json=content))) == ([bos], [])
    for settings, expected in (
        ({}, ([bos], [])),
        ({"add_bos_token": False}, ([], [])),  # ggml-org/llama.cpp #3966: Yi
        ({"add_eos_token": True, "eos_token": "<|eot_id|>"}, ([bos], [eos])),
        ({"add_bos_token": None, "add_eos_token": None}, ([bos], [])),
        ({"bos_token": "<|start_header_id|>", "add_bos_token": True}, ([bos + 2], [])),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, ([bos], [])),
    ):
        assert around(load_tokenizer(write(tokenizer_config=settings))) == expected, settings


def test_without_a_post_processor_only_llamas_class_adds_bos(write: Write) -> None:
    content = llama2(post_processor=None)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    directory = write(tokenizer_json=content, tokenizer_config=names)
    assert around(load_tokenizer(directory)) == ([], [])
    write(tokenizer_config={**names, "tokenizer_class": "LlamaTokenizerFast"})
    assert around(load_tokenizer(directory)) == ([1], [])
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    write(tokenizer_json=smollm2(), tokenizer_config={**end, "tokenizer_class": "GPT2Tokenizer"})
    tokenizer = load_tokenizer(directory)
    assert around(tokenizer) == ([], []) and tokenizer.bos_id == tokenizer.eos_id is not None


def test_bos_and_eos_of_the_models_config(write: Write) -> None:
    """abetlen/llama-cpp-python #1537: a BOS that config.json alone names, and a model without."""
    text = json.dumps(llama3()).replace("<|begin_of_text|>", "<|startoftext|>")
    content = json.loads(text.replace("<|eot_id|>", "<|stop|>").replace("<|end_of_text|>", "<e>"))
    number = next_id(content)
    directory = write(tokenizer_json=content, tokenizer_config={})
    model = config(vocab_size=500, bos_token_id=number, eos_token_ids=(number + 1, number + 4))
    named = load_tokenizer(directory, model)
    assert (named.bos_id, named.eos_id, around(named)[0]) == (number, number + 4, [number])
    assert named.named_tokens == {"bos_token": "<|startoftext|>", "eos_token": "<|stop|>"}
    without = load_tokenizer(directory, NO_BOS)
    assert (without.bos_id, without.eos_ids, around(without)) == (None, (), ([], []))
    assert without.encode("the", bos=True) == without.encode("the")


def test_roles_come_from_each_file_in_turn(write: Write) -> None:
    content = llama3()
    content["added_tokens"][1]["special"] = False
    number = next_id(content)
    directory = write(
        tokenizer_json=content,
        special_tokens_map={"pad_token": {"content": "<|end_of_text|>"}, "eos_token": "<|eot_id|>"},
        tokenizer_config={"eos_token": "<|end_header_id|>", "unk_token": None},
    )
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (number + 1, number + 3)
    assert tokenizer.named_tokens["pad_token"] == "<|end_of_text|>"
    # As in transformers, what tokenizer.json says of an added token holds.
    assert tokenizer.decode([number + 1]) == "<|end_of_text|>"
    assert set(tokenizer.eos_ids) == {number + 1, number + 3, number + 4}


def test_added_tokens_of_the_files_beside(write: Write) -> None:
    content = llama3()
    number = next_id(content) + 5
    flags = {"lstrip": True, "rstrip": True, "normalized": False, "special": True}
    directory = write(
        tokenizer_json=content,
        added_tokens={"<old>": number, "<both>": number + 1},
        tokenizer_config={
            "added_tokens_decoder": {
                str(number + 1): {"content": "<both>", **flags},
                str(number + 2): {"content": "word", "single_word": True, "special": False},
            }
        },
    )
    tokenizer = load_tokenizer(directory)
    parse = {"parse_special": True}
    assert tokenizer.encode("a <both> \n a", **parse) == [97, number + 1, 97]
    assert tokenizer.encode("a<old>\na", **parse) == [97, number, 10, 97]
    assert tokenizer.encode("word", **parse) == [number + 2]
    assert number + 2 not in tokenizer.encode("words", **parse)
    assert tokenizer.decode([97, number, number + 1, number + 2]) == "a<old>word"
    assert tokenizer.vocab_size == number + 3


def test_reply_keeps_what_is_not_special(write: Write) -> None:
    tokenizer = load_tokenizer(write(tokenizer_json=r1_distill()))
    think = tokenizer.special_tokens["</think>"]
    assert tokenizer.decode([104, think]) == "h</think>" and think in tokenizer.visible_ids


@pytest.mark.parametrize("legacy", [False, True, None])
def test_legacy_says_where_sentencepieces_space_goes(
    write: Write, sentencepiece_model: bytes, legacy: bool | None
) -> None:
    """huggingface/transformers #24565: TinyLlama-Chat, Llama 2 as published today."""
    directory = write(
        tokenizer_config={
            "bos_token": "<s>", "eos_token": "</s>", "legacy": legacy, "add_bos_token": False,
            "chat_template": "hello{{ eos_token }}{{ messages[0].content }}",
        }
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = load_tokenizer(directory)
    ids = encode_chat(tokenizer, [{"role": "user", "content": "\nhello"}])
    end = ids.index(2)
    assert tokenizer.token_bytes(ids[0]).startswith(b" ")
    assert tokenizer.token_bytes(ids[end + 1]) == (b"\n" if legacy is False else b" ")
    assert tokenizer.decode(ids) == ("hello\nhello" if legacy is False else "hello \nhello")
    assert tokenizer.encode("hello</s>\nhello", parse_special=True) == ids


def test_prefix_space_can_be_switched_off(write: Write, sentencepiece_model: bytes) -> None:
    directory = write(tokenizer_config={"add_prefix_space": False})
    (directory / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = load_tokenizer(directory)
    ids = tokenizer.encode("hello world")
    assert not tokenizer.token_bytes(ids[0]).startswith(b" ")
    assert tokenizer.decode(ids) == "hello world"
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"


def test_user_defined_pieces_stay_text(write: Write, sentencepiece_model: bytes) -> None:
    (write() / "tokenizer.model").write_bytes(sentencepiece_model)
    name = "<|im_start|>"
    plain = load_tokenizer(write())
    (number,) = [i for i in range(plain.vocab_size) if plain.token_bytes(i) == name.encode()]
    declared = {str(number): {"content": name, "special": True}}
    tokenizer = load_tokenizer(write(tokenizer_config={"added_tokens_decoder": declared}))
    text = f"user {name}{name} world"
    assert number not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, parse_special=True).count(number) == 2


def test_decoding_reads_on_from_a_prompt(write: Write, sentencepiece_model: bytes) -> None:
    """huggingface/transformers #22710: the space of a reply's first word."""
    (write() / "tokenizer.model").write_bytes(sentencepiece_model)
    for tokenizer in (load_tokenizer(write()), load_tokenizer(write(tokenizer_json=llama2()))):
        text = "hello world the of is"
        ids = tokenizer.encode(text, bos=True)
        for cut in range(1, len(ids)):
            stream = StreamDecoder(tokenizer, after=ids[:cut])
            reply = "".join(map(stream.push, ids[cut:])) + stream.flush()
            assert tokenizer.decode(ids[:cut]) + reply == text
        word = tokenizer.encode("world")
        assert tokenizer.token_text(word[0]).startswith(" ")


def test_ids_that_only_the_model_has_decode_to_nothing(write: Write) -> None:
    tokenizer = load_tokenizer(write(tokenizer_json=llama2()))
    beyond = [tokenizer.vocab_size, 10**9]
    assert tokenizer.decode([*beyond, *tokenizer.encode("the"), *beyond]) == "the"
    assert tokenizer.token_bytes(beyond[0]) == b"" and tokenizer.token_text(beyond[1]) == ""


def test_template_writes_tokens_that_take_spaces(write: Write) -> None:
    template = "{{ messages[0].content }} \u2581<PRE>  x"
    settings = {"chat_template": template, "add_bos_token": False}
    tokenizer = load_tokenizer(write(tokenizer_json=code_llama(), tokenizer_config=settings))
    ids = encode_chat(tokenizer, [{"role": "user", "content": "the"}])
    assert ids == tokenizer.encode("the \u2581<PRE>  x", parse_special=True)


def test_yis_chat_tokens_are_special(write: Write) -> None:
    tokenizer = load_tokenizer(write(tokenizer_json=yi()))
    number = tokenizer.special_tokens["<|im_start|>"]
    assert tokenizer.decode([number, *tokenizer.encode("the of")]) == "the of"
    assert tokenizer.encode(" the") != tokenizer.encode("the")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config", [], "tokenizer_config.json: its JSON is .*, expected object"),
        ("tokenizer_config", {"bos_token": 5}, "bos_token is 5, expected"),
        ("tokenizer_config", {"bos_token": {"content": ""}}, "bos_token.content is"),
        ("tokenizer_config", {"eos_token": {"id": 5}}, "eos_token.content is missing"),
        (
            "tokenizer_config",
            {"add_bos_token": "no"},
            "add_bos_token is 'no', expected bool or null",
        ),
        ("tokenizer_config", {"legacy": 0}, "legacy is 0, expected bool or null"),
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "added_tokens_decoder is"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "y"}}}, "token ids up to"),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"3000000000": {"content": "y"}}},
            "token ids up to",
        ),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"5": {"content": "y"}}},
            "id 5 belongs to the added token 'y' and to an ordinary one",
        ),
        ("tokenizer_config", {"chat_template": 5}, "chat_template is 5"),
        ("tokenizer_config", {"chat_template": [{"name": "x"}]}, "template is missing"),
        (
            "tokenizer_config",
            {"eos_token": "<none>"},
            "eos_token is '<none>', which is not a token",
        ),
        ("special_tokens_map", {"pad_token": 1.5}, "special_tokens_map.json: pad_token is 1.5"),
        ("added_tokens", {"<x>": -1}, "added_tokens.json: "),
        ("added_tokens", {"<x>": 3_000_000_000}, "added_tokens.json: .*out of range"),
        ("added_tokens", {"<x>": True}, "added_tokens.json: "),
    ],
)
def test_what_is_wrong_is_named(write: Write, file: str, content: Any, message: str) -> None:
    directory = write(tokenizer_json=llama3(), **{file: content})
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(directory)
    assert str(directory / file) in str(caught.value)
    assert str(caught.value).count("\n") < 3
