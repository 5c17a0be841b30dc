"""Allocates memory for weights that JAX uses without copying, in huge pages on Linux.

On a CPU JAX uses a numpy array without copying it if its address is a multiple of 64 bytes. A core
reads weights a third faster from pages of 2 MiB than from pages of 4 KiB. Linux provides huge pages
on request (`madvise`). All arrays share one allocation, so that no page is half empty.
"""

import contextlib
import math
import mmap
from collections.abc import Iterable

import numpy as np

ALIGNMENT = 64


class Room:
    """One allocation for several arrays, which lives as long as any of them.

    If an array does not fit any more, or the system has no huge pages, numpy allocates it.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        """Allocate room for arrays. sizes: bytes of each."""
        self._used, self._memory = 0, np.empty(0, np.uint8)
        total = sum(map(_padded, sizes))
        if total and hasattr(mmap, "MADV_HUGEPAGE"):
            memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._memory = np.frombuffer(memory, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an array whose content is unspecified."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._memory):
            return np.empty(shape, dtype)
        part = self._memory[self._used : self._used + size]
        self._used += _padded(size)
        return part.view(dtype).reshape(shape)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
