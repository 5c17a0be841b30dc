"""Exports in transformers and compressed-tensors: the same logits as here.

Both sides compute in float32 (1e-4, as in test_parity.py) and take the scales as they are, in
float32. With rounded activations or an FP8 cache a value in the middle between two codes may fall
to either side with the order of a float32 sum, which changes what follows it: nearly all tokens
have to agree, and none may stray further than rounding does.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pytest

from converters.compressed_tensors_writer import compressed_tensors
from converters.dialects.layout import Module
from converters.export import ExportFormat, export
from converters.opened import open_checkpoint
from converters.pipeline import convert
from converters.safetensors_writer import write_checkpoint
from llama_jax.checkpoint.store import MANIFEST, load_params, read_manifest
from llama_jax.model.forward import extend, unembed
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.spec import Activations
from tests import tiny_checkpoints as tiny

pytestmark = pytest.mark.parity

IDS = np.random.default_rng(0).integers(0, tiny.CONFIG["vocab_size"], (2, 24))
KV_SCALES = [[0.015, 0.01], [0.02, 0.0125]]
KV_SCALES_OF_HEADS = [[[0.015, 0.03], [0.01, 0.02]], [[0.02, 0.01], [0.0125, 0.025]]]


def our_logits(
    directory: Path, activations: Activations = "bf16", fp8_cache: bool = False
) -> np.ndarray:
    manifest = read_manifest(directory)
    spec = manifest.spec("float32", activations)
    cache = init_cache(
        manifest.config,
        *IDS.shape,
        "int8" if fp8_cache else "float32",
        jnp.asarray(manifest.kv_scales) if fp8_cache else None,
    )
    lengths = jnp.full(len(IDS), IDS.shape[1])
    params = load_params(directory, spec)
    hidden, _ = extend(
        params, cache, jnp.asarray(IDS, jnp.int32), lengths, spec=spec, phase="prefill"
    )
    return np.asarray(unembed(params, hidden, spec=spec))


def transformers_logits(directory: Path, *, weights_alone: bool = False) -> np.ndarray:
    """Float32 logits; with `weights_alone` neither activations nor the cache are rounded."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    quantization = json.loads((directory / "config.json").read_text()).get("quantization_config")
    if quantization and quantization["kv_cache_scheme"]:
        assert hasattr(model.model.layers[0].self_attn, "k_scale"), "the cache will not be rounded"
    for module in model.modules() if weights_alone else ():
        module.quantization_enabled = False
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(IDS)).logits.numpy()
    return logits


def exported(directory: Path, format: ExportFormat) -> Path:
    """`directory / "orbax"` exported."""
    export(directory / "orbax", directory / format, format, progress=False)
    return directory / format


@pytest.mark.parametrize("tied", [False, True])
def test_dense_weights(tmp_path: Path, tied: bool) -> None:
    arrays = tiny.dense()
    if tied:
        del arrays["lm_head.weight"]
    source = tiny.write(tmp_path / "source", arrays, {"tie_word_embeddings": tied})
    convert(source, tmp_path / "orbax", progress=False)
    theirs = transformers_logits(exported(tmp_path, "bf16"))
    np.testing.assert_allclose(our_logits(tmp_path / "orbax"), theirs, atol=1e-4)


def test_fp8_weights_in_bf16(tmp_path: Path) -> None:
    convert(
        tiny.write(tmp_path / "source", tiny.friendli(), tiny.FRIENDLI_03),
        tmp_path / "orbax",
        progress=False,
    )
    back = exported(tmp_path, "bf16")
    convert(back, tmp_path / "again", progress=False)
    theirs = transformers_logits(back)
    np.testing.assert_allclose(our_logits(tmp_path / "again"), theirs, atol=1e-4)


Kind = Literal[
    "tensor-static",
    "tensor-static-kv",
    "tensor-static-heads-kv",
    "row",
    "row-lm-head",
    "block",
    "mixed",
]


def fp8_checkpoint(directory: Path, kind: Kind) -> Path:
    """A converted FP8 checkpoint, `directory / "orbax"`."""
    if kind == "mixed":
        source = mixed_checkpoint(directory)
        quantize: dict[str, Any] = {}
    elif "static" in kind:
        source = tiny.write(directory / "source", tiny.friendli(), tiny.FRIENDLI_03)
        quantize = {}
    else:
        # Numbers of few bits have quotients in the middle between two codes far too often.
        source = tiny.write(
            directory / "source", tiny.dense(np.float32), {"torch_dtype": "float32"}
        )
        quantize = {
            "quantize": "block" if kind == "block" else "row",
            "quantize_lm_head": kind == "row-lm-head",
        }
    convert(source, directory / "orbax", progress=False, **quantize)
    if kind.endswith("kv"):
        path = directory / "orbax" / MANIFEST
        scales = KV_SCALES_OF_HEADS if "heads" in kind else KV_SCALES
        path.write_text(json.dumps(json.loads(path.read_text()) | {"kv_scales": scales}))
    return directory / "orbax"


def mixed_checkpoint(directory: Path) -> Path:
    """Static activations in layer 1 alone, and two matrices that are not quantised."""
    arrays = tiny.friendli()
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        arrays |= {f"{name}.weight": tiny.dense()[f"{name}.weight"]}
        del arrays[f"{name}.weight_scale"], arrays[f"{name}.in_scale"]
    opened = open_checkpoint(tiny.write(directory / "static", arrays, tiny.FRIENDLI_03))
    modules = {
        path: Module(replace(module.format, input_scale=False), module.arrays)
        if path.startswith("layers_0")
        else module
        for path, module in opened.plan.modules.items()
    }
    tensors, quantization = compressed_tensors(replace(opened.plan, modules=modules))
    source = tiny.write(directory / "source", {}, {"quantization_config": quantization})
    write_checkpoint(source, tensors, lambda count: None)
    return source


@pytest.mark.parametrize(
    "kind", ["tensor-static", "tensor-static-kv", "row", "row-lm-head", "block", "mixed"]
)
def test_fp8_weights_alone(tmp_path: Path, kind: Kind) -> None:
    ours = our_logits(fp8_checkpoint(tmp_path, kind))
    theirs = transformers_logits(exported(tmp_path, "fp8"), weights_alone=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "activations"),
    [
        ("tensor-static", "static"),
        ("tensor-static-kv", "static"),
        ("tensor-static-heads-kv", "static"),
        ("row", "dynamic"),
        ("row-lm-head", "dynamic"),
    ],
)
def test_rounded_activations_and_cache(
    tmp_path: Path, kind: Kind, activations: Activations
) -> None:
    """Block scales are left out: compressed-tensors refuses widths that 128 does not divide."""
    converted = fp8_checkpoint(tmp_path, kind)
    ours = our_logits(converted, activations, fp8_cache=kind.endswith("kv"))
    theirs = transformers_logits(exported(tmp_path, "fp8"))
    off = np.abs(ours - theirs).max(axis=-1)
    rounding = np.abs(ours - our_logits(converted)).max()
    assert (off < 5e-4).mean() > 0.9
    assert off.max() < rounding / 2
