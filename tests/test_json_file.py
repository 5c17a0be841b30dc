"""JSON files of a checkpoint, and what else may lie in their place."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta, Struct

from llama_jax.errors import CheckpointError
from llama_jax.json_file import parse, read_json, read_object, read_text, shown


class Inner(Struct, forbid_unknown_fields=True):
    size: Annotated[int, Meta(ge=1)]


class Schema(Struct):
    layers: Annotated[int, Meta(ge=1, le=100)]
    eps: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    ids: list[int] | int | None = None
    inner: Inner | None = None
    names: dict[str, int] = {}


def refused(path: Path, *words: str, schema: Any = Schema) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_json(path, schema)
    message = str(caught.value)
    assert message.count("\n") == 0 and len(message) < len(str(path)) + 200
    for word in (str(path), *words):
        assert word in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ["layers is missing"]),
        ([], ["its JSON is []", "expected object"]),
        ({"layers": "2"}, ["layers is '2'", "expected int"]),
        ({"layers": True}, ["layers is True", "expected int"]),
        ({"layers": 2.0}, ["layers is 2.0", "expected int"]),
        ({"layers": None}, ["layers is None", "expected int"]),
        ({"layers": 10**40}, ["layers is 1000", "expected int <= 100"]),
        ({"layers": 2, "eps": math.nan}, ["eps is nan", "expected float > 0"]),
        ({"layers": 2, "eps": math.inf}, ["eps is inf", "expected float < 1"]),
        ({"layers": 2, "eps": 10**400}, ["eps is 1000", "a smaller number"]),
        ({"layers": 2, "ids": [1, "2"]}, ["ids[1] is '2'", "expected int"]),
        ({"layers": 2, "inner": {"size": 0}}, ["inner.size is 0", "expected int >= 1"]),
        ({"layers": 2, "inner": {}}, ["inner.size is missing"]),
        ({"layers": 2, "inner": {"size": 1, "other": 2}}, ["inner.other is not known"]),
        ({"layers": 2, "names": {"a.b": "c"}}, ["names[...] is str, expected int"]),
        ({"layers": "\x1b[2J" * 100}, ["layers is '\\x1b[2J", "..."]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(tmp_path: Path, values: Any, words: list[str]) -> None:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(values))
    refused(path, *words)


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "Expecting value"),
        (b'{"layers": 2', "line 1 column 13"),
        (b'\xef\xbb\xbf{"layers": 2}', "byte order mark"),
        ('{"layers": 2}'.encode("utf-16"), "UTF-16"),
        ('{"layers": 2}'.encode("utf-16-be"), "UTF-16"),
        ('{"layers": 2}'.encode("utf-32"), "UTF-32"),
        (b'{"layers": "\xff"}', "byte 12"),
        (b'{"layers": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"layers": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested"),
        (b'{"layers": ' + b"[" * 100 + b"]" * 100 + b"}", "nested"),
        (b'{"layers": "\\ud83d\\ude00 \\ud83d"}', r"'\ud83d', half a character"),
        (b'{"layers": 2, "layers": 3}', "'layers' appears twice"),
    ],
    ids=str,
)
def test_what_is_no_json_in_utf8_is_refused(tmp_path: Path, raw: bytes, word: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(raw)
    refused(path, word)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "large").write_bytes(b" " * 100)
    refused(tmp_path / "fifo", "a FIFO, expected a file")
    refused(tmp_path, "a directory, expected a file")
    refused(Path("/dev/zero"), "a device")
    refused(tmp_path / "absent", "is missing")
    refused(tmp_path / "loop", "cannot be read")
    refused(tmp_path / ("x" * 300), "cannot be read")
    with pytest.raises(CheckpointError, match="has 100 bytes; such a file has at most 99"):
        read_object(tmp_path / "large", max_bytes=99)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to the superuser")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text("{}")
    path.chmod(0)
    refused(path, "Permission denied")


def test_right_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text('{"layers": 2, "eps": 1e-5, "ids": [1], "other": [[{}]], "inner": {"size": 3}}')
    assert read_json(path, Schema) == Schema(2, 1e-5, [1], Inner(3))
    assert read_object(path)["other"] == [[{}]]
    assert read_text(path).startswith("{")


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_no_bytes_give_anything_but_a_value_or_the_error(raw: bytes) -> None:
    with suppress(CheckpointError):
        parse(raw, "some.json")


def test_values_are_shown_in_one_short_line() -> None:
    assert shown("eps") == "'eps'"
    assert shown("\ud800\n") == r"'\ud800\n'"
    assert len(shown([0] * 1000)) == 80
    assert shown(10**5000) == "a int"
