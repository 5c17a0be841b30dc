"""FP8 matrix multiplication: activations times a float8_e4m3fn weight that stays float8."""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array

from pallas_kernels import device, e4m3
from pallas_kernels.fp8_matmul import reference, xla

Implementation = Literal["reference", "xla", "hopper"]


def fp8_matmul(
    x: Array,
    weight: Array,
    weight_scale: Array,
    *,
    x_scale: Array | None = None,
    residual: Array | None = None,
    out_dtype: jnp.dtype = jnp.float32,
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
    implementation: "reference"; "xla"; "hopper", for float8_e4m3fn weights with scales per row or
        per block: either float8 activations, `in` a multiple of 128, `out` of 16 (8 for float32
        results), and a residual of `out_dtype`; or at most 64 rows of bfloat16 activations, `in` a
        multiple of 16 and `out` of 4. None takes "hopper" where it can run, "xla" elsewhere.
    Returns [m, out] of `out_dtype`. With one scale per row the products are exact; with block
    scales and bfloat16 activations code * scale is rounded to bfloat16 first, and so it is with
    `x_scale` per 128 columns on the "xla" path. "hopper" adds runs of 128 products with the tensor
    cores' precision, about 14 bits, and with one scale per row all of them.
    Raises ValueError for other shapes or dtypes, and if the named implementation cannot run.
    """
    _check(x, weight, weight_scale, x_scale)
    shape, dtype = (x.shape[0], weight.shape[0]), jnp.dtype(out_dtype)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be {shape}, got {residual.shape}")
    weight_scale = _without_one_group(weight_scale, weight)
    which = _choose(implementation, x, weight, weight_scale, dtype, residual)
    if which == "hopper" and x_scale is None:
        return _hopper_weight_only().fp8_matmul(x, weight, weight_scale, dtype, residual)
    operands = (x, weight, weight_scale, x_scale, dtype, residual)
    return _MODULES[which]().fp8_matmul(*operands)


def fp8_matmuls(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    *,
    x_scale: Array | None = None,
    out_dtype: jnp.dtype = jnp.float32,
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """`fp8_matmul` of one x with several weights, such as q_proj, k_proj and v_proj.

    Operands as in `fp8_matmul`. For bfloat16 activations "hopper" is one launch, if scales are of
    one kind; everything else is a matmul for each weight.
    """
    dtype = jnp.dtype(out_dtype)
    for weight, scale in zip(weights, weight_scales, strict=True):
        _check(x, weight, scale, x_scale)
    scales = [_without_one_group(*each) for each in zip(weight_scales, weights, strict=True)]
    pairs = list(zip(weights, scales, strict=True))
    which = [_choose(implementation, x, *pair, dtype) for pair in pairs]
    if x_scale is None and {*which} == {"hopper"} and len({scale.ndim for scale in scales}) == 1:
        return _hopper_weight_only().fp8_matmuls(x, weights, scales, dtype)
    product = partial(
        fp8_matmul, x, x_scale=x_scale, out_dtype=dtype, implementation=implementation
    )
    return tuple(product(*pair) for pair in pairs)


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
    which = _choose(implementation, x, gate, gate_scale, None)
    return _MODULES[which]().swiglu(x, gate, gate_scale, up, up_scale, x_scale)


def _choose(
    implementation: Implementation | None,
    x: Array,
    weight: Array,
    weight_scale: Array,
    out_dtype: jnp.dtype | None,
    residual: Array | None = None,
) -> Implementation:
    """The named implementation, or None's. out_dtype: None for `swiglu`."""
    if implementation in ("reference", "xla"):
        return implementation
    if implementation not in (None, "hopper"):
        raise ValueError(
            f"no implementation {implementation!r}: take one of {get_args(Implementation)}, or None"
        )
    reason = device.not_hopper()
    if implementation is None and (reason or not device.is_local()):
        return "xla"
    if reason is None and x.dtype != e4m3.DTYPE and out_dtype is not None:
        reason = _hopper_weight_only().refusal(x, weight, weight_scale, out_dtype)
    elif reason is None:
        reason = _hopper().refusal(x, weight, weight_scale, out_dtype, residual)
    if implementation == "hopper" and reason:
        raise ValueError(f"implementation 'hopper' cannot run: {reason}")
    return "xla" if reason else "hopper"


def _hopper() -> ModuleType:
    """Imported where it may run: Mosaic GPU takes a third of JAX's own time to import."""
    from pallas_kernels.fp8_matmul import hopper

    return hopper


def _hopper_weight_only() -> ModuleType:
    from pallas_kernels.fp8_matmul import hopper_weight_only

    return hopper_weight_only


_MODULES: dict[Implementation, Callable[[], ModuleType]] = {
    "reference": lambda: reference,
    "xla": lambda: xla,
    "hopper": _hopper,
}


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
