"""Small random models that the tests share."""

from dataclasses import replace
from typing import Any

import numpy as np

from llama_jax.model.config import LlamaConfig, RopeScaling
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.spec import ModelSpec

LLAMA3_ROPE = RopeScaling(8.0, 1.0, 4.0, 8192)

CONFIG = LlamaConfig(
    vocab_size=320, hidden_size=64, intermediate_size=160, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, rope_theta=500000.0, rope_scaling=LLAMA3_ROPE,
    max_position_embeddings=131072, dtype="float32", bos_token_id=1, eos_token_ids=(2,),
)  # fmt: skip

LINEARS = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/o_proj",
           "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")  # fmt: skip


def config(**changes: Any) -> LlamaConfig:
    return replace(CONFIG, **changes)


def fp8_formats(
    config: LlamaConfig, scale: str = "row", input_scale: bool = True
) -> dict[str, WeightFormat]:
    stored = WeightFormat("float8_e4m3fn", scale, input_scale)
    return {f"layers_{i}/{name}": stored for i in range(config.num_layers) for name in LINEARS}


def fp8_spec(scale: str = "row", config: LlamaConfig = CONFIG, **settings: Any) -> ModelSpec:
    return ModelSpec(config, fp8_formats(config, scale), **{"dtype": "float32", **settings})


def tokens(*shape: int, seed: int = 0, vocab_size: int = CONFIG.vocab_size) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)
