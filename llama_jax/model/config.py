"""Reads the architecture of a Llama checkpoint from config.json or params.json."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llama_jax.errors import CheckpointError
from llama_jax.errors import ConfigError as ConfigError
from llama_jax.json_file import check_fields, convert, is_there, read_object, shown
from llama_jax.model.config_files import (
    Count,
    Length,
    NormEps,
    Size,
    Stretch,
    Theta,
    TokenId,
    read_hf,
    read_params,
    rope_of,
)
from llama_jax.model.config_files import RopeScaling as RopeScaling

# Tokens in a page of the key/value cache.
PAGE_SIZE = 64
PARAM_DTYPES = ("bfloat16", "float16", "float32")
# Names of `LlamaConfig`'s fields in the files, where they differ.
_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "dtype": "torch_dtype",
    "eos_token_ids": "eos_token_id",
}
_META_NAMES = {
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
    "head_dim": "dim / n_heads",
}


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants of a Llama model.

    max_position_embeddings: the context, in tokens.
    dtype: of the checkpoint's unquantised parameters.
    rope_scaling: Llama 3.1's stretching of the rotary wavelengths.
    rope_linear_factor: stretches all rotary wavelengths ("linear" in config.json: Vicuna 16k,
        DeepSeek Coder).
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    rope_theta: Theta
    rope_scaling: RopeScaling | None
    max_position_embeddings: Length
    rms_norm_eps: NormEps = 1e-5
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    bos_token_id: TokenId | None = None
    eos_token_ids: tuple[TokenId, ...] = field(default=())
    rope_linear_factor: Stretch = 1.0

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.rope_scaling and self.rope_linear_factor != 1:
            raise ConfigError("rope_scaling and rope_linear_factor: expected at most one of them")
        if self.dtype not in PARAM_DTYPES:
            known = ", ".join(PARAM_DTYPES)
            raise ConfigError(f"dtype must be one of {known}, got {shown(self.dtype)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; `LlamaConfig.from_dict` reads them back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["eos_token_ids"] = list(self.eos_token_ids)
        values["rope_scaling"] = self.rope_scaling and vars(self.rope_scaling).copy()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Invert `to_dict`. Raises `ConfigError`."""
        try:
            return convert(dict(values), cls, "config")
        except CheckpointError as error:
            raise ConfigError(str(error)) from error

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "LlamaConfig":
        """Read `config.json`, or else `params.json`, of a checkpoint directory.

        Raises `ConfigError` if neither is there or one is not understood.
        """
        for name, read in (("config.json", cls.from_hf), ("params.json", cls.from_params_json)):
            path = Path(directory) / name
            if is_there(path):
                try:
                    return read(read_object(path), path)
                except CheckpointError as error:
                    raise ConfigError(str(error)) from error
        raise ConfigError(f"{directory} has neither config.json nor params.json")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: Path | str = "config.json") -> "LlamaConfig":
        """Read the contents of config.json, as transformers 4 or 5 writes it.

        where: names the file in errors. Raises `ConfigError`.
        """
        hf = read_hf(values, where)
        theta, rope, linear_factor = rope_of(hf, where)
        for name in ("bos_token_id", "eos_token_id"):
            ids = token_ids(getattr(hf, name))
            if ids and max(ids) >= hf.vocab_size:
                raise ConfigError(
                    f"{where}: {name} is {max(ids)}, outside of the vocabulary of {hf.vocab_size} "
                    "tokens"
                )
        with _explained(where, _HF_NAMES):
            return cls(
                vocab_size=hf.vocab_size,
                hidden_size=hf.hidden_size,
                intermediate_size=hf.intermediate_size,
                num_layers=hf.num_hidden_layers,
                num_heads=hf.num_attention_heads,
                num_kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
                head_dim=hf.head_dim or hf.hidden_size // hf.num_attention_heads,
                rope_theta=theta,
                rope_scaling=rope,
                max_position_embeddings=hf.max_position_embeddings or 2048,
                rms_norm_eps=hf.rms_norm_eps,
                tie_word_embeddings=hf.tie_word_embeddings or False,
                dtype=hf.dtype or hf.torch_dtype or "float32",
                bos_token_id=hf.bos_token_id,
                eos_token_ids=token_ids(hf.eos_token_id),
                rope_linear_factor=linear_factor,
            )

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers 4 and 5 both read."""
        eos = self.eos_token_ids
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
            "rope_scaling": self._rope_scaling_of_hf(),
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        }

    def _rope_scaling_of_hf(self) -> dict[str, Any] | None:
        if self.rope_linear_factor != 1:
            return {"rope_type": "linear", "factor": self.rope_linear_factor}
        if self.rope_scaling is not None:
            return {"rope_type": "llama3", **vars(self.rope_scaling)}
        return None

    @classmethod
    def from_params_json(
        cls, values: Mapping[str, Any], where: Path | str = "params.json"
    ) -> "LlamaConfig":
        """Read the contents of Meta's params.json.

        The file lacks some constants, which are filled in as transformers' converter does.
        `use_scaled_rope` means Llama 3.1's rope scaling with factor 8, or 32 for Llama 3.2 (1B and
        3B, recognised by their shapes). `vocab_size` -1 means Llama 2's 32,000. The context is
        131,072 tokens with scaled rope, 8,192 for Llama 3, 16,384 for Code Llama and 4,096 for
        Llama 2.

        where: names the file in errors. Raises `ConfigError`.
        """
        meta = read_params(values, where)
        theta = meta.rope_theta or 10000.0
        context = 8192 if theta == 500000.0 else 16384 if theta > 10000.0 else 4096
        scaled = bool(meta.use_scaled_rope)
        small = (meta.dim, meta.n_layers) in ((2048, 16), (3072, 28))
        with _explained(where, _META_NAMES):
            return cls(
                vocab_size=32000 if meta.vocab_size in (None, -1) else meta.vocab_size,
                hidden_size=meta.dim,
                intermediate_size=_meta_intermediate_size(
                    meta.dim, meta.ffn_dim_multiplier or 1.0, meta.multiple_of or 256
                ),
                num_layers=meta.n_layers,
                num_heads=meta.n_heads,
                num_kv_heads=meta.n_kv_heads or meta.n_heads,
                head_dim=meta.dim // meta.n_heads,
                rope_theta=theta,
                rope_scaling=(
                    RopeScaling(32.0 if small else 8.0, 1.0, 4.0, 8192) if scaled else None
                ),
                max_position_embeddings=131072 if scaled else context,
                rms_norm_eps=meta.norm_eps,
                tie_word_embeddings=scaled and small,
            )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Return the ids of a field in config.json or generation_config.json, which may be one id, a
    list, or None."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


@contextmanager
def _explained(where: Path | str, names: Mapping[str, str]) -> Iterator[None]:
    """Reword `LlamaConfig`'s own errors as errors of a file. names: the file's names of fields."""
    try:
        yield
    except ConfigError as error:
        message = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(error))
        raise ConfigError(f"{where}: {message}") from error


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
