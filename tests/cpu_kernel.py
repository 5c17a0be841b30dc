"""A marker for tests of the kernels for CPUs: they need AVX2 or NEON, and a compiler."""

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
