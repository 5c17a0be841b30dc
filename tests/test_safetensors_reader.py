import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.finite import has_nonfinite
from converters.safetensors_reader import DTYPES, read_checkpoint, read_header, read_rows
from llama_jax.checkpoint.store import CheckpointError
from tests import tiny_checkpoints as tiny

ARRAYS = {
    "a": np.arange(15, dtype=np.int8).reshape(5, 3),  # odd length: what follows is unaligned
    "b": np.linspace(-2, 2, 12).reshape(4, 3).astype(ml_dtypes.bfloat16),
    "c": np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(2, 128),
    "d": np.array(0.25, np.float32),
    "e": np.zeros((0, 4), np.float16),
}


def save(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    return path


def refused(tmp_path: Path, data: bytes, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        read_header(save(tmp_path, data))
    assert "model.safetensors" in str(error.value)


def test_every_byte_is_read_whatever_the_alignment(tmp_path: Path) -> None:
    tensors = read_header(save(tmp_path, tiny.safetensors_bytes(ARRAYS)))
    assert tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        read = read_rows(tensors[name], 0, array.shape[0] if array.shape else 1)
        assert (read.shape, read.dtype) == (array.shape, array.dtype)
        assert read.tobytes() == array.tobytes()
    assert read_rows(tensors["a"], 2, 4).tolist() == ARRAYS["a"][2:4].tolist()
    with pytest.raises(IndexError, match="a has 5 rows"):
        read_rows(tensors["a"], 4, 6)


def test_every_dtype_of_the_table_is_read(tmp_path: Path) -> None:
    arrays = {tag: np.ones(4, dtype) for tag, dtype in DTYPES.items()}
    tensors = read_header(save(tmp_path, tiny.safetensors_bytes(arrays)))
    assert {tag: tensor.dtype for tag, tensor in tensors.items()} == dict(DTYPES)


@pytest.mark.parametrize("cut", [0, 5, 8, 40, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    refused(tmp_path, tiny.safetensors_bytes(ARRAYS)[:cut], "truncated")


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, tiny.safetensors_bytes(ARRAYS) + b"x", "no tensor owns")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("dtype", "F4", "b: dtype 'F4' is not known"),
        ("dtype", "F32", "b: F32 .* takes 48 bytes"),
        ("shape", [4, -3], "malformed"),
        ("shape", [True, 12], "malformed"),
        ("data_offsets", [16, 40], "back to back"),
        ("data_offsets", [0, 24], "back to back"),
        ("data_offsets", [15], "malformed"),
        ("data_offsets", [2**62, 2**62 + 24], "back to back"),
        ("data_offsets", [2**70, 2**70 + 24], "malformed"),
        ("data_offsets", [15.0, 39.0], "malformed"),
        ("data_offsets", [False, 24], "malformed"),
        ("shape", [0, 2**62, 2**62], "malformed"),
        ("shape", [1] * 40, "malformed"),
        ("dtype", ["BF16"], "is not known"),
        ("more", 1, "expected dtype, shape and data_offsets"),
    ],
)
def test_a_spoilt_header_is_refused(tmp_path: Path, key: str, value: object, match: str) -> None:
    def spoil(header: dict) -> None:
        header["b"][key] = value

    refused(tmp_path, tiny.safetensors_bytes(ARRAYS, spoil), match)


NO_DESCRIPTION = {
    "no object": b"[]",
    "cut short": b"{",
    "no UTF-8": b"\xff\xfe",
    "a number": b'{"a": 1}',
    "nested deeply": b"[" * 20_000,
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("case", NO_DESCRIPTION)
def test_a_header_that_is_no_description_is_refused(tmp_path: Path, case: str) -> None:
    refused(tmp_path, file_of(NO_DESCRIPTION[case]), "JSON|UTF-8|expected dtype")


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def test_a_name_twice_in_one_header_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, file_of(b'{"a": {}, "a": {}}'), "'a' appears twice")
    many = ",".join(f'"{i}": 0' for i in range(100_000))  # quadratic search would take minutes
    refused(tmp_path, file_of(f'{{{many}, "99999": 0}}'.encode()), "'99999' appears twice")


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "\x1b[2J"])
def test_a_name_that_cannot_be_printed_is_refused(tmp_path: Path, name: str) -> None:
    arrays = {name: ARRAYS["d"]}
    match = "cannot be the name of a tensor|half a character"
    refused(tmp_path, tiny.safetensors_bytes(arrays), match)


def test_a_header_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, (2**34).to_bytes(8, "little"))
    os.truncate(path, 2**35)
    with pytest.raises(CheckpointError, match="a header of 17179869184 bytes"):
        read_header(path)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from([*DTYPES, "F4", "__metadata__", "\ud800", "a"])
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4
        )
    ),
    max_leaves=6,
)
NUMBERS = st.lists(st.integers(0, 300) | st.integers(0, 2**66), max_size=4)
KEYS = st.sampled_from(["dtype", "shape", "data_offsets", "more"])
EDITS = st.lists(st.tuples(st.sampled_from([*ARRAYS, "new"]), KEYS, VALUES | NUMBERS), max_size=3)


