"""Whether an array holds NaN or infinity, at the speed of memory, for any float type.

A float is not finite when its exponent bits are all ones (for float8_e4m3fn, which has no infinity:
exponent and mantissa). Adding the lowest of these bits then carries into the sign's place, and one
64-bit addition does this for two, four or eight numbers at once.
"""

import numpy as np

# dtype: (unsigned type of its size, the bits that are all ones in a number that is not finite)
_BITS: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "float32": (np.uint32, 0x7F80_0000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
    "float8_e4m3fn": (np.uint8, 0x7F),
}
_PIECE = 64 * 1024  # words of 8 bytes: small enough for a cache


def has_nonfinite(array: np.ndarray) -> bool:
    """array: C-contiguous, float32, float16, bfloat16 or float8_e4m3fn."""
    unsigned, ones = _BITS[array.dtype.name]
    flat = array.reshape(-1).view(np.uint8)
    whole = flat.size // 8 * 8
    words = flat[:whole].view(np.uint64)
    pieces = (words[i : i + _PIECE] for i in range(0, words.size, _PIECE))
    tail = flat[whole:].view(unsigned)
    return any(_carries(piece, unsigned, ones) for piece in pieces) or _carries(
        tail, unsigned, ones
    )


def _carries(words: np.ndarray, unsigned: type[np.unsignedinteger], ones: int) -> bool:
    lowest = ones & -ones
    sign = ones + lowest
    mask, add, top = (_repeat(value, unsigned, words.dtype) for value in (ones, lowest, sign))
    return bool((((words & mask) + add) & top).any())


def _repeat(value: int, unsigned: type[np.unsignedinteger], dtype: np.dtype) -> np.ndarray:
    return np.full(dtype.itemsize // np.dtype(unsigned).itemsize, value, unsigned).view(dtype)
