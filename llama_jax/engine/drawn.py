"""What a decode launch returns: packed on the device, unpacked on the host."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from llama_jax.engine.sampling import Sampled


class DrawnNumbers(NamedTuple):
    """What the host always wants to know of draws. num_tokens, num_drafts, num_accepted: int32
    [batch], how many tokens each slot drew, how many draft tokens it had and how many of these were
    accepted. tokens: int32 [steps, batch], the tokens of a slot from the first on."""

    num_tokens: np.ndarray
    num_drafts: np.ndarray
    num_accepted: np.ndarray
    tokens: np.ndarray


class Drawn(struct.PyTreeNode):
    """What slots drew. numbers: int32 [3 + steps, batch], `DrawnNumbers` in one array and so in one
    transfer. sampled: the tokens with their logprobs, as in `Sampled` with another axis, of steps,
    in front."""

    numbers: Array
    sampled: Sampled

    @classmethod
    def pack(cls, counts: Array, sampled: Sampled) -> "Drawn":
        """Put them into one array. counts: int32 [3, batch], the first fields of `DrawnNumbers`."""
        return cls(jnp.concatenate([counts, sampled.tokens]), sampled)

    @staticmethod
    def unpack(numbers: np.ndarray) -> DrawnNumbers:
        """Take `numbers`, once on the host, apart."""
        num_tokens, num_drafts, num_accepted = numbers[:3]
        return DrawnNumbers(num_tokens, num_drafts, num_accepted, numbers[3:])


def count_draws(num_tokens: Array, num_drafts: Array) -> Array:
    """Counts as `Drawn.pack` takes them, int32 [3, batch]: every token of a step but its last is an
    accepted draft token."""
    return jnp.stack([num_tokens, num_drafts, jnp.maximum(num_tokens - 1, 0)])
