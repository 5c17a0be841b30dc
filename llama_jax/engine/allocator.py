"""Settings of glibc's allocator, so that freed memory goes back to the system.

With other C libraries they do nothing.
"""

import ctypes
import functools
import sys
from typing import Any


def share_one_arena() -> None:
    """Make glibc use one malloc arena, because XLA's many threads otherwise keep freed memory.

    Affects the whole process from now on, as MALLOC_ARENA_MAX=1 does from the start (mallopt(3)).
    """
    m_arena_max = -8
    if libc := _glibc():
        libc.mallopt(m_arena_max, 1)


def give_back() -> None:
    """Return free memory to the system (malloc_trim(3)), which takes a few milliseconds."""
    if libc := _glibc():
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    """Return the C library, or None on another system or with another library."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
