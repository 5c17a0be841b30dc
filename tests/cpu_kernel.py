"""For tests of the kernel for CPUs, where there is a compiler to make it."""

import pytest

from pallas_kernels.cpu import library

needs_cpu_kernel = pytest.mark.skipif(
    library.why_not() is not None or library.best() == "portable",
    reason=f"the CPU's kernel cannot run: {library.why_not() or 'no AVX2'}",
)
