"""Converts to and from float8_e4m3fn, also in the form of its bit patterns as int8.

Format: OCP 8-bit floating point specification, E4M3: no infinity, NaN 0x7f / 0xff, maximum 448.

XLA's CPU backend upcasts a whole float8 array before slicing it, and copies it for a bitcast. On
that backend, matrices and caches are therefore passed to compiled programs as int8 bit patterns
(`as_bits`); every operation here accepts either dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

DTYPE = jnp.float8_e4m3fn
MAX = 448.0
BITS_SCALE = 256.0


def cast(x: Array) -> Array:
    """Round to float8_e4m3fn and saturate at 448; JAX's own cast gives NaN above 464."""
    return jnp.clip(x.astype(jnp.float32), -MAX, MAX).astype(DTYPE)


def store(x: Array, dtype: jnp.dtype) -> Array:
    """Round as `cast` does. dtype: float8_e4m3fn, or int8 for its bit patterns."""
    codes = cast(x)
    return codes if dtype == DTYPE else jax.lax.bitcast_convert_type(codes, jnp.int8)


def load(codes: Array) -> Array:
    """Convert codes, float8_e4m3fn, int8 bit patterns of it, or bfloat16, to float32 values."""
    return from_bits(codes) * BITS_SCALE if codes.dtype == jnp.int8 else codes.astype(jnp.float32)


def from_bits(bits: Array) -> Array:
    """Convert int8 bit patterns of e4m3fn to their float32 values divided by `BITS_SCALE`.

    The seven bits of the magnitude, shifted into a float16, keep every finite value, subnormals
    too, and take two integer instructions. Callers fold `BITS_SCALE` into a scale of their own. The
    NaN pattern reads as 480, so loaders refuse NaN codes.
    """
    shifted = (bits.astype(jnp.int16) << 7) & jnp.int16(-16385)
    return jax.lax.bitcast_convert_type(shifted, jnp.float16).astype(jnp.float32)


def as_bits(codes: Array) -> Array:
    """View the same bytes as int8, without a copy on the CPU. Not for use inside jit."""
    return jax.device_put(np.asarray(codes).view(np.int8), codes.sharding, may_alias=True)
