"""The C++ kernel against float64, for every instruction set that this machine has."""

from typing import get_args

import jax
import numpy as np
import pytest

from llama_jax.model.fp8 import quantize
from pallas_kernels import e4m3
from pallas_kernels.cpu import library
from pallas_kernels.fp8_matmul import cpu

pytestmark = pytest.mark.skipif(
    library.why_not() is not None, reason=f"no C++ kernel here: {library.why_not()}"
)
ALL = get_args(library.Instructions)
HERE = () if library.why_not() else ALL[: 1 + ALL.index(library.best())]
each_instructions = pytest.mark.parametrize("instructions", HERE)


def operands(m, n, k, layout="row", seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    codes, scale = quantize(jax.random.normal(keys[0], (n, k)), layout)
    return jax.random.normal(keys[1], (m, k)), e4m3.as_bits(codes), scale


def dequantized(bits, scale):
    w = np.asarray(bits).view(e4m3.DTYPE).astype(np.float64)
    if scale.ndim == 1:
        return w * np.asarray(scale, np.float64)[:, None]
    blocks = np.kron(np.asarray(scale, np.float64), np.ones((128, 128)))
    return w * blocks[: w.shape[0], : w.shape[1]]


def multiply(x, bits, scale, instructions):
    (y,) = cpu.fp8_matmuls(x, (bits,), (scale,), instructions=instructions)
    return np.asarray(y)


@each_instructions
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", ["row", "block"])
@pytest.mark.parametrize(
    ("n", "k"), [(8, 1), (80, 300), (129, 64), (300, 1024), (1000, 70)], ids=str
)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 70])
def test_against_float64(m, n, k, layout, dtype, instructions):
    x, bits, scale = operands(m, n, k, layout)
    x = x.astype(dtype)
    expected = np.asarray(x, np.float64) @ dequantized(bits, scale).T
    # Sums of k products of order 1: float32 sums stray by a few sqrt(k) * 2^-24 * sqrt(k). A
    # weight off by one code would move them by 0.06.
    np.testing.assert_allclose(
        multiply(x, bits, scale, instructions), expected, atol=1e-6 + 3e-7 * k
    )
