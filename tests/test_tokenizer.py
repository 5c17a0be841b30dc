import base64
import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.text.tokenizer import (
    LLAMA31_SPECIAL_TOKENS,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    split_long_text,
)
from tests.tiny_checkpoints import byte_characters

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="shared data absent")
MERGES = [b"he", b"ll", b"hell", b"hello", b" w", b"or", b" wor", b"ld", b" world", b"\xf0\x9f"]
TINY_RANKS = [bytes([byte]) for byte in range(256)] + MERGES
TINY_SIZE = len(TINY_RANKS) + 256


def tiktoken_lines(ranks: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for rank, t in enumerate(ranks))


def tiny_json() -> dict:
    """The tiny vocabulary as Hugging Face's tokenizers writes it, its specials with a gap."""
    chars = {byte: character for character, byte in byte_characters().items()}

    def as_text(token: bytes) -> str:
        return "".join(chars[byte] for byte in token)

    splits = [(b"h", b"e"), (b"l", b"l"), (b"he", b"ll"), (b"hell", b"o"), (b" ", b"w")]
    splits += [(b"o", b"r"), (b" w", b"or"), (b"l", b"d"), (b" wor", b"ld"), (b"\xf0", b"\x9f")]
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    names = {300: "<|begin_of_text|>", 301: "<|end_of_text|>", 310: "<|eot_id|>", 311: "</think>"}
    return {
        "added_tokens": [
            {"id": i, "content": name, "special": name != "</think>"} for i, name in names.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {as_text(token): rank for rank, token in enumerate(TINY_RANKS)},
            "merges": [f"{as_text(left)} {as_text(right)}" for left, right in splits],
        },
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tiny") / "tokenizer.model"
    path.write_bytes(tiktoken_lines(TINY_RANKS))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def llama3_model() -> Tokenizer:
    return load_tokenizer(DATA / "llama3_tokenizer")


@pytest.fixture(scope="module")
def llama3_json(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    source = DATA / "hf_llama_3_1_8b_instruct"
    path = tmp_path_factory.mktemp("llama3")
    packed = (source / "tokenizer.json.gz").read_bytes()
    (path / "tokenizer.json").write_bytes(gzip.decompress(packed))
    (path / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    return load_tokenizer(DATA / "llama2_tokenizer" / "tokenizer.model")


@needs_data
@pytest.mark.parametrize("source", ["llama3_model", "llama3_json"])
def test_golden_ids(source: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(source)
    cases = json.loads((DATA / "golden" / "tokenizer.json").read_text())
    assert len(cases) == 43
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids_plain"]
        with_specials = tokenizer.encode(case["text"], bos=True, parse_special=True)
        assert with_specials == case["ids_bos_specials"] == case["hf_ids"]
        assert tokenizer.decode(case["ids_plain"]) == case["text"]


@needs_data
def test_llama3_json_and_model_are_one_vocabulary(
    llama3_json: Tokenizer, llama3_model: Tokenizer
) -> None:
    assert llama3_json.special_tokens == llama3_model.special_tokens
    assert llama3_json.vocab_size == llama3_model.vocab_size == 128256
    ids = range(128256)
    assert all(llama3_json.token_bytes(i) == llama3_model.token_bytes(i) for i in ids)
    assert llama3_json.bos_id == 128000
    assert llama3_json.eos_ids == (128001, 128008, 128009)
    assert llama3_json.chat_template is not None and llama3_model.chat_template is None


@needs_data
def test_checkpoint_with_small_vocabulary() -> None:
    tokenizer = load_tokenizer(DATA / "checkpoints" / "base_bf16")
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (512, 500)
    assert tokenizer.eos_ids == (501, 508, 509)


@needs_data
def test_llama2(llama2: Tokenizer) -> None:
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_ids) == (32000, 1, (2,))
    assert llama2.encode("Hello world", bos=True) == [1, 15043, 3186]
    assert llama2.encode("</s>") != [2] and llama2.encode("</s>", parse_special=True) == [2]
    assert llama2.decode([1, 15043, 3186, 2]) == "Hello world"
    assert llama2.decode([1, 15043, 2], skip_special=False) == "<s> Hello</s>"
    assert llama2.token_bytes(3186) == b" world"


@needs_data
@given(text=st.text().filter(lambda text: "\u2581" not in text))
@settings(max_examples=100, deadline=None)
def test_llama2_round_trip(llama2: Tokenizer, text: str) -> None:
    ids = llama2.encode(text, bos=True)
    assert llama2.decode(ids) == stream(llama2, ids) == text


def stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> str:
    decoder = StreamDecoder(tokenizer, skip_special=skip_special)
    return "".join(decoder.push(token_id) for token_id in ids) + decoder.flush()


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_round_trip(tiny: Tokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text)) == text


@given(ids=st.lists(st.integers(0, TINY_SIZE - 1)), skip_special=st.booleans())
@settings(max_examples=300, deadline=None)
def test_stream_equals_decode_of_the_bytes(
    tiny: Tokenizer, ids: list[int], skip_special: bool
) -> None:
    kept = [i for i in ids if i < len(TINY_RANKS) or not skip_special]
    expected = b"".join(map(tiny.token_bytes, kept)).decode("utf-8", "replace")
    assert tiny.decode(ids, skip_special=skip_special) == expected
    assert stream(tiny, ids, skip_special) == expected


def test_stream_holds_back_incomplete_characters(tiny: Tokenizer) -> None:
    decoder = StreamDecoder(tiny)
    ids = tiny.encode("a🙂é")
    assert [decoder.push(i) for i in ids] == ["a", "", "", "🙂", "", "é"]
    assert decoder.flush() == ""
    assert decoder.push(0xF0) == ""
    assert decoder.flush() == "\ufffd"


def test_tiny_ids(tiny: Tokenizer) -> None:
    assert tiny.encode("hello world") == [259, 264]
    assert tiny.encode("hell") == [258]
    assert tiny.vocab_size == TINY_SIZE
    assert list(tiny.special_tokens) == list(LLAMA31_SPECIAL_TOKENS)
    first = len(TINY_RANKS)
    assert (tiny.bos_id, tiny.eos_ids) == (first, (first + 1, first + 8, first + 9))
    assert tiny.pad_id == first + 4
    assert tiny.special_tokens["<|reserved_special_token_247|>"] == first + 255


def test_special_tokens_are_parsed_only_on_request(tiny: Tokenizer) -> None:
    eot = tiny.special_tokens["<|eot_id|>"]
    assert max(tiny.encode("<|eot_id|>")) < len(TINY_RANKS)
    assert tiny.decode(tiny.encode("<|eot_id|>")) == "<|eot_id|>"
    assert tiny.encode("h<|eot_id|>", bos=True, parse_special=True) == [tiny.bos_id, 0x68, eot]
    assert tiny.decode([0x68, eot]) == "h"
    assert tiny.decode([0x68, eot], skip_special=False) == "h<|eot_id|>"


def reference_split(text: str) -> list[str]:
    """Character by character, as the rule is stated."""
    pieces = []
    for start in range(0, len(text), 400_000):
        piece, run, space = "", 0, None
        for char in text[start : start + 400_000]:
            run = run + 1 if char.isspace() == space else 1
            space = char.isspace()
            if run > 25_000:
                pieces.append(piece)
                piece, run = "", 1
            piece += char
        pieces.append(piece)
    return pieces


def test_long_text_is_split_as_meta_does() -> None:
    rng = random.Random(0)
    lengths = [25_000, 25_001, 60_000, 3, 1, 100_000, 260_000, 7]
    text = "".join(rng.choice(" \n\t" if i % 2 else "aé1") * n for i, n in enumerate(lengths))
    pieces = list(split_long_text(text))
    assert pieces == reference_split(text)
    assert len(pieces) > 15 and "".join(pieces) == text
    assert list(split_long_text("x" * 25_000)) == ["x" * 25_000]
    assert list(split_long_text("")) == []


def test_long_run_is_encoded_in_its_pieces(tiny: Tokenizer) -> None:
    # 25,000 falls inside a "hello", which the cut takes apart.
    text = "x" + "hello" * 5_000
    assert tiny.encode(text) == tiny.encode(text[:25_000]) + tiny.encode(text[25_000:])
    assert tiny.encode(text)[-2:] != [259, 259]


def test_bad_arguments(tiny: Tokenizer) -> None:
    with pytest.raises(TypeError, match="text: expected a str, got bytes"):
        tiny.encode(b"a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token id -1 is negative"):
        tiny.decode([-1])
    assert tiny.decode(tiny.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiktoken_lines(TINY_RANKS)[:-1] + b"9\n", r"line 266: expected a new token with rank 265"),
        (tiktoken_lines(TINY_RANKS)[:-5], r"line 266: expected \"base64 rank\""),
        (b"hello\n", r"line 1: expected \"base64 rank\""),
        (tiktoken_lines(TINY_RANKS[:200]), r"no token for the single byte 0xc8 \(56 of 256"),
        (b"", r"no token for the single byte 0x00"),
        (b"\n\x0e\x0a\x05<unk>", "not a complete SentencePiece model"),
        (b'{"model":\n {"type"', r"not valid JSON: .* line 2"),
    ],
)
def test_damaged_files(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def test_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json and no"):
        load_tokenizer(tmp_path)


def test_tokenizer_json(tmp_path: Path, tiny: Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(tiny_json()))
    config = {"eos_token": {"content": "<|eot_id|>"}, "chat_template": "from config"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 312
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (300, (301, 310), None)
    assert tokenizer.encode("hello world ÿ🙂\0") == tiny.encode("hello world ÿ🙂\0")
    assert tokenizer.decode([310, 311, 0x68, 305]) == "</think>h"  # not a control token; a hole
    assert tokenizer.visible_ids == {311}
    assert tokenizer.chat_template == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert load_tokenizer(tmp_path).chat_template == "from file"


def split_by(pattern: str) -> dict:
    return change("pre_tokenizer", "pretokenizers", 0, "pattern", value={"Regex": pattern})


def change(*keys: str | int, value: object) -> dict:
    content: dict = tiny_json()
    target = content
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (change("model", "type", value="WordPiece"), "model.type is 'WordPiece', expected BPE"),
        (change("model", "type", value="Unigram"), "put the checkpoint's tokenizer.model"),
        (change("model", "dropout", value=0.1), "model.dropout is 0.1, expected null"),
        (change("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix is '</w>'"),
        (change("normalizer", value={"type": "Lowercase"}), "normalizer.type is 'Lowercase'"),
        (change("normalizer", value={"type": "NFC", "x": 1}), "normalizer.x is not known"),
        (change("decoder", "type", value="Metaspace"), "decoder.type is 'Metaspace'"),
        (change("decoder", value=None), "decoder is nothing, expected ByteLevel"),
        (change("pre_tokenizer", value=None), "byte_fallback is not set|0x00. is missing"),
        (split_by(""), "'' matches an empty text"),
        (split_by("x*"), "matches an empty text"),
        (split_by("(a"), "is not a regular expression"),
        (split_by("((((a{50}){50}){50}){50}){50}"), "too large: at most"),  # 18 GB
        (split_by("a" * 20_000), "too large: at most"),
        (split_by(r"\h+"), "which engines of regular expressions read differently"),
        (change("model", "merges", 0, value="q q"), r"merges\[0\] is 'q q', expected two tokens"),
        (change("model", "merges", 2, value="h ell"), r"merges\[2\] is 'h ell', expected two"),
        (change("model", "merges", 2, value="hell"), r"merges\[2\] is 'hell', expected two"),
        (change("added_tokens", 0, "id", value=7), "id 7 belongs to the added token"),
        (change("added_tokens", 0, "id", value=301), "id 301 belongs to the added tokens"),
        (change("added_tokens", 0, "id", value=3_000_000_000), r"added_tokens\[0\].id is 30000000"),
        (change("added_tokens", value=[{}]), r"added_tokens\[0\].id is missing"),
        (change("model", "vocab", "he", value=257), "id 257 belongs to 'he' and to 'll'"),
        (change("model", "vocab", "he", value=3_000_000_000), "model.vocab.* out of range"),
        (change("model", "vocab", value={"a": 0}), "expected two tokens of model.vocab"),
        (change("model", "vocab", value=None), "model.vocab is None, expected object"),
        ({"added_tokens": []}, "model is missing"),
    ],
)
def test_tokenizer_json_refused_by_name(tmp_path: Path, content: dict, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_token_that_merges_never_make_is_a_word_with_ignore_merges(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = tiny_json()
    content["model"]["vocab"]["xyz"] = len(TINY_RANKS)
    path.write_text(json.dumps(content))
    assert load_tokenizer(path).encode("xyz") == [len(TINY_RANKS)]
    content["model"]["ignore_merges"] = False
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("xyz") == [*b"xyz"] and tokenizer.encode("hello") == [259]
    assert tokenizer.decode([len(TINY_RANKS)]) == "xyz"


def test_config_names_specials_of_a_tiktoken_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_lines(TINY_RANKS))
    declared = {str(266 + i): {"content": f"<{i}>", "special": True} for i in range(4)}
    config = {"added_tokens_decoder": declared, "bos_token": "<0>", "eos_token": "<3>"}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (270, 266, (269,))
    path.write_text(json.dumps(config | {"eos_token": "<end>"}))
    with pytest.raises(ValueError, match="eos_token is '<end>', which is not a token of"):
        load_tokenizer(tmp_path)
    # Nothing is padded here: the name only reaches templates.
    path.write_text(json.dumps(config | {"pad_token": "[PAD]", "unk_token": "<unk>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_id is None and tokenizer.named_tokens["pad_token"] == "[PAD]"
    # LLaMA 1's first files in transformers' format name no tokens.
    path.write_text(json.dumps(config | {"bos_token": "", "unk_token": ""}))
    assert load_tokenizer(tmp_path).named_tokens == {"eos_token": "<3>"}


@pytest.mark.parametrize("names", [["default", "tool_use"], ["tool_use"]])
def test_named_chat_templates(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiktoken_lines(TINY_RANKS))
    templates = [{"name": name, "template": f"the {name}"} for name in names]
    config = {"chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if "default" in names:
        assert load_tokenizer(tmp_path).chat_template == "the default"
    else:
        with pytest.raises(ValueError, match='none named "default"'):
            load_tokenizer(tmp_path)


@needs_data
def test_unigram_json_gives_way_to_the_model_file(tmp_path: Path) -> None:
    content = change("model", "type", value="Unigram")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    model = (DATA / "llama2_tokenizer" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert load_tokenizer(tmp_path).vocab_size == 32000
