"""Defines the problems on which `pallas_kernels.dev` checks, times and tunes attention kernels."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import e4m3
from pallas_kernels.dev.case import BF16_OPERATIONS_PER_SECOND, Case
from pallas_kernels.dev.shapes import Heads, heads
from pallas_kernels.paged_attention import (
    hopper_decode,
    hopper_decode_config,
    hopper_prefill,
    reference,
    xla,
)
from pallas_kernels.paged_attention.hopper_loop import PAGE_SIZE

BF16 = jnp.dtype(jnp.bfloat16)
KV_DTYPES = {"bf16": BF16, "fp8": jnp.dtype(e4m3.DTYPE)}
# Weights and results are rounded to 16 bits, each off by at most 2^-9.
TOLERANCE = 2**-8
K_SCALE, V_SCALE = 0.5, 2.0
PREFILL_TOKENS = (4096, 8192, 16_384, 32_768)
CHUNK, CACHED = 2048, 30_720
CONTEXTS, BATCHES = (1024, 8192, 32_768), (1, 8, 32, 128)
SEVERAL_TOKENS = 4  # in a step that checks draft tokens
MAX_CACHE_BYTES = 16 * 2**30
# The reference holds the scores of this many tokens at a time.
REFERENCE_TOKENS = 256


def cases(_rows: Sequence[int]) -> Iterator[Case]:
    """Yield prefill and decode with the heads of every model.

    Prefill is of whole prompts and of a chunk after a cached prefix, decode of one and of several
    tokens per sequence. Caches are as large as fit on a GPU next to others.
    """
    for each, dtype in product(heads(), KV_DTYPES):
        yield prefill(each, dtype, CHUNK, start=CACHED)
        for tokens in reversed(PREFILL_TOKENS):  # tiles are tuned for the last
            yield prefill(each, dtype, tokens)
        for batch, context in product(BATCHES, CONTEXTS):
            for tokens in (1, SEVERAL_TOKENS) if batch == 8 else (1,):
                case = decode(each, dtype, [context] * batch, tokens)
                if case.bytes <= MAX_CACHE_BYTES:
                    yield case


def tiny_cases() -> Iterator[Case]:
    """Yield cases for the simulator."""
    yield prefill(Heads("tiny", 1, 4, 1, 64), "bf16", 40)
    yield prefill(Heads("tiny", 1, 8, 1, 128), "fp8", 20, start=50)
    yield decode(Heads("tiny", 1, 6, 2, 64), "bf16", [1, 63, 64, 200], 1)
    yield decode(Heads("tiny", 1, 8, 1, 128), "fp8", [65, 129], 3)


def prefill(shape: Heads, dtype: str, tokens: int, *, start: int = 0) -> Case:
    """Return prefill of `tokens` tokens of one sequence, after `start` that are cached already."""
    q, pool, table = _structs(shape, dtype, 1, start + tokens, tokens)
    stages = range(2, hopper_prefill.MAX_STAGES + 1)
    in_fp8 = (False, True) if dtype == "fp8" else (False,)
    configs = [hopper_prefill.PrefillConfig(*each) for each in product((64, 128), stages, in_fp8)]

    def cudnn(q: Array, k: Array, v: Array, *_: Any) -> Array:
        """Attend to the pages in the pool's order: other numbers, but as many."""
        k, v = (each.reshape(1, -1, *each.shape[2:]) for each in (k, v))
        return jax.nn.dot_product_attention(
            q, k[:, :tokens], v[:, :tokens], is_causal=True, implementation="cudnn"
        )

    return _case(
        shape, dtype, (q, pool, table), [start + tokens],
        kernel=hopper_prefill.NAME,
        problem=hopper_prefill.tuned_as(shape.num_heads, pool),
        name=f"{shape} T={tokens}{f' after {start}' if start else ''} {dtype} prefill attention",
        run=hopper_prefill.paged_attention,
        # cuDNN's attention has no FP8 cache, and its diagonal begins at the first key.
        baselines={"cudnn": cudnn} if dtype == "bf16" and not start else {},
        configs=[each for each in configs if hopper_prefill.unfit(each, pool) is None],
    )  # fmt: skip


