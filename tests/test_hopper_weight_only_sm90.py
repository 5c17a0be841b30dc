"""The weight-only Hopper kernel as the compiler makes it, for the linears of Llama 3.1 models."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import e4m3
from pallas_kernels.dev import sm90
from pallas_kernels.dev.shapes import launches
from pallas_kernels.fp8_matmul import hopper_weight_only, hopper_weight_only_config
from pallas_kernels.hopper import SHARED_MEMORY_BYTES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sm90.unavailable() is not None, reason=str(sm90.unavailable())),
]

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
KINDS = pytest.mark.parametrize("kind", ["row", "block"])
# Of F2FP and HADD2 together, per byte of weight: from e4m3 to float16, on to float32, to bfloat16.
CONVERSIONS_PER_BYTE = 2


def weights(ns, k, kind):
    struct = jax.ShapeDtypeStruct
    shape = {"row": lambda n: (n,), "block": lambda n: (-(-n // 128), -(-k // 128))}[kind]
    return [struct((n, k), e4m3.DTYPE) for n in ns], [struct(shape(n), F32) for n in ns]


def compile_and_check(m, ns, k, kind, *, in_fp8=False):
    x = jax.ShapeDtypeStruct((m, k), BF16)
    config = replace(hopper_weight_only_config.configure(m, ns, k), in_fp8=in_fp8)
    (kernel,) = sm90.kernels(
        lambda *a: hopper_weight_only.fp8_matmuls(*a, BF16, config=config), x, *weights(ns, k, kind)
    )
    assert kernel.count("UTMALDG") and kernel.count("UTMASTG")
    # A step of 128 along K in instructions of 16 or 32, and the loop is there once.
    assert kernel.count("HGMMA") == (0 if in_fp8 else 128 // 16)
    assert kernel.count("QGMMA") == (128 // 32 if in_fp8 else 0)
    assert not kernel.count("HMMA")
    assert kernel.spill_bytes == kernel.count("LDL") == kernel.count("STL") == 0
    # 65,536 registers an SM, allotted by 8: what three warpgroups can share out.
    assert kernel.registers <= 65_536 // 384 // 8 * 8
    assert kernel.shared_bytes <= SHARED_MEMORY_BYTES
    assert not kernel.losses
    return kernel


@pytest.mark.parametrize(
    "launch", [pytest.param(each, id=each.name.replace(" ", "-")) for each in launches()]
)
def test_every_launch_of_every_model(launch):
    compile_and_check(1, launch.ns, launch.k, "row")


@KINDS
@pytest.mark.parametrize("in_fp8", [False, True])
@pytest.mark.parametrize("m", [3, 9, 16, 17, 33, 64])
def test_every_number_of_rows(m, in_fp8, kind):
    compile_and_check(m, (4096, 1024, 1024), 4096, kind, in_fp8=in_fp8)


def test_ragged_tiles():
    compile_and_check(33, (160, 32), 384, "block")


def test_every_shape_has_a_kernel():
    for launch in launches():
        x = jax.ShapeDtypeStruct((64, launch.k), BF16)
        for weight, scale in zip(*weights(launch.ns, launch.k, "row"), strict=True):
            assert hopper_weight_only.refusal(x, weight, scale, BF16) is None


@KINDS
def test_few_instructions_per_byte_of_weight(kind):
    """In the loop over K, where a thread converts 64 bytes a step: below what bandwidth asks for.

    4.8 TB/s over 132 SMs of 1.755 GHz are 21 bytes a cycle, and four schedulers issue
    128 threads' instructions a cycle: 6 instructions a byte keep up.
    """
    loop = compile_and_check(1, (4096,), 4096, kind).loop("HGMMA")
    assert loop["HGMMA"] == 8
    assert loop["F2FP"] + loop["HADD2"] == CONVERSIONS_PER_BYTE * 64
    assert sum(loop.values()) / 64 < 4


@KINDS
@pytest.mark.parametrize(("m", "most"), [(1, 1), (16, 1.1), (64, 2.4)])
def test_in_fp8_nothing_is_upcast(m, most, kind):
    loop = compile_and_check(m, (4096,), 4096, kind, in_fp8=True).loop("QGMMA")
    assert loop["QGMMA"] == 4 and not loop["F2FP"] + loop["HADD2"] + loop["LDS"]
    assert sum(loop.values()) / 64 < most


@pytest.mark.parametrize("m", [1, 16, 64])
def test_adding_up_takes_no_launch_of_its_own(m):
    """o_proj with the residual, gate and up with their product: XLA fuses what follows a kernel
    into one launch, reads weights in place and writes no wider ones."""
    hidden, inner = 4096, 14_336
    struct = jax.ShapeDtypeStruct

    def mlp(x, residual, gate, gate_scale, up, up_scale, down, down_scale):
        g, u = hopper_weight_only.fp8_matmuls(x, (gate, up), (gate_scale, up_scale), F32)
        h = (jax.nn.silu(g) * u).astype(BF16)
        return hopper_weight_only.fp8_matmul(h, down, down_scale, BF16, residual)

    (gate, up), gate_up_scales = weights((inner, inner), hidden, "row")
    (down,), (down_scale,) = weights((hidden,), inner, "row")
    x = struct((m, hidden), BF16)
    operands = (gate, gate_up_scales[0], up, gate_up_scales[1], down, down_scale)
    compiled = sm90.compile(mlp, x, x, *operands)
    text = compiled.as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 2
    launched = re.findall(r"= \S+ (?:fusion|copy|convert|add)\(", text[text.index("ENTRY") :])
    assert len(launched) == 2
    splits = [hopper_weight_only_config.configure(m, ns, k).splits for ns, k in (
        ((inner, inner), hidden), ((hidden,), inner))]  # fmt: skip
    parts = 4 * m * (splits[0] * 2 * inner + splits[1] * hidden)
    assert compiled.memory_analysis().temp_size_in_bytes <= parts + 2 * m * inner + 4096
