"""Settings of glibc's allocator, so that what compilers and threads free goes back to the system.

Other C libraries are left alone.
"""

import ctypes
import functools
import sys
from typing import Any


def share_one_arena() -> None:
    """Have glibc keep what threads free in one arena, not in one for each: XLA's threads free much.

    For the whole process and what it allocates from now on, as MALLOC_ARENA_MAX=1 does from the
    start (mallopt(3)).
    """
    m_arena_max = -8
    if libc := _glibc():
        libc.mallopt(m_arena_max, 1)


def give_back() -> None:
    """Give memory that is free to the system (malloc_trim(3)), in a few milliseconds."""
    if libc := _glibc():
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    """None on another system, or with another C library."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
