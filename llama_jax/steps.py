"""The compiled programs: what runs on the device between two visits of the host.

Each takes the parameters and the device state, which it donates, and returns the state and what the
host wants to know.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llama_jax import model
from llama_jax.kv_cache import KVCache, copy_pages, init_cache
from llama_jax.model import ModelSpec, Params
from llama_jax.sampling import (
    Sampled,
    SamplingState,
    init_sampling,
    is_stop,
    record,
    sample,
)
from llama_jax.sharding import cache_shardings, default_sharding

# Tokens whose logits exist at one time while scoring: 64 of 128,256 words in float32 are 33 MB.
TOKENS_PER_LOGITS_BLOCK = 64


class DecodeState(struct.PyTreeNode):
    """What lives on the device between steps.

    tokens: int32 [batch], each row's newest. remaining: int32 [batch], how many more it may draw;
    0 while it has nothing to do, and from its stop token on.
    """

    cache: KVCache
    sampling: SamplingState
    tokens: Array
    remaining: Array


def init_state(
    spec: ModelSpec,
    batch_size: int,
    max_seq_len: int,
    cache_dtype: jnp.dtype,
    kv_scales: tuple[tuple[float, float], ...] | None = None,
    mesh: Mesh | None = None,
    num_pages: int | None = None,
) -> DecodeState:
    """Empty rows, made in place on their devices; arguments as `kv_cache.init_cache` takes them."""
    whole = NamedSharding(mesh, PartitionSpec()) if mesh else default_sharding()

    def build() -> DecodeState:
        scales = None if kv_scales is None else jnp.array(kv_scales, jnp.float32)
        none = jnp.zeros(batch_size, jnp.int32)
        return DecodeState(
            cache=init_cache(spec.config, batch_size, max_seq_len, cache_dtype, scales, num_pages),
            sampling=init_sampling(batch_size, spec.config.vocab_size),
            tokens=none,
            remaining=none,
        )

    shardings = jax.tree.map(lambda _: whole, jax.eval_shape(build))
    shardings = shardings.replace(cache=cache_shardings(spec.config, mesh))
    state: DecodeState = jax.jit(build, out_shardings=shardings)()
    return state


@partial(jax.jit, donate_argnames="state")
def admit(
    state: DecodeState,
    rows: Array,
    lengths: Array,
    fresh: SamplingState,
    sources: Array,
    targets: Array,
) -> DecodeState:
    """Give rows, int32 [b], to new requests; an index past the end is padding.

    lengths: int32 [b], tokens that their pages hold already. sources, targets: int32 [b], pages to
    copy for them first, see `kv_cache.copy_pages`.
    """
    cache = copy_pages(state.cache, sources, targets)
    return state.replace(
        cache=cache.replace(lengths=cache.lengths.at[rows].set(lengths, mode="drop")),
        sampling=jax.tree.map(
            lambda old, new: old.at[rows].set(new, mode="drop"), state.sampling, fresh
        ),
        remaining=state.remaining.at[rows].set(0, mode="drop"),
    )


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def prefill_step(
    params: Params,
    state: DecodeState,
    page_table: Array,
    tokens: Array,
    lengths: Array,
    rows: Array,
    remaining: Array,
    *,
    spec: ModelSpec,
) -> tuple[DecodeState, Sampled]:
    """Append a chunk of each prompt; draw the first token of the rows whose prompt ends here.

    page_table: int32 [batch, pages_per_row]; tokens: int32 [b, t]; lengths, rows: int32 [b];
    remaining: int32 [b], tokens to draw from here on, 0 where the prompt goes on. See
    `model.prefill`.
    """
    cache = state.cache.replace(page_table=page_table)
    hidden, cache = model.extend(params, cache, tokens, lengths, rows, spec=spec)
    hidden = model.last_hidden(hidden, lengths)
    vocab, last = spec.config.vocab_size, remaining > 0
    logits = lax.cond(
        jnp.any(last),
        lambda: model.unembed(params, hidden, spec=spec),
        lambda: jnp.zeros((len(rows), vocab), jnp.float32),
    )
    of_rows = jax.tree.map(lambda a: jnp.take(a, rows, axis=0, mode="clip"), state.sampling)
    drawn = sample(logits, of_rows)
    of_rows = record(of_rows, drawn.tokens, last)
    ended = jnp.where(last, rows, len(state.tokens))
    sampling = state.sampling.replace(
        step=state.sampling.step.at[ended].set(of_rows.step, mode="drop"),
        counts=state.sampling.counts.at[ended].set(of_rows.counts, mode="drop"),
    )
    left = jnp.where(is_stop(of_rows, drawn.tokens), 0, remaining - 1)
    state = state.replace(
        cache=cache,
        sampling=sampling,
        tokens=state.tokens.at[ended].set(drawn.tokens, mode="drop"),
        remaining=state.remaining.at[ended].set(left, mode="drop"),
    )
    return state, drawn


@partial(jax.jit, static_argnames=("spec", "max_steps"), donate_argnames="state")
def decode_steps(
    params: Params,
    state: DecodeState,
    page_table: Array,
    active: Array,
    steps: Array,
    *,
    spec: ModelSpec,
    max_steps: int,
) -> tuple[DecodeState, tuple[Array, Sampled]]:
    """Up to `steps` times, feed each row that has tokens left its newest one and draw the next.

    page_table: int32 [batch, pages_per_row], with pages for what will be drawn; active: bool
    [batch], rows that may go on; steps: int32 [], at most `max_steps`. Stops early when no row has
    anything left to draw.
    Returns how many tokens each row drew, int32 [batch], and these, with a first axis [max_steps]:
    row b's are the first counts[b] of its column.
    """
    batch = active.shape[0]
    state = state.replace(
        cache=state.cache.replace(page_table=page_table),
        remaining=jnp.where(active, state.remaining, 0),
    )
    blank = jax.tree.map(
        lambda leaf: jnp.zeros((max_steps, *leaf.shape), leaf.dtype),
        jax.eval_shape(sample, jnp.zeros((batch, spec.config.vocab_size)), state.sampling),
    )

    def goes_on(carry: tuple[Array, DecodeState, Array, Sampled]) -> Array:
        i, state, _, _ = carry
        return (i < steps) & jnp.any(state.remaining > 0)

    def body(
        carry: tuple[Array, DecodeState, Array, Sampled],
    ) -> tuple[Array, DecodeState, Array, Sampled]:
        i, state, counts, drawn = carry
        state, newest = _decode(params, state, spec)
        drawn = jax.tree.map(lambda all_, one: all_.at[i].set(one), drawn, newest[1])
        return i + 1, state, counts + newest[0], drawn

    counts = jnp.zeros(batch, jnp.int32)
    _, state, counts, drawn = lax.while_loop(goes_on, body, (jnp.int32(0), state, counts, blank))
    return state, (counts, drawn)


def _decode(
    params: Params, state: DecodeState, spec: ModelSpec
) -> tuple[DecodeState, tuple[Array, Sampled]]:
    """One token for each row that has any left; also which rows drew one, bool [batch]."""
    active = state.remaining > 0
    hidden, cache = model.extend(
        params, state.cache, state.tokens[:, None], active.astype(jnp.int32), spec=spec
    )
    logits = model.unembed(params, hidden[:, 0], spec=spec)
    temperature = jnp.where(active, state.sampling.temperature, 0.0)
    drawn = sample(logits, state.sampling.replace(temperature=temperature))
    left = jnp.where(is_stop(state.sampling, drawn.tokens), 0, state.remaining - 1)
    state = state.replace(
        cache=cache,
        sampling=record(state.sampling, drawn.tokens, active),
        tokens=jnp.where(active, drawn.tokens, state.tokens),
        remaining=jnp.where(active, left, 0),
    )
    return state, (active, drawn)


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def score_step(
    params: Params,
    state: DecodeState,
    page_table: Array,
    tokens: Array,
    lengths: Array,
    rows: Array,
    targets: Array,
    *,
    spec: ModelSpec,
) -> tuple[DecodeState, tuple[Array, Array]]:
    """Append a chunk of each text; how likely is targets[b, t], the token after tokens[b, t]?

    tokens, targets: int32 [b, t]; the others as in `prefill_step`. Returns float32 logprobs [b, t]
    and bool [b, t], whether the target is the likeliest token. The logits of
    `TOKENS_PER_LOGITS_BLOCK` tokens exist at a time.
    """
    cache = state.cache.replace(page_table=page_table)
    hidden, cache = model.extend(params, cache, tokens, lengths, rows, spec=spec)
    count = tokens.size
    block = min(TOKENS_PER_LOGITS_BLOCK, count)
    padding = -count % block
    flat = jnp.pad(hidden.reshape(count, -1), ((0, padding), (0, 0)))
    wanted = jnp.pad(targets.reshape(count), (0, padding))

    def score_block(part: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = part
        logits = model.unembed(params, hidden, spec=spec)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), targets == jnp.argmax(logits, axis=-1)

    blocks = (flat.reshape(-1, block, flat.shape[-1]), wanted.reshape(-1, block))
    logprobs, greedy = lax.map(score_block, blocks)
    scores = tuple(a.reshape(-1)[:count].reshape(tokens.shape) for a in (logprobs, greedy))
    return state.replace(cache=cache), scores


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def logits_step(
    params: Params,
    state: DecodeState,
    page_table: Array,
    tokens: Array,
    lengths: Array,
    rows: Array,
    *,
    spec: ModelSpec,
) -> tuple[DecodeState, Array]:
    """Append a chunk of each text; float32 logits [b, t, vocab] of every token."""
    cache = state.cache.replace(page_table=page_table)
    hidden, cache = model.extend(params, cache, tokens, lengths, rows, spec=spec)
    return state.replace(cache=cache), model.unembed(params, hidden, spec=spec)
