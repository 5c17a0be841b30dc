"""Defines the problems on which `pallas_kernels.dev` checks, times and tunes `rope_and_attention`.

A problem is two cases, of which one is for two launches: what is tuned is which of them is taken.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.dev.case import BF16_OPERATIONS_PER_SECOND, Case
from pallas_kernels.dev.shapes import Heads, heads
from pallas_kernels.paged_attention import hopper_decode, reference, xla
from pallas_kernels.paged_attention.cases import BF16, K_SCALE, KV_DTYPES, V_SCALE
from pallas_kernels.paged_attention.hopper_decode_config import tuned_as
from pallas_kernels.paged_attention.hopper_loop import PAGE_SIZE
from pallas_kernels.rope_and_attention import hopper
from pallas_kernels.rope_and_cache import hopper as rope
from pallas_kernels.rope_and_cache import reference as rope_reference
from pallas_kernels.rope_and_cache import xla as rope_xla
from pallas_kernels.rope_and_cache.cases import FREQUENCIES_BASE, PARTS
from pallas_kernels.rope_and_cache.projections import Projections

FP32 = jnp.dtype(jnp.float32)
# Of pages with a new token: products are rounded before they are rotated in the reference.
TOLERANCES = {"bf16": 2**-6, "fp8": 2**-4}
SEQUENCES, CONTEXT = (1, 16, 64), 1088
ON_HOPPER = rope.rope_and_cache, hopper.rope_and_attention


def cases(_rows: Sequence[int]) -> Iterator[Case]:
    """Yield decode with partial sums, for the heads of every model that the kernel takes."""
    for each, dtype in product(heads(), KV_DTYPES):
        group = each.num_heads // each.num_kv_heads
        if each.head_dim == hopper.HEAD_DIM and group in hopper.GROUPS:
            for sequences in SEQUENCES:
                yield from decode(each, dtype, [CONTEXT] * sequences, PARTS)


def tiny_cases() -> Iterator[Case]:
    """Yield cases for the simulator."""
    yield from decode(Heads("tiny", 1, 4, 1, 128), "fp8", [1, 65], 2)


def decode(shape: Heads, dtype: str, kv_lens: Sequence[int], parts: int) -> Iterator[Case]:
    """Yield the cases for two launches and for one.

    On a GPU, XLA copies the pages first, as the program does not own its arguments. The time of
    both cases has these copies, which a decode step does not.
    """
    problem = _Problem(shape, KV_DTYPES[dtype], tuple(kv_lens), parts)
    in_two = problem.program(rope.rope_and_cache, hopper_decode.paged_attention, BF16)
    in_one = problem.program(hopper.rope_and_attention, None, BF16)

    def run(default: bool, *arrays: Any, config: Any = None, **options: Any) -> Any:
        return (in_one if (config or hopper.Config(default)).in_one else in_two)(*arrays, **options)

    batch, (pages, *_) = len(kv_lens), problem.pool
    q: Any = jax.ShapeDtypeStruct((batch, 1, shape.num_heads, shape.head_dim), BF16)
    pool: Any = jax.ShapeDtypeStruct(problem.pool, problem.dtype)
    keys = sum(kv_lens) * shape.num_kv_heads * shape.head_dim
    sums = parts * batch * sum(problem.counts) * shape.head_dim
    size = f"{shape} B={batch} S={max(kv_lens)} {dtype} rope, cache and attention"
    for default, name in ((False, size), (True, f"{size} in one")):
        yield Case(
            kernel=hopper.NAME,
            problem=tuned_as(q, pool, pages // batch * PAGE_SIZE),
            name=name,
            operations=4 * keys * shape.num_heads // shape.num_kv_heads,
            bytes=2 * keys * problem.dtype.itemsize + 4 * sums + 2 * q.size,
            peak=BF16_OPERATIONS_PER_SECOND,
            arguments=problem.arguments,
            run=partial(run, default),
            baselines={"xla": problem.program(rope_xla.rope_and_cache, xla.paged_attention, BF16)},
            reference=problem.program(
                rope_reference.rope_and_cache, reference.paged_attention, FP32
            ),
            value=problem.value,
            tolerance=TOLERANCES[dtype],
            configs=[hopper.Config(False), hopper.Config(True)],
        )


@dataclass(frozen=True)
class _Problem:
    """Sequences of `kv_lens` tokens, the last of which is new.

    dtype: of the pages. parts: of the sums.
    """

    shape: Heads
    dtype: jnp.dtype
    kv_lens: tuple[int, ...]
    parts: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """Return the heads of q, k and v."""
        return self.shape.num_heads, self.shape.num_kv_heads, self.shape.num_kv_heads

    @property
    def pool(self) -> tuple[int, ...]:
        """Return the shape of the pages of keys, and of values."""
        pages = len(self.kv_lens) * -(-max(self.kv_lens) // PAGE_SIZE)
        return pages, PAGE_SIZE, self.shape.num_kv_heads, self.shape.head_dim

    @property
    def table(self) -> np.ndarray:
        pages = np.random.default_rng(0).permutation(self.pool[0])
        return pages.astype(np.int32).reshape(len(self.kv_lens), -1)

    @property
    def frequencies(self) -> np.ndarray:
        head_dim = self.shape.head_dim
        return FREQUENCIES_BASE ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)

    def arguments(self, key: Array) -> tuple[Any, ...]:
        """Return sums, weight_scales, positions, cosines and sines, and both pools."""
        keys, head_dim = jax.random.split(key, 5), self.shape.head_dim
        sums, scales = [], []
        for each, count in zip(keys, self.counts, strict=False):
            shape = self.parts, len(self.kv_lens), count, head_dim
            sums.append(jax.random.normal(each, shape, FP32))
            scales.append(jnp.full((count, head_dim), 0.5, FP32))
        pools = (jax.random.normal(each, self.pool, BF16).astype(self.dtype) for each in keys[3:])
        positions = jnp.array(self.kv_lens)[:, None] - 1
        turns = rope_xla.angles(positions, self.frequencies)
        return Projections(*sums), Projections(*scales), positions, turns, *pools

    def program(self, rope_and_cache: Callable[..., Any], attend: Any, dtype: Any) -> Any:
        """Return the program of two launches, or of one if there is no `attend`. dtype: of q."""

        def call(
            sums: Projections, scales: Projections, positions: Array, turns: Any, k: Array,
            v: Array, **options: Any,
        ) -> Any:  # fmt: skip
            lengths = jnp.array(self.kv_lens, jnp.int32)
            where = jnp.asarray(self.table), lengths - 1, lengths
            scales_of = jnp.float32(K_SCALE), jnp.float32(V_SCALE)
            # In a step they are made once for all layers.
            made = {"cos_and_sin": turns} if rope_and_cache in ON_HOPPER else {}
            found = rope_and_cache(
                sums, positions, k, v, *where, scales, *scales_of, frequencies=self.frequencies,
                dtype=dtype, **made, **options,
            )  # fmt: skip
            if attend is None:
                return found
            return attend(*found, *where, *scales_of, **options), *found[1:]

        return call

    def value(self, found: tuple[Array, ...]) -> Array:
        """Return attention's result and the new rows of the pages, unscaled."""
        y, *pools = found
        at, row = np.array(self.kv_lens) - 1, np.arange(len(self.kv_lens))
        page = self.table[row, at // PAGE_SIZE]
        new = (each.astype(FP32)[page, at % PAGE_SIZE] for each in pools)
        return jnp.concatenate([each.astype(FP32).ravel() for each in (y, *new)])
