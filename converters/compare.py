"""Compares two models' predictions on a text, token by token.

The models run one after the other, layer by layer (`converters.layerwise`). Only their hidden
states and output matrices are ever in memory together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from converters.layerwise import final_hidden, logits
from converters.opened import Opened
from llama_jax.model.kv_cache import KVDtype
from llama_jax.model.spec import Activations

_TOP = 5


@dataclass(frozen=True)
class Setting:
    """A checkpoint and its settings (see `LLM.load`)."""

    checkpoint: Opened
    dtype: str = "bfloat16"
    activations: Activations = "bf16"
    kv_dtype: KVDtype = "bf16"


@dataclass(frozen=True)
class Comparison:
    """The predictions of two models at each position; all arrays are [sequences, length - 1].

    kl: float32, KL(A || B) in nats.
    log_likelihood_a, log_likelihood_b: float32, of the text's next token.
    same_top: bool, whether the likeliest token is the same.
    shared_top: float32, the share of A's five likeliest tokens that are among B's five.
    """

    kl: np.ndarray
    log_likelihood_a: np.ndarray
    log_likelihood_b: np.ndarray
    same_top: np.ndarray
    shared_top: np.ndarray

    @property
    def perplexities(self) -> tuple[float, float]:
        """Return the perplexities of A and of B."""
        a, b = self.log_likelihood_a, self.log_likelihood_b
        return float(np.exp(-a.mean(dtype=np.float64))), float(np.exp(-b.mean(dtype=np.float64)))

    def worst(self, count: int) -> list[tuple[int, int]]:
        """Return the places with the largest KL, as (sequence, index of the predicted token)."""
        order = np.argsort(-self.kl, axis=None, kind="stable")[:count]
        places = np.unravel_index(order, self.kl.shape)
        return [(int(i), int(j) + 1) for i, j in zip(*places, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return the summary: KL in nats, shares from 0 to 1."""
        kl = self.kl.astype(np.float64)
        a, b = self.perplexities
        return {
            "tokens": kl.size,
            "kl_mean": float(kl.mean()),
            "kl_median": float(np.median(kl)),
            "kl_p99": float(np.quantile(kl, 0.99)),
            "kl_max": float(kl.max()),
            "top_1_agreement": float(self.same_top.mean()),
            "top_5_agreement": float(self.shared_top.mean(dtype=np.float64)),
            "perplexity_a": a,
            "perplexity_b": b,
            "perplexity_ratio": b / a,
        }


def compare(
    a: Setting,
    b: Setting,
    tokens: np.ndarray,
    advance: Callable[[int], object] = lambda count: None,
) -> Comparison:
    """Compare two models of one vocabulary on tokens, int [sequences, length].

    advance: as in `layerwise.final_hidden`, for one model and then the other.
    Raises ValueError if the vocabularies differ, or if a setting does not suit its checkpoint.
    """
    sizes = [each.checkpoint.config.vocab_size for each in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"vocabularies of {sizes[0]} and {sizes[1]} tokens: distributions over different "
            "tokens cannot be compared"
        )
    specs = [each.checkpoint.spec(each.dtype, each.activations) for each in (a, b)]
    parts = []
    for each, spec in zip((a, b), specs, strict=True):
        plan = each.checkpoint.plan
        hidden, _ = final_hidden(plan, spec, tokens, kv_dtype=each.kv_dtype, advance=advance)
        parts.append(logits(plan, spec, hidden))
    targets, start = tokens[:, 1:].reshape(-1), 0
    found = []
    for logits_a, logits_b in zip(*parts, strict=True):
        stop = start + len(logits_a)
        found.append(_compare(logits_a, logits_b, targets[start:stop]))
        start = stop
    columns = (np.concatenate(column) for column in zip(*found, strict=True))
    return Comparison(*(column.reshape(len(tokens), -1) for column in columns))


@jax.jit
def _compare(a: Array, b: Array, targets: Array) -> tuple[Array, ...]:
    """Return the fields of `Comparison` for logits [tokens, vocab] and the tokens that followed."""
    log_a, log_b = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    kl = jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=1)
    top_a, top_b = (jax.lax.top_k(each, min(_TOP, a.shape[1]))[1] for each in (a, b))
    shared = jnp.any(top_a[:, :, None] == top_b[:, None, :], axis=2)
    chosen = targets[:, None]
    return (
        jnp.maximum(kl, 0),  # rounding can leave it a little below
        jnp.take_along_axis(log_a, chosen, axis=1)[:, 0],
        jnp.take_along_axis(log_b, chosen, axis=1)[:, 0],
        top_a[:, 0] == top_b[:, 0],
        jnp.mean(shared, axis=1, dtype=jnp.float32),
    )
