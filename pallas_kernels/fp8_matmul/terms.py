"""What passes between the launches of a decode step beside plain arrays.

`Parts` are a product that is not summed up yet: thread blocks divide K among them, and whatever
reads the product adds their sums up, which saves a launch. `Terms` are bfloat16 activations in
float8: FP8 tensor cores then take the weight's codes as they are.
"""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import e4m3
from pallas_kernels.hopper import BOX_ROWS

# Of the second of two terms to its code.
TERM_RATIO = 16
# From this many rows of x on, pairs of thread blocks share the loads of x, each loads half of it.
MIN_ROWS_TO_SHARE = 17
MANTISSA_BITS, _DROPPED_BITS = 23, 20  # of float32; of those, what 3 bits leave
_MIN_NORMAL = 2.0**-6
# float8_e4m3fn's smallest number is 2^-9.
_SUBNORMALS_PER_ONE = 2.0**9


class Parts(NamedTuple):
    """A product x @ weight.T, [m, n], as sums over parts of K.

    sums: float32 [splits, m, n]. scale: float32 [n], of the weight's rows; None if sums have it.
    """

    sums: Array
    scale: Array | None

    def total(self) -> Array:
        """The product, float32 [m, n], added up in the order of the parts."""
        y = functools.reduce(operator.add, self.sums)
        return y if self.scale is None else y * self.scale


class Terms(NamedTuple):
    """bfloat16 x [m, k] as unit * (a + b / 16), a and b in float8_e4m3fn; or x / rms(x), whose
    factor is left to the product.

    codes: float8_e4m3fn [2 rows, k], the rows of a and then those of b; rows is `padded_rows(m)`,
        and what is in those past m has no meaning.
    units: float32 [groups, rows], powers of two, one for each group of k / groups columns of a row.
    mean_squares: float32 [parts, rows], whose sums' inverse roots rows are still to be multiplied
        by; None for nothing.

    A bfloat16 number has 8 bits, a float8_e4m3fn one 4, down to 2^-6. So this is exact where a
    number is at least 2^-13 of its group's largest; what is lost of others is below 2^-21 of it.
    """

    codes: Array
    units: Array
    mean_squares: Array | None = None

    def values(self, m: int) -> Array:
        """Return what they stand for, float32 [m, k]."""
        a, b = jnp.split(self.codes.astype(jnp.float32), 2)
        units = jnp.repeat(self.units.T, a.shape[1] // len(self.units), axis=1)
        x = (a + b * (1 / TERM_RATIO)) * units
        if self.mean_squares is not None:
            x = x * lax.rsqrt(self.mean_squares.sum(axis=0))[:, None]
        return x[:m]


def padded_rows(m: int) -> int:
    """Rows of x that are multiplied: TMA takes them by eights, from each block of a cluster."""
    multiple = BOX_ROWS * (2 if m >= MIN_ROWS_TO_SHARE else 1)
    return -(-m // multiple) * multiple


def exponent_of(x: Array) -> Array:
    """The biased exponent of float32 numbers, int32; 255 for those that are none."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.shift_right_logical(bits, jnp.int32(MANTISSA_BITS)) & 255


def unit_exponent(largest: Array) -> Array:
    """The biased exponent of the unit for numbers whose largest one is `largest`, so that they are
    below 256 units."""
    return jnp.maximum(largest - 7, 1)


def power_of_two(exponent: Array) -> Array:
    """float32 of a biased exponent."""
    return lax.bitcast_convert_type(lax.shift_left(exponent, jnp.int32(MANTISSA_BITS)), jnp.float32)


def inverse(exponent: Array) -> Array:
    """The biased exponent of 1 / unit."""
    return 254 - exponent


def split(v: Array) -> tuple[Array, Array]:
    """v, float32 of bfloat16's precision and below 256, as a + b / 16; a and b fit float8_e4m3fn.

    By integer arithmetic, since a compiler may take a cast and a cast back for what it was.
    """
    bits = lax.bitcast_convert_type(v, jnp.int32)
    odd = lax.shift_right_logical(bits, jnp.int32(_DROPPED_BITS)) & 1
    half = (1 << (_DROPPED_BITS - 1)) - 1
    kept = (bits + (odd + half)) & ~((1 << _DROPPED_BITS) - 1)
    normal = lax.bitcast_convert_type(kept, jnp.float32)
    nearest = lax.RoundingMethod.TO_NEAREST_EVEN
    subnormal = lax.round(v * _SUBNORMALS_PER_ONE, nearest) * (1 / _SUBNORMALS_PER_ONE)
    a = jnp.where(jnp.abs(v) < _MIN_NORMAL, subnormal, normal)
    return a, (v - a) * TERM_RATIO


def two_terms(x: Array) -> Terms:
    """bfloat16 x [m, k] as terms, with a unit for each row."""
    m = x.shape[0]
    wide = jnp.pad(x.astype(jnp.float32), ((0, padded_rows(m) - m), (0, 0)))
    exponent = unit_exponent(jnp.max(exponent_of(wide), axis=1, keepdims=True))
    a, b = split(wide * power_of_two(inverse(exponent)))
    return Terms(jnp.concatenate([a, b]).astype(e4m3.DTYPE), power_of_two(exponent).T)
