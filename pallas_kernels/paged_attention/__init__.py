"""Computes grouped-query attention of new tokens against a paged key/value cache."""

from functools import partial
from typing import Any

from jax import Array, lax

from pallas_kernels import choice, device
from pallas_kernels.choice import Choice, Kernel, never
from pallas_kernels.cpu import library
from pallas_kernels.paged_attention import cpu, reference, xla


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    cached_lens: Array,
    kv_lens: Array,
    *,
    k_scale: Array | float = 1.0,
    v_scale: Array | float = 1.0,
    is_batch_invariant: bool = False,
    implementation: str | None = None,
) -> Array:
    """Compute causal attention, softmax(q k^T / sqrt(head_dim)) v, with float32 sums.

    The work grows with max(kv_lens), not with the size of the pool.

    q: [batch, tokens, num_heads, head_dim], the new tokens of each sequence; token t of sequence b
        has position cached_lens[b] + t.
    k_pages, v_pages: [num_pages, page_size, num_kv_heads, head_dim], already holding the new
        tokens; bfloat16, float32, float8_e4m3fn or its int8 bits.
    page_table: int32 [batch, pages_per_sequence]; position p of sequence b is in page
        page_table[b, p // page_size] at offset p % page_size.
    cached_lens, kv_lens: int32 [batch]; a query sees positions <= its own and < kv_lens[b].
    k_scale, v_scale: positive float32 scalars, by which FP8 codes are multiplied.
    is_batch_invariant: whether a sequence's result is bit-equal alone and in any batch, at some
        cost on a GPU.
    implementation: None for the best that takes these arrays on the target device, or "hopper",
        "xla" or "reference"; `choose` returns which it is, and why others refuse.
    Returns [batch, tokens, num_heads, head_dim] in q's dtype. Sequences of length 0 and tokens past
    the end of a sequence get finite but meaningless numbers.
    Raises ValueError for shapes that do not fit, and for a named implementation that cannot run.

    A sequence of one page that has 3 tokens, the last of which is new:

    >>> import jax.numpy as jnp
    >>> q, pages = jnp.ones((1, 1, 4, 8)), jnp.ones((2, 64, 2, 8))
    >>> table, cached, kv = jnp.array([[0]]), jnp.array([2]), jnp.array([3])
    >>> paged_attention(q, pages, pages, table, cached, kv).shape
    (1, 1, 4, 8)
    """
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    if k_pages.shape != v_pages.shape or k_pages.shape[3] != head_dim or num_heads % num_kv_heads:
        raise ValueError(f"q {q.shape} does not fit pages {k_pages.shape} and {v_pages.shape}")
    if page_table.shape[0] != batch or cached_lens.shape != (batch,) or kv_lens.shape != (batch,):
        raise ValueError(f"page_table, cached_lens and kv_lens must have {batch} rows")
    arrays = (q, k_pages, v_pages, page_table, cached_lens, kv_lens, k_scale, v_scale)
    found = choose(q, k_pages, implementation)
    run = partial(found.kernel.run, is_batch_invariant=is_batch_invariant)
    with found.scope():
        if found.kernel is HOPPER and implementation is None:
            # On a machine with a GPU, a program may still be lowered for the CPU.
            return lax.platform_dependent(*arrays, cuda=run, default=xla.paged_attention)
        return run(*arrays)


def choose(q: Array, k_pages: Array, implementation: str | None = None) -> Choice[Kernel]:
    """Choose the kernel for arrays of these shapes and dtypes on the target device.

    Raises ValueError if the named implementation cannot run.
    """
    return choice.choose("paged_attention", KERNELS, (q, k_pages), implementation)


def _hopper_refusal(q: Array, k_pages: Array) -> str | None:
    if reason := device.not_hopper():
        return reason
    # Imported only where it may run: Mosaic GPU takes a third of JAX's own time to import.
    from pallas_kernels.paged_attention import hopper

    return hopper.refusal(q, k_pages)


def _on_cpu(*arrays: Any, is_batch_invariant: bool) -> Array:
    """A row never depends on the others here."""
    return cpu.paged_attention(*arrays)


def _on_hopper(*arrays: Any, is_batch_invariant: bool) -> Array:
    from pallas_kernels.paged_attention import hopper

    return hopper.paged_attention(*arrays, is_batch_invariant=is_batch_invariant)


def _through_xla(*arrays: Any, is_batch_invariant: bool) -> Array:
    """Call XLA's form, in which a sequence never depends on the others."""
    return xla.paged_attention(*arrays)


def _by_reference(*arrays: Any, is_batch_invariant: bool) -> Array:
    return reference.paged_attention(*arrays)


HOPPER = Kernel(
    name="hopper",
    run=_on_hopper,
    refusal=_hopper_refusal,
    launches={
        "paged_attention_prefill": "16-bit tensor cores, 1/2 of FP8's rate",
        "paged_attention_decode": "reads each key and value once",
        "paged_attention_combine": "adds parts up",
    },
)
CPU = Kernel(
    name="cpu",
    run=_on_cpu,
    refusal=cpu.refusal,
    unasked=lambda *_: device.not_local() or library.slower_than_xla(),
    not_here=library.not_here,
    launches={library.ATTENTION: "reads each key and value once for the heads that share it"},
)
XLA = Kernel(name="xla", run=_through_xla, refusal=never, unasked=never)
REFERENCE = Kernel(name="reference", run=_by_reference, refusal=never, unasked=never)
KERNELS: tuple[Kernel, ...] = (HOPPER, CPU, XLA, REFERENCE)
