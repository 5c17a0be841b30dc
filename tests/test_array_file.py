import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from llama_jax.checkpoint import array_file

CASES = [
    ("float8_e4m3fn", (2048, 256)),  # 16 x 2 chunks
    ("bfloat16", (2049, 256)),  # rows that cannot be cut
    ("float16", (12, 2048)),
    ("float32", (5, 3)),
    ("float32", (4096,)),
    ("float32", (1,)),
    ("float32", ()),
]


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    return np.random.default_rng(0).integers(-99, 99, shape).astype(dtype)


def write(directory: Path, array: np.ndarray, step: int) -> str:
    pieces = [array[i : i + step] for i in range(0, len(array), step)] if array.ndim else [array]
    return array_file.write_array(directory, array.dtype, array.shape, pieces, lambda size: None)


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("step", [1000, 1 << 20])
def test_what_is_written_is_read_by_us_and_by_tensorstore(
    tmp_path: Path, name: str, shape: tuple[int, ...], step: int
) -> None:
    array, directory = values(name, shape), tmp_path / "a"
    digest = write(directory, array, step)
    assert digest == hashlib.sha256(array.tobytes()).hexdigest()
    rows = shape[0] if shape else 1
    for start, stop in ((0, rows), (rows // 3, rows - rows // 5)):
        read = array_file.read_rows(directory, array.dtype, shape, start, stop)
        expected = array[start:stop] if shape else array
        assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
        assert read.tobytes() == expected.tobytes()
    matrix = array.reshape(*(*shape, 1, 1)[:2])
    cuts = [(slice(n // 5, n - n // 3), slice(n // 2, None), slice(None)) for n in matrix.shape]
    for part in itertools.product(*cuts):
        read = array_file.read_part(directory, array.dtype, shape, part)
        assert read.shape == matrix[part].shape and read.tobytes() == matrix[part].tobytes()
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{directory}/"}}
    theirs = ts.open(spec).result().read().result()
    assert theirs.dtype == array.dtype and theirs.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((4096, 14336), (256, 896)),
        ((128256, 4096), (8016, 256)),
        ((512, 2048), (128, 128)),  # 16 parts of the rows would be too thin
        ((127, 130), (127, 130)),
        ((96, 53248 // 16), (96, 208)),
        ((), ()),
    ],
)
def test_axes_are_cut_into_as_many_as_sixteen(shape: tuple, chunk: tuple) -> None:
    assert array_file.chunk_shape(shape) == chunk


def test_an_array_is_held_only_with_its_own_bytes(tmp_path: Path) -> None:
    array, directory = values("bfloat16", (512, 256)), tmp_path / "a"
    digest = write(directory, array, 100)
    counted: list[int] = []
    held = (directory, array.dtype, array.shape)
    assert array_file.holds(*held, digest, counted.append) and sum(counted) == array.nbytes
    assert not array_file.holds(*held, "0" * 64, counted.append)
    assert not array_file.holds(directory, array.dtype, (256, 512), digest, counted.append)
    assert not array_file.holds(directory / "b", *held[1:], digest, counted.append)
    data = bytearray((directory / "0.0").read_bytes())
    data[1234] ^= 0x80
    (directory / "0.0").write_bytes(data)
    array_file.check_layout(*held)
    assert not array_file.holds(*held, digest, counted.append)
    assert write(directory, array, 512) == digest  # made anew
    assert array_file.holds(*held, digest, counted.append)


def test_a_layout_of_somebody_else_is_refused(tmp_path: Path) -> None:
    array = values("float32", (256, 256))
    metadata = {"shape": [256, 256], "data_type": "float32"}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{tmp_path / 'a'}/"},
        "metadata": metadata,
    }
    ts.open(spec, create=True).result().write(array).result()
    with pytest.raises(ValueError, match=r"a is stored as float32 \[256, 256\], expected"):
        array_file.check_layout(tmp_path / "a", array.dtype, array.shape)


def bytes_read(action: Callable[[], object]) -> int:
    """What this process asks the system to read meanwhile."""

    def so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = so_far()
    action()
    return so_far() - before


def test_a_part_of_the_rows_or_of_the_columns_is_read_by_itself(tmp_path: Path) -> None:
    array = values("bfloat16", (2048, 4096))
    write(tmp_path / "a", array, 2048)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path / 'a'}/"}}
    stored = ts.open(spec).result()  # as Orbax reads what a device owns
    for part in (np.s_[:128], np.s_[1024:1280], np.s_[:, 256:512], np.s_[:, 3840:]):
        read = bytes_read(lambda part=part: stored[part].read().result())
        assert read < array[part].nbytes + 20_000  # the index and zarr.json
