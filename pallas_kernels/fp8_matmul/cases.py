"""Defines the problems on which `pallas_kernels.dev` checks, times and tunes FP8 x FP8 kernels."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import e4m3
from pallas_kernels.dev.case import FP8_OPERATIONS_PER_SECOND, Case
from pallas_kernels.dev.shapes import Launch, Linear, launches, linears
from pallas_kernels.fp8_matmul import hopper, hopper_config, reference, xla
from pallas_kernels.fp8_matmul.hopper_config import Config
from pallas_kernels.fp8_matmul.reference import BLOCK

Layout = Literal["row", "block"]
LAYOUTS: tuple[Layout, ...] = ("row", "block")
BF16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
# Tensor cores add with about 14 bits. A sum of 14,336 products takes 448 additions, each off by up
# to 2^-14 of the sum so far.
TOLERANCE = 0.02
# A code that is rounded the other way is off by a step of e4m3fn, at most 2^-3 of its value.
SWIGLU_TOLERANCE = 0.04


def cases(rows: Sequence[int]) -> Iterator[Case]:
    """Yield every linear layer of every model, and q, k and v in one launch.

    gate_proj comes alone and with up_proj, down_proj also with scales as `swiglu` makes them.
    """
    for launch, layout, m in itertools.product(launches(), LAYOUTS, rows):
        if len(set(launch.ns)) > 1:
            yield matmuls(launch, m, layout)
    for linear, layout, m in itertools.product(linears(), LAYOUTS, rows):
        yield matmul(linear, m, layout)
        if linear.name == "down_proj":
            yield matmul(linear, m, layout, x_grouped=True)
        if linear.name == "gate_proj":
            yield swiglu(linear, m, layout)


def tiny_cases() -> Iterator[Case]:
    """Yield cases for the simulator."""
    tiny = Linear("tiny", 1, "linear", 256, 384)
    yield matmul(tiny, 1, "row")
    yield matmul(tiny, 65, "block")
    yield matmul(tiny, 130, "row", x_grouped=True)
    yield matmuls(Launch("tiny two", (256, 64), 384), 65, "row")
    yield swiglu(tiny, 65, "row")


def matmul(linear: Linear, m: int, layout: Layout, *, x_grouped: bool = False) -> Case:
    """Return a matmul with a bfloat16 result.

    x_grouped: x [m, k] has a scale per row and 128 columns, instead of one per row.
    """
    n, k = linear.n, linear.k
    x_groups = k // BLOCK if x_grouped else 1
    return _case(
        m, (n,), k, lambda key: _arguments(key, m, (n,), k, layout, x_groups),
        promote=x_grouped or layout == "block", weights=1,
        kernel="fp8_matmul",
        name=f"{linear} m={m} {layout}" + (" after swiglu" if x_grouped else ""),
        result_bytes=m * linear.n * BF16.itemsize,
        run=partial(hopper.fp8_matmul, out_dtype=BF16),
        baselines={"xla": partial(xla.fp8_matmul, out_dtype=BF16)},
        reference=partial(reference.fp8_matmul, out_dtype=FLOAT32),
        value=lambda y: y,
        tolerance=TOLERANCE,
    )  # fmt: skip


def matmuls(launch: Launch, m: int, layout: Layout) -> Case:
    """Return a launch of several weights with bfloat16 results; x [m, k] has a scale per row."""

    def each(multiply: Callable[..., Array], dtype: jnp.dtype) -> Callable[..., list[Array]]:
        def run(
            x: Array, weights: Sequence[Array], weight_scales: Sequence[Array], x_scale: Array
        ) -> list[Array]:
            pairs = zip(weights, weight_scales, strict=True)
            return [multiply(x, *pair, x_scale, out_dtype=dtype) for pair in pairs]

        return run

    def arguments(key: Array) -> tuple[Any, ...]:
        x, *pairs, x_scale = _arguments(key, m, launch.ns, launch.k, layout, x_groups=1)
        return x, tuple(pairs[::2]), tuple(pairs[1::2]), x_scale

    return _case(
        m, launch.ns, launch.k, arguments,
        promote=layout == "block", weights=1,
        kernel="fp8_matmul", name=f"{launch} m={m} {layout}",
        result_bytes=m * sum(launch.ns) * BF16.itemsize,
        run=partial(hopper.fp8_matmuls, out_dtype=BF16),
        baselines={"xla": each(xla.fp8_matmul, BF16)},
        reference=each(reference.fp8_matmul, FLOAT32),
        value=lambda ys: jnp.concatenate(ys, axis=1),
        tolerance=TOLERANCE,
    )  # fmt: skip


def swiglu(linear: Linear, m: int, layout: Layout) -> Case:
    """Return a `swiglu`. linear: gate_proj, and an up_proj like it."""
    n, k = linear.n, linear.k
    return _case(
        m, (n,), k, lambda key: _arguments(key, m, (n, n), k, layout, x_groups=1),
        promote=layout == "block", weights=2,
        kernel="fp8_swiglu", name=f"{linear} m={m} {layout} swiglu",
        result_bytes=m * linear.n + m * linear.n // BLOCK * FLOAT32.itemsize,
        run=hopper.swiglu,
        baselines={"xla": xla.swiglu},
        reference=reference.swiglu,
        value=lambda y: reference.dequantize_activations(*y),
        tolerance=SWIGLU_TOLERANCE,
    )  # fmt: skip


def _case(
    m: int,
    ns: Sequence[int],
    k: int,
    arguments: Callable[[Array], tuple[Any, ...]],
    *,
    promote: bool,
    weights: int,
    result_bytes: int,
    **rest: Any,
) -> Case:
    """Return a case. ns: rows of each product's weight. weights: how many each product has."""
    structs = jax.tree.leaves(jax.eval_shape(arguments, jax.random.key(0)))
    return Case(
        problem=hopper_config.tuned_as(m, ns, k, promote=promote),
        operations=2 * m * sum(ns) * k * weights,
        bytes=sum(each.size * each.dtype.itemsize for each in structs) + result_bytes,
        peak=FP8_OPERATIONS_PER_SECOND,
        arguments=arguments,
        configs=_configs(m, promote=promote, weights=weights),
        **rest,
    )


