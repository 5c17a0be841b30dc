"""Packs the results of a decode launch on the device and unpacks them on the host."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from llama_jax.engine.sampling import Sampled


class DrawnNumbers(NamedTuple):
    """The results of a decode launch that the host always reads.

    num_tokens, num_drafts, num_accepted: int32 [batch], for each slot the number of tokens that it
        drew, of draft tokens that it had, and of draft tokens that were accepted.
    tokens: int32 [steps, batch], each slot's tokens, packed at the front.
    """

    num_tokens: np.ndarray
    num_drafts: np.ndarray
    num_accepted: np.ndarray
    tokens: np.ndarray


class Drawn(struct.PyTreeNode):
    """The results of a decode launch on the device.

    numbers: int32 [3 + steps, batch], `DrawnNumbers` in one array, for one transfer.
    sampled: the tokens with their logprobs, as in `Sampled` with a leading axis of steps.
    """

    numbers: Array
    sampled: Sampled

    @classmethod
    def pack(cls, counts: Array, sampled: Sampled) -> "Drawn":
        """Pack numbers into one array. counts: int32 [3, batch], the counts of `DrawnNumbers`."""
        return cls(jnp.concatenate([counts, sampled.tokens]), sampled)

    @staticmethod
    def unpack(numbers: np.ndarray) -> DrawnNumbers:
        """Split `numbers` into its fields, on the host."""
        num_tokens, num_drafts, num_accepted = numbers[:3]
        return DrawnNumbers(num_tokens, num_drafts, num_accepted, numbers[3:])


def count_draws(num_tokens: Array, num_drafts: Array) -> Array:
    """Compute the counts for `Drawn.pack`, int32 [3, batch]. Every token of a step but the last is
    an accepted draft token."""
    return jnp.stack([num_tokens, num_drafts, jnp.maximum(num_tokens - 1, 0)])
