"""compressed-tensors itself beside our reader of its layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from converters.dialects import make_plan
from converters.source import read_source
from llama_jax.model.fp8 import dequantize
from tests import tiny_checkpoints as tiny
from tests.plans import planned_as_published
from tests.tiny_checkpoints import VARIANTS

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    "name", [name for name, v in VARIANTS.items() if v.dialect == "compressed-tensors"]
)
def test_compressed_tensors_decompresses_to_the_same(tmp_path: Path, name: str) -> None:
    """Every matrix bit for bit, and so every target and every exception.

    It rounds the product of code and scale to the scale's dtype; so are ours here.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    variant = VARIANTS[name]
    (fields,) = variant.config.values()  # in 2024 under another key, and without a method
    method = {"quant_method": "compressed-tensors"}
    directory = replace(variant, config={"quantization_config": method | fields}).write(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    theirs = model.state_dict()
    formats, found = planned_as_published(directory)
    for module, stored in formats.items():
        ours = jnp.asarray(found[f"{module}.weight"])
        if stored.scale:
            ours = dequantize(ours, jnp.asarray(found[f"{module}.weight_scale"]))
            ours = ours.astype(variant.scale_dtype)
        weight = theirs[f"{module}.weight"].float().numpy()
        np.testing.assert_array_equal(ours.astype(jnp.float32), weight)


STATIC8: Any = {"num_bits": 8, "type": "float", "strategy": "tensor"}
PER_HEAD: Any = STATIC8 | {"strategy": "attn_head"}
WRITTEN: dict[str, Any] = {
    "attention": {
        "config_groups": {
            "attention": {"targets": ["LlamaAttention"], "input_activations": STATIC8}
        }
    },
    "attention per head": {
        "config_groups": {
            "attention": {"targets": ["re:.*self_attn$"], "input_activations": PER_HEAD}
        }
    },
    "cache": {"config_groups": {}, "kv_cache_scheme": STATIC8},
    "blocks, cache per head": {
        "config_groups": {"FP8_BLOCK": ["Linear"]},
        "ignore": ["lm_head"],
        "kv_cache_scheme": PER_HEAD,
    },
    "static": {"config_groups": {"FP8": ["Linear"]}, "ignore": ["lm_head"]},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_compressed_tensors_writes_is_read(tmp_path: Path, name: str) -> None:
    """By the tool itself, with q_scale, zero points and a config of today's form."""
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    model = LlamaForCausalLM(LlamaConfig(**(tiny.CONFIG | sizes))).to(torch.bfloat16)
    apply_quantization_config(model, QuantizationConfig.model_validate(WRITTEN[name]))
    for key, parameter in model.named_parameters():
        if key.endswith("_scale"):
            torch.nn.init.uniform_(parameter, 0.01, 0.1)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    source = read_source(tmp_path)
    plan, dialect = make_plan(source)
    assert dialect == "compressed-tensors"
    assert (plan.kv_scales is not None) == (name != "static")
    for layer, pair in enumerate(plan.kv_scales or ()):
        for letter, scale in zip("kv", pair, strict=True):
            stored = model.get_parameter(f"model.layers.{layer}.self_attn.{letter}_scale")
            np.testing.assert_array_equal(np.float32(scale), stored.float().numpy().squeeze())
    group = plan.modules["layers_0/mlp/up_proj"].format.activation_group
    assert group == (128 if name.startswith("blocks") else None)
