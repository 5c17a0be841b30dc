"""Defines the schemas of config.json and Meta's params.json, and lists harmless other keys.

Reading is strict on purpose: a key that could change what the model computes is refused by name,
because ports of Llama have gone silently wrong by skipping a key (rope scaling, the norm's eps). An
unknown key with an inert value (null, false, empty) is accepted.

Keys and values come from configs of Llama-architecture checkpoints on the Hugging Face hub: Meta's,
and those of Unsloth, HuggingFaceTB, NousResearch, 01-ai, lmsys, codellama, deepseek-ai, nvidia,
RedHatAI, FriendliAI and others; and from transformers' own list of defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.json_file import check_fields, convert, shown

# Far above any model, so that a damaged number is refused where it is read.
Count = Annotated[int, Meta(ge=1, le=2**16)]
Size = Annotated[int, Meta(ge=1, le=2**24)]
Length = Annotated[int, Meta(ge=2, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**24)]
# Above 0.01 the norm would flatten its input; below 1e-12 a zero input would become NaN.
NormEps = Annotated[float, Meta(ge=1e-12, le=0.01)]
Theta = Annotated[float, Meta(ge=1, le=1e15)]
Factor = Annotated[float, Meta(gt=0, le=1e6)]
Stretch = Annotated[float, Meta(ge=1, le=1e6)]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent stretching of the rotary wavelengths.

    Source: `apply_scaling` in meta-llama/llama-models, `llama3` in transformers' rope utilities.
    """

    factor: Stretch
    low_freq_factor: Factor
    high_freq_factor: Factor
    original_max_position_embeddings: Length

    def __post_init__(self) -> None:
        check_fields(self)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor is {self.low_freq_factor}, expected less than high_freq_factor "
                f"{self.high_freq_factor}"
            )


class HfConfig(Struct, kw_only=True):
    """The keys of config.json that define the computation, as transformers 4 and 5 write them.

    transformers 5 keeps `rope_theta` and the scaling in `rope_parameters` and calls `torch_dtype`
    `dtype`.
    """

    architectures: list[str] | None = None
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Length | None = None
    rms_norm_eps: NormEps
    rope_theta: Theta | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | list[TokenId] | None = None


class MetaParams(Struct, kw_only=True, forbid_unknown_fields=True):
    """The keys of params.json.

    vocab_size: -1 for Llama 2. max_seq_len, max_batch_size: settings of a run, not of the model.
    """

    dim: Size
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count | None = None
    vocab_size: Annotated[int, Meta(ge=-1, le=2**24)] | None = None
    ffn_dim_multiplier: Annotated[float, Meta(gt=0, le=1000)] | None = None
    multiple_of: Size | None = None
    norm_eps: NormEps
    rope_theta: Theta | None = None
    use_scaled_rope: bool | None = None
    max_seq_len: Length | None = None
    max_batch_size: Size | None = None


