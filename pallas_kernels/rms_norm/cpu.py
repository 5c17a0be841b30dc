"""Calls RMSNorm for CPUs, which is C++ (`pallas_kernels/cpu/rows.inc`).

A result depends on its row alone.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.cpu import library
from pallas_kernels.rms_norm import xla


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def rms_norm(
    x: Array, weight: Array, eps: float, instructions: library.Instructions | None = None
) -> Array:
    """Compute what `rms_norm` defines, for what `refusal` does not refuse.

    weight: of x's dtype.
    instructions: for tests; None takes the best.
    """
    rows = x.reshape(-1, x.shape[-1])
    name = library.target(library.NORM, instructions)
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(rows.shape, x.dtype))
    y: Array = call(rows, weight, jnp.float32(eps))
    return y.reshape(x.shape)


@rms_norm.defjvp
def _rms_norm_jvp(
    eps: float,
    instructions: library.Instructions | None,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[Array, Array]:
    """Differentiate XLA's form, because the kernel has no derivative."""
    _, tangent = jax.jvp(partial(xla.rms_norm, eps=eps), primals, tangents)
    return rms_norm(*primals, eps, instructions), tangent


def refusal(x: Array | jax.ShapeDtypeStruct) -> str | None:
    """Return why the kernel cannot take x; None if it can."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x must be bfloat16 or float32, got {x.dtype}"
    if not x.size:
        return f"x must not be empty, got {x.shape}"
    return library.not_here()
