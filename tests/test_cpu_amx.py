"""The C++ kernels for AMX against float64, on any machine with AVX-512: with emulated tiles.

Where there is AMX, the other tests of the kernels run with it, too.
"""

import ctypes
import os
import subprocess
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import e4m3
from pallas_kernels.cpu import compiler, library
from pallas_kernels.fp8_matmul import cpu
from tests import test_logit_stats as stats
from tests.cpu_kernel import HERE, needs_cpu_kernel
from tests.test_cpu_fp8_matmul import exact, multiply, operands


def lacks() -> str | None:
    if "avx512_bf16" not in HERE:
        return "no AVX-512 with BF16"
    command = [compiler._compiler(), "-mamx-bf16", "-E", "-x", "c++", os.devnull]
    if subprocess.run(command, capture_output=True).returncode:
        return "the compiler does not know AMX"
    return None if "__GFNI__" in compiler._predefined(command[0]) else "no GFNI"


pytestmark = [needs_cpu_kernel, pytest.mark.skipif(bool(lacks()), reason=str(lacks()))]
EMULATED = "emulated"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Compile the kernels with the tiles of emulated_tiles.h, and have XLA know them."""
    header = Path(__file__).with_name("emulated_tiles.h")
    directory = tmp_path_factory.mktemp("emulated")
    path = compiler.build(directory, "fp8_matmul", "amx", ["-include", str(header)])
    loaded = ctypes.CDLL(str(path))
    for name in (library.MATMUL, library.LOGIT_STATS):
        capsule = jax.ffi.pycapsule(loaded[name])
        jax.ffi.register_ffi_target(f"{name}_{EMULATED}", capsule, platform="cpu")


@pytest.fixture(autouse=True)
def emulated_targets(emulated, monkeypatch):
    known = library.target

    def target(name, instructions):
        return f"{name}_{EMULATED}" if instructions == EMULATED else known(name, instructions)

    monkeypatch.setattr(library, "target", target)


def random_operands(m, n, k, layout):
    x, bits, scale = operands(m, n, k, layout)
    return x.astype(jnp.bfloat16), bits, scale


# Columns of several panels (2,048 each) and of parts of one (256), rows of several chunks and of
# half a tile, and more of x than pass by at a time (512).
@pytest.mark.parametrize("layout", ["row", "block"])
@pytest.mark.parametrize(
    ("n", "k", "rows"),
    [(8, 1, (1, 17)), (601, 300, (1, 3, 16, 17, 33)), (70, 4500, (2, 40)), (40, 300, (530,))],
)
def test_against_float64(layout, n, k, rows):
    x, bits, scale = random_operands(rows[-1], n, k, layout)
    expected = exact(x, bits, scale)
    of_all = multiply(x, bits, scale, EMULATED)
    for m in rows:
        y = multiply(x[:m], bits, scale, EMULATED)
        np.testing.assert_allclose(y, expected[:m], atol=1e-4 * max(1, k / 300))
        np.testing.assert_array_equal(y, of_all[:m])  # whatever its company


@pytest.mark.parametrize("m", [2, 40])
def test_groups_of_columns_wider_than_a_panel(m):
    x, bits, _ = random_operands(m, 40, 3 * 2112, "row")
    scale = jax.random.uniform(jax.random.key(7), (40, 3), minval=1e-3, maxval=1e-2)
    y = multiply(x, bits, scale, EMULATED)
    # As in test_cpu_fp8_matmul.py, for results of 213: sqrt(6336) * 2^-24 * 213 is 1e-3.
    np.testing.assert_allclose(y, exact(x, bits, scale), atol=1e-3)


def test_every_code_is_exact():
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[codes & 0x7F != 0x7F]
    bits = jnp.asarray(np.diag(codes).view(np.int8))
    for m in (1, 20):
        y = multiply(jnp.ones((m, len(codes)), jnp.bfloat16), bits, jnp.ones(len(codes)), EMULATED)
        np.testing.assert_array_equal(y[0], codes.view(e4m3.DTYPE).astype(np.float32))


@pytest.mark.parametrize("m", [1, 9, 40])
def test_swiglu_is_that_of_its_parts(m):
    x, gate, gate_scale = random_operands(m, 300, 200, "row")
    up, up_scale = operands(1, 300, 200, "row", seed=1)[1:]
    run = partial(cpu.swiglu, x, gate, gate_scale, up, up_scale, jnp.float32)
    g, u = (exact(x, *each) for each in ((gate, gate_scale), (up, up_scale)))
    np.testing.assert_allclose(run(instructions=EMULATED), g / (1 + np.exp(-g)) * u, atol=1e-2)


@pytest.mark.parametrize("m", [3, 40])
def test_what_is_known_of_logits(m):
    x, bits, scale = random_operands(m, 1000, 130, "row")
    targets = stats.targets_for(m, 1000)
    in_bfloat16 = jax.random.normal(jax.random.key(1), bits.shape).astype(jnp.bfloat16)
    for weight, of_weight in ((bits, scale), (in_bfloat16, None)):
        found = stats.by_kernel(x, weight, of_weight, targets, EMULATED)
        if of_weight is None:
            logits = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        else:
            logits = exact(x, weight, of_weight)
        stats.assert_close(found, stats.known_of(logits, targets), atol=1e-4)


@pytest.mark.skipif("amx" not in HERE, reason="no AMX")
def test_the_emulation_is_what_the_processor_does():
    """Bit for bit, but for products that are denormal."""
    for layout in ("row", "block"):
        x, bits, scale = random_operands(40, 300, 700, layout)
        emulated = multiply(x, bits, scale, EMULATED)
        np.testing.assert_array_equal(emulated, multiply(x, bits, scale, "amx"))
