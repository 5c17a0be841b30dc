"""Declares matrices in their storage format, and multiplies by the kernel chosen for each.

Every parameter is declared once, in `parameter`, with its shape, its dtype and the logical names of
its axes; initialisation, sharding and the restore target of a checkpoint all come from there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax import Array, lax

from llama_jax.model.fp8 import WeightFormat, quantize_per_group, quantize_per_token, scale_shape
from llama_jax.model.sharding import divided_over
from llama_jax.model.spec import ModelSpec
from pallas_kernels import e4m3
from pallas_kernels.fp8_matmul import (
    Choice,
    Kernel,
    choose,
    fp8_matmul,
    fp8_matmul_parts,
    fp8_matmuls,
    is_one_launch,
    silu,
    unquantized_swiglu,
)
from pallas_kernels.fp8_matmul.dense import dense
from pallas_kernels.fp8_matmul.logits import LogitStats, logit_stats
from pallas_kernels.fp8_matmul.terms import Parts, Terms


def parameter(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str
) -> Array:
    """Declare a parameter of `module` with the logical names of its axes, and return it."""
    # `module.param` would trace `initial` to compare shapes, a quarter of tracing a program.
    given = None if module.is_initializing() else module.get_variable("params", name)
    if given is not None and given.shape == shape:
        found: Array = given
        return found

    def initial(key: Array) -> Array:
        if name != "weight" or len(shape) == 1:
            return jnp.full(shape, _INITIAL_SCALE if name == "weight_scale" else 1.0, dtype)
        if dtype == "float8_e4m3fn":
            return e4m3.cast(jax.random.normal(key, shape) * (0.02 / _INITIAL_SCALE))
        return (jax.random.normal(key, shape) * 0.02).astype(dtype)

    parameter: Array = module.param(name, nn.with_logical_partitioning(initial, axes))  # type: ignore[assignment]
    return parameter


_INITIAL_SCALE = 0.02 / 64


class Stored(NamedTuple):
    """A matrix [out, in] with its scales and the scale of its inputs, or None.

    summed_over: inside shard_map, the mesh axis over which the columns are split and products must
        be summed; None elsewhere.
    """

    weight: Array
    scale: Array | None = None
    input_scale: Array | None = None
    summed_over: str | None = None

    @property
    def quantized(self) -> tuple[Array, Array]:
        assert self.scale is not None
        return self.weight, self.scale


# The collection in which each `Linear` stores its input, if `apply` gets it as mutable.
INPUTS = "intermediates"
_INPUT = "input"


def inputs_of(variables: Mapping[str, Any]) -> dict[str, Array]:
    """Return the input [..., in] of each `Linear` by module path ("layers_0/mlp/up_proj").

    variables: the second value that `Llama.apply(..., mutable=INPUTS)` returned.
    """
    sown = traverse_util.flatten_dict(dict(variables[INPUTS]), sep="/")
    return {path.removesuffix(f"/{_INPUT}"): x for path, (x,) in sown.items()}


class Operands(NamedTuple):
    """The operands of x @ matrix.T. x: [rows, in]; x_scale: of FP8 codes, as in `fp8_matmul`."""

    x: Array
    x_scale: Array | None
    matrix: Stored


class Linear(nn.Module):
    """Computes x [..., in] @ weight [out, in].T + residual [..., out], with a weight of any storage
    format."""

    spec: ModelSpec
    in_features: int
    out_features: int
    axes: tuple[str, str]

    def __call__(
        self, x: Array, residual: Array | None = None, choice: Choice[Kernel] | None = None
    ) -> Array:
        """Multiply, and add a residual if given. choice: from `choose`; None to choose now."""
        if choice is None:
            choice = self.choose(x.size // self.in_features, x.dtype, residual)
        return multiply(self.spec, self.operands(x), choice, x, residual)

    @nn.compact
    def stored(self) -> Stored:
        shape, stored = (self.out_features, self.in_features), self.format
        weight = parameter(self, "weight", shape, self.axes, stored.dtype)
        matrix = Stored(weight, summed_over=divided_over(self.axes[1]))
        if stored.scale is None:
            return matrix
        scales = scale_shape(shape, stored.scale, stored.column_groups)
        scale = parameter(self, "weight_scale", scales, self.axes[: len(scales)], "float32")
        matrix = matrix._replace(scale=scale)
        if not stored.input_scale:
            return matrix
        return matrix._replace(input_scale=parameter(self, "input_scale", (), (), "float32"))

    def choose(
        self,
        rows: int,
        dtype: jnp.dtype,
        residual: Array | None = None,
        out_dtype: jnp.dtype | None = None,
    ) -> Choice[Kernel] | None:
        """Choose the kernel for x [rows, in] of `dtype`.

        out_dtype: of the result, by default `dtype`.
        Returns None for a matrix without scales, for which `dense` chooses.
        """
        matrix = self.stored()
        if matrix.scale is None:
            return None
        quantizes = self.spec.activations in ("dynamic", "static")
        x = jax.ShapeDtypeStruct((rows, self.in_features), e4m3.DTYPE if quantizes else dtype)
        added = None
        if residual is not None and not matrix.summed_over:
            added = jax.ShapeDtypeStruct((rows, matrix.weight.shape[0]), residual.dtype)
        return choose(
            x, *matrix.quantized, jnp.dtype(out_dtype or dtype), added,
            implementation=self.spec.implementation,
        )  # fmt: skip

    def operands(self, x: Array) -> Operands:
        self.sow(INPUTS, _INPUT, x)
        matrix, rows, x_scale = self.stored(), x.reshape(-1, self.in_features), None
        if matrix.scale is not None and self.spec.activations == "dynamic":
            if self.format.activation_group:
                # `forward.device_spec` ensures that no group is on two devices.
                rows, x_scale = quantize_per_group(rows)
            else:
                rows, x_scale = quantize_per_token(
                    rows, self.format.activation_scale_ub, matrix.summed_over
                )
        elif matrix.scale is not None and self.spec.activations == "static":
            assert matrix.input_scale is not None
            x_scale = matrix.input_scale
            rows = e4m3.cast(rows.astype(jnp.float32) / x_scale)
        return Operands(rows, x_scale, matrix)

    def logit_stats(self, x: Array, targets: Array, logits_dtype: jnp.dtype) -> LogitStats:
        """Compute what is known of the logits of x [m, in], without keeping them.

        targets: int32 [m], rows of the matrix. logits_dtype: to which logits are rounded.
        """
        rows, x_scale, matrix = self.operands(x)
        return logit_stats(
            rows, matrix.weight, matrix.scale, targets, x_scale=x_scale, logits_dtype=logits_dtype,
            is_batch_invariant=self.spec.is_batch_invariant,
            implementation=self.spec.implementation,
        )  # fmt: skip

    @property
    def format(self) -> WeightFormat:
        return self.spec.format_of(self.path)


@dataclass(frozen=True)
class Products:
    """The products of one x with one or several matrices, and the kernel chosen for each.

    choices: made once per product, from shapes and dtypes (`Linear.choose`).
    """

    linears: tuple[Linear, ...]
    choices: tuple[Choice[Kernel] | None, ...]

    @classmethod
    def of(
        cls, linears: Sequence[Linear], rows: int, dtype: jnp.dtype, residual: Array | None = None
    ) -> "Products":
        choices = (linear.choose(rows, dtype, residual) for linear in linears)
        return cls(tuple(linears), tuple(choices))

    @property
    def choice(self) -> Choice[Kernel]:
        """Return the choice of all products, if they share a launch."""
        (choice, *_) = self.choices
        assert choice is not None
        return choice

    @property
    def spec(self) -> ModelSpec:
        return self.linears[0].spec

    @property
    def name(self) -> str:
        return "+".join(str(linear.name) for linear in self.linears)

    def __call__(self, x: Array) -> list[Array]:
        """Multiply x [..., in] by each matrix, in one launch if a kernel can do that."""
        operands = [linear.operands(x) for linear in self.linears]
        if not self._is_one_launch():
            found = []
            for linear, choice, each in zip(self.linears, self.choices, operands, strict=True):
                with jax.named_scope(str(linear.name)):
                    found.append(multiply(self.spec, each, choice, x))
            return found
        weights, scales = zip(*(each.matrix.quantized for each in operands), strict=True)
        with jax.named_scope(self.name):
            ys = fp8_matmuls(
                operands[0].x, weights, scales, x_scale=operands[0].x_scale, out_dtype=x.dtype,
                is_batch_invariant=self.spec.is_batch_invariant, implementation=self.choice,
            )  # fmt: skip
        return [y.reshape(*x.shape[:-1], -1) for y in ys]

    def swiglu(self, x: Array) -> Array:
        """Compute silu(gate(x)) * up(x) of x [..., in], in one launch if a kernel can do that."""
        is_plain = self.spec.activations == "bf16"
        if not (is_plain and self._is_one_launch() and self.choice.kernel.unquantized_swiglu):
            gate, up = self(x)
            return silu(gate) * up
        of_gate, of_up = (linear.operands(x) for linear in self.linears)
        with jax.named_scope(self.name):
            y = unquantized_swiglu(
                of_gate.x, *of_gate.matrix.quantized, *of_up.matrix.quantized, out_dtype=x.dtype,
                implementation=self.choice,
            )  # fmt: skip
        return y.reshape(*x.shape[:-1], -1)

    def parts(self, x: Array | Terms, rows: int) -> list[Parts]:
        """Multiply x [rows, in] by all matrices in one launch that leaves its sums over splits of K
        unadded. Only if `fused.leave_sums` allows it."""
        weights, scales = zip(*(linear.stored().quantized for linear in self.linears), strict=True)
        with jax.named_scope(self.name):
            return fp8_matmul_parts(
                x, rows, weights, scales,
                is_batch_invariant=self.spec.is_batch_invariant, implementation=self.choice,
            )  # fmt: skip

    def _is_one_launch(self) -> bool:
        """Return whether all products share their quantised x and a kernel takes several
        weights."""
        formats = [linear.format for linear in self.linears]
        alike = {(x.scale, x.activation_scale_ub, x.activation_group) for x in formats}
        choices = [choice for choice in self.choices if choice]
        return (
            len(choices) == len(formats)
            and len(alike) == 1
            and self.spec.activations != "static"
            and is_one_launch(choices)
        )


def multiply(
    spec: ModelSpec,
    operands: Operands,
    choice: Choice[Kernel] | None,
    like: Array | jax.ShapeDtypeStruct,
    residual: Array | None = None,
) -> Array:
    """Multiply, and add a residual if given. The result has the dtype and leading axes of `like`.

    Some kernels add the residual before they round. Otherwise the product is summed over devices
    and rounded first.

    choice: from `Linear.choose`.
    """
    x, x_scale, (weight, scale, _, summed_over) = operands
    is_added = False
    if choice is None or scale is None:
        y = dense(x, weight, spec.implementation)
    else:
        rows = None
        if residual is not None and not summed_over and choice.kernel.adds_residual:
            rows = residual.reshape(-1, weight.shape[0])
        is_added = rows is not None
        y = fp8_matmul(
            x, weight, scale, x_scale=x_scale, residual=rows, out_dtype=like.dtype,
            is_batch_invariant=spec.is_batch_invariant, implementation=choice,
        )  # fmt: skip
    if summed_over:
        y = lax.psum(y.astype(like.dtype), summed_over)
    y = y.astype(like.dtype).reshape(*like.shape[:-1], weight.shape[0])
    return y if residual is None or is_added else y + residual


def declared(x: Array, *linears: Linear) -> Array:
    """Declare all parameters and return x.

    Initialisation needs no more, and tracing the products would take much longer.
    """
    for linear in linears:
        linear.stored()
    return x
