from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax.checkpoint.huge_pages import ALIGNMENT, Room


def test_arrays_are_apart_and_jax_takes_them_as_they_are():
    sizes = [10, 64, 4096, 1]
    room = Room(sizes)
    arrays = [room.empty((size,), np.dtype(np.int8)) for size in sizes]
    for i, array in enumerate(arrays):
        array[:] = i
    taken = [jax.device_put(array, may_alias=True) for array in arrays]
    for i, (array, jax_array) in enumerate(zip(arrays, taken, strict=True)):
        assert array.ctypes.data % ALIGNMENT == 0
        assert jax_array.unsafe_buffer_pointer() == array.ctypes.data
        np.testing.assert_array_equal(jax_array, np.full(sizes[i], i))


def test_memory_lives_as_long_as_an_array_in_it():
    room = Room([1 << 22])
    array = jax.device_put(room.empty((1 << 20,), np.dtype(np.float32)), may_alias=True)
    np.testing.assert_array_equal(array, 0)
    del room
    np.testing.assert_array_equal(array, 0)


def test_what_does_not_fit_is_numpys():
    room = Room([100])
    assert room.empty((10, 10), np.dtype(np.int8)).shape == (10, 10)
    assert room.empty((3, 5), np.dtype(np.float32)).shape == (3, 5)
    assert room.empty((), np.dtype(np.float32)).shape == ()


def huge_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("AnonHuge"))


def test_the_pages_are_huge_where_linux_gives_them():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("this system has no transparent huge pages")
    before = huge_bytes()
    array = Room([64 << 20]).empty((64 << 20,), np.dtype(np.int8))
    array[:] = 1
    # Memory may be too scattered for some of them.
    assert huge_bytes() - before > 16 << 20
