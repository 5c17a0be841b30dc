"""What tests of the kernels for CPUs share: they need AVX2 or NEON, and a compiler."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.cpu import compiler, library

needs_cpu_kernel = pytest.mark.skipif(
    library.why_not() is not None or library.best() == "portable",
    reason=f"the CPU's kernel cannot run: {library.why_not() or 'neither AVX2 nor NEON'}",
)
# The instruction sets of this machine, from worst to best.
HERE: tuple[library.Instructions, ...] = ("portable",)
if library.why_not() is None:
    HERE = compiler.here()[: 1 + compiler.here().index(library.best())]


def all_alike_in_threads(run: Callable[..., Any], cases: Sequence[Any], times: int) -> bool:
    """Return whether each of two cases gives what it gives alone, while others run in threads.

    times: how often each of four threads runs one of them.
    """
    expected = [jax.tree.leaves(run(*case)) for case in cases]
    alike: list[int] = []

    def repeat(i: int) -> None:
        for _ in range(times):
            found = jax.tree.leaves(run(*cases[i]))
            if all(map(np.array_equal, found, expected[i])):
                alike.append(i)

    threads = [threading.Thread(target=repeat, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(alike) == 4 * times
