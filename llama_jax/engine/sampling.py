"""Draws the next token of each slot, inside the compiled step.

Each setting is an array with an entry per slot, so one compiled program serves any mixture of
requests, and a slot's draw depends on its own logits, seed and step alone. A program may leave out
what none of its slots needs (`draw_kinds`), which changes no token.

The order is that of Hugging Face transformers and vLLM: penalties, logit bias, minimum length,
grammar, temperature, top-k, top-p, min-p. Logprobs are those of the model's own distribution,
before all of these.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from llama_jax.engine.draw_kinds import Kind
from llama_jax.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from pallas_kernels.fp8_matmul.logits import likeliest

# The most stop tokens that are sent to the device as a list, not as a mask, see `is_plain`.
_LISTED_STOPS = 16
_LEAST_TEMPERATURE = np.float32(1e-30)


class SamplingState(struct.PyTreeNode):
    """The settings and the history of each slot. Shapes are [batch] unless noted.

    step: the number of generated tokens.
    logit_bias: [batch, vocab].
    stop_mask: int8 [batch, vocab]: 2 for tokens that end the text, 1 for other tokens that may not
        be drawn before `min_new_tokens`.
    prompt_mask: [batch, vocab], the prompt's tokens.
    counts: [batch, vocab], how often each token was generated.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    presence_penalty: Array
    frequency_penalty: Array
    min_new_tokens: Array
    top_logprobs: Array
    seed: Array
    step: Array
    logit_bias: Array
    stop_mask: Array
    prompt_mask: Array
    counts: Array


class Sampled(struct.PyTreeNode):
    """The drawn tokens; all other fields are None unless the draws' kind is "everything".

    tokens: int32 [batch]. logprobs: float32 [batch].
    top_ids, top_logprobs: [batch, 20], the likeliest tokens, filled for slots that ask for them.
    """

    tokens: Array
    logprobs: Array | None = None
    top_ids: Array | None = None
    top_logprobs: Array | None = None


def init_sampling(batch_size: int, vocab_size: int) -> SamplingState:
    """Return greedy settings and empty histories."""
    row = host_rows([SamplingParams(temperature=0.0, seed=0)], [()], [()], vocab_size)
    return jax.tree.map(lambda a: jnp.repeat(a, batch_size, axis=0), row)


