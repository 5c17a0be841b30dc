"""Lists the kernels for FP8 products in order of preference, with what each of them fuses.

Modules of Mosaic GPU are imported inside functions, where they are needed: importing them takes a
third of the time of importing JAX.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import choice, device, e4m3
from pallas_kernels.choice import Choice, never
from pallas_kernels.cpu import library
from pallas_kernels.fp8_matmul import cpu, reference, xla
from pallas_kernels.fp8_matmul.terms import Parts, Terms

_FP8 = "FP8 tensor cores"


@dataclass(frozen=True, eq=False, kw_only=True)
class Kernel(choice.Kernel):
    """One way to multiply.

    refusal, unasked: functions of x, weight, weight_scale, out_dtype (None for `swiglu`) and
        residual, or of their shapes and dtypes.
    run: `run(x, weights, weight_scales, x_scale, out_dtype, residual, is_batch_invariant)` returns
        the product with each weight, of out_dtype; operands as in `fp8_matmul`.
    takes_several: whether `run` takes several weights with scales of one kind in one launch. Other
        kernels get one weight at a time.
    adds_residual: whether `run` adds the residual before it rounds.
    parts: `parts(x, m, weights, weight_scales, is_batch_invariant)` is one launch that returns
        partial sums over splits of K (`fp8_matmul_parts`).
    swiglu: `swiglu(x, gate, gate_scale, up, up_scale, x_scale)` is one launch that quantises its
        result (`fp8_matmul.swiglu`). Without it, products are combined.
    unquantized_swiglu: `unquantized_swiglu(x, gate, gate_scale, up, up_scale, out_dtype)` is the
        same without quantising (`fp8_matmul.unquantized_swiglu`).
    logit_stats: `logit_stats(x, weight, weight_scale, targets, logits_dtype)` is one launch that
        returns what is known of logits, and not the logits (`logits.logit_stats`).
    """

    takes_several: bool = False
    adds_residual: bool = False
    parts: Callable[..., list[Parts]] | None = None
    swiglu: Callable[..., tuple[Array, Array]] | None = None
    unquantized_swiglu: Callable[..., Array] | None = None
    logit_stats: Callable[..., tuple[Array, ...]] | None = None

    @property
    def fuses(self) -> tuple[str, ...]:
        found = {
            "several weights": self.takes_several,
            "a residual": self.adds_residual,
            "its sums with the next launch": self.parts,
            "SwiGLU": self.swiglu or self.unquantized_swiglu,
            "logsumexp": self.logit_stats,
        }
        return tuple(name for name, is_fused in found.items() if is_fused)


def choose(
    x: Array | jax.ShapeDtypeStruct,
    weight: Array,
    weight_scale: Array,
    out_dtype: jnp.dtype | None,
    residual: Array | jax.ShapeDtypeStruct | None = None,
    *,
    implementation: str | None = None,
) -> Choice[Kernel]:
    """Choose the kernel that multiplies these operands, given as arrays or as shapes and dtypes.

    Operands and implementation as in `fp8_matmul`; out_dtype: None for `swiglu`.
    Raises ValueError if the named implementation cannot run.
    """
    scale = without_one_group(weight_scale, weight)
    return choice.choose(
        "fp8_matmul", KERNELS, (x, weight, scale, out_dtype, residual), implementation
    )


def without_one_group(weight_scale: Array, weight: Array) -> Array:
    """Drop the axis of groups if there is a single group of columns, as in a shard."""
    rows = weight.shape[0]
    return weight_scale.reshape(rows) if weight_scale.shape == (rows, 1) else weight_scale


def _weight_only_refusal(
    x: Array, weight: Array, weight_scale: Array, out_dtype: jnp.dtype | None, _: Array | None
) -> str | None:
    if reason := device.not_hopper():
        return reason
    from pallas_kernels.fp8_matmul import hopper_weight_only

    dtype = jnp.dtype(jnp.float32) if out_dtype is None else out_dtype
    return hopper_weight_only.refusal(_upcast_shape(x), weight, weight_scale, dtype)


def _weight_only(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    x_scale: Array | None,
    out_dtype: jnp.dtype,
    residual: Array | None,
    is_batch_invariant: bool,
) -> tuple[Array, ...]:
    """Run the weight-only kernel. FP8 activations become bfloat16, which is exact; per-row scales
    of x are applied afterwards."""
    from pallas_kernels.fp8_matmul import hopper_weight_only

    if x_scale is not None and reference.is_grouped(x_scale, x.shape[1]):
        x, x_scale = reference.dequantize_activations(x, x_scale).astype(jnp.bfloat16), None
    ys = hopper_weight_only.fp8_matmuls(
        _upcast(x), weights, weight_scales, jnp.dtype(jnp.float32),
        is_batch_invariant=is_batch_invariant,
    )  # fmt: skip
    return tuple(_finished(y, x_scale, residual, out_dtype) for y in ys)


def _weight_only_parts(
    x: Array | Terms,
    m: int,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    is_batch_invariant: bool,
) -> list[Parts]:
    from pallas_kernels.fp8_matmul import hopper_weight_only

    return hopper_weight_only.parts(
        x, weights, weight_scales, m=m, is_batch_invariant=is_batch_invariant
    )


def _fp8_refusal(
    x: Array,
    weight: Array,
    weight_scale: Array,
    out_dtype: jnp.dtype | None,
    residual: Array | None,
) -> str | None:
    if reason := device.not_hopper():
        return reason
    from pallas_kernels.fp8_matmul import hopper

    return hopper.refusal(x, weight, weight_scale, out_dtype, residual)


def _fp8(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    x_scale: Array | None,
    out_dtype: jnp.dtype,
    residual: Array | None,
    _: bool,
) -> tuple[Array, ...]:
    from pallas_kernels.fp8_matmul import hopper

    assert x_scale is not None  # `refusal` demands float8 activations, which have one
    if len(weights) > 1:
        return hopper.fp8_matmuls(x, weights, weight_scales, x_scale, out_dtype)
    (weight,), (weight_scale,) = weights, weight_scales
    return (hopper.fp8_matmul(x, weight, weight_scale, x_scale, out_dtype, residual),)


def _fp8_swiglu(*operands: Array) -> tuple[Array, Array]:
    from pallas_kernels.fp8_matmul import hopper

    return hopper.swiglu(*operands)


def _cpu_refusal(x: Array, weight: Array, weight_scale: Array, *_: Array | None) -> str | None:
    return cpu.refusal(_upcast_shape(x), weight, weight_scale)


def _cpu_unasked(x: Array, *_: Array | None) -> str | None:
    return cpu.slower_than_xla(x.shape[0]) or device.not_local()


def _on_cpu(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    x_scale: Array | None,
    out_dtype: jnp.dtype,
    residual: Array | None,
    _: bool,
) -> tuple[Array, ...]:
    if x_scale is not None and reference.is_grouped(x_scale, x.shape[1]):
        x, x_scale = xla.ungrouped(x, x_scale, out_dtype), None
    is_alike = residual is None or residual.dtype == out_dtype
    if x_scale is None and is_alike and out_dtype in (jnp.bfloat16, jnp.float32):
        return cpu.fp8_matmuls(
            _upcast(x), weights, weight_scales, out_dtype=out_dtype, residual=residual
        )
    ys = cpu.fp8_matmuls(_upcast(x), weights, weight_scales)
    return tuple(_finished(y, x_scale, residual, out_dtype) for y in ys)


def _each(multiply: Callable[..., Array]) -> Callable[..., tuple[Array, ...]]:
    """Make `Kernel.run` from a function of one weight."""

    def run(
        x: Array,
        weights: Sequence[Array],
        weight_scales: Sequence[Array],
        x_scale: Array | None,
        out_dtype: jnp.dtype,
        residual: Array | None,
        _: bool,
    ) -> tuple[Array, ...]:
        pairs = zip(weights, weight_scales, strict=True)
        return tuple(multiply(x, *pair, x_scale, out_dtype, residual) for pair in pairs)

    return run


def _finished(
    y: Array, x_scale: Array | None, residual: Array | None, out_dtype: jnp.dtype
) -> Array:
    """Apply scales and residual to a float32 product, as far as its kernel has not, and round it to
    out_dtype."""
    y = y if x_scale is None else y * x_scale
    return (y if residual is None else y + residual.astype(jnp.float32)).astype(out_dtype)


def _upcast(x: Array) -> Array:
    return x.astype(jnp.bfloat16) if x.dtype == e4m3.DTYPE else x


def _upcast_shape(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == e4m3.DTYPE else x.dtype)


HOPPER_WEIGHT_ONLY = Kernel(
    name="hopper_weight_only",
    family="hopper",
    run=_weight_only,
    refusal=_weight_only_refusal,
    not_here=lambda: device.not_hopper(),
    takes_several=True,
    adds_residual=True,
    parts=_weight_only_parts,
    launches={
        "fp8_matmul_weight_only": "reads each code once, multiplies it as bf16, or as FP8 by x in "
        "two"
    },
)
HOPPER_FP8 = Kernel(
    name="hopper_fp8",
    family="hopper",
    run=_fp8,
    refusal=_fp8_refusal,
    not_here=lambda: device.not_hopper(),
    takes_several=True,
    adds_residual=True,
    swiglu=_fp8_swiglu,
    launches={"fp8_matmul": _FP8, "fp8_swiglu": _FP8},
)
CPU = Kernel(
    name="cpu",
    run=_on_cpu,
    refusal=_cpu_refusal,
    unasked=_cpu_unasked,
    not_here=library.not_here,
    takes_several=True,
    adds_residual=True,
    unquantized_swiglu=cpu.swiglu,
    logit_stats=cpu.logit_stats,
    launches=dict.fromkeys(
        (library.MATMUL, library.LOGIT_STATS), "reads each code once, upcasts it in registers"
    ),
)
XLA = Kernel(name="xla", run=_each(xla.fp8_matmul), refusal=never, unasked=never)
REFERENCE = Kernel(name="reference", run=_each(reference.fp8_matmul), refusal=never, unasked=never)
# XLA refuses nothing, so "reference" is used only by name.
KERNELS: tuple[Kernel, ...] = (HOPPER_WEIGHT_ONLY, HOPPER_FP8, CPU, XLA, REFERENCE)
