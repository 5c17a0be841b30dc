"""Files like those of `torch.save`, and pickles that it never writes, built byte by byte."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(dtype): f"{name}Storage"
    for name, dtype in {
        "Double": np.float64, "Float": np.float32, "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16, "Long": np.int64, "Int": np.int32, "Short": np.int16,
        "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
    }.items()
}  # fmt: skip
EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def group(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def numbers(values: tuple[int, ...]) -> bytes:
    return group(*map(number, values))


def tensor(
    key: str,
    dtype: np.dtype,
    shape: tuple[int, ...],
    *,
    length: int | None = None,
    offset: int = 0,
    strides: tuple[int, ...] | None = None,
) -> bytes:
    """Return the instructions that make one tensor. length: elements of its storage."""
    typed = dtype in STORAGES
    size = int(np.prod(shape)) * (1 if typed else dtype.itemsize)
    kind = f"torch.{STORAGES[dtype]}" if typed else "torch.storage.UntypedStorage"
    storage = group(
        text("storage"),
        name(kind),
        text(key),
        text("cpu"),
        number(size if length is None else length),
    )
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    arguments = [
        storage + b"Q", number(offset), numbers(shape), numbers(strides), b"\x89",
        EMPTY_ORDERED_DICT,
    ]  # fmt: skip
    if typed:
        return name("torch._utils._rebuild_tensor_v2") + group(*arguments) + b"R"
    arguments.append(name(f"torch.{dtype.name}"))
    return name("torch._utils._rebuild_tensor_v3") + group(*arguments) + b"R"


def program(entries: Mapping[str, bytes]) -> bytes:
    """Return a pickle of a dictionary, from the instructions that make its values."""
    items = b"".join(text(key) + value for key, value in entries.items())
    return b"\x80\x02}(" + items + b"u."


def archive(members: Mapping[str, bytes], root: str = "archive") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for member, data in members.items():
            opened.writestr(f"{root}/{member}", data)
    return file.getvalue()


def with_program(pickle: bytes, **storages: bytes) -> bytes:
    """Return an archive with any pickle. storages: by their keys, with a prefix s."""
    data = {f"data/{key.removeprefix('s')}": raw for key, raw in storages.items()}
    return archive({"data.pkl": pickle, "byteorder": b"little", **data, "version": b"3\n"})


def saved(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the file that `torch.save` writes for a dictionary of tensors. Equal tensors share a
    storage."""
    distinct = {id(array): array for array in arrays.values()}
    keys = {each: str(i) for i, each in enumerate(distinct)}
    entries = {key: tensor(keys[id(a)], a.dtype, a.shape) for key, a in arrays.items()}
    storages = {f"s{keys[each]}": array.tobytes() for each, array in distinct.items()}
    return with_program(program(entries), **storages)


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    path.write_bytes(saved(arrays))
    return path
