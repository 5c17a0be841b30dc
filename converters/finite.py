"""Finds NaN and infinity in an array of any float type, at the speed of memory.

A float is not finite when its exponent bits are all ones (for float8_e4m3fn, which has no infinity:
exponent and mantissa). Without the sign, these are the largest of all bit patterns.
"""

import numpy as np

# dtype: (unsigned type of its size, all bits but the sign's, the least pattern that is not finite)
_BITS: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "float32": (np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float8_e4m3fn": (np.uint8, 0x7F, 0x7F),
}
_PIECE = 256 * 1024  # bytes: small enough for a cache


def has_nonfinite(array: np.ndarray) -> bool:
    """Return whether an array holds NaN or infinity.

    array: C-contiguous, float32, float16, bfloat16 or float8_e4m3fn.
    """
    unsigned, magnitude, least = _BITS[array.dtype.name]
    bits = array.reshape(-1).view(unsigned)
    step = _PIECE // bits.itemsize
    return any(
        int((bits[i : i + step] & unsigned(magnitude)).max()) >= least
        for i in range(0, bits.size, step)
    )
