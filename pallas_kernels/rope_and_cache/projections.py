"""Defines `Projections`, a value for each of q_proj, k_proj and v_proj."""

from typing import NamedTuple

from jax import Array


class Projections(NamedTuple):
    """An array for each of q, k and v."""

    q: Array
    k: Array
    v: Array
