"""What `pallas_kernels.dev.bench` checks and times, and what `pallas_kernels.dev.tune` tunes."""

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

    kernel, problem: what its tuned configurations are filed under.
    name: what people call it.
    operations, bytes: what cannot be done without; an addition and a product are two operations.
    peak: operations per second of the unit that does them.
    arguments: random ones, for a key.
    run: the kernel, with the keyword arguments config and interpret. reference: the same for the
        same arguments.
    rivals: what does the same work for these arguments, by name: "xla", "cudnn".
    value: what `run` returns as one array of numbers.
    tolerance: of the error's norm over the reference's.
    configs: to try for tuning.
    """

    kernel: str
    problem: str
    name: str
    operations: int
    bytes: int
    peak: float
    arguments: Callable[[Array], tuple[Array, ...]]
    run: Callable[..., Any]
    rivals: Mapping[str, Callable[..., Any]]
    reference: Callable[..., Any]
    value: Callable[[Any], Array]
    tolerance: float
    configs: Sequence[Any]

    def floor(self, bytes_per_second: float) -> float:
        """Seconds that no kernel can go below."""
        return max(self.operations / self.peak, self.bytes / bytes_per_second)

    def expected(self, *arguments: Any) -> Array:
        """What the reference gives, as `value`."""
        return self.value(self.reference(*arguments))

    def error(
        self,
        run: Callable[..., Any],
        arguments: tuple[Array, ...],
        expected: Callable[..., Array] | None = None,
    ) -> float:
        """The norm of the difference to the reference, over the reference's norm.

        expected: the method of that name, compiled.
        """
        right = (expected or jax.jit(self.expected))(*arguments)
        difference = self.value(run(*arguments)).astype(jnp.float32) - right
        return float(jnp.linalg.norm(difference) / jnp.linalg.norm(right))