def is_plain(
    params: SamplingParams, stop_ids: Collection[int], eos_ids: Collection[int] = ()
) -> bool:
    """Return whether a request needs no state of vocabulary size, only a few stop tokens."""
    return len(stop_ids) <= _LISTED_STOPS and not (
        params.logit_bias
        or (params.min_new_tokens and not set(eos_ids) <= set(stop_ids))
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


def host_rows(
    params: Sequence[SamplingParams],
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[Collection[int]],
    vocab_size: int,
    drawn: Sequence[Sequence[int]] | None = None,
    eos_ids: Sequence[Collection[int]] | None = None,
    plain: bool = False,
) -> SamplingState:
    """Make the state of new rows as numpy arrays, one row per element of the sequences.

    drawn: tokens that were drawn before, if a request was preempted.
    eos_ids: tokens that are not drawn before `min_new_tokens`, besides the stop tokens.
    plain: for plain rows, see `is_plain`: a few bytes in place of arrays over the vocabulary, for
        `set_rows`.

    Raises ValueError if the settings have token ids outside the vocabulary, except for stop tokens,
    which are then never drawn.
    """

    def column(name: str, dtype: type) -> np.ndarray:
        # The largest number of the dtype means what a larger one would: no limit.
        largest = float(np.finfo(dtype).max) if dtype is np.float32 else np.iinfo(dtype).max
        return np.array([min(getattr(p, name), largest) for p in params], dtype)

    shape = (len(params), 0 if plain else vocab_size)
    bias: Any = np.zeros(shape, np.float32)
    counts: Any = np.zeros(shape, np.int32)
    stop_mask: Any = np.zeros(shape, np.int8)
    prompt_mask: Any = np.zeros(shape, bool)
    drawn = [()] * len(params) if drawn is None else drawn
    ends = [[i for i in stops if 0 <= i < vocab_size] for stops in stop_ids]
    barred = [[i for i in each if 0 <= i < vocab_size] for each in eos_ids or [()] * len(params)]
    for row, (p, prompt) in enumerate(zip(params, prompts, strict=True)):
        check_ids("logit_bias", p.logit_bias, vocab_size)
        check_ids("stop_token_ids", p.stop_token_ids, vocab_size)
        if not plain:
            bias[row, list(p.logit_bias)] = list(p.logit_bias.values())
            stop_mask[row, barred[row]] = 1
            stop_mask[row, ends[row]] = 2
            prompt_mask[row, list(prompt)] = True
            np.add.at(counts[row], list(drawn[row]), 1)
    if plain:
        stop_mask = np.full((len(params), _LISTED_STOPS), vocab_size, np.int32)
        for row, stops in enumerate(ends):
            stop_mask[row, : len(stops)] = sorted(stops)
    fresh = np.random.SeedSequence().generate_state(len(params), np.uint32)
    seeds = [fresh[i] if p.seed is None else p.seed for i, p in enumerate(params)]
    columns: dict[str, Any] = {
        name: column(name, dtype)
        for name, dtype in (
            ("temperature", np.float32),
            ("top_k", np.int32),
            ("top_p", np.float32),
            ("min_p", np.float32),
            ("repetition_penalty", np.float32),
            ("presence_penalty", np.float32),
            ("frequency_penalty", np.float32),
            ("min_new_tokens", np.int32),
        )
    }
    # With a smaller temperature, logits could overflow to infinity.
    warm = columns["temperature"] > 0
    columns["temperature"][warm] = np.maximum(columns["temperature"][warm], _LEAST_TEMPERATURE)
    columns |= {
        "top_logprobs": np.array([p.logprobs or 0 for p in params], np.int32),
        "seed": np.array(seeds, np.uint32),
        "step": np.array([len(each) for each in drawn], np.int32),
    }
    return SamplingState(
        **columns, logit_bias=bias, stop_mask=stop_mask, prompt_mask=prompt_mask, counts=counts
    )


def set_rows(state: SamplingState, slots: Array, rows: SamplingState) -> SamplingState:
    """Set slots, int32 [b], to rows of `host_rows`; an index past the end is padding."""
    is_plain = not rows.counts.shape[1]

    def put(old: Array, new: Array) -> Array:
        # Plain rows are zeros over the vocabulary, which are written in place without being made.
        return old.at[slots].set(new if new.size else jnp.zeros((), old.dtype), mode="drop")

    marks = jnp.zeros((len(slots), 0), jnp.int8) if is_plain else rows.stop_mask
    found: SamplingState = jax.tree.map(put, state, rows.replace(stop_mask=marks))
    if not is_plain:
        return found
    stops = found.stop_mask.at[slots[:, None], rows.stop_mask].set(2, mode="drop")
    return found.replace(stop_mask=stops)


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> list[int]:
    """Return token ids as a list of int.

    Raises TypeError, naming `name`, for one that is no integer, and ValueError unless all lie in
    [0, vocab_size).
    """
    given, checked = list(ids), []
    if set(map(type, given)) == {int} and min(given) >= 0 and max(given) < vocab_size:
        return given  # sooner than one by one, as what is wrong has to be found
    for token_id in given:
        if not isinstance(token_id, int | np.integer) or isinstance(token_id, bool):
            kind = type(token_id).__name__
            raise TypeError(f"{name}: expected token ids, which are int, got {token_id!r} ({kind})")
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"{name}: token id {token_id} is not in [0, {vocab_size})")
        checked.append(int(token_id))
    return checked


def sample(
    logits: Array, state: SamplingState, kind: Kind = "everything", masks: Array | None = None
) -> Sampled:
    """Draw one token per slot.

    logits: float32 [batch, vocab], of the model.
    kind: must cover every slot whose token is used, and be "everything" with masks.
    masks: uint32 [batch, words]; bit i % 32 of word i // 32 is 1 if token i may be drawn. A slot
        without such a token draws an arbitrary one.
    """
    assert masks is None or kind == "everything"
    if kind == "greedy":
        return Sampled(likeliest(logits))
    if kind != "everything":
        return Sampled(likeliest(_noisy(logits, state, kind == "truncated")))
    scores = _penalise(logits, state)
    scores = jnp.where(
        (state.step < state.min_new_tokens)[:, None] & (state.stop_mask > 0), -jnp.inf, scores
    )
    if masks is not None:
        scores = jnp.where(_bits(masks, scores.shape[-1]), scores, -jnp.inf)
    limited = (state.top_k > 0) | (state.top_p < 1) | (state.min_p > 0)
    limited &= state.temperature > 0
    scores = lax.cond(
        jnp.any(state.temperature > 0),
        lambda: _noisy(scores, state, jnp.any(limited)),
        lambda: scores,
    )
    tokens = likeliest(scores)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    count = min(MAX_TOP_LOGPROBS, logits.shape[-1])

    def top() -> tuple[Array, Array]:
        values, ids = lax.top_k(logprobs, count)
        return ids.astype(jnp.int32), values

    empty = (len(tokens), count)
    top_ids, top_logprobs = lax.cond(
        jnp.any(state.top_logprobs > 0),
        top,
        lambda: (jnp.zeros(empty, jnp.int32), jnp.zeros(empty, jnp.float32)),
    )
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return Sampled(tokens, chosen, top_ids, top_logprobs)


