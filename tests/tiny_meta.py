"""Small checkpoints as Meta distributes them: params.json, consolidated.NN.pth, tokenizer.model."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests import torch_files
from tests.tiny_checkpoints import Arrays

META_PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 96,
    "ffn_dim_multiplier": 0.9,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
META_LAYER = {
    "attention.wq": (64, 64),
    "attention.wk": (32, 64),
    "attention.wv": (32, 64),
    "attention.wo": (64, 64),
    "feed_forward.w1": (160, 64),
    "feed_forward.w2": (64, 160),
    "feed_forward.w3": (160, 64),
    "attention_norm": (64,),
    "ffn_norm": (64,),
}


def meta(dtype: Any = ml_dtypes.bfloat16) -> Arrays:
    """Return the weights of `META_PARAMS` under Meta's names, not split."""
    rng = np.random.default_rng(3)
    shapes: dict[str, tuple[int, ...]] = {
        f"layers.{layer}.{name}.weight": shape
        for layer in range(META_PARAMS["n_layers"])
        for name, shape in META_LAYER.items()
    }
    shapes |= {"tok_embeddings.weight": (96, 64), "norm.weight": (64,), "output.weight": (96, 64)}
    return {
        name: rng.normal(len(shape) == 1, 0.2, shape).astype(dtype)
        for name, shape in shapes.items()
    }


def meta_parts(arrays: Arrays, count: int, embedding_axis: int = 0) -> list[Arrays]:
    """Split arrays among `count` files. embedding_axis: 0 as in Llama 3, 1 as in Llama 2."""
    axes = {"wo": 1, "w2": 1, "tok_embeddings": embedding_axis}
    parts: list[Arrays] = [{} for _ in range(count)]
    for name, array in arrays.items():
        axis = axes.get(name.split(".")[-2], 0)
        split = np.split(array, count, axis) if array.ndim == 2 else [array] * count
        for part, piece in zip(parts, split, strict=True):
            part[name] = np.ascontiguousarray(piece)
    return parts


def meta_fp8(parts: Sequence[Arrays]) -> list[Arrays]:
    """Replace the feed-forward weights between the first and the last layer by random codes, and
    return the scales of each file."""
    rng = np.random.default_rng(4)
    finite = np.setdiff1d(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)
    scales: list[Arrays] = [{} for _ in parts]
    for rank, part in enumerate(parts):
        for layer in range(1, META_PARAMS["n_layers"] - 1):
            for matrix in ("w1", "w3", "w2"):
                name = f"layers.{layer}.feed_forward.{matrix}.weight"
                rows, columns = part[name].shape
                part[name] = rng.choice(finite, (rows, columns)).view(ml_dtypes.float8_e4m3fn)
                values = rng.uniform(5e-4, 2e-3, rows).astype(np.float32)
                scales[rank][f"{layer}_feed_forward.{matrix}_{rank}"] = values
    return scales


def byte_tokenizer() -> bytes:
    """Return a tokenizer.model like Llama 3's with a token per byte: 512 with special tokens."""
    lines = (b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
    return b"".join(lines)


def write_meta(
    directory: Path,
    parts: Sequence[Arrays],
    params: Mapping[str, Any] = META_PARAMS,
    scales: Sequence[Arrays] = (),
    tokenizer: bytes | None = None,
) -> Path:
    """Write a directory as Meta distributes it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params))
    (directory / "checklist.chk").write_text("0123  consolidated.00.pth\n")
    for rank, part in enumerate(parts):
        torch_files.save(directory / f"consolidated.{rank:02d}.pth", part)
    for rank, part in enumerate(scales):
        torch_files.save(directory / f"fp8_scales_{rank}.pt", part)
    if tokenizer is not None:
        (directory / "tokenizer.model").write_bytes(tokenizer)
    return directory
