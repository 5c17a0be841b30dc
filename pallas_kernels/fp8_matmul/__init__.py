"""FP8 matrix multiplication: activations times a float8_e4m3fn weight that stays float8."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import device, e4m3
from pallas_kernels.fp8_matmul import cpu, reference, xla
from pallas_kernels.fp8_matmul.terms import Parts, Terms

Implementation = Literal["reference", "xla", "cpu", "hopper", "hopper_fp8", "hopper_weight_only"]


def fp8_matmul(
    x: Array,
    weight: Array,
    weight_scale: Array,
    *,
    x_scale: Array | None = None,
    residual: Array | None = None,
    out_dtype: jnp.dtype = jnp.float32,
    is_batch_invariant: bool = False,
    implementation: Implementation | None = None,
) -> Array:
    """x @ dequantised(weight).T + residual, accumulated in float32.

    x: [m, in], bfloat16 or float32 (weight-only), or float8_e4m3fn codes with `x_scale`.
    weight: [out, in], float8_e4m3fn, or int8 bit patterns of it (see `pallas_kernels.e4m3`), or
        bfloat16 codes, which no FP8 tensor core takes.
    weight_scale: float32 [out], one per row; [out, groups], one per row and group of columns, all
        of one size; or [ceil(out / 128), ceil(in / 128)], one per block.
    x_scale: float32 [m, 1] (per token), [] (static) or [m, ceil(in / 128)] (per token and 128
        columns); required with float8 activations.
    residual: [m, out], bfloat16 or float32, added before the result is rounded to `out_dtype`.
    is_batch_invariant: a row's result is bit-equal whatever the other rows, and however many.
    implementation: None takes the first that can run: "hopper_weight_only", "hopper_fp8", "cpu",
        "xla"; "hopper" the first of its two kernels. `chosen` names it. Those of "hopper" need a
        Hopper GPU, a float8_e4m3fn weight with scales per row or per block, and `in` a multiple of
        128.
        "hopper_weight_only": at most 64 rows of x, bfloat16 or float8; `out` a multiple of 32.
        "hopper_fp8": float8 x; `out` a multiple of 16, of 8 for float32 results; a residual of
        `out_dtype`.
        "cpu": a CPU with AVX2 and a C++ compiler (`pallas_kernels.cpu.library`); `out` at least 8;
        a group of columns with scales of its own a multiple of 64.
    Returns [m, out] of `out_dtype`. With one scale per row the products are exact; with block
    scales and bfloat16 activations, on a GPU also with float8 ones, "xla" rounds code * scale to
    bfloat16 first; with `x_scale` per 128 columns "hopper_weight_only" does so with x, and "xla"
    and "cpu" unless the result is float32.
    "hopper_fp8" adds runs of 128 products with the tensor cores' precision, about 14 bits, and with
    one scale per row all of them; a row does not depend on how many there are, nor does it in
    "cpu".
    Raises ValueError for other shapes or dtypes, and if the named implementation cannot run.
    """
    _check(x, weight, weight_scale, x_scale)
    shape, dtype = (x.shape[0], weight.shape[0]), jnp.dtype(out_dtype)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be {shape}, got {residual.shape}")
    weight_scale = _without_one_group(weight_scale, weight)
    which = chosen(x, weight, weight_scale, dtype, residual, implementation=implementation)
    if which == "hopper_weight_only":
        (y,) = _weight_only(x, (weight,), (weight_scale,), x_scale, is_batch_invariant)
        return (y if residual is None else y + residual.astype(jnp.float32)).astype(dtype)
    if which == "hopper_fp8":
        from pallas_kernels.fp8_matmul import hopper

        assert x_scale is not None
        return hopper.fp8_matmul(x, weight, weight_scale, x_scale, dtype, residual)
    if which == "cpu":
        (y,) = _on_cpu(x, (weight,), (weight_scale,), x_scale, dtype)
        return (y if residual is None else y + residual.astype(jnp.float32)).astype(dtype)
    arguments = x, weight, weight_scale, x_scale, dtype, residual
    if which == "reference":
        return reference.fp8_matmul(*arguments)
    with _left_to_xla(implementation, x, weight, weight_scale, dtype, residual):
        return xla.fp8_matmul(*arguments)


def fp8_matmuls(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    *,
    x_scale: Array | None = None,
    out_dtype: jnp.dtype = jnp.float32,
    is_batch_invariant: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """`fp8_matmul` of one x with several weights, such as q_proj, k_proj and v_proj.

    Operands as in `fp8_matmul`. "hopper_weight_only" and "cpu" are one launch, if all scales are of
    one kind; everything else is a matmul for each weight.
    """
    dtype = jnp.dtype(out_dtype)
    for weight, scale in zip(weights, weight_scales, strict=True):
        _check(x, weight, scale, x_scale)
    scales = [_without_one_group(*each) for each in zip(weight_scales, weights, strict=True)]
    pairs = list(zip(weights, scales, strict=True))
    which = {chosen(x, *pair, dtype, implementation=implementation) for pair in pairs}
    if which == {"hopper_weight_only"} and len({scale.ndim for scale in scales}) == 1:
        ys = _weight_only(x, weights, scales, x_scale, is_batch_invariant)
        return tuple(y.astype(dtype) for y in ys)
    if which == {"cpu"} and len({scale.ndim for scale in scales}) == 1:
        return tuple(y.astype(dtype) for y in _on_cpu(x, weights, scales, x_scale, dtype))
    return tuple(
        fp8_matmul(
            x, *pair, x_scale=x_scale, out_dtype=dtype,
            is_batch_invariant=is_batch_invariant, implementation=implementation,
        )
        for pair in pairs
    )  # fmt: skip


def fp8_matmul_parts(
    x: Array | Terms,
    m: int,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    *,
    is_batch_invariant: bool = False,
) -> list[Parts]:
    """The products of one x [m, in] with several weights by "hopper_weight_only", in one launch and
    not summed up: for what reads them next.

    x: bfloat16 [m, in], or in two float8 terms. Operands as in `fp8_matmul`; `chosen` says whether
    the kernel takes them.
    """
    from pallas_kernels.fp8_matmul import hopper_weight_only

    scales = [_without_one_group(*each) for each in zip(weight_scales, weights, strict=True)]
    return hopper_weight_only.parts(x, weights, scales, m=m, is_batch_invariant=is_batch_invariant)


def swiglu(
    x: Array,
    gate: Array,
    gate_scale: Array,
    up: Array,
    up_scale: Array,
    *,
    x_scale: Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, Array]:
    """silu(x @ gate.T) * (x @ up.T), quantised for the matmul that follows.

    Operands as in `fp8_matmul`; gate and up are [out, in], out a multiple of 128, with scales of
    the same kind.
    Returns codes, float8_e4m3fn [m, out], and scales, float32 [m, out / 128]: absmax / 448 of each
    row's 128 columns, 1 where all are zero; they are what `fp8_matmul` takes as x and x_scale. One
    scale per row would need the whole row, which no one block of a kernel has: a second pass over
    memory. Per 128 columns a block knows its absmax, and the error is smaller, not larger.
    Raises ValueError as `fp8_matmul` does.
    """
    for weight, scale in ((gate, gate_scale), (up, up_scale)):
        _check(x, weight, scale, x_scale)
    if gate.shape != up.shape or gate_scale.shape != up_scale.shape:
        raise ValueError(
            f"gate {gate.shape} and up {up.shape}, and their scales {gate_scale.shape} and "
            f"{up_scale.shape}, must have the same shapes"
        )
    if gate.shape[0] % reference.BLOCK:
        raise ValueError(f"out = {gate.shape[0]} must be a multiple of {reference.BLOCK}")
    gate_scale, up_scale = (_without_one_group(each, gate) for each in (gate_scale, up_scale))
    which = chosen(x, gate, gate_scale, None, implementation=implementation)
    if which == "hopper_weight_only":
        g, u = _weight_only(x, (gate, up), (gate_scale, up_scale), x_scale, False)
        return reference.quantize_groups(jax.nn.silu(g) * u)
    if which == "hopper_fp8":
        from pallas_kernels.fp8_matmul import hopper

        assert x_scale is not None
        return hopper.swiglu(x, gate, gate_scale, up, up_scale, x_scale)
    if which == "cpu":
        float32 = jnp.dtype(jnp.float32)
        g, u = _on_cpu(x, (gate, up), (gate_scale, up_scale), x_scale, float32)
        return reference.quantize_groups(jax.nn.silu(g) * u)
    arguments = x, gate, gate_scale, up, up_scale, x_scale
    if which == "reference":
        return reference.swiglu(*arguments)
    with _left_to_xla(implementation, x, gate, gate_scale, None):
        return xla.swiglu(*arguments)


def chosen(
    x: Array | jax.ShapeDtypeStruct,
    weight: Array,
    weight_scale: Array,
    out_dtype: jnp.dtype | None,
    residual: Array | None = None,
    *,
    implementation: Implementation | None = None,
) -> Implementation:
    """What None or "hopper" stands for with these operands; any other name as it is. out_dtype:
    None for `swiglu`.

    Raises ValueError if what is named cannot run.
    """
    if implementation in ("reference", "xla"):
        return implementation
    if implementation not in (None, "hopper", *_KERNELS):
        raise ValueError(
            f"no implementation {implementation!r}: take one of {get_args(Implementation)}, or None"
        )
    refusals = _refusals(
        x, weight, weight_scale, out_dtype, residual, implementation=implementation
    )
    if which := next((each for each, refusal in refusals.items() if refusal is None), None):
        return which
    if implementation is None:
        return "xla"
    raise ValueError(f"implementation {implementation!r} cannot run: {_in_words(refusals)}")


def _refusals(
    x: Array | jax.ShapeDtypeStruct,
    weight: Array,
    weight_scale: Array,
    out_dtype: jnp.dtype | None,
    residual: Array | None,
    *,
    implementation: Implementation | None,
) -> Mapping[Implementation, str | None]:
    """Why the kernels that an implementation stands for cannot run, in order; None if they can."""
    kernels = (implementation,) if implementation in _KERNELS else _KERNELS
    if implementation == "hopper":
        kernels = _HOPPER
    weight_scale = _without_one_group(weight_scale, weight)
    refusals: dict[Implementation, str | None] = {
        "cpu": cpu.refusal(_wide(x), weight, weight_scale) if "cpu" in kernels else None
    }
    reason = device.not_hopper()
    refusals |= dict.fromkeys(_HOPPER, reason)
    if reason is None and implementation != "cpu":
        # Mosaic GPU takes a third of JAX's own time to import: only where it may run.
        from pallas_kernels.fp8_matmul import hopper, hopper_weight_only

        result = jnp.dtype(jnp.float32) if out_dtype is None else out_dtype
        refusals |= {
            "hopper_weight_only": hopper_weight_only.refusal(
                _wide(x), weight, weight_scale, result
            ),
            "hopper_fp8": hopper.refusal(x, weight, weight_scale, out_dtype, residual),
        }
    if implementation is None:
        refusals["cpu"] = refusals["cpu"] or cpu.slower_than_xla(x.shape[0])
        if reason := device.not_local():
            refusals = {each: refusals[each] or reason for each in refusals}
    return {each: refusals[each] for each in kernels}


def _left_to_xla(
    implementation: Implementation | None,
    x: Array,
    weight: Array,
    weight_scale: Array,
    out_dtype: jnp.dtype | None,
    residual: Array | None = None,
) -> AbstractContextManager[Any, None]:
    """The scope of XLA's formulation, with the reason why no kernel runs."""
    if implementation:
        return device.left_to_xla(f"{implementation} was asked for")
    operands = x, weight, weight_scale, out_dtype, residual
    return device.left_to_xla(_in_words(_refusals(*operands, implementation=None)))


