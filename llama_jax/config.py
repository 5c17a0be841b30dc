"""The architecture of a Llama checkpoint, read strictly from config.json or params.json.

Reading is strict on purpose: a key that this project does not know, or a value it does not
implement, raises `ConfigError` naming the key. The public ports of Llama that went silently wrong
did so because they skipped a key (rope scaling, the norm's eps).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llama_jax.errors import ConfigError as ConfigError

PARAM_DTYPES = ("bfloat16", "float16", "float32")

# Keys of a transformers config.json that do not change what the forward pass computes.
_HF_IRRELEVANT = {
    "_name_or_path", "_attn_implementation_autoset", "attention_dropout", "bad_words_ids",
    "begin_suppress_tokens", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task",
    "fmo_version", "forced_bos_token_id", "forced_eos_token_id", "id2label",
    "initializer_range", "is_decoder", "label2id", "length_penalty", "llama_jax_version",
    "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "prefix",
    "pretraining_tp", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p", "torchscript",
    "transformers_version", "typical_p", "unsloth_version", "use_cache", "use_bfloat16",
}  # fmt: skip
# Keys that the converters read: how the weights are stored, not what is computed with them.
_HF_STORAGE = {"quantization_config", "compression_config", "use_fp8_e4m3"}
# Keys with the one value that is implemented.
_HF_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu",),
    "model_type": ("llama",),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, None),
}
_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent stretching of the rotary wavelengths.

    Source: `apply_scaling` in meta-llama/llama-models, `llama3` in transformers' rope utilities.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"need factor >= 1 and 0 < low_freq_factor < high_freq_factor, got {self}"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants of a Llama model.

    `dtype` is the type that unquantised parameters have in the checkpoint. Lengths are in tokens.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
            "num_kv_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if not self.rms_norm_eps > 0 or not self.rope_theta > 0:
            raise ConfigError("rms_norm_eps and rope_theta must be positive")
        if self.dtype not in PARAM_DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(PARAM_DTYPES)}, got {self.dtype!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; `LlamaConfig.from_dict` reads them back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["eos_token_ids"] = list(self.eos_token_ids)
        values["rope_scaling"] = self.rope_scaling and vars(self.rope_scaling).copy()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """The inverse of `to_dict`."""
        scaling = values["rope_scaling"]
        return cls(
            **{
                **values,
                "eos_token_ids": tuple(values["eos_token_ids"]),
                "rope_scaling": scaling and RopeScaling(**scaling),
            }
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "LlamaConfig":
        """Read `config.json`, or else `params.json`, of a checkpoint directory.

        Raises `ConfigError` if neither is there or one is not understood.
        """
        for name, read in (("config.json", cls.from_hf), ("params.json", cls.from_params_json)):
            path = Path(directory) / name
            if path.is_file():
                try:
                    values = json.loads(path.read_text(encoding="utf-8"))
                except (UnicodeDecodeError, json.JSONDecodeError) as error:
                    raise ConfigError(f"{path} is not valid JSON: {error}") from error
                if not isinstance(values, dict):
                    raise ConfigError(f"{path} must hold a JSON object")
                try:
                    return read(values)
                except ConfigError as error:
                    raise ConfigError(f"{path}: {error}") from error
        raise ConfigError(f"{directory} has neither config.json nor params.json")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """From the contents of config.json, as transformers 4 or 5 writes it.

        transformers 5 keeps `rope_theta` and the scaling in `rope_parameters` and calls
        `torch_dtype` `dtype`; both forms are read.
        """
        architectures = values.get("architectures")
        if architectures and "LlamaForCausalLM" not in architectures:
            raise ConfigError(
                f"architectures is {architectures}; only LlamaForCausalLM is implemented"
            )
        for key, implemented in _HF_FIXED.items():
            if key in values and values[key] not in implemented:
                raise ConfigError(
                    f"{key} = {values[key]!r} is not implemented (only {implemented[0]!r})"
                )
        missing = [
            key
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                        "num_attention_heads", "rms_norm_eps")
            if key not in values
        ]  # fmt: skip
        if missing:
            raise ConfigError(f"missing {', '.join(missing)}")

        num_heads = values["num_attention_heads"]
        rope_theta, rope_scaling = _rope_of_hf(values)
        config = cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=_value(values, "num_key_value_heads", num_heads),
            head_dim=_value(values, "head_dim", values["hidden_size"] // num_heads),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=_value(values, "max_position_embeddings", 2048),
            rms_norm_eps=values["rms_norm_eps"],
            tie_word_embeddings=_value(values, "tie_word_embeddings", False),
            dtype=_value(values, "dtype", _value(values, "torch_dtype", "float32")),
            bos_token_id=values.get("bos_token_id"),
            eos_token_ids=token_ids(values.get("eos_token_id")),
        )
        read = {
            "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling",
            "rope_parameters", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
            "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id",
        }  # fmt: skip
        unknown = sorted(set(values) - read - set(_HF_FIXED) - _HF_IRRELEVANT - _HF_STORAGE)
        if unknown:
            raise ConfigError(
                f"unknown key {', '.join(unknown)}: it may change the model, so it is not ignored. "
                "Remove it if it does not matter."
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json, in the form that both transformers 4 and 5 read."""
        eos = self.eos_token_ids
        scaling = self.rope_scaling
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling and {"rope_type": "llama3", **vars(scaling)},
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        }

    @classmethod
    def from_params_json(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """From the contents of Meta's params.json.

        `use_scaled_rope` stands for Llama 3.1's constants; Meta's file does not hold them, and
        Llama 3.2 (1B and 3B, recognised by their shapes) uses factor 32 where 3.1 uses 8.
        `vocab_size` -1 means Llama 2's 32,000. Meta's file has no context length either; it is
        that of the model it was trained for, as transformers' converter has it: 131,072 with scaled
        rope, 8,192 for Llama 3, 16,384 for Code Llama, 4,096 for Llama 2.
        """
        if isinstance(values.get("model"), dict):
            values = values["model"]
        known = {
            "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_dim_multiplier",
            "multiple_of", "norm_eps", "rope_theta", "use_scaled_rope", "max_seq_len",
            "max_batch_size",
        }  # fmt: skip
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown key {', '.join(unknown)}: it may change the model")
        values = {key: value for key, value in values.items() if value is not None}
        missing = [key for key in ("dim", "n_layers", "n_heads", "norm_eps") if key not in values]
        if missing:
            raise ConfigError(f"missing {', '.join(missing)}")
        for key, value in values.items():
            if not isinstance(value, int | float):
                raise ConfigError(f"{key} must be a number, got {value!r}")
        for key in ("dim", "n_layers", "n_heads", "multiple_of"):
            if type(values.get(key, 1)) is not int or values.get(key, 1) < 1:
                raise ConfigError(f"{key} must be a positive integer, got {values[key]!r}")
        dim, num_heads = values["dim"], values["n_heads"]
        rope_theta = values.get("rope_theta", 10000.0)
        context = 8192 if rope_theta == 500000.0 else 16384 if rope_theta > 10000.0 else 4096
        scaled = values.get("use_scaled_rope", False)
        vocab_size = values.get("vocab_size", -1)
        small = (dim, values["n_layers"]) in ((2048, 16), (3072, 28))
        return cls(
            vocab_size=32000 if vocab_size == -1 else vocab_size,
            hidden_size=dim,
            intermediate_size=_meta_intermediate_size(
                dim, values.get("ffn_dim_multiplier", 1.0), values.get("multiple_of", 256)
            ),
            num_layers=values["n_layers"],
            num_heads=num_heads,
            num_kv_heads=values.get("n_kv_heads", num_heads),
            head_dim=dim // num_heads,
            rope_theta=rope_theta,
            rope_scaling=RopeScaling(32.0 if small else 8.0, 1.0, 4.0, 8192) if scaled else None,
            max_position_embeddings=131072 if scaled else context,
            rms_norm_eps=values["norm_eps"],
            tie_word_embeddings=scaled and small,
        )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A token id field of config.json or generation_config.json: one id, a list, or nothing."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _value(values: Mapping[str, Any], key: str, default: Any) -> Any:
    found = values.get(key)
    return default if found is None else found


def _rope_of_hf(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = dict(values.get(key) or {})
    theta = rope.pop("rope_theta", None) or _value(values, "rope_theta", 10000.0)
    rope_type = rope.pop("rope_type", None)
    rope_type = rope.pop("type", None) or rope_type or "default"
    if rope_type == "default":
        rope.pop("partial_rotary_factor", None)
        if rope:
            raise ConfigError(f"{key} has {', '.join(sorted(rope))} but no rope_type")
        return theta, None
    if rope_type != "llama3":
        raise ConfigError(f"{key}.rope_type = {rope_type!r} is not implemented (default, llama3)")
    if sorted(rope) != sorted(_ROPE_KEYS):
        raise ConfigError(
            f"{key} of type llama3 needs {', '.join(_ROPE_KEYS)}; it has {sorted(rope)}"
        )
    return theta, RopeScaling(**rope)


def _meta_intermediate_size(dim: int, multiplier: float, multiple_of: int) -> int:
    return multiple_of * math.ceil(int(multiplier * int(8 * dim / 3)) / multiple_of)


_LLAMA3_1 = RopeScaling(8.0, 1.0, 4.0, 8192)
_LLAMA3_IDS: dict[str, Any] = {"bos_token_id": 128000, "eos_token_ids": (128001, 128008, 128009)}
_LLAMA3_1_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, rope_theta=500000.0, rope_scaling=_LLAMA3_1,
    max_position_embeddings=131072, **_LLAMA3_IDS,
)  # fmt: skip
_LLAMA3_1_70B = replace(
    _LLAMA3_1_8B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64
)
_LLAMA3_2_1B = replace(
    _LLAMA3_1_8B, hidden_size=2048, intermediate_size=8192, num_layers=16, head_dim=64,
    rope_scaling=replace(_LLAMA3_1, factor=32.0), tie_word_embeddings=True,
)  # fmt: skip
_LLAMA3: dict[str, Any] = {
    "rope_scaling": None, "max_position_embeddings": 8192, "eos_token_ids": (128001, 128009),
}  # fmt: skip
_LLAMA2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_layers=32, num_heads=32,
    num_kv_heads=32, head_dim=128, rope_theta=10000.0, rope_scaling=None,
    max_position_embeddings=4096, dtype="float16", bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip

PRESETS: dict[str, LlamaConfig] = {
    "llama-3.1-8b": _LLAMA3_1_8B,
    "llama-3.1-70b": _LLAMA3_1_70B,
    "llama-3.1-405b": replace(
        _LLAMA3_1_8B, hidden_size=16384, intermediate_size=53248, num_layers=126, num_heads=128
    ),
    "llama-3.2-1b": _LLAMA3_2_1B,
    "llama-3.2-3b": replace(
        _LLAMA3_2_1B, hidden_size=3072, num_layers=28, num_heads=24, head_dim=128
    ),
    "llama-3.3-70b": _LLAMA3_1_70B,
    "llama-3-8b": replace(_LLAMA3_1_8B, **_LLAMA3),
    "llama-3-70b": replace(_LLAMA3_1_70B, **_LLAMA3),
    "llama-2-7b": _LLAMA2_7B,
    "llama-2-13b": replace(
        _LLAMA2_7B, hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40,
        num_kv_heads=40,
    ),
    "llama-2-70b": replace(
        _LLAMA2_7B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64,
        num_kv_heads=8,
    ),
}  # fmt: skip
