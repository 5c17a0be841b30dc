"""Proposes draft tokens, of which the model checks several while its weights are read once.

A draft token is accepted if it is the token that would have been drawn in its place. A slot's draw
at a step is a function of its logits, seed and step number (`sampling`), so speculation changes no
token, greedy or sampled, with penalties or without. A draft model draws with the same random
numbers, which makes it agree with the model nearly as often as rejection sampling: at least
(1 - d) / (1 + d) of the time if the distributions differ by d in total variation, where 1 - d is
the best possible (Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant
speculative decoding", 2024).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from llama_jax.engine.draw_kinds import Kind
from llama_jax.engine.sampling import SamplingState, record, sample
from llama_jax.model import forward
from llama_jax.model.config import LlamaConfig
from llama_jax.model.kv_cache import KVCache
from llama_jax.model.spec import ModelSpec, Params

# The most tokens compared between the end of the text and an earlier place; more hardly help.
LONGEST_NGRAM = 3


@dataclass(frozen=True)
class Speculation:
    """The way in which draft tokens are proposed.

    num_speculative_tokens: the number per step, 0 for none.
    draft: the spec of the draft model. None for prompt lookup: the tokens that followed an earlier
        occurrence of the last ones.
    """

    num_speculative_tokens: int = 0
    draft: ModelSpec | None = None

    def __post_init__(self) -> None:
        if self.num_speculative_tokens < 0 or (self.draft and not self.num_speculative_tokens):
            raise ValueError(
                f"num_speculative_tokens must be at least {1 if self.draft else 0}, got "
                f"{self.num_speculative_tokens}"
            )

    def check(self, config: LlamaConfig, max_seq_len: int) -> None:
        """Raise ValueError unless the draft model fits a model of `config`."""
        if self.draft is None:
            return
        draft = self.draft.config
        if draft.vocab_size != config.vocab_size:
            raise ValueError(
                f"the draft model has {draft.vocab_size} tokens in its vocabulary, the model "
                f"{config.vocab_size}: they must be the same"
            )
        if draft.max_position_embeddings < max_seq_len:
            raise ValueError(
                f"the draft model's context of {draft.max_position_embeddings} tokens is shorter "
                f"than max_seq_len {max_seq_len}"
            )

    @property
    def uses_history(self) -> bool:
        return self.num_speculative_tokens > 0 and self.draft is None


NO_SPECULATION = Speculation()


def look_up(history: Array, last: Array, count: int) -> tuple[Array, Array]:
    """Look up draft tokens in each slot's own text.

    They follow the place that has the most of the last `LONGEST_NGRAM` tokens in common with the
    end, the latest of several. A text that repeats itself is continued with its period.

    history: int32 [batch, capacity]; the tokens of slot b are those up to index last[b].
    Returns int32 [batch, count], and which slots have any, bool [batch].
    Source: Saxena, "Prompt lookup decoding", 2023.
    """

    def of_slot(history: Array, last: Array) -> tuple[Array, Array]:
        places = jnp.arange(history.shape[0])
        run, common = jnp.ones(history.shape, bool), jnp.zeros(history.shape, jnp.int32)
        for back in range(LONGEST_NGRAM):
            same = jnp.roll(history, back) == history[last - back]
            run &= same & (places >= back) & (last >= back)
            common += run
        rank = jnp.where(places < last, common * len(places) + places, -1)
        best = jnp.argmax(rank)
        period = last - best
        drafts = history[best + 1 + jnp.arange(count) % jnp.maximum(period, 1)]
        return drafts, rank[best] >= len(places)

    return jax.vmap(of_slot)(history, last)


def draft_tokens(
    params: Params,
    cache: KVCache,
    tokens: Array,
    sampling: SamplingState,
    room: Array,
    forced: tuple[Array, Array] | None = None,
    *,
    spec: ModelSpec,
    count: int,
    kind: Kind = "everything",
) -> tuple[KVCache, Array]:
    """Draw draft tokens int32 [batch, count] after each slot's newest token with a draft model.

    The last draft token goes through the draft model too, so that its cache has all of them if they
    are accepted.

    tokens: int32 [batch], the newest token.
    room: int32 [batch], tokens for which the cache has room after it; -1 for a slot that draws
        nothing.
    forced: given draft tokens, int32 [batch, count], and their number, int32 [batch].
    kind: see `sampling.sample`.
    """

    def step(
        carry: tuple[KVCache, Array, SamplingState], i: Array
    ) -> tuple[tuple[KVCache, Array, SamplingState], Array]:
        cache, tokens, sampling = carry
        grows = i <= room
        hidden, cache = forward.extend(
            params, cache, tokens[:, None], grows.astype(jnp.int32), spec=spec, phase="decode"
        )
        logits = forward.unembed(params, hidden[:, 0], spec=spec)
        drawn = sample(logits, sampling, kind).tokens
        if forced:
            given = jnp.take(forced[0], i, axis=1, mode="clip")
            drawn = jnp.where(i < forced[1], given, drawn)
        return (cache, drawn, record(sampling, drawn, grows, kind)), drawn

    (cache, _, _), drawn = lax.scan(step, (cache, tokens, sampling), jnp.arange(count + 1))
    return cache, drawn[:count].T
