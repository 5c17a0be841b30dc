"""Matrices in the format that they are stored in, and products by whichever kernel takes them.

Every parameter is declared once, in `parameter`, with its shape, its dtype and the logical names of
its axes; initialisation, sharding and the restore target of a checkpoint all come from there.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from llama_jax.model.fp8 import WeightFormat, quantize_per_group, quantize_per_token, scale_shape
from llama_jax.model.sharding import divided_over
from llama_jax.model.spec import Implementation, ModelSpec
from pallas_kernels import device, e4m3, row_fusions
from pallas_kernels.fp8_matmul import chosen, cpu, fp8_matmul, fp8_matmul_parts, fp8_matmuls
from pallas_kernels.fp8_matmul.terms import Parts, Terms
from pallas_kernels.fp8_matmul.xla import MIN_ROWS_FOR_BF16, by_row_blocks, dot


def parameter(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: str
) -> Array:
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
    """A matrix [out, in] and, where it is quantised, its scales and perhaps that of its inputs.

    summed_over: the mesh axis whose devices have some columns each, so that products are sums.
    """

    weight: Array
    scale: Array | None = None
    input_scale: Array | None = None
    summed_over: str | None = None

    @property
    def quantized(self) -> tuple[Array, Array]:
        assert self.scale is not None
        return self.weight, self.scale


class Operands(NamedTuple):
    """Of a product x @ matrix.T. x: [rows, in]; x_scale: of FP8 codes, see `fp8_matmul`."""

    x: Array
    x_scale: Array | None
    matrix: Stored


class Linear(nn.Module):
    """x [..., in] @ weight [out, in].T + residual [..., out], the weight in whatever format it is
    stored."""

    spec: ModelSpec
    in_features: int
    out_features: int
    axes: tuple[str, str]

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        return multiply(self.spec, self.operands(x), x, residual)

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

    def operands(self, x: Array) -> Operands:
        matrix, rows, x_scale = self.stored(), x.reshape(-1, self.in_features), None
        if matrix.scale is not None and self.spec.activations == "dynamic":
            if self.format.activation_group:
                # No group lies on two devices: `forward.device_spec` sees to it.
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

    @property
    def format(self) -> WeightFormat:
        return self.spec.format_of(self.path)


def multiply(
    spec: ModelSpec, operands: Operands, like: Array, residual: Array | None = None
) -> Array:
    """The product, plus a residual, in the dtype and with the leading axes of `like`.

    A kernel adds the residual before it rounds; otherwise the product is rounded first, after it is
    summed over devices.
    """
    x, x_scale, (weight, scale, _, summed_over) = operands
    is_added = False
    if scale is None:
        y = dense(x, weight, spec.implementation)
    else:
        rows = None
        if residual is not None and not summed_over:
            rows = residual.reshape(-1, weight.shape[0])
        runs = chosen(x, weight, scale, like.dtype, rows, implementation=spec.implementation)
        is_added = rows is not None and runs.startswith("hopper")
        y = fp8_matmul(
            x, weight, scale, x_scale=x_scale, residual=rows if is_added else None,
            out_dtype=like.dtype, is_batch_invariant=spec.is_batch_invariant,
            implementation=spec.implementation,
        )  # fmt: skip
    if summed_over:
        y = lax.psum(y.astype(like.dtype), summed_over)
    y = y.astype(like.dtype).reshape(*like.shape[:-1], weight.shape[0])
    return y if residual is None or is_added else y + residual


def products(spec: ModelSpec, x: Array, linears: Sequence[Linear]) -> list[Array]:
    """x [..., in] through each, in one launch where a kernel does that."""
    operands = [linear.operands(x) for linear in linears]
    if not _is_one_launch(spec, [linear.format for linear in linears], operands, x.dtype):
        found = []
        for linear, each in zip(linears, operands, strict=True):
            with jax.named_scope(str(linear.name)):
                found.append(multiply(spec, each, x))
        return found
    weights, scales = zip(*(each.matrix.quantized for each in operands), strict=True)
    with jax.named_scope("+".join(str(linear.name) for linear in linears)):
        ys = fp8_matmuls(
            operands[0].x, weights, scales, x_scale=operands[0].x_scale, out_dtype=x.dtype,
            is_batch_invariant=spec.is_batch_invariant, implementation=spec.implementation,
        )  # fmt: skip
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def parts(spec: ModelSpec, x: Array | Terms, rows: int, linears: Sequence[Linear]) -> list[Parts]:
    """x, [rows, in], through each in one launch, where `is_fused` says that this runs."""
    weights, scales = zip(*(linear.stored().quantized for linear in linears), strict=True)
    with jax.named_scope("+".join(str(linear.name) for linear in linears)):
        return fp8_matmul_parts(
            x, rows, weights, scales, is_batch_invariant=spec.is_batch_invariant
        )


def is_fused(
    spec: ModelSpec, residual: Array, groups: Sequence[Sequence[Linear]], inner: int = 0
) -> bool:
    """Whether products leave their sums to what follows, which is a launch of its own. That is for
    few rows on a Hopper GPU, all weights in FP8.

    groups: those that share a launch each. inner: columns of SwiGLU, if there is one.
    """
    linears = [linear for group in groups for linear in group]
    if (
        spec.activations != "bf16"
        or spec.implementation not in (None, "hopper")
        or any(linear.format.scale is None for linear in linears)
        or any(linear.stored().summed_over for linear in linears)
        or any(len({linear.format.scale for linear in group}) > 1 for group in groups)
    ):
        return False
    rows = jax.ShapeDtypeStruct(
        (residual.size // residual.shape[-1], residual.shape[-1]), residual.dtype
    )
    if device.not_hopper() or row_fusions.refusal(rows, inner):
        return False

    def is_weight_only(linear: Linear) -> bool:
        operand = jax.ShapeDtypeStruct((rows.shape[0], linear.in_features), rows.dtype)
        which = chosen(operand, *linear.stored().quantized, rows.dtype)
        return which == "hopper_weight_only"

    return all(map(is_weight_only, linears))


def declared(x: Array, *linears: Linear) -> Array:
    """x, once all parameters are declared: all that initialising needs, much sooner than products
    are traced."""
    for linear in linears:
        linear.stored()
    return x


def _is_one_launch(
    spec: ModelSpec,
    formats: Sequence[WeightFormat],
    operands: Sequence[Operands],
    dtype: jnp.dtype,
) -> bool:
    """Whether what is multiplied is the same for all, and one kernel takes it."""
    alike = {(x.scale, x.activation_scale_ub, x.activation_group) for x in formats}
    if formats[0].scale is None or len(alike) > 1 or spec.activations == "static":
        return False
    (which, *others) = {
        chosen(x, *matrix.quantized, dtype, implementation=spec.implementation)
        for x, _, matrix in operands
    }
    return not others and which in ("hopper_weight_only", "cpu")


def is_swiglu_fused(spec: ModelSpec, x: Array, gate: Linear, up: Linear, down: Linear) -> bool:
    """Whether one kernel computes silu(gate(x)) * up(x) and quantises it for down_proj, with a
    scale per token and 128 columns, where otherwise it is one per token."""
    formats = [linear.format for linear in (gate, up, down)]
    if (
        spec.activations != "dynamic"
        or spec.implementation not in (None, "hopper")
        or any(each.scale is None or each.activation_scale_ub for each in formats)
        or formats[0].scale != formats[1].scale
    ):
        return False

    def runs_in_fp8(linear: Linear, out_dtype: jnp.dtype | None) -> bool:
        codes = jax.ShapeDtypeStruct((x.size // x.shape[-1], linear.in_features), e4m3.DTYPE)
        return chosen(codes, *linear.stored().quantized, out_dtype) == "hopper_fp8"

    return runs_in_fp8(gate, None) and runs_in_fp8(up, None) and runs_in_fp8(down, x.dtype)


def dense(x: Array, weight: Array, implementation: Implementation | None = None) -> Array:
    """x [m, in] @ weight [out, in].T in float32 sums, for unquantised weights.

    On a CPU the kernel for FP8 weights takes those in bfloat16, too. Otherwise a weight of another
    dtype than x, or few bfloat16 rows on a CPU, go by blocks of the weight's rows: XLA would write
    out a copy of the whole weight.
    """
    if implementation in (None, "cpu") and _runs_on_cpu(x, weight):
        return cpu.dense(x, weight)

    def direct(x: Array, weight: Array) -> Array:
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        return lax.dot_general(
            x, weight, (((1,), (1,)), ((), ())),
            precision=precision, preferred_element_type=jnp.float32,
        )  # fmt: skip

    by_blocks = partial(by_row_blocks, weight_scale=None)
    if x.dtype != weight.dtype:
        return by_blocks(x, weight)
    if x.dtype == jnp.float32:
        return direct(x, weight)
    without_kernel = by_blocks if x.shape[0] < MIN_ROWS_FOR_BF16 else dot
    return lax.platform_dependent(x, weight, cpu=without_kernel, default=direct)


def _runs_on_cpu(x: Array, weight: Array) -> bool:
    reasons = (
        lambda: cpu.refusal(x, weight, None),
        device.not_local,
        lambda: cpu.slower_than_xla(len(x)),
    )
    return weight.dtype == jnp.bfloat16 and not any(reason() for reason in reasons)
