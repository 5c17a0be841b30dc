"""Defines the compiled programs that the engine launches.

Most take the parameters and the device state, which they donate, and return the new state and
results. `score_step` and `logits_step`, which go on from the hidden states of `prefill_step`, need
no state. So there is one program with all layers for each shape of a prefill call, whatever the
prompts are for.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from llama_jax.engine.draw_kinds import Kind
from llama_jax.engine.drawn import Drawn, count_draws
from llama_jax.engine.program_cache import kept_jit, returns
from llama_jax.engine.sampling import (
    Sampled,
    SamplingState,
    init_sampling,
    is_stop,
    record,
    sample,
    set_rows,
)
from llama_jax.engine.speculation import NO_SPECULATION, Speculation, draft_tokens, look_up
from llama_jax.model import forward
from llama_jax.model.kv_cache import KVCache, KVScales, copy_pages, init_cache
from llama_jax.model.sharding import cache_shardings, default_sharding, replicated_on
from llama_jax.model.spec import ModelSpec, Params
from llama_jax.sampling_params import MAX_TOP_LOGPROBS
from pallas_kernels import device
from pallas_kernels.fp8_matmul.logits import LogitStats, in_blocks, stats_of


class DecodeState(struct.PyTreeNode):
    """The state on the device between launches.

    tokens: int32 [batch], each slot's newest token.
    remaining: int32 [batch], how many more tokens each slot may draw; 0 while it is idle and after
        its stop token.
    history: int32 [batch, capacity], each slot's tokens if draft tokens are looked up in them, else
        [batch, 0].
    draft: the draft model's cache, with the same page table.
    """

    cache: KVCache
    sampling: SamplingState
    tokens: Array
    remaining: Array
    history: Array
    draft: KVCache | None


returns(DecodeState, Drawn, KVCache, Sampled, SamplingState)


def state_builder(
    spec: ModelSpec,
    batch_size: int,
    max_seq_len: int,
    cache_dtype: jnp.dtype,
    kv_scales: KVScales | None = None,
    num_pages: int | None = None,
    speculation: Speculation = NO_SPECULATION,
) -> Callable[[], DecodeState]:
    """Return a compiled program that makes the state of empty slots directly on their devices.

    Arguments are those of `kv_cache.init_cache`.
    """
    whole = replicated_on(spec.mesh) if spec.mesh else default_sharding()

    def build() -> DecodeState:
        scales = None if kv_scales is None else jnp.array(kv_scales, jnp.float32)
        none = jnp.zeros(batch_size, jnp.int32)
        pages = (batch_size, max_seq_len, cache_dtype)
        cache = init_cache(spec.config, *pages, scales, num_pages)
        looked_up = cache.capacity if speculation.uses_history else 0
        return DecodeState(
            cache=cache,
            sampling=init_sampling(batch_size, spec.config.vocab_size),
            tokens=none,
            remaining=none,
            history=jnp.zeros((batch_size, looked_up), jnp.int32),
            draft=init_cache(draft.config, *pages, None, num_pages) if draft else None,
        )

    draft = speculation.draft
    shardings = jax.tree.map(lambda _: whole, jax.eval_shape(build))
    shardings = shardings.replace(
        cache=cache_shardings(spec.config, spec.mesh),
        draft=cache_shardings(draft.config, spec.mesh) if draft else None,
    )
    return jax.jit(build, out_shardings=shardings)


@partial(kept_jit, donate_argnames="state")
def admit(
    state: DecodeState,
    slots: Array,
    cached_lens: Array,
    settings: SamplingState,
    sources: Array,
    targets: Array,
    history: Array,
) -> DecodeState:
    """Initialise slots for new sequences.

    slots: int32 [b]; an index past the end is padding.
    cached_lens: int32 [b], tokens that their pages hold already.
    settings: from `sampling.host_rows`.
    sources, targets: int32 [b], pages to copy for them first, see `kv_cache.copy_pages`.
    history: int32 [b, capacity], see `DecodeState`.
    """
    cache = copy_pages(state.cache, sources, targets)
    return state.replace(
        cache=cache.replace(cached_lens=cache.cached_lens.at[slots].set(cached_lens, mode="drop")),
        sampling=set_rows(state.sampling, slots, settings),
        remaining=state.remaining.at[slots].set(0, mode="drop"),
        history=state.history.at[slots].set(history, mode="drop"),
        draft=state.draft and copy_pages(state.draft, sources, targets),
    )


@partial(kept_jit, static_argnames=("spec", "speculation"), donate_argnames="state")
def prefill_step(
    params: Params,
    state: DecodeState,
    page_table: Array,
    tokens: Array,
    num_new_tokens: Array,
    slots: Array,
    draft_params: Params | None = None,
    *,
    spec: ModelSpec,
    speculation: Speculation = NO_SPECULATION,
) -> tuple[DecodeState, tuple[Array, Array]]:
    """Append a chunk of each prompt to the cache.

    page_table: int32 [batch, pages_per_slot].
    tokens, num_new_tokens, slots: as in `forward.prefill`.
    draft_params: of `speculation.draft`, which gets the same chunks.
    Returns the hidden states [b, d] of the last tokens, for `draw_step` if a prompt ends here, and
    those [b, t, d] of all tokens, for `score_step` and `logits_step`.
    """
    cache, draft = state.cache.replace(page_table=page_table), state.draft
    if speculation.draft:
        assert draft is not None and draft_params is not None
        draft = _follow(draft, cache)
        _, draft = forward.extend(
            draft_params,
            draft,
            tokens,
            num_new_tokens,
            slots,
            spec=speculation.draft,
            phase="prefill",
        )
    hidden, cache = forward.extend(
        params, cache, tokens, num_new_tokens, slots, spec=spec, phase="prefill"
    )
    found = forward.last_hidden(hidden, num_new_tokens), hidden
    if spec.mesh:
        found = lax.with_sharding_constraint(found, replicated_on(spec.mesh))
    return state.replace(cache=cache, draft=draft), found


@partial(kept_jit, static_argnames=("spec", "kind"), donate_argnames="state")
def draw_step(
    params: Params,
    state: DecodeState,
    hidden: Array,
    slots: Array,
    remaining: Array,
    masks: Array | None = None,
    *,
    spec: ModelSpec,
    kind: Kind = "everything",
) -> tuple[DecodeState, Sampled]:
    """Draw the first token of slots whose prompt has ended.

    hidden, slots: [b, d] and int32 [b], as in `prefill_step`.
    remaining: int32 [b], tokens to draw from here on; 0 if the prompt continues.
    masks: uint32 [b, words] or None, see `sampling.sample`.
    kind: see `sampling.sample`.
    """
    last = remaining > 0
    logits = forward.unembed(params, hidden, spec=spec)
    of_slots = jax.tree.map(lambda a: jnp.take(a, slots, axis=0, mode="clip"), state.sampling)
    drawn = sample(logits, of_slots, kind, masks)
    after = jnp.where(is_stop(of_slots, drawn.tokens), 0, remaining - 1)
    of_slots = record(of_slots, drawn.tokens, last, kind)
    ended = jnp.where(last, slots, len(state.tokens))
    sampling = state.sampling.replace(
        step=state.sampling.step.at[ended].set(of_slots.step, mode="drop")
    )
    if kind == "everything":
        counts = sampling.counts.at[ended].set(of_slots.counts, mode="drop")
        sampling = sampling.replace(counts=counts)
    state = state.replace(
        sampling=sampling,
        tokens=state.tokens.at[ended].set(drawn.tokens, mode="drop"),
        remaining=state.remaining.at[ended].set(after, mode="drop"),
    )
    return state, drawn


def has_free_conditions() -> bool:
    """Return whether a loop may test a condition at no cost.

    On a GPU XLA makes the host evaluate it, and the device is idle meanwhile at each step.
    """
    return device.platform() == "cpu"


@partial(
    kept_jit,
    static_argnames=("spec", "max_steps", "speculation", "kind", "stops_early"),
    donate_argnames="state",
)
def decode_steps(
    params: Params,
    state: DecodeState,
    page_table: Array,
    active: Array,
    steps: Array,
    draft_params: Params | None = None,
    *,
    spec: ModelSpec,
    max_steps: int,
    speculation: Speculation = NO_SPECULATION,
    kind: Kind = "everything",
    stops_early: bool = True,
) -> tuple[DecodeState, Drawn]:
    """Run up to `steps` decode steps.

    In each, every active slot with tokens remaining feeds its newest token to the model and draws
    the next, or several if draft tokens are accepted.

    page_table: int32 [batch, pages_per_slot], with pages for all tokens to be drawn.
    active: bool [batch], the slots that may draw.
    steps: int32 [], at most `max_steps`.
    kind: see `sampling.sample`.
    stops_early: whether to stop when no slot has tokens remaining. Otherwise there are `max_steps`
        steps whatever `steps` is, and slots that are done draw nothing (`has_free_conditions`).
    """
    state, waiting = _only(state, active, page_table)
    capacity = max_steps * (1 + speculation.num_speculative_tokens)
    logits = jax.ShapeDtypeStruct((len(active), spec.config.vocab_size), jnp.float32)
    blank = jax.eval_shape(partial(sample, kind=kind), logits, state.sampling)
    empty = jax.tree.map(lambda a: jnp.zeros((capacity, *a.shape), a.dtype), blank)

    def goes_on(carry: tuple[Array, DecodeState, Array, Sampled]) -> Array:
        i, state, *_ = carry
        return (i < steps) & jnp.any(state.remaining > 0)

    def body(
        carry: tuple[Array, DecodeState, Array, Sampled],
    ) -> tuple[Array, DecodeState, Array, Sampled]:
        i, state, counts, sampled = carry
        state, drew, drawn, num_drafts = _decode(
            params, draft_params, state, spec, speculation, kind
        )
        places = jnp.where(drew, counts[0] + jnp.arange(len(drew))[:, None], capacity)
        new = jnp.sum(drew, axis=0)
        sampled = jax.tree.map(
            lambda all_, these: all_.at[places, jnp.arange(len(new))].set(these, mode="drop"),
            sampled, drawn,
        )  # fmt: skip
        return i + 1, state, counts + count_draws(new, num_drafts), sampled

    none = jnp.zeros((3, len(active)), jnp.int32)
    carry = (jnp.int32(0), state, none, empty)
    if stops_early:
        _, state, counts, sampled = lax.while_loop(goes_on, body, carry)
    else:
        _, state, counts, sampled = lax.fori_loop(0, max_steps, lambda _, each: body(each), carry)
    return state.replace(remaining=state.remaining + waiting), Drawn.pack(counts, sampled)


def _only(
    state: DecodeState, active: Array, page_table: Array | None = None
) -> tuple[DecodeState, Array]:
    """Make inactive slots draw nothing, and set the page table.

    Returns the state, and the tokens remaining of inactive slots, int32 [batch], to be added again
    later.
    """
    waiting = jnp.where(active, 0, state.remaining)
    if page_table is not None:
        state = state.replace(cache=state.cache.replace(page_table=page_table))
    return state.replace(remaining=state.remaining - waiting), waiting


# One step of `decode_steps` as three programs, for structured output: `draft_step` (with
# speculation), `feed_step` and `draw_fed_step`. While the device runs the second, the host computes
# the masks for the third.


@partial(kept_jit, static_argnames=("spec", "speculation"), donate_argnames="state")
def draft_step(
    params: Params,
    state: DecodeState,
    page_table: Array,
    active: Array,
    forced: Array,
    num_forced: Array,
    draft_params: Params | None = None,
    *,
    spec: ModelSpec,
    speculation: Speculation,
) -> tuple[DecodeState, tuple[Array, Array]]:
    """Propose draft tokens for the active slots.

    forced, num_forced: int32 [batch, drafts] and [batch], draft tokens that come first, and their
        number. The other arguments are those of `decode_steps`.
    Returns draft tokens, int32 [batch, drafts], and their number, int32 [batch].
    """
    state, waiting = _only(state, active, page_table)
    state, drafts, num_drafts = _propose(
        draft_params, state, speculation, "everything", (forced, num_forced)
    )
    num_drafts = _acceptable(state, num_drafts)
    return state.replace(remaining=state.remaining + waiting), (drafts, num_drafts)


@partial(kept_jit, static_argnames="spec", donate_argnames="state")
def feed_step(
    params: Params,
    state: DecodeState,
    page_table: Array,
    active: Array,
    drafts: Array,
    num_drafts: Array,
    *,
    spec: ModelSpec,
) -> tuple[DecodeState, Array]:
    """Feed the newest tokens of active slots, and the draft tokens after them, to the model.

    drafts: int32 [batch, drafts]; num_drafts: int32 [batch], how many of them are valid.
    Returns hidden states [batch, 1 + drafts, d], for `draw_fed_step`.
    """
    state, waiting = _only(state, active, page_table)
    state, hidden = _feed(params, state, drafts, _acceptable(state, num_drafts), spec)
    if spec.mesh:
        hidden = lax.with_sharding_constraint(hidden, replicated_on(spec.mesh))
    return state.replace(remaining=state.remaining + waiting), hidden


@partial(kept_jit, static_argnames=("spec", "kind"), donate_argnames="state")
def draw_fed_step(
    params: Params,
    state: DecodeState,
    hidden: Array,
    active: Array,
    drafts: Array,
    num_drafts: Array,
    masks: Array,
    *,
    spec: ModelSpec,
    kind: Kind = "everything",
) -> tuple[DecodeState, Drawn]:
    """Draw after the tokens that `feed_step` fed, for the active slots.

    hidden, drafts, num_drafts: its result and arguments.
    masks: uint32 [batch, 1 + drafts, words], see `sampling.sample`.
    kind: see `sampling.sample`.
    """
    state, waiting = _only(state, active)
    num_drafts = _acceptable(state, num_drafts)
    state, drew, drawn = _draw(params, state, hidden, drafts, num_drafts, masks, spec, kind)
    new = jnp.sum(drew, axis=0)
    packed = Drawn.pack(count_draws(new, num_drafts), drawn)
    return state.replace(remaining=state.remaining + waiting), packed


def _decode(
    params: Params,
    draft_params: Params | None,
    state: DecodeState,
    spec: ModelSpec,
    speculation: Speculation,
    kind: Kind,
) -> tuple[DecodeState, Array, Sampled, Array]:
    """Draw one token for each slot that has any remaining, plus one for each accepted draft token.

    Returns the state; which slots drew, bool [1 + drafts, batch]; what they drew, with the same
    leading axes; and the number of draft tokens of each, int32 [batch].
    """
    state, drafts, num_drafts = _propose(draft_params, state, speculation, kind)
    num_drafts = _acceptable(state, num_drafts)
    state, hidden = _feed(params, state, drafts, num_drafts, spec)
    state, drew, drawn = _draw(params, state, hidden, drafts, num_drafts, None, spec, kind)
    return state, drew, drawn, num_drafts


def _acceptable(state: DecodeState, num_drafts: Array) -> Array:
    """Reduce the number of draft tokens so that a token may still be drawn after the last."""
    return jnp.where(state.remaining > 0, jnp.minimum(num_drafts, state.remaining - 1), 0)


def _feed(
    params: Params, state: DecodeState, drafts: Array, num_drafts: Array, spec: ModelSpec
) -> tuple[DecodeState, Array]:
    """Feed the newest token of each slot with tokens remaining, and its draft tokens, to the model.

    The cache holds them afterwards, but its `cached_lens` are unchanged.
    Returns the state and hidden states [batch, 1 + drafts, d].
    """
    fed = jnp.concatenate([state.tokens[:, None], drafts], axis=1)
    num_new_tokens = jnp.where(state.remaining > 0, 1 + num_drafts, 0)
    hidden, cache = forward.extend(
        params, state.cache, fed, num_new_tokens, spec=spec, phase="decode"
    )
    return state.replace(cache=cache.replace(cached_lens=state.cache.cached_lens)), hidden


def _draw(
    params: Params,
    state: DecodeState,
    hidden: Array,
    drafts: Array,
    num_drafts: Array,
    masks: Array | None,
    spec: ModelSpec,
    kind: Kind,
) -> tuple[DecodeState, Array, Sampled]:
    """Draw after the tokens that `_feed` fed. Returns which slots drew and what, as in `_decode`.

    masks: uint32 [batch, 1 + drafts, words], see `sampling.sample`.
    """
    active = state.remaining > 0
    logits = forward.unembed(params, hidden, spec=spec)

    def draw(
        carry: tuple[SamplingState, Array, Array, Array],
        at: tuple[Array, Array, Array, Array | None],
    ) -> tuple[tuple[SamplingState, Array, Array, Array], tuple[Array, Sampled]]:
        sampling, draws, remaining, newest = carry
        logits, draft_token, is_draft, masks = at
        temperature = jnp.where(draws, sampling.temperature, 0.0)
        drawn = sample(logits, sampling.replace(temperature=temperature), kind, masks)
        after = jnp.where(is_stop(sampling, drawn.tokens), 0, remaining - 1)
        remaining = jnp.where(draws, after, remaining)
        is_accepted = draws & is_draft & (drawn.tokens == draft_token) & (remaining > 0)
        newest = jnp.where(draws, drawn.tokens, newest)
        carry = record(sampling, drawn.tokens, draws, kind), is_accepted, remaining, newest
        return carry, (draws, drawn)

    following = jnp.pad(drafts, ((0, 0), (0, 1))).T
    is_draft = jnp.arange(len(following))[:, None] < num_drafts
    (sampling, _, remaining, newest), (drew, drawn) = lax.scan(
        draw,
        (state.sampling, active, jnp.where(active, state.remaining, 0), state.tokens),
        (
            jnp.moveaxis(logits, 1, 0), following, is_draft,
            None if masks is None else jnp.moveaxis(masks, 1, 0),
        ),
    )  # fmt: skip
    state = state.replace(
        cache=state.cache.replace(cached_lens=state.cache.cached_lens + jnp.sum(drew, axis=0)),
        sampling=sampling,
        tokens=newest,
        remaining=remaining,
    )
    return state, drew, drawn


def _propose(
    draft_params: Params | None,
    state: DecodeState,
    speculation: Speculation,
    kind: Kind,
    forced: tuple[Array, Array] | None = None,
) -> tuple[DecodeState, Array, Array]:
    """Propose draft tokens for each slot, int32 [batch, drafts], and their number, int32 [batch].

    forced: draft tokens from the host, in the same form. A draft model's come after them; looked-up
        ones are used only for slots without forced ones.
    """
    batch, count = len(state.tokens), speculation.num_speculative_tokens
    slots, last = jnp.arange(batch), state.cache.cached_lens
    if speculation.draft:
        assert state.draft is not None and draft_params is not None
        draft, drafts = draft_tokens(
            draft_params, _follow(state.draft, state.cache), state.tokens, state.sampling,
            state.remaining - 1, forced, spec=speculation.draft, count=count, kind=kind,
        )  # fmt: skip
        return state.replace(draft=draft), drafts, jnp.full(batch, count)
    if not count:
        return state, jnp.zeros((batch, 0), jnp.int32), jnp.zeros(batch, jnp.int32)
    history = state.history.at[slots, last].set(state.tokens, mode="drop")
    drafts, is_any = look_up(history, last, count)
    num_drafts = jnp.where(is_any, count, 0)
    if forced:
        is_forced = forced[1] > 0
        drafts = jnp.where(is_forced[:, None], forced[0], drafts)
        num_drafts = jnp.where(is_forced, forced[1], num_drafts)
    # Entries of rejected tokens are overwritten before they are read.
    places = last[:, None] + 1 + jnp.arange(count)
    history = history.at[slots[:, None], places].set(drafts, mode="drop")
    return state.replace(history=history), drafts, num_drafts


def _follow(draft: KVCache, cache: KVCache) -> KVCache:
    """Set the draft model's cache to the lengths and page table of the model's."""
    return draft.replace(page_table=cache.page_table, cached_lens=cache.cached_lens)


@partial(kept_jit, static_argnames="spec")
def score_step(
    params: Params, hidden: Array, targets: Array, wants_top: Array, *, spec: ModelSpec
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Compute the logprob of each target after `prefill_step`.

    Logits of all tokens never exist, see `pallas_kernels.fp8_matmul.logits`.

    hidden: [b, t, d], of the tokens before the targets.
    targets: int32 [b, t].
    wants_top: bool [], whether to compute the second tuple, which is zeros otherwise.
    Returns two tuples: float32 logprobs [b, t], and the likeliest token in each target's place,
    int32 [b, t], with its logprob; and the `MAX_TOP_LOGPROBS` likeliest tokens in each target's
    place, int32 [b, t, k], with their logprobs, and the target's rank among all tokens from 1 on,
    int32 [b, t].
    """
    flat, flat_targets = hidden.reshape(targets.size, -1), targets.reshape(-1)
    most_top = min(MAX_TOP_LOGPROBS, spec.config.vocab_size)

    def logprobs(stats: LogitStats) -> tuple[Array, ...]:
        total = stats.logsumexp
        return stats.target_logits - total, stats.top_ids, stats.top_logits - total

    def without_top() -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        none = jnp.zeros((targets.size, most_top))
        stats = forward.logit_stats(params, flat, flat_targets, spec=spec)
        return logprobs(stats), (none.astype(jnp.int32), none, jnp.zeros_like(flat_targets))

    def with_top(hidden: Array, targets: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        logits = forward.unembed(params, hidden, spec=spec)
        stats = stats_of(logits, targets)
        top, ids = lax.top_k(logits, most_top)
        ranks = 1 + jnp.sum(logits > stats.target_logits[:, None], axis=-1, dtype=jnp.int32)
        top = top - stats.logsumexp[:, None]
        return logprobs(stats), (ids.astype(jnp.int32), top, ranks)

    # One condition around all blocks: on a GPU the host evaluates each.
    found = lax.cond(wants_top, lambda: in_blocks(with_top, flat, flat_targets), without_top)
    return jax.tree.map(lambda each: each.reshape(*targets.shape, *each.shape[1:]), found)


@partial(kept_jit, static_argnames="spec")
def logits_step(params: Params, hidden: Array, *, spec: ModelSpec) -> Array:
    """Compute float32 logits [b, t, vocab] of the hidden states [b, t, d] of `prefill_step`."""
    return forward.unembed(params, hidden, spec=spec)
