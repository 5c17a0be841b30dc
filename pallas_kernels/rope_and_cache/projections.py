"""What belongs to q_proj, k_proj and v_proj each."""

from typing import NamedTuple

from jax import Array


class Projections(NamedTuple):
    q: Array
    k: Array
    v: Array
