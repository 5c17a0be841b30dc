"""Encodes prompts and checks them: one or several, with their settings, within the context."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llama_jax.engine.sampling import check_ids
from llama_jax.sampling_params import SamplingParams
from llama_jax.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]


class PromptTooLongError(ValueError):
    """Raised for a prompt that leaves no room in the context for the output."""


def is_prompt(value: Prompt | Sequence[Prompt]) -> bool:
    """Return whether this is one prompt, not a list of prompts."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return isinstance(value, str)
    return bool(len(value) and isinstance(value[0], int | np.integer))


def listed[T](name: str, values: Iterable[T], expected: str = "a list") -> list[T]:
    """Return several values as a list. Raises TypeError for a single one in their place."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        found = f"{values!r:.100} ({type(values).__name__})"
        raise TypeError(f"{name}: expected {expected}, got {found}")
    return list(values)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> Sequence[int]:
    """Encode a text with the tokenizer's special tokens (usually BOS); return token ids as they
    are."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, bos=True, eos=True) if prompt else ()
    try:
        return list(prompt)
    except TypeError as error:
        raise TypeError(
            f"a prompt must be a str or a list of token ids, got {type(prompt).__name__}"
        ) from error


def encode_pair(tokenizer: Tokenizer, prompt: Prompt, completion: Prompt) -> tuple[list[int], int]:
    """Encode a prompt and a completion that can be scored after it.

    Returns the token ids of both, and the index of the completion's first.
    """
    ids, begin = tokenizer.encode_pair(prompt, completion)
    if len(ids) == begin:
        raise ValueError(f"the completion {completion!r} is empty")
    if not begin:
        raise ValueError("the prompt is empty, so the first token has no context to be scored in")
    return ids, begin


def with_sampling[T](
    prompts: Sequence[T],
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    default: SamplingParams,
) -> list[tuple[T, SamplingParams]]:
    """Pair each prompt with its settings, which may be the same for all."""
    if sampling is None or isinstance(sampling, SamplingParams):
        sampling = [sampling or default] * len(prompts)
    given = listed("sampling", sampling, "SamplingParams or a list of them")
    if len(given) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(given)} sampling settings")
    return list(zip(prompts, given, strict=True))


def check_prompt(ids: Sequence[int], vocab_size: int, max_seq_len: int, room: int = 0) -> list[int]:
    """Return `ids` as a list. Raises unless they are in the vocabulary and leave `room`."""
    if not ids:
        raise ValueError("the prompt is empty")
    checked = check_ids("prompt", ids, vocab_size)
    if len(ids) + room > max_seq_len:
        raise PromptTooLongError(
            f"the prompt has {len(ids)} tokens; max_seq_len is {max_seq_len}"
            + (", of which at least one is for the reply" if room else "")
            + ". Shorten it, or load the model with a larger max_seq_len."
        )
    return checked