def decode(shape: Heads, dtype: str, kv_lens: Sequence[int], tokens: int) -> Case:
    """Return decode of the last `tokens` tokens of sequences of `kv_lens` tokens."""
    q, pool, table = _structs(shape, dtype, len(kv_lens), max(kv_lens), tokens)
    capacity = table.shape[1] * PAGE_SIZE
    heuristic = hopper_decode_config.heuristic(q, pool, capacity, False)
    configs = {heuristic} | {
        hopper_decode_config.DecodeConfig(splits, None, stages)
        for splits in (1, 2, 3, 4, 6, 8, 11, 16, 22, 32)
        if splits * PAGE_SIZE <= capacity
        for stages in {heuristic.stages, 4, 6}
    }
    configs |= {
        replace(heuristic, splits=splits, in_cluster=True)
        for splits in (2, 4, hopper_decode_config.MAX_CLUSTER)
        if splits * heuristic.keys <= capacity
    }
    return _case(
        shape, dtype, (q, pool, table), kv_lens,
        kernel=hopper_decode_config.NAME,
        problem=hopper_decode_config.tuned_as(q, pool, capacity),
        name=f"{shape} B={len(kv_lens)} S={max(kv_lens)} tokens={tokens} {dtype} decode attention",
        run=hopper_decode.paged_attention,
        baselines={},
        configs=[each for each in configs if not hopper_decode_config.unfit(each, pool, capacity)],
    )  # fmt: skip


def _structs(shape: Heads, dtype: str, batch: int, length: int, tokens: int) -> Any:
    """Return the types of q, of one of the two pools, and of the page table."""
    pages = -(-length // PAGE_SIZE)
    pool = batch * pages, PAGE_SIZE, shape.num_kv_heads, shape.head_dim
    struct = jax.ShapeDtypeStruct
    q = struct((batch, tokens, shape.num_heads, shape.head_dim), BF16)
    return q, struct(pool, KV_DTYPES[dtype]), struct((batch, pages), jnp.int32)


def _case(
    shape: Heads,
    dtype: str,
    structs: Any,
    kv_lens: Sequence[int],
    *,
    run: Callable[..., Array],
    baselines: Mapping[str, Callable[..., Array]],
    **rest: Any,
) -> Case:
    q, pool, table = structs
    batch, tokens = q.shape[:2]
    scales = (K_SCALE, V_SCALE) if dtype == "fp8" else (1.0, 1.0)

    def arguments(key: Array) -> tuple[Array, ...]:
        """Return q, both pools, the page table in random order, cached_lens and kv_lens."""
        keys = jax.random.split(key, 4)
        made = (jax.random.normal(each, pool.shape, BF16).astype(pool.dtype) for each in keys[:2])
        pages = jax.random.permutation(keys[2], table.size).astype(jnp.int32)
        ends = jnp.array(kv_lens, jnp.int32)
        queries = jax.random.normal(keys[3], q.shape, BF16)
        return queries, *made, pages.reshape(table.shape), ends - tokens, ends

    def scaled(attend: Callable[..., Array]) -> Callable[..., Array]:
        return lambda *arrays, **options: attend(*arrays, *scales, **options)

    seen = sum(length - tokens + t + 1 for length in kv_lens for t in range(tokens))
    read = sum(kv_lens) * shape.num_kv_heads * shape.head_dim * 2 * pool.dtype.itemsize
    return Case(
        operations=4 * seen * shape.num_heads * shape.head_dim,
        bytes=read + 2 * q.size * q.dtype.itemsize + table.size * 4 + 8 * batch,
        peak=BF16_OPERATIONS_PER_SECOND,
        arguments=arguments,
        run=scaled(run),
        baselines={"xla": scaled(xla.paged_attention), **baselines},
        reference=scaled(by_parts),
        value=lambda y: y,
        tolerance=TOLERANCE,
        **rest,
    )


def by_parts(
    q: Array, k_pages: Array, v_pages: Array, page_table: Array, cached_lens: Array, kv_lens: Array,
    k_scale: float, v_scale: float,
) -> Array:  # fmt: skip
    """Compute the reference in float32, of one sequence and some of its tokens at a time."""
    part = math.gcd(q.shape[1], REFERENCE_TOKENS)

    def of_row(row: tuple[Array, ...]) -> Array:
        q, table, start, length = row

        def of_tokens(i: Array) -> Array:
            some = lax.dynamic_slice_in_dim(q, i * part, part)
            where = table[None], (start + i * part)[None], length[None]
            one = reference.paged_attention(
                some[None].astype(jnp.float32), k_pages, v_pages, *where, k_scale, v_scale
            )
            return one[0]

        return lax.map(of_tokens, jnp.arange(q.shape[0] // part)).reshape(q.shape)

    return lax.map(of_row, (q, page_table, cached_lens, kv_lens))
