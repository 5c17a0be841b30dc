"""Hugging Face checkpoints of a tiny Llama in each supported layout, written byte by byte."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.safetensors_reader import DTYPES

Arrays = dict[str, np.ndarray]
TAGS = {dtype: tag for tag, dtype in DTYPES.items()}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": [2, 3],
}
SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (160, 64),
    "mlp.up_proj": (160, 64),
    "mlp.down_proj": (64, 160),
}
LINEARS = {
    f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()
}


def dense(dtype: Any = ml_dtypes.bfloat16) -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {f"{name}.weight": shape for name, shape in LINEARS.items()}
    shapes |= {"model.embed_tokens.weight": (96, 64), "lm_head.weight": (96, 64)}
    norms = ["model.norm.weight"] + [
        f"model.layers.{layer}.{name}.weight"
        for layer in range(2)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    arrays = {name: rng.normal(0, 0.1, shape).astype(dtype) for name, shape in shapes.items()}
    return arrays | {name: np.ones(64, dtype) for name in norms}


def friendli(dynamic: bool = False) -> Arrays:
    """Random finite e4m3fn bits as int8, with scales of their own for every matrix."""
    rng = np.random.default_rng(1)
    finite = np.setdiff1d(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)
    arrays = dense()
    for name, shape in LINEARS.items():
        arrays[f"{name}.weight"] = rng.choice(finite, shape).view(np.int8)
        if dynamic:
            scale = rng.uniform(1e-4, 1e-3, (shape[0], 1)).astype(ml_dtypes.bfloat16)
            arrays[f"{name}.zeros"] = np.zeros((shape[0], 1), ml_dtypes.float8_e4m3fn)
        else:
            scale = np.array(rng.uniform(1e-4, 1e-3), np.float32)
            arrays[f"{name}.in_scale"] = np.array(rng.uniform(0.01, 0.1), np.float32)
        arrays[f"{name}.weight_scale"] = scale
    return arrays


def quantized(scheme: str) -> dict[str, Any]:
    return {"quantization_config": {"activation_scheme": scheme, "quant_method": "fp8"}}


FRIENDLI_03 = {"fmo_version": "0.3", "use_fp8_e4m3": True}
FRIENDLI_05 = {"fmo_version": "0.5", "use_fp8_e4m3": True, **quantized("static")}
FRIENDLI_DYNAMIC = quantized("dynamic")


def safetensors_bytes(
    arrays: Mapping[str, np.ndarray], edit: Callable[[dict], None] = len
) -> bytes:
    """One file; `edit` may spoil the header first."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {
            "dtype": TAGS[array.dtype],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
        data += array.tobytes()
    edit(header)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def write(
    directory: Path,
    arrays: Mapping[str, np.ndarray],
    config: Mapping[str, Any] = {},
    shards: int = 1,
) -> Path:
    """A checkpoint directory: one file, or shards with an index; and tokenizer files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | dict(config)))
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    (directory / "tokenizer.json").write_text('{"stand": "in"}')
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(arrays))
        return directory
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: arrays[key] for key in sorted(arrays)[shard::shards]}
        weight_map |= dict.fromkeys(part, name)
        (directory / name).write_bytes(safetensors_bytes(part))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