def _in_words(refusals: Mapping[Implementation, str | None]) -> str:
    return "; ".join(dict.fromkeys(each for each in refusals.values() if each))


_HOPPER: tuple[Implementation, ...] = ("hopper_weight_only", "hopper_fp8")
_KERNELS: tuple[Implementation, ...] = (*_HOPPER, "cpu")


def _weight_only(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    x_scale: Array | None,
    is_batch_invariant: bool,
) -> tuple[Array, ...]:
    """float32 products from one launch. Codes fit bfloat16 exactly, and a scale per row waits."""
    from pallas_kernels.fp8_matmul import hopper_weight_only

    if x_scale is not None and reference.is_grouped(x_scale, x.shape[1]):
        x, x_scale = reference.dequantize_activations(x, x_scale).astype(jnp.bfloat16), None
    ys = hopper_weight_only.fp8_matmuls(
        _widened(x), weights, weight_scales, jnp.dtype(jnp.float32),
        is_batch_invariant=is_batch_invariant,
    )  # fmt: skip
    return ys if x_scale is None else tuple(y * x_scale for y in ys)


def _on_cpu(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    x_scale: Array | None,
    out_dtype: jnp.dtype,
) -> tuple[Array, ...]:
    """float32 products from one call."""
    if x_scale is not None and reference.is_grouped(x_scale, x.shape[1]):
        x, x_scale = xla.ungrouped(x, x_scale, out_dtype), None
    ys = cpu.fp8_matmuls(_widened(x), weights, weight_scales)
    return ys if x_scale is None else tuple(y * x_scale for y in ys)


