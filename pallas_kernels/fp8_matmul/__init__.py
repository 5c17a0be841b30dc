"""FP8 matrix multiplication: activations times a float8_e4m3fn weight that stays float8."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import e4m3
from pallas_kernels.choice import Choice
from pallas_kernels.fp8_matmul import reference
from pallas_kernels.fp8_matmul.kernels import Kernel, choose, without_one_group
from pallas_kernels.fp8_matmul.terms import Parts, Terms


def fp8_matmul(
    x: Array,
    weight: Array,
    weight_scale: Array,
    *,
    x_scale: Array | None = None,
    residual: Array | None = None,
    out_dtype: jnp.dtype = jnp.float32,
    is_batch_invariant: bool = False,
    implementation: str | Choice[Kernel] | None = None,
) -> Array:
    """Compute x @ dequantised(weight).T + residual, accumulated in float32.

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
        "xla"; "hopper" the first of its two kernels. `choose` says which, and why others refuse;
        what it returns for these operands may be given instead of a name. Those of "hopper" need a
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
    weight_scale = without_one_group(weight_scale, weight)
    choice = _chosen(implementation, x, weight, weight_scale, dtype, residual)
    operands = x, (weight,), (weight_scale,), x_scale, dtype, residual, is_batch_invariant
    with choice.scope():
        (y,) = choice.kernel.run(*operands)
    return y


def fp8_matmuls(
    x: Array,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    *,
    x_scale: Array | None = None,
    out_dtype: jnp.dtype = jnp.float32,
    is_batch_invariant: bool = False,
    implementation: str | Choice[Kernel] | None = None,
) -> tuple[Array, ...]:
    """Multiply one x by several weights, such as q_proj, k_proj and v_proj.

    Operands are those of `fp8_matmul`. If one kernel that takes several weights is chosen for each
    of them, and all scales are of one kind, this is one launch; otherwise each weight is one.
    """
    dtype = jnp.dtype(out_dtype)
    for weight, scale in zip(weights, weight_scales, strict=True):
        _check(x, weight, scale, x_scale)
    scales = [without_one_group(*each) for each in zip(weight_scales, weights, strict=True)]
    choices = [
        _chosen(implementation, x, *pair, dtype) for pair in zip(weights, scales, strict=True)
    ]
    if is_one_launch(choices) and len({scale.ndim for scale in scales}) == 1:
        operands = x, weights, scales, x_scale, dtype, None, is_batch_invariant
        with choices[0].scope():
            return choices[0].kernel.run(*operands)
    return tuple(
        fp8_matmul(
            x, weight, scale, x_scale=x_scale, out_dtype=dtype,
            is_batch_invariant=is_batch_invariant, implementation=choice,
        )
        for weight, scale, choice in zip(weights, scales, choices, strict=True)
    )  # fmt: skip


def is_one_launch(choices: Sequence[Choice[Kernel]]) -> bool:
    """Return whether one kernel is chosen for all products of one x, and takes several weights."""
    (kernel, *others) = {choice.kernel for choice in choices}
    return not others and kernel.takes_several


def fp8_matmul_parts(
    x: Array | Terms,
    m: int,
    weights: Sequence[Array],
    weight_scales: Sequence[Array],
    *,
    is_batch_invariant: bool = False,
    implementation: str | Choice[Kernel] | None = None,
) -> list[Parts]:
    """Multiply one x [m, in] by several weights in one launch, which leaves the sums over splits of
    `in` to the launch that reads them.

    x: bfloat16 [m, in], or in two float8 terms. Other operands are those of `fp8_matmul`.
    Raises ValueError if the kernel that takes the first weight cannot leave its sums.
    """
    scales = [without_one_group(*each) for each in zip(weight_scales, weights, strict=True)]
    shape = jax.ShapeDtypeStruct((m, weights[0].shape[1]), jnp.bfloat16)
    choice = _chosen(implementation, shape, weights[0], scales[0], jnp.dtype(jnp.bfloat16))
    if choice.kernel.parts is None:
        raise ValueError(f"{choice.kernel.name} adds its sums up itself")
    with choice.scope():
        return choice.kernel.parts(x, m, weights, scales, is_batch_invariant)


def swiglu(
    x: Array,
    gate: Array,
    gate_scale: Array,
    up: Array,
    up_scale: Array,
    *,
    x_scale: Array | None = None,
    implementation: str | Choice[Kernel] | None = None,
) -> tuple[Array, Array]:
    """Compute silu(x @ gate.T) * (x @ up.T), quantised for the matmul that follows.

    Operands are those of `fp8_matmul`. gate and up are [out, in], where out is a multiple of 128,
    with scales of the same kind.
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
    gate_scale, up_scale = (without_one_group(each, gate) for each in (gate_scale, up_scale))
    choice = _chosen(implementation, x, gate, gate_scale, None)
    with choice.scope():
        if choice.kernel.swiglu:
            return choice.kernel.swiglu(x, gate, gate_scale, up, up_scale, x_scale)
        weights, scales = (gate, up), (gate_scale, up_scale)
        g, u = fp8_matmuls(x, weights, scales, x_scale=x_scale, implementation=choice)
        return reference.quantize_groups(jax.nn.silu(g) * u)


def _chosen(
    implementation: str | Choice[Kernel] | None,
    x: Array | jax.ShapeDtypeStruct,
    weight: Array,
    weight_scale: Array,
    out_dtype: jnp.dtype | None,
    residual: Array | None = None,
) -> Choice[Kernel]:
    if isinstance(implementation, Choice):
        return implementation
    operands = x, weight, weight_scale, out_dtype, residual
    return choose(*operands, implementation=implementation)


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


__all__ = [
    "Choice",
    "Kernel",
    "choose",
    "fp8_matmul",
    "fp8_matmul_parts",
    "fp8_matmuls",
    "is_one_launch",
    "swiglu",
]
