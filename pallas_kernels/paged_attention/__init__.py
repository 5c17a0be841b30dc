"""Grouped-query attention of new tokens against a paged key/value cache."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from jax import Array, lax

from pallas_kernels import device
from pallas_kernels.paged_attention import reference, xla

Implementation = Literal["reference", "xla", "hopper"]


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    starts: Array,
    lengths: Array,
    *,
    k_scale: Array | float = 1.0,
    v_scale: Array | float = 1.0,
    is_batch_invariant: bool = False,
    implementation: Implementation | None = None,
) -> Array:
    """softmax(q k^T / sqrt(head_dim)) v, causal, in float32 sums.

    q: [batch, tokens, num_heads, head_dim], the new tokens of each sequence; token t of row b
        stands at position starts[b] + t.
    k_pages, v_pages: [num_pages, page_size, num_kv_heads, head_dim], already holding the new
        tokens; bfloat16, float32, float8_e4m3fn or its int8 bits.
    page_table: int32 [batch, pages_per_row]; position p of row b lives in page
        page_table[b, p // page_size] at offset p % page_size.
    starts, lengths: int32 [batch]; a query sees positions <= its own and < lengths[b].
    k_scale, v_scale: float32 scalars that FP8 codes are multiplied by, positive.
    is_batch_invariant: a row's result is bit-equal alone and in any batch, at some cost on a GPU.
    implementation: None for the best that takes these arrays on the platform lowered for;
        `chosen` names it.
    Returns [batch, tokens, num_heads, head_dim] in q's dtype. The rows of a sequence of length 0,
    and tokens past its end, hold finite numbers without meaning.
    The work grows with max(lengths), not with the size of the pool.
    Raises ValueError for shapes that do not fit, and for a named implementation that cannot run.
    """
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != head_dim or num_heads % num_kv_heads:
        raise ValueError(f"q {q.shape} does not fit pages {k_pages.shape} and {v_pages.shape}")
    if page_table.shape[0] != batch or starts.shape != (batch,) or lengths.shape != (batch,):
        raise ValueError(f"page_table, starts and lengths must have {batch} rows")
    arrays = (q, k_pages, v_pages, page_table, starts, lengths, k_scale, v_scale)
    match implementation or chosen(q, k_pages):
        case "reference":
            return reference.paged_attention(*arrays)
        case "xla":
            refusal = f"{implementation} was asked for" if implementation else _why_not(q, k_pages)
            with device.left_to_xla(str(refusal)):
                return xla.paged_attention(*arrays)
        case "hopper" if implementation is None:
            # Beside a GPU, a program may still be lowered for the CPU.
            kernels = _on_hopper(is_batch_invariant)
            return lax.platform_dependent(*arrays, cuda=kernels, default=xla.paged_attention)
        case "hopper":
            if reason := _refusal(q, k_pages):
                raise ValueError(f"paged_attention cannot run as 'hopper': {reason}")
            return _on_hopper(is_batch_invariant)(*arrays)
        case unknown:
            raise ValueError(f"paged_attention has no implementation {unknown!r}")


def chosen(q: Array, k_pages: Array) -> Implementation:
    """What `implementation=None` stands for where a program is lowered for JAX's default device;
    given arrays or anything with their shape and dtype."""
    return "xla" if _why_not(q, k_pages) else "hopper"


def _why_not(q: Array, k_pages: Array) -> str | None:
    return _refusal(q, k_pages) or device.not_local()


def _refusal(q: Array, k_pages: Array) -> str | None:
    """Why the kernels cannot take these arrays on what is lowered for; None if they can."""
    if reason := device.not_hopper():
        return reason
    # Mosaic GPU takes a third of JAX's own time to import: only where it may run.
    from pallas_kernels.paged_attention import hopper

    return hopper.refusal(q, k_pages)


def _on_hopper(is_batch_invariant: bool) -> Callable[..., Array]:
    from pallas_kernels.paged_attention import hopper

    return partial(hopper.paged_attention, is_batch_invariant=is_batch_invariant)
