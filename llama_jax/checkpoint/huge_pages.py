"""Memory for weights that JAX takes as it is, in huge pages where the system gives them.

On a CPU JAX takes a numpy array over, without a copy, if it begins at a multiple of 64 bytes. With
pages of 2 MiB a core reads weights a third faster than with pages of 4 KiB. Linux gives them to
who asks (`madvise`); one piece of memory for all arrays leaves none of them half empty.
"""

import contextlib
import math
import mmap
from collections.abc import Iterable

import numpy as np

ALIGNMENT = 64


class Room:
    """Memory for arrays, which it outlives as long as any of them does.

    What does not fit any more, and all of it where there is no such memory, is numpy's.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        """sizes: bytes of each array."""
        self._used, self._memory = 0, np.empty(0, np.uint8)
        total = sum(map(_padded, sizes))
        if total and hasattr(mmap, "MADV_HUGEPAGE"):
            memory = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._memory = np.frombuffer(memory, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array with unspecified content."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._memory):
            return np.empty(shape, dtype)
        part = self._memory[self._used : self._used + size]
        self._used += _padded(size)
        return part.view(dtype).reshape(shape)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
