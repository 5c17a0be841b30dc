"""Reads generation_config.json, which has a checkpoint's sampling settings.

Each field that transformers defines is listed once. Those in `Settings` are honoured, and those in
`HARMLESS` cannot change the tokens here. A field in `NOT_HONOURED` is named in a warning unless its
value has no effect.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from llama_jax.errors import CheckpointError
from llama_jax.json_file import convert, shown
from llama_jax.model.config_files import TokenId
from llama_jax.sampling_params import SamplingParams

_log = logging.getLogger(__name__)
# Below this, sampling is greedy as in vLLM: logits divided by less would overflow float32.
_LEAST_TEMPERATURE = 1e-5

Probability = Annotated[float, Meta(ge=0, le=1)]
Tokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]
StopString = Annotated[str, Meta(min_length=1)]


class Settings(Struct, kw_only=True):
    """The fields that are honoured, with transformers' meaning.

    do_sample: whether tokens are sampled. If not, or with temperature 0, decoding is greedy.
    top_k: 0 and -1 keep all tokens.
    top_p: 0 keeps only the likeliest token.
    eos_token_id: the tokens that end a text, instead of config.json's.
    stop_strings: the strings that end it.
    suppress_tokens: tokens that are never drawn.
    """

    do_sample: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1000)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    top_p: Probability | None = None
    min_p: Probability | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-3, le=1e3)] | None = None
    max_new_tokens: Tokens | None = None
    min_new_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    stop_strings: StopString | list[StopString] | None = None
    suppress_tokens: list[TokenId] | None = None


# Fields that cannot change the tokens, by the reason.
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "where the file comes from": (
        "_commit_hash", "_from_model_config", "_original_object_hash", "transformers_version",
    ),
    "how transformers runs the model": (
        "cache_config", "cache_implementation", "compile_config", "continuous_batching_config",
        "disable_compile", "low_memory", "max_cache_len", "prefill_chunk_size", "use_cache",
    ),
    "what transformers returns beside the tokens": (
        "output_attentions", "output_hidden_states", "output_logits", "output_scores",
        "renormalize_logits", "return_dict_in_generate",
    ),
    "speculation, which changes the speed and not the tokens": (
        "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
        "assistant_lookbehind", "is_assistant", "max_matching_ngram_size", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "prompt_lookup_num_tokens", "speculation_type",
        "target_lookbehind", "use_mtp",
    ),
    "parts that Llama does not have": (
        "decoder_start_token_id", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
    ),
    "the tokenizer's, which its own files say": ("bos_token_id", "pad_token_id"),
    "a guard against NaN, of which none arise": ("remove_invalid_values",),
    "of beam search alone, which `num_beams` asks for": (
        "diversity_penalty", "early_stopping", "length_penalty",
    ),
}  # fmt: skip
# The others, with values that have no effect, besides null, false, [] and {}.
NOT_HONOURED: Mapping[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "constraints": (),
    "dola_layers": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_length": (),
    "max_time": (),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "token_healing": (),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
FIELDS = {
    *Settings.__struct_fields__,
    *NOT_HONOURED,
    *(key for keys in HARMLESS.values() for key in keys),
}
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")


def read_settings(values: Mapping[str, Any], vocab_size: int, where: Path | str) -> Settings:
    """Read the settings that are honoured. where: names the file in errors.

    Raises `CheckpointError` for a value of a wrong type or out of range, and for ids outside the
    vocabulary.
    """
    settings = convert(dict(values), Settings, where)
    eos = settings.eos_token_id
    for name, ids in (
        ("eos_token_id", [eos] if isinstance(eos, int) else eos),
        ("suppress_tokens", settings.suppress_tokens),
    ):
        if ids and max(ids) >= vocab_size:
            raise CheckpointError(
                f"{where}: {name} is {max(ids)}, outside of the vocabulary of {vocab_size} tokens"
            )
    if (settings.min_new_tokens or 0) > (settings.max_new_tokens or 2**31):
        raise CheckpointError(
            f"{where}: min_new_tokens is {settings.min_new_tokens}, expected at most "
            f"max_new_tokens {settings.max_new_tokens}"
        )
    return settings


def without_effect(values: Mapping[str, Any], context: int) -> list[str]:
    """Return the fields that would have an effect but are not honoured.

    context: of the model, in tokens; a `max_length` of at least that has no effect.
    """
    fields = [
        key
        for key, value in values.items()
        if (key in NOT_HONOURED or key not in FIELDS)
        and not (value is None or value is False or value in ([], {}, ""))
        and not (not isinstance(value, bool) and value in NOT_HONOURED.get(key, ()))
        and not (key == "max_length" and isinstance(value, int) and value >= context)
    ]
    if values.get("do_sample") is None:
        fields += [key for key in _SAMPLING_ONLY if values.get(key) not in (None, 0, 1, 1.0)]
    return fields


def default_sampling(settings: Settings) -> SamplingParams:
    """Return the checkpoint's sampling parameters, which apply unless the caller gives some."""
    params: dict[str, Any] = {
        name: value
        for name in ("repetition_penalty", "min_new_tokens", "max_new_tokens")
        if (value := getattr(settings, name)) is not None
    }
    if settings.max_new_tokens is None and settings.min_new_tokens:
        params["max_new_tokens"] = max(settings.min_new_tokens, SamplingParams.max_new_tokens)
    if settings.stop_strings:
        params["stop"] = settings.stop_strings
    if settings.suppress_tokens:
        params["logit_bias"] = dict.fromkeys(settings.suppress_tokens, float("-inf"))
    temperature = 1.0 if settings.temperature is None else settings.temperature
    if not settings.do_sample or temperature < _LEAST_TEMPERATURE or settings.top_p == 0:
        return SamplingParams(temperature=0.0, **params)
    if settings.top_p is not None:
        params["top_p"] = settings.top_p
    return SamplingParams(
        temperature=temperature,
        top_k=max(settings.top_k or 0, 0),
        min_p=settings.min_p or 0.0,
        **params,
    )


def warn_of_fields_without_effect(values: Mapping[str, Any], context: int) -> None:
    """Log a warning that names the fields of `without_effect`."""
    fields = without_effect(values, context)
    if fields:
        names = ", ".join(key if key.isidentifier() else shown(key) for key in sorted(fields))
        _log.warning("generation_config.json: without effect here: %s", names)
