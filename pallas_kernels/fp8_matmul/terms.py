"""Defines `Parts` and `Terms`, which launches of a decode step pass to each other.

`Parts` are a product that has not been summed up yet: thread blocks divide K among them, and the
next launch adds their partial sums, which saves a launch. `Terms` are bfloat16 activations as sums
of two float8 numbers, so that FP8 tensor cores can take the weight's codes unchanged.
"""

import functools
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import e4m3
from pallas_kernels.hopper import BOX_ROWS

# The second term is its code divided by this.
TERM_RATIO = 16
# From this many rows of x on, pairs of thread blocks share the loads of x, half each.
MIN_ROWS_TO_SHARE = 17
MANTISSA_BITS, _DROPPED_BITS = 23, 20  # of float32; those beyond float8_e4m3fn's 3
_MIN_NORMAL = 2.0**-6
# float8_e4m3fn's smallest number is 2^-9.
_SUBNORMALS_PER_ONE = 2.0**9


class Parts(NamedTuple):
    """A product x @ weight.T, [m, n], as partial sums over splits of K.

    sums: float32 [splits, m, n].
    scale: float32 [n], of the weight's rows; None if it is applied already.
    """

    sums: Array
    scale: Array | None

    def total(self) -> Array:
        """Return the product, float32 [m, n], added up in the order of the splits."""
        y = functools.reduce(operator.add, self.sums)
        return y if self.scale is None else y * self.scale


class Terms(NamedTuple):
    """Activations x [m, k] as unit * (a + b / 16), with a and b in float8_e4m3fn.

    A bfloat16 number has 8 significant bits and a float8_e4m3fn one has 4, down to 2^-6. So this is
    exact for numbers of at least 2^-13 of the largest in their group, and off by less than 2^-21 of
    that for others.

    codes: float8_e4m3fn [2 rows, k], the rows of a and then those of b, where rows is
        `padded_rows(m)`. Rows past m are meaningless.
    units: float32 [groups, rows], powers of two, one for each group of k / groups columns of a row.
    mean_squares: float32 [parts, rows] if x still has to be normalised: each row must be multiplied
        by the inverse square root of their sum. Otherwise None.
    """

    codes: Array
    units: Array
    mean_squares: Array | None = None

    def values(self, m: int) -> Array:
        """Return the activations, float32 [m, k]."""
        a, b = jnp.split(self.codes.astype(jnp.float32), 2)
        units = jnp.repeat(self.units.T, a.shape[1] // len(self.units), axis=1)
        x = (a + b * (1 / TERM_RATIO)) * units
        if self.mean_squares is not None:
            x = x * lax.rsqrt(self.mean_squares.sum(axis=0))[:, None]
        return x[:m]


def padded_rows(m: int) -> int:
    """Return the rows of x that are multiplied: TMA takes multiples of 8 per block of a cluster."""
    multiple = BOX_ROWS * (2 if m >= MIN_ROWS_TO_SHARE else 1)
    return -(-m // multiple) * multiple


def exponent_of(x: Array) -> Array:
    """Return the biased exponent of float32 numbers, int32; 255 for infinities and NaNs."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return lax.shift_right_logical(bits, jnp.int32(MANTISSA_BITS)) & 255


def unit_exponent(largest: Array) -> Array:
    """Return the biased exponent of a unit such that numbers with biased exponents up to `largest`
    are below 256 units."""
    return jnp.maximum(largest - 7, 1)


def power_of_two(exponent: Array) -> Array:
    """Return the power of two with this biased exponent, float32."""
    return lax.bitcast_convert_type(lax.shift_left(exponent, jnp.int32(MANTISSA_BITS)), jnp.float32)


def inverse(exponent: Array) -> Array:
    """Return the biased exponent of 1 / unit."""
    return 254 - exponent


def split(v: Array) -> tuple[Array, Array]:
    """Split v into a + b / 16, where a and b fit float8_e4m3fn.

    v: float32 with bfloat16's precision and below 256.

    This uses integer arithmetic, because a compiler may remove a cast to float8 and back.
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
    """Convert bfloat16 x [m, k] to terms, with a unit for each row."""
    m = x.shape[0]
    wide = jnp.pad(x.astype(jnp.float32), ((0, padded_rows(m) - m), (0, 0)))
    exponent = unit_exponent(jnp.max(exponent_of(wide), axis=1, keepdims=True))
    a, b = split(wide * power_of_two(inverse(exponent)))
    return Terms(jnp.concatenate([a, b]).astype(e4m3.DTYPE), power_of_two(exponent).T)
