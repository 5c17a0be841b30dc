"""Grouped-query attention of new tokens against a paged key/value cache."""

from typing import Literal

from jax import Array

from pallas_kernels.paged_attention import reference, xla

Implementation = Literal["reference", "xla"]
_IMPLEMENTATIONS = {"reference": reference.paged_attention, "xla": xla.paged_attention}


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
    implementation: Implementation = "xla",
) -> Array:
    """softmax(q k^T / sqrt(head_dim)) v, causal, in float32 sums.

    q: [batch, tokens, num_heads, head_dim], the new tokens of each sequence; token t of row b
        stands at position starts[b] + t.
    k_pages, v_pages: [num_pages, page_size, num_kv_heads, head_dim], already holding the new
        tokens; bfloat16, float32, float8_e4m3fn or its int8 bits.
    page_table: int32 [batch, pages_per_row]; position p of row b lives in page
        page_table[b, p // page_size] at offset p % page_size.
    starts, lengths: int32 [batch]; a query sees positions <= its own and < lengths[b].
    k_scale, v_scale: float32 scalars that FP8 codes are multiplied by.
    Returns [batch, tokens, num_heads, head_dim] in q's dtype. The rows of a sequence of length 0,
    and tokens past its end, hold finite numbers without meaning.
    The work grows with max(lengths), not with the size of the pool.
    """
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != head_dim or num_heads % num_kv_heads:
        raise ValueError(f"q {q.shape} does not fit pages {k_pages.shape} and {v_pages.shape}")
    if page_table.shape[0] != batch or starts.shape != (batch,) or lengths.shape != (batch,):
        raise ValueError(f"page_table, starts and lengths must have {batch} rows")
    return _IMPLEMENTATIONS[implementation](
        q, k_pages, v_pages, page_table, starts, lengths, k_scale, v_scale
    )
