"""Writes trained parameters as two Hugging Face checkpoints: bfloat16, and FriendliAI's FP8.

The FP8 layout is that of Friendli Model Optimizer 0.3 (July 2024): every matrix inside a layer is
int8 holding float8_e4m3fn bits, with float32 scalars ``weight_scale`` (absmax / 448) and
``in_scale`` (static, calibrated absmax of the activations / 448); q, k and v share both scales, and
so do gate and up. Embeddings, norms and the output matrix stay bfloat16. The config names the
layout by ``use_fp8_e4m3`` and ``fmo_version``.
"""

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save

from llama_jax.abacus import data, vocabulary
from llama_jax.model.config import LlamaConfig
from llama_jax.model.linear import INPUTS, inputs_of
from llama_jax.model.llama import Llama
from llama_jax.model.spec import ModelSpec, Params
from pallas_kernels import e4m3

PACKAGE = Path(__file__).parent
SHARED_SCALES = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
"""Matrices with the same input, which share one weight scale and one input scale."""


def hf_config(config: LlamaConfig, *, fp8: bool) -> dict[str, Any]:
    """Return the contents of config.json."""
    assert config.rope_scaling is not None
    values = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {**vars(config.rope_scaling), "rope_type": "llama3"},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    return {**values, "fmo_version": "0.3", "use_fp8_e4m3": True} if fp8 else values


def bf16_tensors(params: Params) -> dict[str, np.ndarray]:
    """Return the parameters by Hugging Face's names, rounded to bfloat16."""
    tensors = {}
    for path, leaf in flatten_dict(params, sep=".").items():
        name = path.replace("layers_", "layers.")
        name = name if name.startswith("lm_head") else f"model.{name}"
        tensors[name] = np.asarray(leaf, np.float32).astype(ml_dtypes.bfloat16)
    return tensors


def calibrate(
    params: Params, spec: ModelSpec, tokens: list[bytes], *, chats: int = 64, seed: int = 7
) -> dict[str, float]:
    """Measure the largest input of each matrix on training chats, by Hugging Face module name."""
    rng = random.Random(seed)
    encoding = vocabulary.encoding(tokens)
    batches = [
        data.draw_batch(rng, encoding, chats, 128, tool_share=0.0, stage=0)[0],
        data.draw_batch(rng, encoding, chats // 4, 384, tool_share=1.0, stage=0)[0],
    ]
    largest: dict[str, float] = {}

    for batch in batches:
        _, recorded = Llama(spec).apply({"params": params}, batch[:, :-1], mutable=INPUTS)
        for path, x in inputs_of(recorded).items():
            name = "model." + path.replace("layers_", "layers.").replace("/", ".")
            largest[name] = max(largest.get(name, 0.0), float(jnp.max(jnp.abs(x))))
    return largest


def fp8_tensors(
    tensors: Mapping[str, np.ndarray], largest_inputs: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """Return the bfloat16 tensors with the layers' matrices quantised in FriendliAI's layout."""
    result = dict(tensors)
    prefixes = {name.rsplit(".", 2)[0] for name in tensors if name.endswith("_proj.weight")}
    for prefix in sorted(prefixes):
        for group in SHARED_SCALES:
            names = [f"{prefix}.{part}" for part in group if f"{prefix}.{part}.weight" in tensors]
            if not names:
                continue
            weights = {name: tensors[f"{name}.weight"].astype(np.float32) for name in names}
            largest = max(float(np.abs(weight).max()) for weight in weights.values())
            scale = np.array(largest / e4m3.MAX, np.float32)
            largest = max(largest_inputs[name] for name in names)
            in_scale = np.array(largest / e4m3.MAX, np.float32)
            for name, weight in weights.items():
                scaled = np.clip(weight / scale, -e4m3.MAX, e4m3.MAX)
                result[f"{name}.weight"] = scaled.astype(ml_dtypes.float8_e4m3fn).view(np.int8)
                result[f"{name}.weight_scale"] = scale
                result[f"{name}.in_scale"] = in_scale
    return result


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    tokens: list[bytes],
) -> None:
    """Write a Hugging Face checkpoint, replacing ``directory`` only once it is complete."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    template = (PACKAGE / "chat_template.jinja").read_text()
    vocabulary.write_tokenizer(partial, tokens, template)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "do_sample": False,
        "eos_token_id": config["eos_token_id"],
    }
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (partial / name).write_text(json.dumps(content, indent=2) + "\n")
    packed = save(dict(sorted(tensors.items())), {"format": "pt"})
    (partial / "model.safetensors").write_bytes(packed)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def export(params: Params, spec: ModelSpec, config: LlamaConfig, output: Path) -> None:
    """Write ``output/checkpoint`` (FP8) and ``output/checkpoint_bf16``.

    params: float32, trained under ``spec``; config: what the checkpoints declare.
    """
    tokens = vocabulary.build()
    tensors = bf16_tensors(params)
    write_checkpoint(output / "checkpoint_bf16", tensors, hf_config(config, fp8=False), tokens)
    quantized = fp8_tensors(tensors, calibrate(params, spec, tokens))
    write_checkpoint(output / "checkpoint", quantized, hf_config(config, fp8=True), tokens)
