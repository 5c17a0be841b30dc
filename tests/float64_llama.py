"""Llama 3.1's forward pass in float64 numpy, written from the published formulas alone."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llama_jax.model.config import LlamaConfig


def forward(
    params: Mapping[str, Any],
    config: LlamaConfig,
    ids: np.ndarray,
    rounded: Callable[[str, np.ndarray], np.ndarray] = lambda path, x: x,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return logits [sequences, length, vocab] and the intermediate arrays by path.

    params: matrices may be FP8 codes with a scale per row or per 128 x 128 block.
    The intermediate arrays are the input of each matrix under its path ("layers_0/mlp/up_proj"),
    [sequences, length, in], and "layers_0/k" (rotated) and "layers_0/v", [sequences, length,
    kv_heads, head_dim].
    rounded: is called with such a path and array, and returns the array to go on with.
    """
    seen: dict[str, np.ndarray] = {}

    def linear(x: np.ndarray, path: str) -> np.ndarray:
        seen[path] = x
        return rounded(path, x) @ _weight(params, path).T

    batch, length = ids.shape
    causal = np.tril(np.ones((length, length), bool))
    x = _weight(params, "embed_tokens")[ids]
    for i in range(config.num_layers):
        layer, attention = f"layers_{i}", f"layers_{i}/self_attn"
        h = _norm(x, _weight(params, f"{layer}/input_layernorm"), config)
        q, k, v = (
            linear(h, f"{attention}/{name}").reshape(batch, length, -1, config.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = _rotate(q, config), _rotate(k, config)
        seen[f"{layer}/k"], seen[f"{layer}/v"] = k, v
        k, v = rounded(f"{layer}/k", k), rounded(f"{layer}/v", v)
        group = config.num_heads // config.num_kv_heads
        k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(config.head_dim)
        weights = np.exp(np.where(causal, scores, -np.inf) - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        h = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, -1)
        x = x + linear(h, f"{attention}/o_proj")
        h = _norm(x, _weight(params, f"{layer}/post_attention_layernorm"), config)
        gate = linear(h, f"{layer}/mlp/gate_proj")
        h = gate / (1 + np.exp(-gate)) * linear(h, f"{layer}/mlp/up_proj")
        x = x + linear(h, f"{layer}/mlp/down_proj")
    output = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    return linear(_norm(x, _weight(params, "norm"), config), output), seen


def read(params: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return the arrays of the module at `path`."""
    for name in path.split("/"):
        params = params[name]
    return params


def _weight(params: Mapping[str, Any], path: str) -> np.ndarray:
    module = read(params, path)
    weight = np.asarray(module["weight"], np.float64)
    if "weight_scale" not in module:
        return weight
    scale = np.asarray(module["weight_scale"], np.float64)
    if scale.ndim == 1:
        return weight * scale[:, None]
    return weight * np.kron(scale, np.ones((128, 128)))[: weight.shape[0], : weight.shape[1]]


def _norm(x: np.ndarray, weight: np.ndarray, config: LlamaConfig) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * weight


def _rotate(x: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """Apply the rotary embedding to x [batch, length, heads, head_dim], as complex numbers."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    if scaling := config.rope_scaling:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = np.arange(x.shape[1])[:, None, None] * frequencies
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)
