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
from llama_jax.kv_cache import KVCache, init_cache
from llama_jax.model import ModelSpec, Params
from llama_jax.sampling import Sampled, SamplingState, init_sampling, record, sample
from llama_jax.sharding import cache_shardings, default_sharding

# Tokens whose logits exist at one time while scoring: 64 of 128,256 words in float32 are 33 MB.
TOKENS_PER_LOGITS_BLOCK = 64


class DecodeState(struct.PyTreeNode):
    """What lives on the device between steps. tokens: int32 [batch], each row's newest."""

    cache: KVCache
    sampling: SamplingState
    tokens: Array


def init_state(
    spec: ModelSpec,
    batch_size: int,
    max_seq_len: int,
    cache_dtype: jnp.dtype,
    kv_scales: tuple[tuple[float, float], ...] | None = None,
    mesh: Mesh | None = None,
) -> DecodeState:
    """Empty rows, made in place on their devices; arguments as `kv_cache.init_cache` takes them."""
    whole = NamedSharding(mesh, PartitionSpec()) if mesh else default_sharding()

    def build() -> DecodeState:
        scales = None if kv_scales is None else jnp.array(kv_scales, jnp.float32)
        return DecodeState(
            cache=init_cache(spec.config, batch_size, max_seq_len, cache_dtype, scales),
            sampling=init_sampling(batch_size, spec.config.vocab_size),
            tokens=jnp.zeros(batch_size, jnp.int32),
        )

    shardings = jax.tree.map(lambda _: whole, jax.eval_shape(build))
    shardings = shardings.replace(cache=cache_shardings(spec.config, mesh))
    state: DecodeState = jax.jit(build, out_shardings=shardings)()
    return state


@partial(jax.jit, donate_argnames="state")
def admit(state: DecodeState, rows: Array, fresh: SamplingState) -> DecodeState:
    """Empty the rows, int32 [b], and give them fresh settings; an index past the end is padding."""
    return state.replace(
        cache=state.cache.replace(lengths=state.cache.lengths.at[rows].set(0, mode="drop")),
        sampling=jax.tree.map(
            lambda old, new: old.at[rows].set(new, mode="drop"), state.sampling, fresh
        ),
    )


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def prefill_step(
    params: Params,
    state: DecodeState,
    tokens: Array,
    lengths: Array,
    rows: Array,
    last: Array,
    *,
    spec: ModelSpec,
) -> tuple[DecodeState, Sampled]:
    """Append a chunk of each prompt; draw the first token of the rows whose prompt ends here.

    tokens: int32 [b, t]; lengths, rows: int32 [b]; last: bool [b]. See `model.prefill`.
    """
    hidden, cache = model.extend(params, state.cache, tokens, lengths, rows, spec=spec)
    hidden = model.last_hidden(hidden, lengths)
    vocab = spec.config.vocab_size
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
    state = state.replace(
        cache=cache,
        sampling=sampling,
        tokens=state.tokens.at[ended].set(drawn.tokens, mode="drop"),
    )
    return state, drawn


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def decode_step(
    params: Params, state: DecodeState, active: Array, *, spec: ModelSpec
) -> tuple[DecodeState, Sampled]:
    """Feed each active row, bool [batch], its newest token and draw the next."""
    hidden, cache = model.extend(
        params, state.cache, state.tokens[:, None], active.astype(jnp.int32), spec=spec
    )
    logits = model.unembed(params, hidden[:, 0], spec=spec)
    temperature = jnp.where(active, state.sampling.temperature, 0.0)
    drawn = sample(logits, state.sampling.replace(temperature=temperature))
    tokens = jnp.where(active, drawn.tokens, state.tokens)
    sampling = record(state.sampling, drawn.tokens, active)
    return state.replace(cache=cache, sampling=sampling, tokens=tokens), drawn


@partial(jax.jit, donate_argnames="state")
def clear_rows(state: DecodeState, rows: Array) -> DecodeState:
    """Empty the rows, int32 [b]; an index past the end is padding."""
    lengths = state.cache.lengths.at[rows].set(0, mode="drop")
    return state.replace(cache=state.cache.replace(lengths=lengths))


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def score_step(
    params: Params,
    state: DecodeState,
    tokens: Array,
    targets: Array,
    lengths: Array,
    rows: Array,
    *,
    spec: ModelSpec,
) -> tuple[DecodeState, tuple[Array, Array]]:
    """Append a chunk of each text; how likely is targets[b, t], the token after tokens[b, t]?

    tokens, targets: int32 [b, t]; lengths, rows: int32 [b]. Returns float32 logprobs [b, t] and
    bool [b, t], whether the target is the likeliest token. The logits of `TOKENS_PER_LOGITS_BLOCK`
    tokens exist at a time.
    """
    hidden, cache = model.extend(params, state.cache, tokens, lengths, rows, spec=spec)
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
    tokens: Array,
    lengths: Array,
    rows: Array,
    *,
    spec: ModelSpec,
) -> tuple[DecodeState, Array]:
    """Append a chunk of each text; float32 logits [b, t, vocab] of every token."""
    hidden, cache = model.extend(params, state.cache, tokens, lengths, rows, spec=spec)
    return state.replace(cache=cache), model.unembed(params, hidden, spec=spec)