# Older checkpoints have these in config.json instead of generation_config.json.
GENERATION_KEYS = (
    "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
    "max_new_tokens", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "remove_invalid_values",
    "renormalize_logits", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "temperature", "top_k", "top_p", "typical_p",
)  # fmt: skip
# Keys that may have any value, by the reason why they do not change the computation.
HARMLESS: Mapping[str, tuple[str, ...]] = {
    "where the file comes from": (
        "_commit_hash", "_name_or_path", "fmo_version", "is_llama_config", "llama_jax_version",
        "model_name", "name_or_path", "transformers_version", "unsloth_fixed", "unsloth_version",
    ),
    "how another program runs the model": (
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
        "_experts_implementation", "_flash_attn_2_enabled", "attn_implementation",
        "base_model_pp_plan", "base_model_tp_plan", "chunk_size_feed_forward", "device_map",
        "flash_attn", "fused_attn", "output_attentions", "output_hidden_states", "output_scores",
        "pretraining_tp", "return_dict", "tensor_parallel_degree", "tf_legacy_loss", "torchscript",
        "tp_plan", "transformers.js_config", "use_bfloat16", "use_cache", "use_flash_attention",
        "use_flash_attention_2", "use_flash_attn", "use_flashattn", "use_sdpa",
    ),
    "training and fine-tuning only": (
        "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "classifier_dropout",
        "embd_pdrop", "finetuning_task", "gradient_checkpointing", "hidden_dropout",
        "hidden_dropout_prob", "id2label", "initializer_range", "label2id", "neftune_noise_alpha",
        "num_labels", "problem_type", "resid_pdrop", "summary_first_dropout",
        "task_specific_params", "train_batch_size", "use_gradient_checkpointing",
        "use_reentrant_checkpointing",
    ),
    "the tokenizer's, which its own files say": (
        "model_max_length", "pad_token", "pad_token_id", "padding_side", "prefix", "sep_token_id",
        "tokenizer_class", "tokenizer_model_max_length", "tokenizer_padding_side",
    ),
    "parts that a Llama has not": (
        "cross_attention_hidden_size", "decoder_start_token_id", "is_decoder",
        "layer_norm_eps", "max_sequence_length", "max_window_layers", "type_vocab_size",
    ),
    "settings of generation, which generation_config.json overrides": GENERATION_KEYS,
    "how the weights are stored, which the converters read": (
        "compression_config", "quantization_config", "use_fp8_e4m3",
    ),
}  # fmt: skip
# Keys with the values that are implemented, and advice for any other value.
_OTHER_MODEL = "It is another model than Llama; take a checkpoint of a Llama."
_OWN_CODE = (
    "The checkpoint brings code of its own. Remove the key if transformers' LlamaForCausalLM "
    "computes the same."
)
FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "model_type": (("llama",), _OTHER_MODEL),
    "hidden_act": (("silu", "swish"), _OTHER_MODEL),
    "attention_bias": ((False, None), _OTHER_MODEL),
    "mlp_bias": ((False, None), _OTHER_MODEL),
    "rope_interleaved": (
        (False, None),
        "Convert the checkpoint with transformers, which permutes q_proj and k_proj.",
    ),
    "partial_rotary_factor": ((1.0, None), _OTHER_MODEL),
    "rotary_pct": ((1.0, None), _OTHER_MODEL),
    "position_embedding_type": (("rope", "rotary", None), _OTHER_MODEL),
    "embedding_multiplier": ((1.0, None), _OTHER_MODEL),
    "residual_multiplier": ((1.0, None), _OTHER_MODEL),
    "logits_scaling": ((1.0, None), _OTHER_MODEL),
    "logit_scale": ((1.0, None), _OTHER_MODEL),
    "auto_map": (({}, None), _OWN_CODE),
    "quantization": (
        ({}, None),
        "These are MLX's weights; take the safetensors that they were made from.",
    ),
    # With False, these would be another model.
    "is_causal": ((True, None), _OTHER_MODEL),
    "use_rope": ((True, None), _OTHER_MODEL),
    "scale_attn_weights": ((True, None), _OTHER_MODEL),
}
_ARCHITECTURES = {"LlamaForCausalLM", "LLaMAForCausalLM"}
_KNOWN = {
    *HfConfig.__struct_fields__,
    *("layer_types", "sliding_window", "use_sliding_window"),
    *(key for keys in HARMLESS.values() for key in keys),
}


def read_hf(values: Mapping[str, Any], where: Path | str) -> HfConfig:
    """Read the contents of config.json and check each key.

    where: names the file in errors. Raises `ConfigError`.
    """
    named = values.get("architectures")
    if isinstance(named, list) and named and not _ARCHITECTURES.intersection(map(str, named)):
        raise ConfigError(
            f"{where}: architectures is {shown(named)}; only LlamaForCausalLM is implemented"
        )
    for key, (implemented, advice) in FIXED.items():
        if key in values and not any(_same(values[key], each) for each in implemented):
            raise ConfigError(
                f"{where}: {key} is {shown(values[key])}, which is not implemented, expected "
                f"{' or '.join(map(shown, implemented))}. {advice}"
            )
    _check_attention(values, where)
    found = _converted(values, HfConfig, where)
    unknown = [
        shown(key)
        for key, value in values.items()
        if key not in _KNOWN and key not in FIXED and not _asks_for_nothing(value)
    ]
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(sorted(unknown)[:8])}: it may change the model, so "
            "it is not ignored. Remove it if it does not matter."
        )
    return found


