"""Settings of glibc's allocator, so that freed memory goes back to the system.

With other C libraries they do nothing.
"""

import ctypes
import functools
import sys
from typing import Any

# Larger blocks, such as a program's temporaries, come from the system and go back to it. Paging
# them in again takes less than a hundredth of a program's time.
LARGE_BLOCK = 1 << 20


def keep_little() -> None:
    """Make glibc keep little freed memory: in one arena, because each of XLA's many threads would
    keep its own, and no large blocks, which glibc otherwise begins to keep once one was freed.

    Affects the whole process from now on, as MALLOC_ARENA_MAX=1 and MALLOC_MMAP_THRESHOLD_ do from
    the start (mallopt(3)).
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    if libc := _glibc():
        libc.mallopt(m_arena_max, 1)
        libc.mallopt(m_mmap_threshold, LARGE_BLOCK)
        libc.mallopt(m_trim_threshold, 2 * LARGE_BLOCK)


def give_back() -> None:
    """Return free memory to the system (malloc_trim(3)), which takes a few milliseconds."""
    if libc := _glibc():
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    """Return the C library, or None on another system or with another library."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
