"""Computes the frequencies of rotary embedding, with the scaling of a checkpoint's config."""

import numpy as np

from llama_jax.model.config import LlamaConfig


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Compute the angular frequencies of the rotary pairs, float32 [head_dim / 2].

    Source: `apply_scaling` in llama-models, with the config's constants.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.float64(config.rope_theta) ** exponents.astype(np.float64)
    inv = np.float32(1.0) / powers.astype(np.float32)  # rounded as in torch, bit for bit
    scaling = config.rope_scaling
    if scaling is None:
        return inv / np.float32(config.rope_linear_factor)
    wavelength = np.float32(2 * np.pi) / inv
    turns = np.float32(scaling.original_max_position_embeddings) / wavelength
    low, high = np.float32(scaling.low_freq_factor), np.float32(scaling.high_freq_factor)
    smooth = (turns - low) / (high - low)
    factor = np.float32(scaling.factor)
    blended = (np.float32(1.0) - smooth) * inv / factor + smooth * inv
    return np.where(turns < low, inv / factor, np.where(turns > high, inv, blended))
