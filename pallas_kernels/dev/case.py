"""Defines a case: a problem on which `pallas_kernels.dev` checks, times and tunes a kernel."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# NVIDIA H100 and H200 SXM data sheets, without sparsity.
FP8_OPERATIONS_PER_SECOND = 1_979e12
BF16_OPERATIONS_PER_SECOND = 989e12


@dataclass(frozen=True)
class Case:
    """A kernel and a problem for it.

    kernel, problem: the keys of its tuned configuration.
    name: for people.
    operations, bytes: the least that any kernel has to compute and to move; a multiply-add is two
        operations.
    peak: operations per second of the unit that computes them.
    arguments: makes random arguments from a key.
    run: the kernel, with keyword arguments config and interpret.
    reference: computes the same from the same arguments.
    baselines: other programs that do the same work, by name: "xla", "cudnn".
    value: converts the result of `run` to one array of numbers.
    tolerance: the largest allowed ratio of the error's norm to the reference's.
    configs: the configurations to try.
    """

    kernel: str
    problem: str
    name: str
    operations: int
    bytes: int
    peak: float
    arguments: Callable[[Array], tuple[Array, ...]]
    run: Callable[..., Any]
    baselines: Mapping[str, Callable[..., Any]]
    reference: Callable[..., Any]
    value: Callable[[Any], Array]
    tolerance: float
    configs: Sequence[Any]

    def floor(self, bytes_per_second: float) -> float:
        """Return the least seconds that any kernel needs."""
        return max(self.operations / self.peak, self.bytes / bytes_per_second)

    def expected(self, *arguments: Any) -> Array:
        """Return the reference's `value`."""
        return self.value(self.reference(*arguments))

    def error(
        self,
        run: Callable[..., Any],
        arguments: tuple[Array, ...],
        expected: Callable[..., Array] | None = None,
    ) -> float:
        """Return the norm of the difference to the reference, over the reference's norm.

        expected: the method of that name, compiled.
        """
        right = (expected or jax.jit(self.expected))(*arguments)
        difference = self.value(run(*arguments)).astype(jnp.float32) - right
        return float(jnp.linalg.norm(difference) / jnp.linalg.norm(right))
