"""Kinds of draws: what the sequences of a launch need of the sampler.

What none of them needs can be left out of the launch's program, which changes no token.
"""

from typing import Literal, get_args

from llama_jax.sampling_params import SamplingParams

# Each kind does more than the one before: the likeliest token; a draw; a draw from the likeliest
# tokens; everything, which reads and writes arrays over the vocabulary besides the logits.
Kind = Literal["greedy", "sampled", "truncated", "everything"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def kind_of(params: SamplingParams) -> Kind:
    """The least kind that serves a sequence with these settings."""
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
