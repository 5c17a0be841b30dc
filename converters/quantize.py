"""Quantising unquantised matrices to FP8 while they are converted."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from converters.dialects.layout import LazyArray, Module, Plan, is_linear
from llama_jax import fp8
from llama_jax.checkpoint import CheckpointError


def quantize_plan(plan: Plan, layout: fp8.ScaleLayout, lm_head: bool) -> Plan:
    """The plan with the matrices of the decoder layers, and perhaps lm_head, quantised.

    Embeddings and norms stay as they are. Raises `CheckpointError` if the checkpoint has FP8
    weights already, or no lm_head where one is to be quantised.
    """
    stored = [path for path, module in plan.modules.items() if module.format.scale]
    if stored:
        raise CheckpointError(
            f"{stored[0]} and {len(stored) - 1} more matrices are FP8 already; convert without "
            "quantize (--quantize)"
        )
    if lm_head and "lm_head" not in plan.modules:
        raise CheckpointError(
            "quantize_lm_head: this checkpoint has no lm_head of its own (tie_word_embeddings); "
            "leave it out"
        )
    modules = {
        path: _quantized(module, layout)
        if is_linear(path) and (lm_head or path != "lm_head")
        else module
        for path, module in plan.modules.items()
    }
    return replace(plan, modules=modules)


def _quantized(module: Module, layout: fp8.ScaleLayout) -> Module:
    """Codes are made when the weight is read, block after block of rows; the scales that come with
    them are handed out afterwards, so the weight must be read first, in order, and once."""
    source = module.arrays["weight"]
    rows, columns = source.shape
    scales: list[np.ndarray] = []

    def codes(start: int, stop: int) -> np.ndarray:
        with jax.default_device(jax.devices("cpu")[0]):
            codes, scale = fp8.quantize(jnp.asarray(source.rows(start, stop)), layout)
        scales.append(np.asarray(scale))
        return np.asarray(codes)

    return Module(
        fp8.WeightFormat("float8_e4m3fn", layout),
        {
            "weight": LazyArray(np.dtype(ml_dtypes.float8_e4m3fn), source.shape, codes),
            "weight_scale": LazyArray(
                np.dtype(np.float32),
                fp8.scale_shape((rows, columns), layout),
                lambda start, stop: np.concatenate(scales)[start:stop],
            ),
        },
    )
