"""Defines the problems on which `pallas_kernels.dev` checks, times and tunes the weight-only
kernel."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import e4m3
from pallas_kernels.dev.case import BF16_OPERATIONS_PER_SECOND, Case
from pallas_kernels.dev.shapes import Launch, launches
from pallas_kernels.fp8_matmul import (
    hopper_weight_only,
    reference,
    xla,
)
from pallas_kernels.fp8_matmul.hopper_weight_only_config import (
    NAME,
    WeightOnlyConfig,
    configure,
    heuristic_cost,
    tuned_as,
    typical_rows,
)
from pallas_kernels.fp8_matmul.limits import MAX_WEIGHT_ONLY_ROWS
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.fp8_matmul.terms import Parts, Terms, two_terms

Layout = Literal["row", "block"]
LAYOUTS: tuple[Layout, ...] = ("row", "block")
BF16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
# Results are rounded to bfloat16, which is off by at most 2^-9.
TOLERANCE = 2**-9
# Splits are tried if their estimated cost is at most this multiple of the least.
WORTH_A_TRY = 1.3


def cases(rows: Sequence[int]) -> Iterator[Case]:
    """Yield every launch for the rows that the kernel takes, with x in bfloat16 and in terms."""
    few = [m for m in rows if m <= MAX_WEIGHT_ONLY_ROWS]
    for launch, layout, m in itertools.product(launches(), LAYOUTS, few):
        yield matmuls(launch, m, layout)
        yield in_terms(launch, m, layout)


def tiny_cases() -> Iterator[Case]:
    """Yield cases for the simulator."""
    yield matmuls(Launch("tiny one", (160,), 384), 1, "row")
    yield matmuls(Launch("tiny two", (160, 32), 384), 17, "block")
    yield in_terms(Launch("tiny one", (160,), 384), 9, "row")


def matmuls(launch: Launch, m: int, layout: Layout) -> Case:
    ns, k = launch.ns, launch.k

    def arguments(key: Array) -> tuple[Any, ...]:
        """Return x, the weights and their scales; results are of order 1."""
        keys = iter(jax.random.split(key, 1 + 2 * len(ns)))
        size = k**-0.5 / 32
        x = jax.random.normal(next(keys), (m, k), BF16)
        codes = [e4m3.cast(32 * jax.random.normal(next(keys), (n, k), BF16)) for n in ns]
        scales = [
            jax.random.uniform(
                next(keys),
                (n,) if layout == "row" else (-(-n // BLOCK), k // BLOCK),
                minval=size / 2,
                maxval=size * 2,
            )
            for n in ns
        ]
        return x, tuple(codes), tuple(scales)

    def by_xla(x: Array, weights: Sequence[Array], scales: Sequence[Array]) -> list[Array]:
        pairs = zip(weights, scales, strict=True)
        return [xla.fp8_matmul(x, weight, scale, None, BF16) for weight, scale in pairs]

    def exactly(x: Array, weights: Sequence[Array], scales: Sequence[Array]) -> list[Array]:
        pairs = zip(weights, scales, strict=True)
        return [reference.fp8_matmul(x, weight, scale, None, FLOAT32) for weight, scale in pairs]

    structs = jax.tree.leaves(jax.eval_shape(arguments, jax.random.key(0)))
    return Case(
        kernel=NAME,
        problem=tuned_as(ns, k, typical_rows(m)),
        name=f"{launch} m={m} {layout} weight-only",
        operations=2 * m * sum(ns) * k,
        bytes=sum(each.size * each.dtype.itemsize for each in structs)
        + m * sum(ns) * BF16.itemsize,
        peak=BF16_OPERATIONS_PER_SECOND,
        arguments=arguments,
        run=partial(hopper_weight_only.fp8_matmuls, out_dtype=BF16),
        baselines={"xla": by_xla},
        reference=exactly,
        value=lambda parts: jnp.concatenate(parts, axis=1),
        tolerance=TOLERANCE,
        configs=_configs(m, ns, k),
    )


def in_terms(launch: Launch, m: int, layout: Layout) -> Case:
    """Return a launch of a decode step: x in two float8 terms, partial sums over splits."""
    case = matmuls(launch, m, layout)

    def arguments(key: Array) -> tuple[Any, ...]:
        x, weights, scales = case.arguments(key)
        return two_terms(x), weights, scales

    def exactly(x: Terms, weights: Sequence[Array], scales: Sequence[Array]) -> list[Array]:
        expected: list[Array] = case.reference(x.values(m).astype(BF16), weights, scales)
        return expected

    def value(products: Sequence[Any]) -> Array:
        whole = [each.total() if isinstance(each, Parts) else each for each in products]
        return jnp.concatenate(whole, axis=1)

    return replace(
        case,
        problem=tuned_as(launch.ns, launch.k, typical_rows(m), in_terms=True),
        name=f"{case.name} in terms",
        arguments=arguments,
        run=partial(hopper_weight_only.parts, m=m),
        baselines={},
        reference=exactly,
        value=value,
        configs=[config for config in case.configs if config.in_fp8],
    )


def _configs(m: int, ns: Sequence[int], k: int) -> list[WeightOnlyConfig]:
    """Return configurations that may be fastest.

    Only the splits and `in_fp8` vary, as in the tuned table; the rest follows from m.
    """
    default = configure(m, ns, k)
    rows = typical_rows(m)
    costs = {splits: heuristic_cost(ns, k, rows, splits) for splits in range(1, k // BLOCK + 1)}
    best = min(costs.values())
    splits = [each for each, cost in costs.items() if cost <= WORTH_A_TRY * best]
    return [
        replace(default, splits=s, in_fp8=f) for s, f in itertools.product(splits, (False, True))
    ]
