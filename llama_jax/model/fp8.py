"""Defines FP8 weights (e4m3fn codes and float32 scales, value = code * scale) and quantises.

A quantised matrix is stored (out, in), as in Hugging Face's checkpoints, with a float32 scale per
output row, or per 128x128 block (edge blocks may be smaller). A per-tensor scale becomes the same
number in every row, which is exact. If a checkpoint's shards hold some of the columns each, with
row scales of their own, then a row has a scale per group of columns.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import e4m3
from pallas_kernels.fp8_matmul.reference import BLOCK, expand_scale

ScaleLayout = Literal["row", "block"]


@dataclass(frozen=True)
class WeightFormat:
    """The storage format of one parameter.

    dtype: of the weight or its codes. Codes are float8_e4m3fn, or bfloat16 if they come from an
        8-bit format with numbers that e4m3fn lacks.
    scale: "row" or "block" for codes; None for an unquantised weight.
    input_scale: whether a calibrated scale of the activations is stored as well.
    activation_scale_ub: the bound to which activations are clipped when quantised per token.
    column_groups: the number of equal groups of columns; each group has a scale per row.
    activation_group: the number of a token's features that share a scale with dynamic activations
        (kernels take 128); None for one scale per token.
    """

    dtype: str
    scale: ScaleLayout | None = None
    input_scale: bool = False
    activation_scale_ub: float | None = None
    column_groups: int = 1
    activation_group: int | None = None

    def __post_init__(self) -> None:
        if self.scale is None:
            valid = self.dtype != "float8_e4m3fn" and not self.input_scale
            valid = valid and self.activation_scale_ub is self.activation_group is None
        else:
            valid = self.dtype in ("float8_e4m3fn", "bfloat16")
        valid = valid and (self.column_groups == 1 or self.scale == "row")
        if not valid:
            raise ValueError(f"only codes (float8_e4m3fn, bfloat16) may have scales, got {self}")
        if self.activation_group not in (None, BLOCK) or (
            self.activation_group and self.activation_scale_ub
        ):
            raise ValueError(
                f"activation_group must be {BLOCK} or None, and goes without a bound, got {self}"
            )


def scale_shape(
    shape: tuple[int, int], layout: ScaleLayout, column_groups: int = 1
) -> tuple[int, ...]:
    """Return the shape of an (out, in) matrix's scales: (out,), (out, groups), or (ceil(out / 128),
    ceil(in / 128)) for blocks."""
    rows, columns = shape
    if layout == "block":
        return -(-rows // BLOCK), -(-columns // BLOCK)
    return (rows,) if column_groups == 1 else (rows, column_groups)


def quantize(weight: Array, layout: ScaleLayout) -> tuple[Array, Array]:
    """Quantise an (out, in) matrix symmetrically with scale = absmax / 448.

    Returns the codes, float8_e4m3fn (out, in), and the float32 scales of `scale_shape`. Rows and
    blocks of zeros get scale 1.
    """
    scale = weight_scale(weight, layout)
    return encode(weight, scale), scale


def weight_scale(weight: Array, layout: ScaleLayout) -> Array:
    """Compute the scales of `quantize` alone: the largest magnitude of each row or block / 448.

    Maxima are taken in the weight's own dtype, so that no copy of it is upcast.
    """
    if layout == "row":
        return _scale_of(jnp.max(jnp.abs(weight), axis=1))
    return _scale_of(jnp.max(jnp.max(jnp.abs(_in_blocks(weight)), axis=1), axis=2))


def encode(weight: Array, scale: Array) -> Array:
    """Encode an (out, in) matrix as float8_e4m3fn codes for given scales, saturating at 448.

    scale: float32, one per row or per block (`scale_shape`), all positive.
    """
    if scale.ndim == 1:
        return e4m3.cast(_quotient(weight, scale[:, None]))
    blocks = _in_blocks(weight)
    codes = e4m3.cast(_quotient(blocks, scale[:, None, :, None]))
    codes = codes.reshape(blocks.shape[0] * BLOCK, blocks.shape[2] * BLOCK)
    return codes[: weight.shape[0], : weight.shape[1]]


def _quotient(x: Array, scale: Array) -> Array:
    """Compute x / scale in float32, rounded correctly.

    For a plain broadcast XLA would multiply by the reciprocal, which rounds some numbers halfway
    between two codes to the wrong one.
    """
    x = x.astype(jnp.float32)
    return x / jnp.where(jnp.isnan(x), x, scale)


def dequantize(codes: Array, scale: Array) -> Array:
    """Compute code * scale in float32, the exact value of a quantised matrix, for tests and
    reports."""
    return e4m3.load(codes) * expand_scale(scale, (codes.shape[0], codes.shape[1]))


def dequantize_rows(codes: Array, scale: Array, stored: WeightFormat) -> Array:
    """Compute code * scale in float32 for some rows of a quantised matrix.

    codes: [..., in]. scale: a scale per row, [...], or per group of columns, [..., groups].
    """
    columns = codes.shape[-1]
    scale = scale.reshape(*codes.shape[:-1], -1)
    width = BLOCK if stored.scale == "block" else columns // scale.shape[-1]
    return e4m3.load(codes) * jnp.repeat(scale, width, axis=-1)[..., :columns]


def quantize_per_token(
    x: Array, upper_bound: float | None = None, divided_over: str | None = None
) -> tuple[Array, Array]:
    """Quantise activations over the last axis with scale = absmax / 448.

    x: [..., features].
    upper_bound: caps absmax, so that larger activations are clipped; scales are then at least
        1 / (448 * 512), as in FBGEMM's `quantize_fp8_per_row`.
    divided_over: inside shard_map, the mesh axis over which the features are split.
    Returns codes, float8_e4m3fn [..., features], and scales, float32 [..., 1]. A token of zeros
    gets scale 1.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    if divided_over:
        absmax = lax.pmax(absmax, divided_over)
    if upper_bound is None:
        scale = _scale_of(absmax)
    else:
        scale = jnp.maximum(_scale_of(jnp.minimum(absmax, upper_bound)), 1 / (e4m3.MAX * 512))
    return e4m3.cast(x / scale), scale


def quantize_per_group(x: Array) -> tuple[Array, Array]:
    """Quantise activations by groups of 128 features with scale = absmax / 448.

    x: [..., features]. Returns codes, float8_e4m3fn [..., features], and scales, float32
    [..., ceil(features / 128)]; a group of zeros gets scale 1.
    Source: compressed-tensors' strategy "group", DeepSeek-V3's `act_quant`.
    """
    features = x.shape[-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -features % BLOCK)])
    groups = padded.reshape(*x.shape[:-1], -1, BLOCK)
    scale = _scale_of(jnp.max(jnp.abs(groups), axis=-1))
    codes = e4m3.cast(_quotient(groups, scale[..., None]))
    return codes.reshape(padded.shape)[..., :features], scale


def _in_blocks(weight: Array) -> Array:
    """Reshape to [block row, 128, block column, 128], with edge blocks padded by zeros."""
    padded = jnp.pad(weight, [(0, -size % BLOCK) for size in weight.shape])
    return padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def _scale_of(absmax: Array) -> Array:
    absmax = absmax.astype(jnp.float32)
    # Dividing by a constant would not do: XLA multiplies by its reciprocal, which may be an ulp
    # off, and removes a barrier around the constant first.
    some = absmax > 0
    return jnp.where(some, absmax, 1.0) / jnp.where(some, e4m3.MAX, 1.0)
