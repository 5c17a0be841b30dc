"""This module tells how likely a prompt's own tokens are, and which would have been likeliest.

That is what `prompt_logprobs` and echo with logprobs ask. Each such prompt is scored by a request
of its own, beside those that continue it, since these compute no logits of a prompt.
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
    """Returns the request that scores each prompt; None where nothing is asked.

    num_top: the likeliest tokens that are wanted in each token's place; None where no logprobs are.
    has_ranks: whether ranks are wanted. Of a single token, which follows nothing, nothing is asked.
    """
    if num_top is None:
        return [None] * len(prompts)
    # One is known of each token anyway.
    asked = num_top if has_ranks or num_top > 1 else None
    return [score_request(ids, 1, asked) if len(ids) > 1 else None for ids in prompts]


def likeliest(scored: Request, count: int) -> list[list[tuple[int, float]]]:
    """Returns the `count` likeliest tokens in the place of each of a prompt's but the first."""
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
