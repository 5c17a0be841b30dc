"""Calls `rope_and_cache` for CPUs, which is C++ (`pallas_kernels/cpu/rows.inc`).

It writes into the pages where they are. A result depends on its row alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import e4m3
from pallas_kernels.cpu import library
from pallas_kernels.rope_and_cache.projections import Projections
from pallas_kernels.rope_and_cache.xla import angles, products


def rope_and_cache(
    parts: Projections,
    positions: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    cached_lens: Array,
    kv_lens: Array,
    weight_scales: Projections | None,
    k_scale: Array,
    v_scale: Array,
    *,
    frequencies: np.ndarray,
    dtype: jnp.dtype,
    instructions: library.Instructions | None = None,
) -> tuple[Array, Array, Array]:
    """Compute what `rope_and_cache` defines, for what `refusal` does not refuse.

    instructions: for tests; None takes the best.
    """
    q, k, v = products(parts, weight_scales, positions.size, dtype)
    results = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (q, k_pages, v_pages)]
    name = library.target(library.ROPE, instructions)
    call = jax.ffi.ffi_call(name, results, input_output_aliases={10: 1, 11: 2})
    where = (each.astype(jnp.int32) for each in (page_table, cached_lens, kv_lens))
    scales = (jnp.asarray(each, jnp.float32) for each in (k_scale, v_scale))
    # In a step the angles are computed once for all layers.
    cos_and_sin = angles(positions, frequencies)
    q, k_pages, v_pages = call(q, k, v, *cos_and_sin, *where, *scales, k_pages, v_pages)
    return q.reshape(*positions.shape, *q.shape[1:]), k_pages, v_pages


def refusal(parts: Projections, k_pages: Array, dtype: jnp.dtype) -> str | None:
    """Return why the kernel cannot take these arrays; None if it can."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"q must be bfloat16 or float32, got {dtype}"
    if k_pages.dtype not in (e4m3.DTYPE, jnp.int8, jnp.bfloat16, jnp.float32):
        return f"pages must be float8_e4m3fn, bfloat16 or float32, got {k_pages.dtype}"
    if k_pages.shape[3] % 2:
        return f"head_dim must be even, got {k_pages.shape[3]}"
    if not parts.q.size or not k_pages.size:
        return f"q and pages must not be empty, got {parts.q.shape} and {k_pages.shape}"
    return library.not_here()
