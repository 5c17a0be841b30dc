"""Converts float8_e4m3fnuz codes (AMD MI300) to codes of the canonical tree, exactly.

The same bits mean half the value of float8_e4m3fn. So a row (or block) that shares a scale can keep
its bits and halve its scale, unless it has 240 or -240, whose bits would mean 480, a NaN. Or it can
keep its values and its scale, unless it has odd multiples of the smallest number, 2^-10, which
float8_e4m3fn lacks. A matrix in which some row has both kinds is kept as bfloat16 codes.
"""

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np

from converters.dialects.layout import LazyArray, pieces
from converters.safetensors_reader import StoredTensor, read_rows
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.model.fp8 import ScaleLayout
from pallas_kernels.fp8_matmul.reference import BLOCK

FNUZ = "float8_e4m3fnuz"

_BITS = np.arange(256, dtype=np.uint8)
_VALUES = _BITS.view(ml_dtypes.float8_e4m3fnuz)
_SAME_VALUE = _VALUES.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
# A code may rule out keeping the bits (240), or keeping the values (odd multiples of 2^-10). The
# only NaN is 0x80.
_BITS_LOST, _VALUE_LOST, _NAN = 1, 2, 4
_RULED_OUT = np.select(
    [_BITS == 0x80, _BITS & 0x7F == 0x7F, (_BITS & 0x7F < 16) & (_BITS & 1 == 1)],
    [_NAN, _BITS_LOST, _VALUE_LOST],
    0,
).astype(np.uint8)


def from_fnuz(
    weight: StoredTensor, scale: np.ndarray, layout: ScaleLayout
) -> tuple[LazyArray, np.ndarray]:
    """Return the canonical weight, float8_e4m3fn or bfloat16, and scales in the shape of `scale`.

    The whole weight is read once to find which codes it has. Raises `CheckpointError` for NaN.
    """
    ruled_out = _ruled_out(weight, layout)
    if (ruled_out == _BITS_LOST | _VALUE_LOST).any():
        table = _VALUES.astype(ml_dtypes.bfloat16)
        return _mapped(weight, table.dtype, lambda bits, start: table[bits]), scale
    keeps_bits = ruled_out == _VALUE_LOST

    def translate(bits: np.ndarray, start: int) -> np.ndarray:
        rows = np.arange(start, start + len(bits))
        if layout == "row":
            keep = keeps_bits[rows, None]
        else:
            keep = np.repeat(keeps_bits[rows // BLOCK], BLOCK, axis=1)[:, : bits.shape[1]]
        return np.where(keep, bits, _SAME_VALUE[bits]).view(ml_dtypes.float8_e4m3fn)

    codes = _mapped(weight, np.dtype(ml_dtypes.float8_e4m3fn), translate)
    return codes, np.where(keeps_bits, scale / 2, scale)


def _ruled_out(weight: StoredTensor, layout: ScaleLayout) -> np.ndarray:
    """Return what is ruled out by the codes of each scale, uint8 in the shape of the scales."""
    stored = LazyArray(weight.dtype, weight.shape, partial(read_rows, weight))
    found: list[np.ndarray] = []
    row = 0
    for piece in pieces(stored):
        flags = _RULED_OUT[piece.view(np.uint8)]
        by_row = np.bitwise_or.reduce(flags, axis=1)
        if (by_row & _NAN).any():
            raise CheckpointError(
                f"{weight.name} has NaN in row {row + int((by_row & _NAN).argmax())}: the "
                "checkpoint is damaged"
            )
        row += len(piece)
        if layout == "row":
            found.append(by_row)
        else:
            edges = [np.arange(0, size, BLOCK) for size in flags.shape]
            blocks = np.bitwise_or.reduceat(flags, edges[1], axis=1)
            found.append(np.bitwise_or.reduceat(blocks, edges[0], axis=0))
    return np.concatenate(found)


def _mapped(
    weight: StoredTensor, dtype: np.dtype, of_bits: Callable[[np.ndarray, int], np.ndarray]
) -> LazyArray:
    def rows(start: int, stop: int) -> np.ndarray:
        return of_bits(read_rows(weight, start, stop).view(np.uint8), start)

    return LazyArray(dtype, weight.shape, rows)
