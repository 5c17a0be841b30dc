"""Defines `rms_norm` plainly: each row is divided by its length over the square root of d."""

import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    wide = x.astype(jnp.float32)
    rms = jnp.sqrt((wide * wide).sum(axis=-1) / x.shape[-1] + eps)
    rounded = (wide / rms[..., None]).astype(x.dtype)
    return (rounded.astype(jnp.float32) * weight.astype(jnp.float32)).astype(x.dtype)
