"""Defines `ModelSpec`: everything that shapes a compiled program besides its arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from flax.core import FrozenDict
from jax.sharding import Mesh

from llama_jax.model.config import LlamaConfig
from llama_jax.model.fp8 import WeightFormat
from pallas_kernels.choice import Kernel, not_here
from pallas_kernels.fp8_matmul import kernels as fp8_kernels

Activations = Literal["auto", "bf16", "dynamic", "static"]
Phase = Literal["prefill", "decode"]
Implementation = Literal["reference", "xla", "cpu", "hopper"]
Params = Mapping[str, Any]


@dataclass(frozen=True)
class ModelSpec:
    """Everything that shapes a compiled program besides its arguments.

    formats: the storage format of each parameter by module path ("layers_0/self_attn/q_proj").
        Parameters without one are unquantised and have the config's dtype.
    dtype: "bfloat16" or "float32", of the activations and the residual stream.
    activations: the format in which activations meet FP8 weights: "bf16" (unquantised, in
        `dtype`), "dynamic" (e4m3fn with a scale per token, or per `WeightFormat.activation_group`
        of its features) or "static" (e4m3fn with the checkpoint's input scale). `extend` resolves
        "auto", see `activations_in`.
    implementation: of attention and FP8 products, see `pallas_kernels`: None for the best that runs
        on the target device, else "reference", "xla", "cpu" or "hopper"; the last two raise if
        their kernels cannot take an operand. With "cpu", attention is XLA's.
    is_batch_invariant: whether a sequence's results are bit-equal whatever else is in the call.
    mesh: the devices that share the work (`sharding.make_mesh`); None for the default device.
    """

    config: LlamaConfig
    formats: Mapping[str, WeightFormat] = field(default_factory=FrozenDict)
    dtype: str = "bfloat16"
    activations: Activations = "bf16"
    implementation: Implementation | None = None
    is_batch_invariant: bool = False
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", FrozenDict(self.formats))
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype must be 'bfloat16' or 'float32', got {self.dtype!r}")
        if self.activations not in get_args(Activations):
            raise ValueError(
                "activations must be 'auto', 'bf16', 'dynamic' or 'static', got "
                f"{self.activations!r}"
            )
        if self.implementation not in (None, *get_args(Implementation)):
            raise ValueError(
                "implementation must be 'reference', 'xla', 'cpu', 'hopper' or None, got "
                f"{self.implementation!r}"
            )
        if self.mesh is not None and not isinstance(self.mesh, Mesh):
            raise TypeError(f"mesh: expected a Mesh, such as make_mesh(4), got {self.mesh!r}")
        lacking = [
            path for path, stored in self.formats.items() if stored.scale and not stored.input_scale
        ]
        if self.activations == "static" and lacking:
            raise ValueError(
                f"activations='static' needs an input scale for each FP8 matrix; {lacking[0]} and "
                f"{len(lacking) - 1} more have none. Use 'dynamic' or 'bf16'."
            )

    def check_runs(self) -> None:
        """Raise ValueError if the named implementation cannot run on the target device."""
        if self.implementation is None:  # XLA's always can
            return
        if reason := not_here(fp8_kernels.KERNELS, self.implementation):
            raise ValueError(
                f"implementation={self.implementation!r} cannot run: {reason}. Leave it out to use "
                "one that can."
            )

    def implementation_of(self, kernels: Sequence[Kernel]) -> str | None:
        """Return the implementation to ask for among an operation's kernels: None, for the best, if
        none of them has the name in `implementation`."""
        known = any(each.is_meant_by(self.implementation) for each in kernels)
        return self.implementation if known else None

    def format_of(self, path: tuple[str, ...]) -> WeightFormat:
        return self.formats.get("/".join(path), WeightFormat(self.config.dtype))
