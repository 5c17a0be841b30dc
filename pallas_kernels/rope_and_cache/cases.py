"""Defines the problems on which `pallas_kernels.dev` checks, times and tunes `rope_and_cache`."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels import e4m3
from pallas_kernels.dev.case import BF16_OPERATIONS_PER_SECOND, Case
from pallas_kernels.dev.shapes import Heads, heads
from pallas_kernels.rope_and_cache import hopper, reference, xla
from pallas_kernels.rope_and_cache.projections import Projections

BF16, FP32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
KV_DTYPES = {"bf16": BF16, "fp8": jnp.dtype(e4m3.DTYPE)}
# Between bfloat16 results of exact and of rounded products, the latter being XLA's.
TOLERANCE = 2**-6
PAGE_SIZE = 64
FREQUENCIES_BASE = 500_000.0
K_SCALE, V_SCALE = 0.5, 0.25
# Decode: sequences, and the weight-only matmul's splits of K for 8B. Prefill: tokens.
SEQUENCES, PARTS, CHUNK = (1, 16, 64), 11, 2048
CONTEXT = 1000


def cases(_rows: Sequence[int]) -> Iterator[Case]:
    """Yield decode, with partial sums, and prefill for the heads of every model."""
    for each, dtype in product(heads(), KV_DTYPES):
        for sequences in SEQUENCES:
            yield decode(each, dtype, sequences, PARTS)
        yield prefill(each, dtype, CHUNK)


def tiny_cases() -> Iterator[Case]:
    """Yield cases for the simulator."""
    yield decode(Heads("tiny", 1, 4, 2, 64), "fp8", 2, 3)
    yield prefill(Heads("tiny", 1, 4, 2, 128), "bf16", 5)


def decode(shape: Heads, dtype: str, sequences: int, parts: int) -> Case:
    """Return a case with one token per sequence."""
    name = f"{shape} B={sequences} parts={parts} {dtype} rope and cache"
    return _case(shape, dtype, sequences, 1, parts, name)


def prefill(shape: Heads, dtype: str, tokens: int) -> Case:
    """Return a case with the first tokens of a sequence."""
    return _case(shape, dtype, 1, tokens, 1, f"{shape} T={tokens} {dtype} rope and cache")


def _case(shape: Heads, dtype: str, batch: int, tokens: int, parts: int, name: str) -> Case:
    """Return a case. The program makes the pages itself, uninitialised but for the new tokens: as
    arguments they would have to be copied first."""
    head_dim, counts = shape.head_dim, (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    start = CONTEXT if parts > 1 else 0
    pages_per_sequence = -(-(start + tokens) // PAGE_SIZE)
    pool = (batch * pages_per_sequence, PAGE_SIZE, shape.num_kv_heads, head_dim)
    sums_dtype = FP32 if parts > 1 else BF16
    frequencies = FREQUENCIES_BASE ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    rows = batch * tokens
    structs: Any = Projections(
        *(jax.ShapeDtypeStruct((parts, rows, count, head_dim), sums_dtype) for count in counts)  # type: ignore[arg-type]
    )

    table = np.random.default_rng(0).permutation(pool[0]).astype(np.int32).reshape(batch, -1)

    def arguments(key: Array) -> tuple[Any, ...]:
        sums = Projections(
            *(
                jax.random.normal(each, one.shape, sums_dtype)
                for each, one in zip(jax.random.split(key, 3), structs, strict=True)
            )
        )
        scales = Projections(*(jnp.full((count, head_dim), 0.5, FP32) for count in counts))
        cached_lens = jnp.full(batch, start, jnp.int32)
        positions = cached_lens[:, None] + jnp.arange(tokens)
        turns = xla.angles(positions, frequencies)
        return (
            sums,
            scales if parts > 1 else None,
            positions,
            turns,
            cached_lens,
            cached_lens + tokens,
        )

    def of(run: Callable[..., Any], dtype_of_q: Any) -> Callable[..., Any]:
        def call(
            sums: Projections, scales: Projections | None, positions: Array, turns: Any,
            cached_lens: Array, kv_lens: Array, **options: Any,
        ) -> Any:  # fmt: skip
            if run is hopper.rope_and_cache:  # In a step they are made once for all layers.
                options["cos_and_sin"] = turns
            return run(
                sums, positions, lax.empty(pool, pages), lax.empty(pool, pages),
                jnp.asarray(table), cached_lens, kv_lens, scales,
                jnp.float32(K_SCALE), jnp.float32(V_SCALE),
                frequencies=frequencies, dtype=dtype_of_q, **options,
            )  # fmt: skip

        return call

    def value(found: tuple[Array, ...]) -> Array:
        """Return q, and the part of the pages that was written, unscaled."""
        q, *pools = found
        at = start + np.arange(tokens)
        stored = [each.astype(FP32)[table[:, at // PAGE_SIZE], at % PAGE_SIZE] for each in pools]
        return jnp.concatenate([q.astype(FP32).ravel(), *(each.ravel() for each in stored)])

    pages = KV_DTYPES[dtype]
    moved = sum(one.size * one.dtype.itemsize for one in structs)
    written = 2 * rows * shape.num_kv_heads * head_dim * pages.itemsize
    configs = [
        hopper.Config(*each) for each in product((1, 2, 4, 8), (False, True))
        if not hopper.unfit(hopper.Config(*each), structs)
    ]  # fmt: skip
    return Case(
        kernel=hopper.NAME,
        problem=hopper.tuned_as(structs, rows),
        name=name,
        operations=sum(one.size for one in structs) + 3 * structs.q.size // parts,
        bytes=moved + rows * shape.num_heads * head_dim * 2 + written,
        peak=BF16_OPERATIONS_PER_SECOND,
        arguments=arguments,
        run=of(hopper.rope_and_cache, BF16),
        baselines={"xla": of(xla.rope_and_cache, BF16)},
        reference=of(reference.rope_and_cache, FP32),
        value=value,
        tolerance=TOLERANCE if dtype == "bf16" else 2**-4,
        configs=configs,
    )