def read_or_refused(directory: Path) -> None:
    """Only `CheckpointError` comes out of a file, or all of its tensors, which are no more."""
    message, tensors = "", {}
    try:
        tensors = read_checkpoint(directory)
    except CheckpointError as error:
        message = str(error)
    assert len(message) < 2000  # it can be read, whatever the file holds
    size = sum(path.stat().st_size for path in directory.iterdir())
    read = [read_rows(each, 0, each.shape[0] if each.shape else 1) for each in tensors.values()]
    assert sum(array.nbytes for array in read) <= size


@given(edits=EDITS, top=st.none() | VALUES)
def test_no_lying_header_gives_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, edits: list, top: object
) -> None:
    def spoil(header: dict) -> None:
        for name, key, value in edits:
            header.setdefault(name, {})[key] = value
        if top is not None:
            header["b"] = top

    path = save(tmp_path_factory.mktemp("lying"), tiny.safetensors_bytes(ARRAYS, spoil))
    read_or_refused(path.parent)


@given(
    edits=st.lists(st.tuples(st.integers(0, 450), st.binary(max_size=9)), min_size=1, max_size=4),
    cut=st.integers(0, 600),
)
def test_no_damaged_file_gives_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, bytes]], cut: int
) -> None:
    data = bytearray(tiny.safetensors_bytes(ARRAYS))
    for position, replacement in edits:
        data[position : position + len(replacement)] = replacement
    del data[len(data) - cut // 10 :]  # often by nothing at all
    read_or_refused(save(tmp_path_factory.mktemp("damaged"), bytes(data)).parent)


@given(weight_map=VALUES | st.dictionaries(st.sampled_from([*ARRAYS]), st.text(max_size=6)))
def test_no_lying_index_gives_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, weight_map: object
) -> None:
    directory = tmp_path_factory.mktemp("index")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (directory / "a").write_bytes(tiny.safetensors_bytes(ARRAYS))
    read_or_refused(directory)


@pytest.mark.parametrize("name", ["nul\0", "x" * 5000, "loop"])
def test_a_shard_whose_name_cannot_be_opened_is_refused(tmp_path: Path, name: str) -> None:
    directory = tiny.write(tmp_path, tiny.dense(), shards=2)
    (directory / "loop").symlink_to("loop")
    edit_index(directory, **{"model.norm.weight": name})
    with pytest.raises(CheckpointError):
        read_checkpoint(directory)


def test_shards_with_and_without_an_index(tmp_path: Path) -> None:
    arrays = tiny.dense()
    tiny.write(tmp_path, arrays, shards=3)
    assert read_checkpoint(tmp_path).keys() == arrays.keys()
    (tmp_path / "model.safetensors.index.json").unlink()
    assert read_checkpoint(tmp_path).keys() == arrays.keys()


@pytest.mark.parametrize("indexed", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, indexed: bool) -> None:
    tiny.write(tmp_path, tiny.dense(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    if not indexed:
        (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is missing"):
        read_checkpoint(tmp_path)


def edit_index(directory: Path, **changes: str) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "", "a/b"])
def test_an_index_that_leads_out_of_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    directory = tiny.write(tmp_path / "model", tiny.dense(), shards=2)
    (tmp_path / "secret.safetensors").write_bytes(tiny.safetensors_bytes(ARRAYS))
    edit_index(directory, **{"model.norm.weight": name})
    with pytest.raises(CheckpointError, match="a plain file name is expected"):
        read_checkpoint(directory)


def test_an_index_that_differs_from_the_shards_is_refused(tmp_path: Path) -> None:
    tiny.write(tmp_path, tiny.dense(), shards=2)
    constant = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_index(tmp_path, **{constant: "model-00001-of-00002.safetensors"})
    assert read_checkpoint(tmp_path).keys() == tiny.dense().keys()
    edit_index(tmp_path, extra="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"lists extra in .*, which does not hold it"):
        read_checkpoint(tmp_path)
    edit_index(tmp_path, **{"lm_head.weight": "model-00002-of-00002.safetensors"})
    with pytest.raises(
        CheckpointError, match=r"holds lm_head.weight, which .* lists in model-00002"
    ):
        read_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        (tmp_path / name).write_bytes(tiny.safetensors_bytes(ARRAYS))
    with pytest.raises(CheckpointError, match="is in both"):
        read_checkpoint(tmp_path)


def test_links_into_the_hub_cache_are_read_and_others_refused(tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0123").write_bytes(tiny.safetensors_bytes(ARRAYS))
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert read_checkpoint(snapshot).keys() == ARRAYS.keys()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").symlink_to(blobs / "0123")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        read_checkpoint(elsewhere)


def test_a_directory_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        CheckpointError, match=r"no safetensors weights; it holds pytorch_model.bin"
    ):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_has_nonfinite_agrees_with_isfinite(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    bits = np.arange(256 if dtype.itemsize == 1 else 65536).astype(f"u{min(dtype.itemsize, 2)}")
    if dtype.itemsize == 4:
        bits = bits.astype(np.uint32) << 16
    values = bits.view(dtype)
    bad = ~np.isfinite(values.astype(np.float32))
    assert not has_nonfinite(values[~bad])
    padding = np.zeros(37, dtype)
    for value in values[bad][:300]:
        for place in (0, 3, 36):  # in whole 64-bit words and in the rest
            padding[place] = value
            assert has_nonfinite(padding)
            padding[place] = 0