def _arguments(
    key: Array, m: int, ns: Sequence[int], k: int, layout: Layout, x_groups: int
) -> tuple[Array, ...]:
    """Return x, each weight and its scale, and x_scale; results are of order 1."""
    keys = iter(jax.random.split(key, 2 + 2 * len(ns)))

    def codes(*shape: int) -> Array:
        return e4m3.cast(32 * jax.random.normal(next(keys), shape, BF16))

    def scale(*shape: int) -> Array:
        size = k**-0.25 / 32
        return jax.random.uniform(next(keys), shape, minval=size / 2, maxval=size * 2)

    x = codes(m, k)
    pairs = [
        (codes(n, k), scale(*((n,) if layout == "row" else (-(-n // BLOCK), k // BLOCK))))
        for n in ns
    ]
    return x, *itertools.chain(*pairs), scale(m, x_groups)


def _configs(m: int, *, promote: bool, weights: int) -> list[Config]:
    """Return configurations that may be fastest: each tile with the deepest ring that fits, and
    with the deepest whose slots are a power of two, so that a mask finds them."""
    tiles = itertools.product((64, 128), (64, 128, 256), (1, 2))
    found = []
    for tile_m, tile_n, cluster in tiles:
        if (tile_m == 64 and m > 64) or (cluster == 2 and m <= tile_m):
            continue
        deepest = hopper_config.most_stages(tile_m, tile_n, weights)
        for stages in {deepest, 1 << deepest.bit_length() - 1}:
            config = Config(tile_m, tile_n, stages, cluster)
            if hopper_config.unfit(config, promote=promote, weights=weights) is None:
                found.append(config)
    return found
