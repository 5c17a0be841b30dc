"""Multiplies by weights without scales, for which the CPU's kernel for FP8 weights can be used."""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import choice, device
from pallas_kernels.choice import Choice, never
from pallas_kernels.fp8_matmul import cpu, kernels
from pallas_kernels.fp8_matmul.kernels import Kernel
from pallas_kernels.fp8_matmul.xla import MIN_ROWS_FOR_BF16, by_row_blocks, dot


def dense(x: Array, weight: Array, implementation: str | None = None) -> Array:
    """Compute x [m, in] @ weight [out, in].T with float32 sums; both bfloat16 or float32.

    On a CPU the CPU's kernel takes bfloat16 weights, unless an implementation other than "cpu" is
    named.
    """
    found = choose_dense(x, weight, implementation)
    with found.scope():
        y: Array = found.kernel.run(x, weight)
    return y


def choose_dense(x: Array, weight: Array, implementation: str | None = None) -> Choice[Kernel]:
    """Choose the kernel that multiplies these operands, as `dense` describes it."""
    asked = implementation is None or CPU.is_meant_by(implementation)
    candidates = KERNELS if asked and device.platform() == "cpu" else (XLA,)
    return choice.choose("dense", candidates, (x, weight))


def _cpu_refusal(x: Array, weight: Array) -> str | None:
    if weight.dtype != jnp.bfloat16:
        return f"a weight without scales must be bfloat16, got {weight.dtype}"
    return cpu.refusal(x, weight, None)


def _cpu_unasked(x: Array, _: Array) -> str | None:
    return device.not_local() or cpu.slower_than_xla(len(x))


def _through_xla(x: Array, weight: Array) -> Array:
    """Multiply by XLA. If the dtypes differ, or for few bfloat16 rows on a CPU, go by blocks of the
    weight's rows, because XLA would write a converted copy of the whole weight."""

    def direct(x: Array, weight: Array) -> Array:
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return lax.dot_general(
            x, weight, (((1,), (1,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    by_blocks = partial(by_row_blocks, weight_scale=None)
    if x.dtype != weight.dtype:
        return by_blocks(x, weight)
    if x.dtype == jnp.float32:
        return direct(x, weight)
    on_cpu = by_blocks if x.shape[0] < MIN_ROWS_FOR_BF16 else dot
    return lax.platform_dependent(x, weight, cpu=on_cpu, default=direct)


CPU = Kernel(
    name=kernels.CPU.name,
    run=cpu.dense,
    refusal=_cpu_refusal,
    unasked=_cpu_unasked,
    logit_stats=cpu.logit_stats,
    launches=kernels.CPU.launches,
)
XLA = Kernel(name="xla", run=_through_xla, refusal=never, unasked=never)
KERNELS = (CPU, XLA)
