"""Defines the problems on which `pallas_kernels.dev` checks and times the row fusions."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.dev.case import BF16_OPERATIONS_PER_SECOND, Case
from pallas_kernels.dev.shapes import MODELS
from pallas_kernels.fp8_matmul.terms import Parts, Terms
from pallas_kernels.row_fusions import hopper, reference

BF16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
MAX_ROWS, SPLITS, EPS = 64, 4, 1e-5
# Results are rounded to bfloat16, twice in the norm.
TOLERANCE = 2**-8


def cases(rows: Sequence[int]) -> Iterator[Case]:
    """Yield both fusions of every model, not sharded, for up to as many rows as decode has."""
    for name, model in MODELS.items():
        for m in (each for each in rows if each <= MAX_ROWS):
            yield norm(f"{name} TP1 hidden {model.hidden} m={m}", m, model.hidden)
            yield swiglu(
                f"{name} TP1 intermediate {model.intermediate} m={m}", m, model.intermediate
            )


def tiny_cases() -> Iterator[Case]:
    """Yield cases for the simulator."""
    yield norm("tiny hidden 512 m=2", 2, 512)
    yield swiglu("tiny intermediate 256 m=2", 2, 256)


def norm(name: str, m: int, d: int) -> Case:
    """Return a residual with RMSNorm of [m, d]."""

    def arguments(key: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 3)
        weight = jax.random.uniform(keys[2], (d,), BF16, 0.5, 2)
        return _product(keys[0], m, d), jax.random.normal(keys[1], (m, d), BF16), weight

    return _case(
        name, "add_rms_norm", m, d, arguments,
        lambda p, x, w, **options: hopper.add_rms_norm(p, x, w, EPS, options["interpret"]),
        lambda p, x, w: reference.add_rms_norm(p, x, w, EPS),
    )  # fmt: skip


def swiglu(name: str, m: int, n: int) -> Case:
    """Return a SwiGLU of [m, n]."""

    def arguments(key: Array) -> tuple[Any, ...]:
        gate, up = jax.random.split(key)
        return _product(gate, m, n), _product(up, m, n)

    return _case(
        name, "silu_and_mul", m, n, arguments,
        lambda *args, **options: (hopper.silu_and_mul(*args, interpret=options["interpret"]),),
        lambda *args: (reference.silu_and_mul(*args),),
    )  # fmt: skip


def _product(key: Array, m: int, n: int) -> Parts:
    sums, scale = jax.random.split(key)
    return Parts(
        jax.random.normal(sums, (SPLITS, m, n)), jax.random.uniform(scale, (n,), FLOAT32, 0.5, 2)
    )


def _case(name: str, kernel: str, m: int, n: int, arguments: Any, run: Any, expected: Any) -> Case:
    structs = jax.tree.leaves(jax.eval_shape(arguments, jax.random.key(0)))

    def value(found: tuple[Any, ...]) -> Array:
        whole = [each.values(m) if isinstance(each, Terms) else each for each in found]
        return jnp.concatenate([each.astype(FLOAT32) for each in whole], axis=1)

    return Case(
        kernel=kernel,
        problem=f"n={n} m={m}",
        name=f"{name} {kernel}",
        operations=structs[0].size,
        bytes=sum(each.size * each.dtype.itemsize for each in structs) + 2 * m * n,
        peak=BF16_OPERATIONS_PER_SECOND,
        arguments=arguments,
        run=lambda *args, config=None, interpret=None: run(*args, interpret=interpret),
        baselines={"xla": expected},
        reference=expected,
        value=value,
        tolerance=TOLERANCE,
        configs=(None,),
    )
