"""FP8 matrix multiplication: activations times a float8_e4m3fn weight that stays float8."""

from typing import Literal

import jax.numpy as jnp
from jax import Array

from pallas_kernels import e4m3
from pallas_kernels.fp8_matmul import reference, xla

Implementation = Literal["reference", "xla"]
_IMPLEMENTATIONS = {"reference": reference.fp8_matmul, "xla": xla.fp8_matmul}


def fp8_matmul(
    x: Array,
    weight: Array,
    weight_scale: Array,
    *,
    x_scale: Array | None = None,
    out_dtype: jnp.dtype = jnp.float32,
    implementation: Implementation = "xla",
) -> Array:
    """x @ dequantised(weight).T, accumulated in float32.

    x: [m, in], bfloat16 or float32 (weight-only), or float8_e4m3fn codes with `x_scale`.
    weight: [out, in], float8_e4m3fn, or int8 bit patterns of it (see `pallas_kernels.e4m3`), or
        bfloat16 codes, which no FP8 tensor core takes.
    weight_scale: float32 [out], one per row, or [ceil(out / 128), ceil(in / 128)], one per block.
    x_scale: float32 [m, 1] (per token) or [] (static); required with float8 activations.
    Returns [m, out] of `out_dtype`. With one scale per row the products are exact; with block
    scales and bfloat16 activations code * scale is rounded to bfloat16 first.
    Raises ValueError for other shapes or dtypes.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"need x [m, in] and weight [out, in], got {x.shape} and {weight.shape}")
    if weight.dtype not in (e4m3.DTYPE, jnp.int8, jnp.bfloat16):
        raise ValueError(
            f"weight must be float8_e4m3fn, its int8 bits, or bfloat16, got {weight.dtype}"
        )
    out, columns = weight.shape
    blocks = (-(-out // reference.BLOCK), -(-columns // reference.BLOCK))
    if weight_scale.shape not in ((out,), blocks):
        raise ValueError(f"weight_scale must be [{out}] or {blocks}, got {weight_scale.shape}")
    if (x.dtype == e4m3.DTYPE) != (x_scale is not None):
        raise ValueError("x_scale goes with float8_e4m3fn activations and with no others")
    return _IMPLEMENTATIONS[implementation](x, weight, weight_scale, x_scale, jnp.dtype(out_dtype))