def _widened(x: Array) -> Array:
    return x.astype(jnp.bfloat16) if x.dtype == e4m3.DTYPE else x


def _wide(x: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape and dtype of x as weight-only kernels take it."""
    return jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == e4m3.DTYPE else x.dtype)


def _without_one_group(weight_scale: Array, weight: Array) -> Array:
    """One group of columns, which a GPU may hold of several, is one scale per row."""
    rows = weight.shape[0]
    return weight_scale.reshape(rows) if weight_scale.shape == (rows, 1) else weight_scale


def _check(x: Array, weight: Array, weight_scale: Array, x_scale: Array | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"need x [m, in] and weight [out, in], got {x.shape} and {weight.shape}")
    if weight.dtype not in (e4m3.DTYPE, jnp.int8, jnp.bfloat16):
        raise ValueError(
            f"weight must be float8_e4m3fn, its int8 bits, or bfloat16, got {weight.dtype}"
        )
    (m, columns), out = x.shape, weight.shape[0]
    groups = -(-columns // reference.BLOCK)
    blocks = (-(-out // reference.BLOCK), groups)
    by_group = weight_scale.ndim == 2 and weight_scale.shape[0] == out
    if weight_scale.shape not in ((out,), blocks) and (
        not by_group or columns % weight_scale.shape[1]
    ):
        raise ValueError(
            f"weight_scale must be [{out}], [{out}, groups of columns] or {blocks}, got "
            f"{weight_scale.shape}"
        )
    if (x.dtype == e4m3.DTYPE) != (x_scale is not None):
        raise ValueError("x_scale goes with float8_e4m3fn activations and with no others")
    if x_scale is not None and x_scale.shape not in ((), (m, 1), (m, groups)):
        raise ValueError(f"x_scale must be [], {(m, 1)} or {(m, groups)}, got {x_scale.shape}")
