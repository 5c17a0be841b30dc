"""Prepares q, k and v for attention: rotary embedding, and new keys and values into the paged
cache."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels import choice, device
from pallas_kernels.choice import Choice, Kernel, never
from pallas_kernels.cpu import library
from pallas_kernels.rope_and_cache import cpu, reference, xla
from pallas_kernels.rope_and_cache.projections import Projections


def rope_and_cache(
    parts: Projections,
    positions: Array,
    frequencies: np.ndarray,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    cached_lens: Array,
    kv_lens: Array,
    *,
    weight_scales: Projections | None = None,
    k_scale: Array | float = 1.0,
    v_scale: Array | float = 1.0,
    dtype: jnp.dtype,
    implementation: str | None = None,
) -> tuple[Array, Array, Array]:
    """Rotate q and k, and store k and v of the new tokens of each sequence.

    parts: of q, k and v, [parts, rows, heads, head_dim], bfloat16 or float32; the products are
        their sums over the first axis. Row b * tokens + t is token t of sequence b; rows beyond
        those are ignored.
    positions: int32 [batch, tokens]. Pairs (j, j + head_dim / 2) of q and k are rotated by float32
        angles positions * frequencies.
    frequencies: float32 [head_dim / 2].
    k_pages, v_pages: [num_pages, page_size, num_kv_heads, head_dim]; bfloat16, float32,
        float8_e4m3fn or its int8 bits.
    page_table: int32 [batch, pages_per_sequence]; position p of sequence b is in page
        page_table[b, p // page_size] at offset p % page_size.
    cached_lens, kv_lens: int32 [batch], tokens stored before and after. Token t of sequence b is
        stored at cached_lens[b] + t, or not at all if that is kv_lens[b] or more, or if its page is
        num_pages or more.
    weight_scales: float32 [heads, head_dim] each, by which the sums are multiplied.
    k_scale, v_scale: float32 [], or [num_kv_heads] for one per head. FP8 keys and values are
        divided by them before rounding, and attention multiplies by them. If k_scale is per head, q
        is multiplied by it here.
    dtype: bfloat16 or float32, of q. The products are first rounded to it, except that "hopper"
        rounds only what it stores.
    implementation: None for the best that takes these arrays on the target device, or "hopper",
        "cpu", "xla" or "reference"; `choose` returns which it is, and why others refuse. "hopper"
        and "cpu" are one launch that updates the pages in place.
    Returns q, [batch, tokens, num_heads, head_dim], and the pages.
    Raises ValueError for shapes that do not fit, and for a named implementation that cannot run.
    """
    _check(parts, positions, frequencies, k_pages, v_pages, page_table, cached_lens, kv_lens)
    arrays = (
        parts, positions, k_pages, v_pages, page_table, cached_lens, kv_lens, weight_scales,
        jnp.asarray(k_scale), jnp.asarray(v_scale),
    )  # fmt: skip
    dtype = jnp.dtype(dtype)
    settings = {"frequencies": frequencies, "dtype": dtype}
    found = choose(parts, k_pages, dtype, implementation)
    run = partial(found.kernel.run, **settings)
    with found.scope():
        if found.kernel is HOPPER and implementation is None:
            # On a machine with a GPU, a program may still be lowered for the CPU.
            run = partial(lax.platform_dependent, cuda=run, default=partial(XLA.run, **settings))
        rotated: tuple[Array, Array, Array] = run(*arrays)
    return rotated


def choose(
    parts: Projections, k_pages: Array, dtype: jnp.dtype, implementation: str | None = None
) -> Choice[Kernel]:
    """Choose the kernel for arrays of these shapes and dtypes on the target device.

    Raises ValueError if the named implementation cannot run.
    """
    return choice.choose(
        "rope_and_cache", KERNELS, (parts, k_pages, jnp.dtype(dtype)), implementation
    )


def _hopper_refusal(parts: Projections, k_pages: Array, dtype: jnp.dtype) -> str | None:
    if reason := device.not_hopper():
        return reason
    # Imported only where it may run: Mosaic GPU takes a third of JAX's own time to import.
    from pallas_kernels.rope_and_cache import hopper

    return hopper.refusal(parts, k_pages, dtype)


def _on_hopper(*arrays: Any, **settings: Any) -> tuple[Array, Array, Array]:
    from pallas_kernels.rope_and_cache import hopper

    return hopper.rope_and_cache(*arrays, **settings)


def _check(
    parts: Projections, positions: Array, frequencies: np.ndarray, k_pages: Array, v_pages: Array,
    page_table: Array, cached_lens: Array, kv_lens: Array,
) -> None:  # fmt: skip
    (batch, tokens), heads = positions.shape, k_pages.shape[2:]
    if k_pages.shape != v_pages.shape or k_pages.dtype != v_pages.dtype:
        raise ValueError(
            f"pages of keys {k_pages.dtype}{k_pages.shape} and of values "
            f"{v_pages.dtype}{v_pages.shape} must be alike"
        )
    for name, each in parts._asdict().items():
        fits = each.ndim == 4 and each.shape[1] >= batch * tokens and each.shape[3] == heads[1]
        if not fits or each.shape[2] % heads[0] or (name != "q" and each.shape[2] != heads[0]):
            raise ValueError(
                f"{name} {each.shape} must be [parts, {batch * tokens} or more rows, heads, "
                f"head_dim] and fit pages {k_pages.shape}"
            )
    if frequencies.shape != (heads[1] // 2,):
        raise ValueError(f"frequencies must be [{heads[1] // 2}], got {frequencies.shape}")
    if page_table.shape[0] != batch or cached_lens.shape != (batch,) or kv_lens.shape != (batch,):
        raise ValueError(f"page_table, cached_lens and kv_lens must have {batch} rows")


HOPPER = Kernel(
    name="hopper",
    run=_on_hopper,
    refusal=_hopper_refusal,
    launches={"rope_and_cache": "reads q, k and v once, writes k and v into their pages"},
)
CPU = Kernel(
    name="cpu",
    run=cpu.rope_and_cache,
    refusal=cpu.refusal,
    unasked=lambda *_: device.not_local() or library.slower_than_xla(),
    not_here=library.not_here,
    launches={library.ROPE: "reads q, k and v once, writes k and v into their pages"},
)
XLA = Kernel(name="xla", run=xla.rope_and_cache, refusal=never, unasked=never)
REFERENCE = Kernel(name="reference", run=reference.rope_and_cache, refusal=never, unasked=never)
KERNELS: tuple[Kernel, ...] = (HOPPER, CPU, XLA, REFERENCE)
