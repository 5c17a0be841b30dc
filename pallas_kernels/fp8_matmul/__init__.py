"""Multiplies activations by float8_e4m3fn weights, which stay in float8."""

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
    weight: [out, in], float8_e4m3fn, int8 bit patterns of it (see `pallas_kernels.e4m3`), or
        bfloat16 codes, which FP8 tensor cores cannot take.
    weight_scale: float32 [out], one per row; [out, groups], one per row and equal group of columns;
        or [ceil(out / 128), ceil(in / 128)], one per block.
    x_scale: float32 [m, 1] (per token), [] (static) or [m, ceil(in / 128)] (per token and 128
        columns); required with float8 activations.
    residual: [m, out], bfloat16 or float32, added before the result is rounded to `out_dtype`.
    is_batch_invariant: whether a row's result is bit-equal for any number and content of other
        rows.
    implementation: None for the first of "hopper_weight_only", "hopper_fp8", "cpu" and "xla" that
        can run; a name; "hopper" for the first of its two kernels; or the `Choice` that `choose`
        returned for these operands, which also has the reasons of refusals.
        "hopper_weight_only", "hopper_fp8": need a Hopper GPU, a float8_e4m3fn weight with scales
            per row or per block, and `in` a multiple of 128. The former also needs at most 64 rows
            of bfloat16 or float8 x, and `out` a multiple of 32; the latter float8 x, `out` a
            multiple of 16 (8 for float32 results), and a residual of `out_dtype`.
        "cpu": needs AVX2 or NEON, a C++ compiler (`pallas_kernels.cpu.library`), `out` of at least
            8, and groups of columns that are multiples of 64.

    Returns [m, out] of `out_dtype`.

    With one scale per row, products are exact. "xla" rounds code * scale to bfloat16 first for
    block scales with bfloat16 activations (on a GPU also with float8 ones). For `x_scale` per 128
    columns, "hopper_weight_only" rounds x * x_scale to bfloat16, and so do "xla" and "cpu" unless
    the result is float32. "hopper_fp8" adds runs of 128 products (with one scale per row, all
    products) with the tensor cores' precision of about 14 bits. In "hopper_fp8" and "cpu" a row's
    result does not depend on the number of rows.

    Raises ValueError for other shapes or dtypes, and if the named implementation cannot run.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((2, 128), jnp.bfloat16)
    >>> weight = jnp.ones((64, 128), jnp.float8_e4m3fn)
    >>> y = fp8_matmul(x, weight, jnp.full(64, 0.5), implementation="reference")
    >>> y.shape, float(y[0, 0])
    ((2, 64), 64.0)
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

    Operands are those of `fp8_matmul`. This is one launch if the same kernel is chosen for all
    weights, it takes several weights, and all scales are of one kind. Otherwise it is one per
    weight.
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
    """Return whether all products of one x have the same kernel and it takes several weights."""
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
    """Multiply one x [m, in] by several weights in one launch, and return the partial sums over
    splits of `in`, for the launch that reads them to add.

    x: bfloat16 [m, in], or in two float8 terms. Other operands are those of `fp8_matmul`.

    Raises ValueError if the kernel of the first weight cannot return partial sums.
    """
    scales = [without_one_group(*each) for each in zip(weight_scales, weights, strict=True)]
    shape = jax.ShapeDtypeStruct((m, weights[0].shape[1]), jnp.bfloat16)
    choice = _chosen(implementation, shape, weights[0], scales[0], jnp.dtype(jnp.bfloat16))
    if choice.kernel.parts is None:
        raise ValueError(f"{choice.kernel.name} cannot return partial sums")
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
    Returns x and x_scale for `fp8_matmul`: codes, float8_e4m3fn [m, out], and scales, float32
    [m, out / 128], absmax / 448 of each row's 128 columns, or 1 where all are zero. One scale per
    row would take a second pass over memory, because no block of a kernel has a whole row. With one
    per 128 columns the error is smaller, too.
    Raises ValueError as `fp8_matmul` does.
    """
    _check_alike(x, gate, gate_scale, up, up_scale, x_scale)
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


def unquantized_swiglu(
    x: Array,
    gate: Array,
    gate_scale: Array,
    up: Array,
    up_scale: Array,
    *,
    out_dtype: jnp.dtype = jnp.float32,
    implementation: str | Choice[Kernel] | None = None,
) -> Array:
    """Compute silu(x @ gate.T) * (x @ up.T), rounded to out_dtype after each of the operations, of
    which silu is one.

    Operands are those of `fp8_matmul`, x bfloat16 or float32. gate and up are [out, in], with
    scales of the same kind. One launch if the kernel can do that.
    Returns [m, out] of `out_dtype`.
    Raises ValueError as `fp8_matmul` does.
    """
    _check_alike(x, gate, gate_scale, up, up_scale, None)
    dtype = jnp.dtype(out_dtype)
    gate_scale, up_scale = (without_one_group(each, gate) for each in (gate_scale, up_scale))
    choice = _chosen(implementation, x, gate, gate_scale, dtype)
    if choice.kernel.unquantized_swiglu:
        with choice.scope():
            return choice.kernel.unquantized_swiglu(x, gate, gate_scale, up, up_scale, dtype)
    weights, scales = (gate, up), (gate_scale, up_scale)
    g, u = fp8_matmuls(x, weights, scales, out_dtype=dtype, implementation=choice)
    return silu(g) * u


def silu(x: Array) -> Array:
    """Compute x * sigmoid(x) in float32, and round once, as torch does.

    Written with `exp`, it takes XLA:CPU half as long as `jax.nn.silu` of bfloat16.
    """
    wide = x.astype(jnp.float32)
    return (wide / (1 + jnp.exp(-wide))).astype(x.dtype)


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


def _check_alike(
    x: Array, gate: Array, gate_scale: Array, up: Array, up_scale: Array, x_scale: Array | None
) -> None:
    for weight, scale in ((gate, gate_scale), (up, up_scale)):
        _check(x, weight, scale, x_scale)
    if gate.shape != up.shape or gate_scale.shape != up_scale.shape:
        raise ValueError(
            f"gate {gate.shape} and up {up.shape}, and their scales {gate_scale.shape} and "
            f"{up_scale.shape}, must have the same shapes"
        )


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
        raise ValueError(
            "x_scale is required with float8_e4m3fn activations, and not allowed with others"
        )
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
    "silu",
    "swiglu",
    "unquantized_swiglu",
]
