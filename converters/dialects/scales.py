"""Reads a checkpoint's scales as float32, and refuses those that would give NaN or infinity.

A scale is finite and positive. For weights that are all zero, tools write different scales:
llm-compressor the dtype's epsilon, FBGEMM and AutoFP8 their least divisor, transformers and
modelopt 1, torchao 0 (with codes that are NaN). So a scale of 0 is accepted only if all of its
codes are 0.
"""

import ml_dtypes
import numpy as np

from converters.dialects.layout import LazyArray, Shape, Tensors, pieces, take
from converters.safetensors_reader import StoredTensor, read_rows
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.model.config import PARAM_DTYPES
from llama_jax.model.fp8 import ScaleLayout
from pallas_kernels import e4m3
from pallas_kernels.fp8_matmul.reference import BLOCK

# The largest product that is finite in both bfloat16 and float32.
_LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def row_scale(
    tensors: Tensors, name: str, rows: int, dtypes: tuple[str, ...] = PARAM_DTYPES
) -> np.ndarray:
    """Return the scales of a matrix's rows, float32 [rows], from one per tensor or per row.

    Raises `CheckpointError` for one that is negative or not finite.
    """
    tensor = take(tensors, name, ((), (1,), (1, 1), (rows,), (rows, 1)), dtypes)
    return np.broadcast_to(scale_values(tensor).reshape(-1), (rows,))


def activation_scales(tensors: Tensors, name: str, shapes: tuple[Shape, ...]) -> np.ndarray:
    """Return scales by which activations are divided, float32 [n].

    Raises `CheckpointError` unless they are positive and their products with all codes are finite.
    """
    values = scale_values(take(tensors, name, shapes, PARAM_DTYPES)).reshape(-1)
    if (values == 0).any():
        raise CheckpointError(f"{name} is 0: activations cannot be divided by it")
    if (values > _LARGEST / e4m3.MAX).any():
        raise CheckpointError(f"{name} is {values.max():g}: its product with codes overflows")
    return values


def scale_values(tensor: StoredTensor) -> np.ndarray:
    """Return scales as float32; bytes are exponents of two (`ue8m0`).

    Raises `CheckpointError` for one that is negative or not finite.
    """
    stored = read_rows(tensor, 0, (tensor.shape or (1,))[0])
    if stored.dtype == np.uint8:
        stored = stored.view(ml_dtypes.float8_e8m0fnu)
    values = stored.astype(np.float32)
    if not (np.isfinite(values) & (values >= 0)).all():
        bad = values[~(np.isfinite(values) & (values >= 0))].flat[0]
        raise CheckpointError(f"{tensor.name} holds {bad}: a scale must be finite and positive")
    return values


def check_zeros(tensor: StoredTensor) -> None:
    """Refuse zero points that are not 0, in float8_e4m3fn, its bits, or any integers."""
    stored = read_rows(tensor, 0, (tensor.shape or (1,))[0])
    if (stored.astype(np.float32) != 0).any():
        raise CheckpointError(
            f"{tensor.name} is not all zero: numbers are quantised asymmetrically, which is not "
            "supported. Export the checkpoint with symmetric ones."
        )


def check_products(
    codes: LazyArray, scale: np.ndarray, layout: ScaleLayout, weight_name: str, scale_name: str
) -> None:
    """Refuse a scale of 0 for codes that are not 0, and one whose products overflow.

    Codes are read only if a scale is 0 or very large, which is rare.

    scale: of the shape `fp8.scale_shape`.
    Raises `CheckpointError`, which names both tensors and the row.
    """
    scale = scale.reshape(len(scale), -1)
    if not ((scale == 0) | (scale > _LARGEST / e4m3.MAX)).any():
        return
    height = BLOCK if layout == "block" else 1
    width = BLOCK if layout == "block" else codes.shape[1] // scale.shape[1]
    row = 0
    for piece in pieces(codes):
        largest = np.abs(piece.astype(np.float32))
        largest = np.maximum.reduceat(largest, np.arange(0, piece.shape[1], width), axis=1)
        largest = np.maximum.reduceat(largest, np.arange(0, len(piece), height), axis=0)
        some = scale[row // height :][: len(largest)]
        is_lost = (some == 0) & (largest > 0)
        is_over = some.astype(np.float64) * largest > _LARGEST
        for wrong, why in ((is_lost, "are not all 0"), (is_over, "overflow with it")):
            if wrong.any():
                index = np.argwhere(wrong)[0]
                raise CheckpointError(
                    f"{scale_name} holds {some[tuple(index)]:g} for codes of {weight_name} that "
                    f"{why}, from row {row + index[0] * height}: the checkpoint is damaged"
                )
        row += len(piece)
