"""Calls attention for CPUs, which is C++ (`pallas_kernels/cpu/attention.inc`).

It computes in float32, with a running softmax over blocks of keys, which are upcast in registers.
With AMX, queries in bfloat16 are multiplied as they are, and weights of keys as sums of two
bfloat16 numbers. A result depends only on its own sequence, and not on how many tokens come with
it: a token decoded alone has the bits that it has in a prompt.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import e4m3
from pallas_kernels.cpu import library

# The head dimension is a multiple of this.
GRANULE = 16


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    cached_lens: Array,
    kv_lens: Array,
    k_scale: Array | float,
    v_scale: Array | float,
    *,
    instructions: library.Instructions | None = None,
) -> Array:
    """Compute what `paged_attention` defines, for what `refusal` does not refuse.

    instructions: for tests; None takes the best.
    """
    name = library.target(library.ATTENTION, instructions)
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(q.shape, q.dtype))
    where = (each.astype(jnp.int32) for each in (page_table, cached_lens, kv_lens))
    scales = (jnp.asarray(each, jnp.float32) for each in (k_scale, v_scale))
    y: Array = call(q, k_pages, v_pages, *where, *scales)
    return y


def refusal(q: Array, k_pages: Array) -> str | None:
    """Return why the kernel cannot take these arrays; None if it can."""
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q must be bfloat16 or float32, got {q.dtype}"
    if k_pages.dtype not in (e4m3.DTYPE, jnp.int8, jnp.bfloat16, jnp.float32):
        return f"pages must be float8_e4m3fn, bfloat16 or float32, got {k_pages.dtype}"
    if not q.size or q.shape[-1] % GRANULE:
        return f"head_dim must be a multiple of {GRANULE}, got q {q.shape}"
    return library.not_here()