def _bits(masks: Array, vocab_size: int) -> Array:
    """Unpack uint32 [batch, words] into bool [batch, vocab_size]."""
    bits = masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return bits.reshape(len(masks), -1)[:, :vocab_size] == 1


def record(
    state: SamplingState, tokens: Array, active: Array, kind: Kind = "everything"
) -> SamplingState:
    """Add the tokens [batch] that active slots (bool [batch]) drew to their history.

    kind: of the draw. `counts` is updated for "everything" alone: slots that need it draw every
        token that way.
    """
    state = state.replace(step=state.step + active)
    if kind != "everything":
        return state
    rows = jnp.where(active, jnp.arange(len(tokens)), len(tokens))
    return state.replace(counts=state.counts.at[rows, tokens].add(1, mode="drop"))


def is_stop(state: SamplingState, tokens: Array) -> Array:
    """Return whether each slot's token, int32 [batch], ends its text: bool [batch].

    state: the one with which the tokens were drawn, before they are recorded.
    """
    marks = jnp.take_along_axis(state.stop_mask, tokens[:, None], axis=-1)[:, 0]
    return (marks == 2) & (state.step >= state.min_new_tokens)


def _noisy(scores: Array, state: SamplingState, is_limited: bool | Array) -> Array:
    """Compute scores of which the largest is that of the token to draw, float32 [batch, vocab].

    They are the scores themselves where the temperature is 0, else truncated and with noise.

    scores: float32 [batch, vocab]. is_limited: whether any slot has to be truncated.

    Source: the Gumbel-max trick, as in `jax.random.categorical`.
    """
    scaled = scores / jnp.where(state.temperature > 0, state.temperature, 1.0)[:, None]
    if isinstance(is_limited, bool):
        kept = _truncate(scaled, state) if is_limited else scaled
    else:
        kept = lax.cond(is_limited, _truncate, lambda scaled, _: scaled, scaled, state)
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(state.seed, state.step, scores.shape[-1])
    return jnp.where(state.temperature[:, None] > 0, kept + noise, scores)


def _penalise(logits: Array, state: SamplingState) -> Array:
    penalty = state.repetition_penalty[:, None]
    seen = state.prompt_mask | (state.counts > 0)
    penalised = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(seen, penalised, logits)
    logits -= state.frequency_penalty[:, None] * state.counts
    logits -= state.presence_penalty[:, None] * (state.counts > 0)
    return logits + state.logit_bias


def _truncate(logits: Array, state: SamplingState) -> Array:
    """Set all but the top-k, the nucleus and the min-p tokens of each slot to -inf."""
    vocab = logits.shape[-1]
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    top_k = jnp.where(state.top_k > 0, jnp.minimum(state.top_k, vocab), vocab)[:, None]
    kth = jnp.take_along_axis(ordered, top_k - 1, axis=-1)
    ordered = jnp.where(ordered < kth, -jnp.inf, ordered)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    in_nucleus = (before < state.top_p[:, None]) | (state.top_p[:, None] >= 1)
    last = jnp.maximum(jnp.sum(in_nucleus, axis=-1, keepdims=True) - 1, 0)
    threshold = jnp.maximum(kth, jnp.take_along_axis(ordered, last, axis=-1))
    threshold = jnp.maximum(threshold, ordered[:, :1] + jnp.log(state.min_p)[:, None])
    return jnp.where(logits < threshold, -jnp.inf, logits)


def _gumbel(seed: Array, step: Array, size: int) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.gumbel(key, (size,))
