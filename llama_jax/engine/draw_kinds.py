"""Defines the kinds of draws: how much of the sampler the sequences of a launch need.

A launch's program may leave out what none of its sequences needs, which changes no token.
"""

from typing import Literal, get_args

from llama_jax.sampling_params import SamplingParams

# Each kind includes those before it. greedy: the likeliest token; sampled: a random draw;
# truncated: a draw from the likeliest tokens; everything: also settings and history over the whole
# vocabulary.
Kind = Literal["greedy", "sampled", "truncated", "everything"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def kind_of(params: SamplingParams) -> Kind:
    """Return the simplest kind that serves a sequence with these settings."""
    if (
        params.logit_bias
        or params.logprobs is not None
        or params.min_new_tokens
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    ):
        return "everything"
    if params.temperature == 0:
        return "greedy"
    return "truncated" if params.top_k or params.top_p < 1 or params.min_p else "sampled"