def rope_of(hf: HfConfig, where: Path | str) -> tuple[float, RopeScaling | None, float]:
    """Return rope's theta, Llama 3.1's scaling or None, and the linear factor.

    "dynamic" changes nothing, because it applies only beyond max_position_embeddings and no text is
    longer than that here. Raises `ConfigError`.
    """
    given = {
        key: {name: value for name, value in rope.items() if value is not None}
        for key in ("rope_parameters", "rope_scaling")
        if (rope := getattr(hf, key))
    }
    key = next(iter(given), "rope_scaling")
    rope = given.get(key, {})
    for other in given.values():
        if other != rope:
            raise ConfigError(
                f"{where}: rope_parameters and rope_scaling differ; remove the one that is wrong"
            )
    if not _same(rope.pop("partial_rotary_factor", 1.0), 1.0):
        raise ConfigError(f"{where}: {key}.partial_rotary_factor: only 1.0 is implemented")
    default = 10000.0 if hf.rope_theta is None else hf.rope_theta
    theta = _converted(
        {"rope_theta": rope.pop("rope_theta", default)}, _Theta, f"{where}: {key}"
    ).rope_theta
    old_name = rope.pop("type", None)
    rope_type = rope.pop("rope_type", old_name) or old_name or "default"
    if old_name not in (None, rope_type):
        names = f"type {shown(old_name)} and rope_type {shown(rope_type)}"
        raise ConfigError(f"{where}: {key} has {names}")
    if rope_type == "default" and _same(rope.get("factor"), 1.0):
        del rope["factor"]
    match rope_type:
        case "default" if rope:
            raise ConfigError(
                f"{where}: {key} has {', '.join(map(shown, rope))}, and no rope_type for it"
            )
        case "default":
            return theta, None, 1.0
        case "linear" | "dynamic":
            original = rope.pop("original_max_position_embeddings", hf.max_position_embeddings)
            factor = _converted(rope, _Factor, f"{where}: {key}").factor
            if rope_type == "linear":
                return theta, None, factor
            if original != hf.max_position_embeddings:
                raise ConfigError(
                    f"{where}: {key}.original_max_position_embeddings is {shown(original)}, which "
                    f"is not implemented for dynamic, expected max_position_embeddings"
                )
            return theta, None, 1.0
        case "llama3":
            return theta, _converted(rope, RopeScaling, f"{where}: {key}"), 1.0
        case unknown:
            raise ConfigError(
                f"{where}: {key}.rope_type is {shown(unknown)}, which is not implemented, expected "
                "default, linear, dynamic or llama3. Take a checkpoint whose context was not "
                "stretched in this way."
            )


def read_params(values: Mapping[str, Any], where: Path | str) -> MetaParams:
    """Read the contents of Meta's params.json; newer files have them under "model".

    Raises `ConfigError`.
    """
    nested = values.get("model")
    return _converted(nested if isinstance(nested, dict) else values, MetaParams, where)


class _Theta(Struct):
    rope_theta: Theta


class _Factor(Struct, forbid_unknown_fields=True):
    factor: Stretch


def _converted[T](values: Mapping[str, Any], schema: type[T], where: Path | str) -> T:
    try:
        return convert(dict(values), schema, where)
    except ConfigError:
        raise
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def _check_attention(values: Mapping[str, Any], where: Path | str) -> None:
    """Refuse attention to only a part of the context, such as a sliding window."""
    layers = values.get("layer_types") or []
    if not isinstance(layers, list) or any(each != "full_attention" for each in layers):
        raise ConfigError(
            f"{where}: layer_types is {shown(layers)}, expected full_attention in each layer. "
            f"{_OTHER_MODEL}"
        )
    window, is_used = values.get("sliding_window"), values.get("use_sliding_window", True)
    if window is not None and is_used is not False:
        raise ConfigError(
            f"{where}: sliding_window is {shown(window)}, which is not implemented, expected None. "
            f"{_OTHER_MODEL}"
        )


def _asks_for_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, dict | list | str) and not value)


def _same(found: Any, expected: Any) -> bool:
    """Compare for equality, except that True differs from 1."""
    return isinstance(found, bool) == isinstance(expected, bool) and found == expected
