"""This module computes logprobs of a prompt's own tokens, and the likeliest tokens in their places.

`prompt_logprobs` and echo with logprobs need them. Each such prompt is scored by a separate
request, because the requests that continue a prompt compute no logits of its tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_jax.engine.request import Request
from llama_jax.jobs import score_request
from llama_jax.serve.replies import LEAST_LOGPROB, PromptLogprob

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer


def scoring(
    prompts: Sequence[Sequence[int]], num_top: int | None, has_ranks: bool
) -> list[Request | None]:
    """Returns the request that scores each prompt, or None for a prompt of a single token, which
    has no context.

    num_top: how many likeliest tokens to find in each token's place; None for no logprobs at all.
    has_ranks: whether to find each token's rank too.
    """
    if num_top is None:
        return [None] * len(prompts)
    # The likeliest token is always computed.
    asked = num_top if has_ranks or num_top > 1 else None
    return [score_request(ids, 1, asked) if len(ids) > 1 else None for ids in prompts]


def likeliest(scored: Request, count: int) -> list[list[tuple[int, float]]]:
    """Returns the `count` likeliest tokens in the place of each prompt token but the first."""
    if count > 1:
        return [top[:count] for top in scored.prompt_top]
    best = zip(scored.prompt_likeliest.tolist(), scored.prompt_most.tolist(), strict=True)
    return [[each][:count] for each in best]


def prompt_logprobs(
    tokenizer: "Tokenizer", scored: Request | None, count: int
) -> list[dict[str, PromptLogprob] | None]:
    """Returns vLLM's form: for each token of a prompt its own logprob and the `count` likeliest, by
    id; None for the first, which follows nothing.

    scored: has been asked for at least as many.
    """
    told: list[dict[str, PromptLogprob] | None] = [None]
    if scored is None:
        return told

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, PromptLogprob]:
        text = tokenizer.token_text(token_id)
        logprob = max(logprob, LEAST_LOGPROB)
        return {str(token_id): PromptLogprob(logprob=logprob, rank=rank, decoded_token=text)}

    own = zip(scored.prompt[1:], scored.prompt_logprobs.tolist(), scored.prompt_ranks, strict=True)
    for (token_id, logprob, rank), top in zip(own, scored.prompt_top, strict=True):
        entries = entry(token_id, logprob, rank)
        for place, (other, value) in enumerate(top[:count], 1):
            if other != token_id:
                entries |= entry(other, value, place)
        told.append(entries)
    return told
