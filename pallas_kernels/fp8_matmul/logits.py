"""Computes what scoring needs of each token's logits, x @ weight.T, without keeping the logits.

With a vocabulary of 128,256 those of 1,000 tokens take 0.5 GB. A kernel may add them up while it
multiplies (`Kernel.logit_stats`). Otherwise the logits of some tokens exist at a time
(`tokens_at_once`).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels import device
from pallas_kernels.fp8_matmul import choose, fp8_matmul
from pallas_kernels.fp8_matmul.dense import choose_dense, dense
from pallas_kernels.fp8_matmul.kernels import without_one_group

# With a vocabulary of 128,256 and in float32, logits of 32 tokens take 16 MB, and of 256 131 MB.
# The matrix is read once for each. On a GPU products of fewer than some 160 rows take as long as
# that, so there are more.
_TOKENS_ON_CPU, _TOKENS_ON_GPU = 32, 256
_ROWS_OF_LOGITS = 8


class LogitStats(NamedTuple):
    """Holds what is known of each token's logits; all have the shape [m].

    target_logits: float32, that of the token's target; -inf if the target is outside of the
        vocabulary.
    top_ids, top_logits: int32 and float32, the likeliest token, the first of several, and its
        logit.
    logsumexp: float32, log(sum(exp(logits))).
    """

    target_logits: Array
    top_ids: Array
    top_logits: Array
    logsumexp: Array


def logit_stats(
    x: Array,
    weight: Array,
    weight_scale: Array | None,
    targets: Array,
    *,
    x_scale: Array | None = None,
    logits_dtype: jnp.dtype = jnp.float32,
    is_batch_invariant: bool = False,
    implementation: str | None = None,
) -> LogitStats:
    """Compute what is known of the logits x @ dequantised(weight).T.

    x, weight, weight_scale, x_scale, is_batch_invariant, implementation: as in `fp8_matmul`;
        without a weight_scale as in `dense`.
    targets: int32 [m], a token for each row of x.
    logits_dtype: bfloat16 or float32, to which logits are rounded first.

    Raises ValueError as `fp8_matmul` does.

    >>> import jax.numpy as jnp
    >>> x, weight = jnp.eye(2, 8), jnp.eye(16, 8)
    >>> found = logit_stats(x, weight, None, jnp.array([0, 3]))
    >>> found.target_logits.tolist(), found.top_ids.tolist()
    ([1.0, 0.0], [0, 1])
    """
    if targets.shape != x.shape[:1]:
        raise ValueError(
            f"targets must be {x.shape[:1]}, a token for each row, got {targets.shape}"
        )
    if weight_scale is None:
        choice = choose_dense(x, weight, implementation)
    else:
        weight_scale = without_one_group(weight_scale, weight)
        choice = choose(
            x, weight, weight_scale, jnp.dtype(logits_dtype), implementation=implementation
        )
    if choice.kernel.logit_stats and x_scale is None:
        with choice.scope():
            operands = x, weight, weight_scale, targets.astype(jnp.int32)
            return LogitStats(*choice.kernel.logit_stats(*operands, jnp.dtype(logits_dtype)))

    def of_block(x: Array, x_scale: Array | None, targets: Array) -> LogitStats:
        if weight_scale is None:
            y = dense(x, weight, implementation)
        else:
            y = fp8_matmul(
                x, weight, weight_scale, x_scale=x_scale, out_dtype=logits_dtype,
                is_batch_invariant=is_batch_invariant, implementation=implementation,
            )  # fmt: skip
        return stats_of(y.astype(logits_dtype), targets)

    if x_scale is not None and x_scale.ndim == 0:
        x_scale = jnp.broadcast_to(x_scale, (len(x), 1))
    return in_blocks(of_block, x, x_scale, targets)


def stats_of(logits: Array, targets: Array) -> LogitStats:
    """Compute what is known of logits [m, vocab], which exist."""
    logits = logits.astype(jnp.float32)
    top_ids = likeliest(logits)
    found = partial(jnp.take_along_axis, logits, axis=-1)
    is_there = (targets >= 0) & (targets < logits.shape[-1])
    chosen = found(jnp.clip(targets, 0, logits.shape[-1] - 1)[:, None])[:, 0]
    return LogitStats(
        jnp.where(is_there, chosen, -jnp.inf),
        top_ids,
        found(top_ids[:, None])[:, 0],
        jax.nn.logsumexp(logits, axis=-1),
    )


def likeliest(logits: Array) -> Array:
    """Compute the argmax of each row of logits [rows, vocab], int32 [rows]; the first of equals.

    XLA's argmax is not vectorised on a CPU. There it is done in two passes that are, over a few
    rows at a time, which fit in the processor's cache.
    """
    if device.platform() != "cpu":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Without the barrier each pass might recompute the logits, with other bits.
    logits = lax.optimization_barrier(logits)
    last = logits.shape[-1] - 1

    def of_row(row: Array) -> Array:
        return jnp.where(row == row.max(), jnp.arange(last + 1, dtype=jnp.int32), last).min()

    return lax.map(of_row, logits, batch_size=_ROWS_OF_LOGITS)


def in_blocks[T](of_block: Callable[..., T], *arrays: Array | None) -> T:
    """Apply a function to `tokens_at_once` rows of arrays [m, ...] at a time, one block after the
    other, and return its results [m, ...] put together. None stays None."""
    (count, *_) = (len(each) for each in arrays if each is not None)
    size = min(tokens_at_once(), count)
    padding = -count % size

    def divided(array: Array) -> Array:
        padded = jnp.pad(array, ((0, padding), *[(0, 0)] * (array.ndim - 1)))
        return padded.reshape(-1, size, *array.shape[1:])

    found = lax.map(lambda each: of_block(*each), jax.tree.map(divided, arrays))
    return jax.tree.map(lambda each: each.reshape(-1, *each.shape[2:])[:count], found)


def tokens_at_once() -> int:
    """Return the number of tokens whose logits exist at a time on the target device."""
    return _TOKENS_ON_GPU if device.platform() == "gpu" else _TOKENS_ON_CPU
