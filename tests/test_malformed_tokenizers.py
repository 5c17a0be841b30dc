"""Damaged tokenizer files, made by chance: they are read as something that encodes and decodes, or
refused in a few words that name the user's file, by loading, `convert` and `inspect` alike."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.cli import main
from llama_jax.text.tokenizer import load_tokenizer
from tests import tiny_checkpoints as tiny
from tests.tokenizer_forms import code_llama, hermes3, llama2, next_id, r1_distill, smollm2

FORMS = {
    make.__name__: make() for make in (hermes3, r1_distill, smollm2, llama2, code_llama)
}  # fmt: skip
FLAGS = {"special": True, "lstrip": False, "rstrip": False, "normalized": False}
BESIDE = {
    "tokenizer_config.json": {
        "bos_token": {"content": "<x>", **FLAGS}, "eos_token": "<y>", "add_bos_token": True,
        "add_eos_token": False, "legacy": False, "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {"900": {"content": "<x>", **FLAGS}},
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    },
    "special_tokens_map.json": {"pad_token": "<x>", "additional_special_tokens": ["<y>"]},
    "added_tokens.json": {"<y>": 901},
}  # fmt: skip
# Written into the file as it stands, which no value in Python could be.
DIGITS, BRACKETS, HALF = "@digits@", "@brackets@", "@half@"
RAW = {DIGITS: "9" * 5000, BRACKETS: "[" * 200_000 + "]" * 200_000, HALF: '"\\ud800"'}
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3_000_000_000, 2**70, 1.5, 1e21, float("inf"), float("nan"), "",
    "0", "x", "\u2581", " ", "\x00", "(", "x*", "\\h+", "(?i", "a" * 5000, [], {}, [{}], [[]],
    [None], {"": None}, {"type": "Sequence"}, {"type": "ByteLevel"}, DIGITS, BRACKETS, HALF,
]  # fmt: skip


value = st.sampled_from(VALUES).map(copy.deepcopy)


@st.composite
def damaged(draw: st.DrawFn, content: Any) -> Any:
    """`content` with one to three values dropped, changed, wrapped, doubled or swapped."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = {"": content}, ""
        while True:
            node = parent[key]
            inside = isinstance(node, dict | list) and len(node) > 0
            if not inside or (parent is not None and key != "" and draw(st.integers(0, 3)) == 0):
                break
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            parent, key = node, keys[draw(st.integers(0, len(keys) - 1))]
        if key == "":
            return draw(value)
        how = draw(st.sampled_from(["drop", "retype", "widen", "nest", "swap"]))
        if how == "drop":
            del parent[key]
        elif how == "retype":
            parent[key] = draw(value)
        elif how == "widen" and isinstance(node, list):
            node += [draw(value)] * 3
        elif how == "widen" and isinstance(node, dict):
            node[draw(st.sampled_from(["unknown", "type", "Ā", "0", "5"]))] = draw(
                st.sampled_from(VALUES)
            )
        elif how == "nest":
            parent[key] = draw(st.sampled_from([[node], {"content": node}, {"type": node}]))
        else:
            other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else [0]))
            parent[key], parent[other] = parent[other], parent[key]
    return content


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """A tokenizer's files, one of which is damaged."""
    content = copy.deepcopy(FORMS[draw(st.sampled_from(sorted(FORMS)))])
    model = content["model"]
    name = draw(st.sampled_from(["tokenizer.json"] * len(BESIDE) + sorted(BESIDE)))
    found = {"tokenizer.json": content, **BESIDE}
    if name == "tokenizer.json" and draw(st.booleans()):  # the model is most of the file
        rest = draw(damaged({key: value for key, value in content.items() if key != "model"}))
        found[name] = {**rest, "model": model} if isinstance(rest, dict) else rest
    else:
        found[name] = draw(damaged(found[name]))
    return found


def write(directory: Path, contents: dict[str, Any]) -> None:
    for name, content in contents.items():
        text = json.dumps(content, ensure_ascii=False)
        for mark, raw in RAW.items():
            text = text.replace(f'"{mark}"', raw)
        (directory / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("malformed") / "checkpoint", tiny.dense())


def refusal(directory: Path) -> str | None:
    """What loading says against the tokenizer, None if it is loaded and works."""
    began = time.process_time()
    try:
        tokenizer = load_tokenizer(directory)
    except ValueError as error:
        message = str(error)
        assert str(directory) in message and message.count("\n") < 3 and len(message) < 2000
        assert time.process_time() - began < 5
        return message
    text = "Hello world, the 123 <s>\n\u4f60 <x>"
    for parse in (False, True):
        ids = tokenizer.encode(text, bos=True, eos=True, parse_special=parse)
        assert isinstance(tokenizer.decode([*ids, tokenizer.vocab_size]), str)
    assert time.process_time() - began < 5
    return None


def test_the_sound_files_are_read(checkpoint: Path) -> None:
    for content in FORMS.values():
        assert next_id(content) < 900
        write(checkpoint, {"tokenizer.json": content, **BESIDE})
        assert refusal(checkpoint) is None


def check_loading(checkpoint: Path, made: dict[str, Any]) -> None:
    write(checkpoint, made)
    message = refusal(checkpoint)
    assert message is None or any(name in message for name in made)


@settings(max_examples=60)
@given(made=files())
def test_loading(checkpoint: Path, made: dict[str, Any]) -> None:
    check_loading(checkpoint, made)


@pytest.mark.slow
@settings(max_examples=3000)
@given(made=files())
def test_loading_of_many(checkpoint: Path, made: dict[str, Any]) -> None:
    check_loading(checkpoint, made)


def check_commands(
    checkpoint: Path, made: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write(checkpoint, made)
    message = refusal(checkpoint)
    if message is None:
        return
    target = checkpoint.parent / "target"
    for command in (["convert", str(checkpoint), str(target)], ["inspect", str(checkpoint)]):
        capsys.readouterr()
        began = time.process_time()
        with pytest.raises(SystemExit) as caught:
            main(command)
        assert caught.value.code == 2
        assert time.process_time() - began < 10
        printed = capsys.readouterr()
        said = [line for line in printed.err.splitlines() if line.strip()]
        assert said[-1].startswith("error:") or any(line.startswith("error:") for line in said[-3:])
        assert str(checkpoint) in printed.err and "Traceback" not in printed.err
        assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["checkpoint"]


# One fixture for all examples is meant: what is printed is read after each.
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(made=files())
def test_convert_and_inspect(checkpoint: Path, made: Any, capsys: Any) -> None:
    check_commands(checkpoint, made, capsys)


@pytest.mark.slow
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(made=files())
def test_convert_and_inspect_of_many(checkpoint: Path, made: Any, capsys: Any) -> None:
    check_commands(checkpoint, made, capsys)


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"\n\x05\n\x03abc", b"\x00" * 64, b"QQ== 0\nQg== 5\n"]
)
def test_damaged_models(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_any_cut_of_a_sentencepiece_model(tmp_path: Path, sentencepiece_model: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    for size in range(1, len(sentencepiece_model), len(sentencepiece_model) // 40):
        path.write_bytes(sentencepiece_model[:size])
        refusal(tmp_path)
