"""Computes `rope_and_cache`, then `paged_attention`: on Hopper, decode may take one launch.

There are two launches by default, as nothing has measured yet which is faster. `dev.tune` times
both, and where its table says so, `why_not` has nothing against one.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels import device, paged_attention, rope_and_cache
from pallas_kernels.choice import Choice, Kernel
from pallas_kernels.rope_and_cache.projections import Projections
from pallas_kernels.rope_and_cache.xla import per_head


def rope_and_attention(
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
) -> tuple[Array, Array, Array]:
    """Store k and v of each sequence's new token, and let its rotated q attend to the cache.

    Needs operands and a target device that `why_not` accepts. Numbers are rounded as by the kernels
    for two launches. The arguments are theirs, see `rope_and_cache`, with positions [batch, 1].
    Scales must be numbers: with one per head Mosaic GPU looks for layouts of registers for ever.
    Returns attention's result [batch, 1, num_heads, head_dim] in `dtype`, and the pages.
    """
    arrays = (
        parts, positions, k_pages, v_pages, page_table, cached_lens, kv_lens, weight_scales,
        k_scale, v_scale,
    )  # fmt: skip
    settings: dict[str, Any] = {"frequencies": frequencies, "dtype": dtype}
    with Choice(HOPPER).scope():
        # On a machine with a GPU, a program may still be lowered for the CPU.
        found: tuple[Array, Array, Array] = lax.platform_dependent(
            *arrays,
            cuda=partial(HOPPER.run, **settings),
            default=partial(in_two, rope="xla", attention="xla", **settings),
        )
    return found


def why_not(
    parts: Projections, k_pages: Array, page_table: Array, tokens: int, dtype: jnp.dtype
) -> str | None:
    """Return why one launch should not be taken for these arrays; None if it should.

    tokens: new ones per sequence.
    """
    if reason := device.not_hopper() or device.not_local():
        return reason
    from pallas_kernels.rope_and_attention import hopper

    if reason := hopper.refusal(parts, k_pages, tokens, dtype):
        return reason
    q = jax.ShapeDtypeStruct((len(page_table), tokens, *parts.q.shape[2:]), dtype)
    if not hopper.is_faster(q, k_pages, page_table.shape[1] * k_pages.shape[1]):
        return "one launch has not been measured to be faster than two"
    return None


def in_two(
    parts: Projections, positions: Array, k_pages: Array, v_pages: Array, page_table: Array,
    cached_lens: Array, kv_lens: Array, weight_scales: Projections | None, k_scale: Array,
    v_scale: Array, *, frequencies: np.ndarray, dtype: jnp.dtype, is_batch_invariant: bool = False,
    rope: str | None = None, attention: str | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Compute it by `rope_and_cache` and `paged_attention`, for any number of new tokens.

    rope, attention: the implementations to ask for.
    """
    where = page_table, cached_lens, kv_lens
    q, k_pages, v_pages = rope_and_cache.rope_and_cache(
        parts, positions, frequencies, k_pages, v_pages, *where, weight_scales=weight_scales,
        k_scale=k_scale, v_scale=v_scale, dtype=dtype, implementation=rope,
    )  # fmt: skip
    # Scales per kv head are applied outside of attention: to q by rope_and_cache, to y here.
    y = paged_attention.paged_attention(
        q, k_pages, v_pages, *where, k_scale=1.0 if k_scale.ndim else k_scale,
        v_scale=1.0 if v_scale.ndim else v_scale, is_batch_invariant=is_batch_invariant,
        implementation=attention,
    )  # fmt: skip
    return per_head(y, v_scale), k_pages, v_pages


def _on_hopper(*arrays: Any, **settings: Any) -> tuple[Array, Array, Array]:
    from pallas_kernels.rope_and_attention import hopper

    return hopper.rope_and_attention(*arrays, **settings)


HOPPER = Kernel(
    name="hopper",
    run=_on_hopper,
    refusal=why_not,
    launches={
        "rope_and_attention": "reads q, k and v, and each key and value once, and writes the new",
        "paged_attention_combine": "adds parts up",
    },
)
