"""A marker for tests of the kernel for CPUs: they need AVX2 and a compiler."""

import pytest

from pallas_kernels.cpu import library

needs_cpu_kernel = pytest.mark.skipif(
    library.why_not() is not None or library.best() == "portable",
    reason=f"the CPU's kernel cannot run: {library.why_not() or 'no AVX2'}",
)
