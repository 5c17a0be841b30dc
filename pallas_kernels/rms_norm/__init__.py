"""Computes RMSNorm as Hugging Face orders it: x / rms(x) is rounded, then multiplied by the weight.

`row_fusions` has what a Hopper GPU takes instead in decode.
"""

import jax
from jax import Array

from pallas_kernels import choice, device
from pallas_kernels.choice import Choice, Kernel, never
from pallas_kernels.cpu import library
from pallas_kernels.rms_norm import cpu, reference, xla


def rms_norm(x: Array, weight: Array, eps: float, *, implementation: str | None = None) -> Array:
    """Compute x / sqrt(mean(x^2) + eps) in float32, round it to x's dtype, and multiply by weight.

    x: [..., d], bfloat16 or float32.
    weight: [d], rounded to x's dtype.
    implementation: None for the best that takes these arrays on the target device, or "cpu", "xla"
        or "reference".
    Returns [..., d] of x's dtype.
    Raises ValueError for shapes that do not fit, and for a named implementation that cannot run.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}], got {list(weight.shape)}")
    found = choose(x, implementation)
    with found.scope():
        y: Array = found.kernel.run(x, weight.astype(x.dtype), eps)
    return y


def choose(x: Array | jax.ShapeDtypeStruct, implementation: str | None = None) -> Choice[Kernel]:
    """Choose the kernel for x on the target device.

    Raises ValueError if the named implementation cannot run.
    """
    return choice.choose("rms_norm", KERNELS, (x,), implementation)


CPU = Kernel(
    name="cpu",
    run=cpu.rms_norm,
    refusal=cpu.refusal,
    unasked=lambda *_: device.not_local() or library.slower_than_xla(),
    not_here=library.not_here,
    launches={library.NORM: "reads each row twice, the second time from the cache"},
)
XLA = Kernel(name="xla", run=xla.rms_norm, refusal=never, unasked=never)
REFERENCE = Kernel(name="reference", run=reference.rms_norm, refusal=never, unasked=never)
KERNELS: tuple[Kernel, ...] = (CPU, XLA, REFERENCE)
