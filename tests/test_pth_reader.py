"""Files of torch.save: what they hold is found, and nothing in them ever runs."""

import contextlib
import io
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.pth_reader import read_bin_checkpoint, read_consolidated, read_state_dict
from converters.safetensors_reader import read_rows
from converters.torch_pickle import MAX_PROGRAM
from llama_jax.checkpoint.store import CheckpointError
from tests import torch_files as torch_file
from tests.torch_files import group, name, number, program, save, saved, tensor, text, with_program

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
TWELVE = np.arange(12, dtype=F32)
ARRAYS = {
    "odd": np.arange(15, dtype=np.int8).reshape(5, 3),  # what follows is unaligned
    "matrix": np.linspace(-2, 2, 12).reshape(4, 3).astype(BF16),
    "codes": np.arange(256, dtype=np.uint8).view(E4M3).reshape(2, 128),
    "scalar": np.array(0.25, F32),
    "empty": np.zeros((0, 4), np.float16),
}
NEW_DTYPES = [
    np.dtype(getattr(ml_dtypes, each))
    for each in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu")
]


def put(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(data)
    return path


def refused(tmp_path: Path, data: bytes, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        read_state_dict(put(tmp_path, data))
    assert "consolidated.00.pth" in str(error.value)


def whole(path: Path, key: str) -> np.ndarray:
    stored = read_state_dict(path)[key]
    return read_rows(stored, 0, (stored.shape or (1,))[0])


def test_every_byte_is_found_whatever_the_alignment(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", ARRAYS)
    tensors = read_state_dict(path)
    assert list(tensors) == list(ARRAYS)
    for key, array in ARRAYS.items():
        read = whole(path, key)
        assert (read.shape, read.dtype, read.tobytes()) == (
            array.shape, array.dtype, array.tobytes(),
        )  # fmt: skip
    assert read_rows(tensors["odd"], 2, 4).tolist() == ARRAYS["odd"][2:4].tolist()


@pytest.mark.parametrize("dtype", [*torch_file.STORAGES, *NEW_DTYPES], ids=str)
def test_every_dtype_of_the_table_is_read(tmp_path: Path, dtype: np.dtype) -> None:
    path = save(tmp_path / "x.pth", {"a": np.ones(4, dtype)})
    assert whole(path, "a").tolist() == np.ones(4, dtype).tolist()


def test_views_share_a_storage_and_begin_where_they_say(tmp_path: Path) -> None:
    entries = {
        "all": tensor("0", F32, (3, 4)),
        "rows": tensor("0", F32, (2, 4), length=12, offset=4),
        "column": tensor("0", F32, (3, 1, 1), length=12, offset=2, strides=(1, 77, 5)),
        "none": tensor("0", F32, (0, 4), length=12, strides=(9, 9)),
    }
    path = put(tmp_path, with_program(program(entries), s0=TWELVE.tobytes()))
    assert whole(path, "rows").tolist() == TWELVE.reshape(3, 4)[1:].tolist()
    assert whole(path, "column").ravel().tolist() == [2, 3, 4]
    assert whole(path, "none").shape == (0, 4)


def test_parameters_and_state_dicts_of_modules(tmp_path: Path) -> None:
    """What modules are saved as: an OrderedDict of parameters, with the attribute _metadata."""
    parameter = (
        name("torch._utils._rebuild_parameter")
        + group(tensor("0", F32, (3, 4)), b"\x88", torch_file.EMPTY_ORDERED_DICT)
        + b"R"
    )
    metadata = b"}" + text("_metadata") + b"}" + text("") + b"}" + text("version") + b"K\x01sss"
    module = torch_file.EMPTY_ORDERED_DICT + text("w") + parameter + b"s" + metadata + b"b."
    path = put(tmp_path, with_program(module, s0=TWELVE.tobytes()))
    assert whole(path, "w").tolist() == TWELVE.reshape(3, 4).tolist()


class FloatStorage:
    """Stands for torch's."""


def _rebuild_tensor_v2(*arguments: Any) -> None:
    """Stands for that of torch._utils."""


class Tensor:
    def __reduce__(self) -> Any:
        return _rebuild_tensor_v2, (FloatStorage(), 0, (3, 4), (4, 1), False, OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return ("storage", FloatStorage, "0", "cpu", 12) if isinstance(obj, FloatStorage) else None


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_can_save_with(
    tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stand_in, module in ((FloatStorage, "torch"), (_rebuild_tensor_v2, "torch._utils")):
        contents = SimpleNamespace(**{stand_in.__name__: stand_in})
        monkeypatch.setitem(sys.modules, module, contents)  # type: ignore[arg-type]
        monkeypatch.setattr(stand_in, "__module__", module)
    file = io.BytesIO()
    Pickler(file, protocol).dump({key: Tensor() for key in "abc"})
    path = put(tmp_path, with_program(file.getvalue(), s0=TWELVE.tobytes()))
    assert list(read_state_dict(path)) == ["a", "b", "c"]
    assert whole(path, "c").tolist() == TWELVE.reshape(3, 4).tolist()


class Attack:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


def call(dotted: str, *arguments: bytes) -> bytes:
    return name(dotted) + group(*arguments) + b"R"


TOUCH = text("touch canary")
ATTACKS = {
    "os.system": call("os.system", TOUCH),
    "posix.system": call("posix.system", TOUCH),
    "eval": call("builtins.eval", text("open('canary', 'w')")),
    "__builtin__.eval": call("__builtin__.eval", text("open('canary', 'w')")),
    "getattr": call("builtins.getattr", name("os.path"), text("sys")),
    "torch.load": call("torch.load", text("other.pth")),
    "torch.hub": call("torch.hub.load", text("org/evil"), text("model")),
    "a dotted attribute": b"cos\npath.os.system\n" + group(TOUCH) + b"R",
    "a name that begins like one of ours": call("torch.FloatStorage.__init__", TOUCH),
    "a class whose module looks harmless": call("collections.OrderedDict.fromkeys", text("a")),
    "torch._utils": call("torch._utils._import_dotted_name", text("os.system")),
    "nested in the arguments of a tensor": (
        name("torch._utils._rebuild_tensor_v2") + group(call("os.system", TOUCH)) + b"R"
    ),
    "in the hooks of a parameter": (
        name("torch._utils._rebuild_parameter")
        + group(tensor("0", F32, (3, 4)), b"\x88", call("os.system", TOUCH))
        + b"R"
    ),
    "through a memo": b"cos\nsystem\nq\x01" + b"0" + b"h\x01" + group(TOUCH) + b"R",
    "by a stack global": text("os") + text("system") + b"\x93" + group(TOUCH) + b"R",
    "as an attribute": (
        torch_file.EMPTY_ORDERED_DICT + b"}" + text("x") + call("os.system", TOUCH) + b"sb"
    ),
    "as a persistent id": call("os.system", TOUCH) + b"Q",
    "a new object": name("os.system") + group(TOUCH) + b"\x81",
    "an instance": b"(" + TOUCH + b"ios\nsystem\n",
    "an object": b"(" + name("os.system") + TOUCH + b"o",
    "an extension code": b"\x82\x01",
    "a tensor subclass": call("torchao.dtypes.AffineQuantizedTensor.__new__"),
    "a tensor with attributes": call("torch._tensor._rebuild_from_type_v2"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_file_runs(
    tmp_path: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        tmp_path,
        with_program(program({"a": ATTACKS[attack]}), s0=TWELVE.tobytes()),
        r"asks for [\w.]+, which is not run|uses (NEWOBJ|INST|OBJ|EXT1|POP), of which",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["consolidated.00.pth"]


@pytest.mark.parametrize("protocol", range(6))
def test_what_the_pickle_module_writes_for_an_attack_is_refused(
    tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps({"a": Attack(os.system, "touch canary")}, protocol)
    refused(tmp_path, with_program(evil), r"(os|posix).system, which is not run|of which no state")
    assert not (tmp_path / "canary").exists()


BAD_PROGRAMS = {
    "a list": (b"\x80\x02].", "a dictionary of tensors is expected"),
    "a number": (b"\x80\x02K\x01.", "a dictionary of tensors is expected"),
    "a nested dictionary": (program({"model": b"}"}), "'model' is an object of type dict"),
    "a number for a name": (b"\x80\x02}K\x01" + tensor("0", F32, (3, 4)) + b"s.", "1 is an object"),
    "a name twice": (b"\x80\x02}" + 2 * (text("a") + b"N" + b"s") + b".", "'a' appears twice"),
    "an unhashable key": (b"\x80\x02}}Ns.", "damaged"),
    "an odd number of items": (b"\x80\x02}(" + text("a") + b"u.", "damaged"),
    "no mark": (b"\x80\x02}u.", "damaged"),
    "an empty stack": (b"\x80\x02.", "damaged"),
    "two results": (b"\x80\x02}}.", "damaged"),
    "an unknown memo": (b"\x80\x02h\x07.", "damaged"),
    "an unknown instruction": (b"\x80\x02\xff.", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
    "nothing": (b"", "damaged"),
    "an item added to a tensor": (tensor("0", F32, (3, 4)) + text("a") + b"Ns.", "damaged"),
    "attributes of a tensor": (tensor("0", F32, (3, 4)) + b"}b.", "sets attributes of"),
    "a text that is called": (program({"a": text("a") + b")R"}), "calls an object of type str"),
    "a storage that is called": (
        program({"a": name("torch.FloatStorage") + b")R"}),
        "calls torch.FloatStorage with",
    ),
    "a persistent id of another kind": (
        program({"a": group(text("module"), text("x.py"), text("src")) + b"Q"}),
        "not a storage",
    ),
    "a storage of a class that is none": (
        program({"a": group(text("storage"), name("collections.OrderedDict"), text("0"),
                            text("cpu"), number(12)) + b"Q"}),
        "not a storage",
    ),
    "another dtype for the bytes": (
        program({"a": tensor("0", E4M3, (3, 4)).replace(b"float8_e4m3fn", b"FloatStorage")}),
        "damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PROGRAMS)
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path, case: str) -> None:
    pickled, match = BAD_PROGRAMS[case]
    refused(tmp_path, with_program(pickled, s0=TWELVE.tobytes()), match)


BAD_TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "transposed": ({"strides": (1, 3)}, r"a is a view with shape \[3, 4\] and strides \[1, 3\]"),
    "expanded": ({"strides": (0, 1)}, "a is a view"),
    "fewer strides": ({"strides": (1,)}, "a is a view"),
    "beyond its storage": ({"shape": (4, 4), "length": 12}, "a reaches beyond its storage of 48"),
    "offset beyond": ({"offset": 1, "length": 12}, "a reaches beyond its storage"),
    "negative offset": ({"offset": -1}, "of a are not lengths"),
    "negative shape": ({"shape": (-3, 4), "length": 12}, "of a are not lengths"),
    "enormous shape": ({"shape": (2**60, 4), "length": 12}, "of a are not lengths"),
    "many dimensions": ({"shape": (1,) * 9, "length": 12}, "of a are not lengths"),
    "another length": ({"length": 13}, "the storage of a has 48 bytes, the pickle says 52"),
    "no storage": ({"key": "1"}, "the storage '1' of a is missing"),
    "a storage elsewhere": ({"key": "../data.pkl"}, "the storage '../data.pkl' of a is missing"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_tensor_that_is_not_where_it_says_is_refused(tmp_path: Path, case: str) -> None:
    changes, match = BAD_TENSORS[case]
    entry = tensor(**({"key": "0", "dtype": F32, "shape": (3, 4)} | changes))
    refused(tmp_path, with_program(program({"a": entry}), s0=TWELVE.tobytes()), match)


def rewritten(tmp_path: Path, **changes: Any) -> bytes:
    """The archive of ARRAYS written anew, with other members or compression."""
    path = put(tmp_path, saved(ARRAYS))
    with zipfile.ZipFile(path) as opened:
        members = {each.partition("/")[2]: opened.read(each) for each in opened.namelist()}
    return torch_file.archive(members | changes.get("members", {}), **changes.get("named", {}))


def test_archives_of_other_programs_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, rewritten(tmp_path, members={"a/data.pkl": b"."}), "needs one data.pkl")
    refused(tmp_path, rewritten(tmp_path, members={"constants.pkl": b"."}), "TorchScript")
    refused(tmp_path, rewritten(tmp_path, members={"byteorder": b"big"}), "big-endian")
    refused(tmp_path, torch_file.archive({"word/document.xml": b"<a/>"}), "not from torch.save")
    bomb = program({"a": b"N" * (MAX_PROGRAM + 1)})
    refused(tmp_path, with_program(bomb), "has a pickle of .* bytes: no state dict")


def test_compressed_and_repeated_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"0" * 100_000_000)
    with pytest.raises(CheckpointError, match=r"a/data.pkl is compressed"):
        read_state_dict(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b".")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("a/data.pkl", b".")
    with pytest.raises(CheckpointError, match=r"the archive has a/data.pkl twice"):
        read_state_dict(path)


def test_a_member_that_the_directory_does_not_point_to_is_refused(tmp_path: Path) -> None:
    data = saved({"a": TWELVE, "b": TWELVE})
    at = data.index(b"archive/data/0")
    refused(tmp_path, data[:at] + b"archive/data/9" + data[at + 14 :], "data/0 does not lie where")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",  # torch.save before 1.6
        b"sys_info\0" * 60,  # the tar of 2016
        pickle.dumps({"a": 1}),
        saved(ARRAYS)[:-30],
        saved(ARRAYS)[: len(saved(ARRAYS)) // 2],
    ],
    ids=["empty", "legacy", "tar", "pickle", "truncated", "half"],
)
def test_other_formats_are_refused_with_what_to_do(tmp_path: Path, data: bytes) -> None:
    refused(tmp_path, data, "is not a zip archive.*torch.save|is damaged.*Download it again")


@settings(max_examples=150, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3),
    in_program=st.booleans(),
    cut=st.integers(0, 10**6) | st.none(),
)
def test_no_damaged_file_gives_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory,
    edits: list[tuple[int, int]],
    in_program: bool,
    cut: int | None,
) -> None:
    """Of the pickle alone, with a right checksum, or of any byte of the archive."""
    entries = {key: tensor(str(i), a.dtype, a.shape) for i, (key, a) in enumerate(ARRAYS.items())}
    data = bytearray(program(entries) if in_program else saved(ARRAYS))
    for position, byte in edits:
        data[position % len(data)] = byte
    if cut is not None:
        del data[cut % len(data) :]
    storages = {f"s{i}": array.tobytes() for i, array in enumerate(ARRAYS.values())}
    path = put(
        tmp_path_factory.mktemp("damaged"),
        with_program(bytes(data), **storages) if in_program else bytes(data),
    )
    try:
        tensors = read_state_dict(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    assert all(stored.offset + stored.nbytes <= size for stored in tensors.values())


@settings(max_examples=150, deadline=None)
@given(pickled=st.binary(max_size=60) | st.lists(st.sampled_from(
    [b"}", b")", b"]", b"(", b"t", b"u", b"s", b"a", b"e", b"R", b"b", b"Q", b"q\x00", b"h\x00",
     b"\x85", b"\x86", b"\x94", b"\x93", b"N", b"K\x01", text("storage"), b"\x88",
     name("torch.FloatStorage"), name("collections.OrderedDict"),
     name("torch._utils._rebuild_tensor_v2"), name("torch._utils._rebuild_parameter")]
).map(bytes), max_size=40).map(b"".join))  # fmt: skip
def test_no_pickle_gives_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, pickled: bytes
) -> None:
    path = put(tmp_path_factory.mktemp("pickle"), with_program(pickled + b"."))
    with contextlib.suppress(CheckpointError):
        assert not read_state_dict(path)  # nothing but an empty dictionary can come of these


def test_pytorch_model_bin_whole_or_in_shards(tmp_path: Path) -> None:
    save(tmp_path / "pytorch_model.bin", ARRAYS)
    assert read_bin_checkpoint(tmp_path).keys() == ARRAYS.keys()
    (tmp_path / "pytorch_model.bin").unlink()
    weight_map = {}
    for shard in (1, 2):
        file = f"pytorch_model-0000{shard}-of-00002.bin"
        part = {key: ARRAYS[key] for key in sorted(ARRAYS)[shard - 1 :: 2]}
        weight_map |= dict.fromkeys(part, file)
        save(tmp_path / file, part)
    assert read_bin_checkpoint(tmp_path).keys() == ARRAYS.keys()
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert read_bin_checkpoint(tmp_path).keys() == ARRAYS.keys()
    (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00001-of-00002.bin is missing"):
        read_bin_checkpoint(tmp_path)


def test_ranks_are_read_in_order_and_a_missing_one_is_named(tmp_path: Path) -> None:
    for rank in range(11):
        save(tmp_path / f"consolidated.{rank:02d}.pth", {"norm.weight": np.full(2, rank, F32)})
        save(tmp_path / f"fp8_scales_{rank}.pt", {f"1_feed_forward.w1_{rank}": np.ones(2, F32)})
    (tmp_path / "checklist.chk").write_text("0123  consolidated.00.pth\n")
    tensors = read_consolidated(tmp_path)
    assert list(tensors)[9:12] == [
        "consolidated.09/norm.weight",
        "consolidated.10/norm.weight",
        "fp8_scales_0/1_feed_forward.w1_0",
    ]
    assert tensors["consolidated.10/norm.weight"].name == "consolidated.10/norm.weight"
    (tmp_path / "consolidated.03.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated.04.pth but no file of rank 3"):
        read_consolidated(tmp_path)


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save(tmp_path / "elsewhere.pth", ARRAYS)
    for file, read in (
        ("consolidated.00.pth", read_consolidated),
        ("pytorch_model.bin", read_bin_checkpoint),
    ):
        (inside / file).symlink_to(tmp_path / "elsewhere.pth")
        with pytest.raises(CheckpointError, match="outside the checkpoint"):
            read(inside)


@pytest.mark.parity
def test_what_torch_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(60, dtype=torch.float32).reshape(5, 12)
    state = {
        "base": base,
        "rows": base[1:3],
        "parameter": torch.nn.Parameter(base[2:].clone()),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "bf16": base.to(torch.bfloat16),
        "codes": base.to(torch.float8_e4m3fn),
        "int": torch.arange(7),
        "bool": torch.tensor([True, False]),
    }
    for protocol in (2, 4):
        torch.save(state, tmp_path / "x.pth", pickle_protocol=protocol)
        assert list(read_state_dict(tmp_path / "x.pth")) == list(state)
        for key, value in state.items():
            read = whole(tmp_path / "x.pth", key).astype(np.float64)
            assert read.shape == tuple(value.shape)
            np.testing.assert_array_equal(read, value.detach().double().numpy())
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "m.pth")
    np.testing.assert_array_equal(
        whole(tmp_path / "m.pth", "weight"), module.weight.detach().numpy()
    )
    for spoilt, match in (
        (base.t(), "is a view"),
        (module, "asks for torch.nn.modules.linear.Linear"),
    ):
        torch.save({"a": spoilt}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=match):
            read_state_dict(tmp_path / "x.pth")
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6"):
        read_state_dict(tmp_path / "x.pth")
