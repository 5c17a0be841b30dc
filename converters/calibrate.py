"""Calibrates on a text: measures the magnitudes of activations, and smooths their outliers.

Smoothing is SmoothQuant's (Xiao et al. 2022, equation 4, https://arxiv.org/abs/2211.10438): channel
j of a matrix's input is divided by

    s_j = max|X_j| ** alpha / max|W_j| ** (1 - alpha)

in its producer (a norm's weight, or rows of the matrix before it), and column j of the matrix is
multiplied by it. The factors are powers of two, so folding them in is exact, and the model computes
the same as before, up to the order of sums.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from converters.dialects.layout import LazyArray, Module, Plan, pieces
from converters.layerwise import final_hidden
from converters.on_host import on_host
from llama_jax.model.cached_attention import LayerCache
from llama_jax.model.config import LlamaConfig
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.spec import ModelSpec, Params
from pallas_kernels import e4m3

_V_PROJ = "self_attn/v_proj"
# The producers of inputs within a layer, and the matrices that consume them.
_FOLDS = (
    ("input_layernorm", ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj")),
    (_V_PROJ, ("self_attn/o_proj",)),
    ("post_attention_layernorm", ("mlp/gate_proj", "mlp/up_proj")),
    ("mlp/up_proj", ("mlp/down_proj",)),
)


@dataclass(frozen=True)
class Ranges:
    """The largest magnitudes of activations, float32.

    inputs: [in] for each matrix, one per channel of its input, by path ("layers_0/mlp/up_proj").
    k, v: [kv_heads, head_dim] for each layer, of the cache's contents (k after rotation).
    """

    inputs: Mapping[str, np.ndarray]
    k: tuple[np.ndarray, ...]
    v: tuple[np.ndarray, ...]

    def input_scale(self, path: str) -> np.float32:
        """Return the static scale of a matrix's input: absmax / 448."""
        return _scale(self.inputs[path])

    def kv_scales(self) -> tuple[tuple[float, float], ...]:
        """Return the scales (k, v) of each layer's cache: absmax / 448."""
        pairs = zip(self.k, self.v, strict=True)
        return tuple((float(_scale(k)), float(_scale(v))) for k, v in pairs)


def calibrate(
    plan: Plan,
    spec: ModelSpec,
    tokens: np.ndarray,
    advance: Callable[[int], object] = lambda count: None,
) -> Ranges:
    """Measure the ranges that a model's activations take over a text.

    plan: the model's parameters, unquantised.
    tokens: int [sequences, length].
    advance: as in `layerwise.final_hidden`.
    """
    hidden, observed = final_hidden(plan, spec, tokens, observe=_absmax, advance=advance)
    layers = [jax.tree.map(lambda *parts: np.max(parts, axis=0), *seen) for seen in observed]
    inputs = {
        f"layers_{i}/{name}": absmax
        for i, layer in enumerate(layers)
        for name, absmax in layer["inputs"].items()
    }
    inputs[plan.output] = np.max([_channel_absmax(x) for x in hidden], axis=0)
    return Ranges(
        inputs,
        tuple(layer["k"] for layer in layers),
        tuple(layer["v"] for layer in layers),
    )


def smooth(plan: Plan, config: LlamaConfig, ranges: Ranges, alpha: float) -> tuple[Plan, Ranges]:
    """Fold smoothing factors into a plan. Returns the plan and its ranges.

    The model computes the same as before, from inputs with smaller outliers. Weights keep their
    dtype, except that float16 becomes float32, since float16 has too few exponents.

    alpha: 0 to 1; larger values move more of the outliers from activations into weights.
    """
    rows: dict[str, np.ndarray] = {}
    columns: dict[str, np.ndarray] = {}
    for layer in range(config.num_layers):
        for maker, takers in _FOLDS:
            paths = [f"layers_{layer}/{name}" for name in takers]
            weights = [column_absmax(plan.modules[path].arrays["weight"]) for path in paths]
            # Axis 1 has the channels of the input that share a channel of the producer: each kv
            # head produces the input of o_proj for a group of heads.
            groups = (config.num_kv_heads, -1, config.head_dim) if maker == _V_PROJ else (-1, 1)
            x = ranges.inputs[paths[0]].reshape(groups)
            w = np.max(weights, axis=0).reshape(groups)
            factor = _power_of_two(x.max(axis=1), w.max(axis=1), alpha)
            rows[f"layers_{layer}/{maker}"] = 1 / factor.reshape(-1)
            column = np.broadcast_to(np.expand_dims(factor, axis=1), x.shape).reshape(-1)
            columns |= dict.fromkeys(paths, column)
    modules = {
        path: _folded(module, rows.get(path), columns.get(path))
        for path, module in plan.modules.items()
    }
    inputs = {path: absmax / columns.get(path, 1) for path, absmax in ranges.inputs.items()}
    v = [
        absmax * rows[f"layers_{i}/{_V_PROJ}"].reshape(absmax.shape)
        for i, absmax in enumerate(ranges.v)
    ]
    return replace(plan, modules=modules), Ranges(inputs, ranges.k, tuple(v))


def _absmax(inputs: Mapping[str, Array], pages: LayerCache, params: Params) -> dict[str, Any]:
    """Return the largest magnitudes within a layer; an `Observe`."""
    return {
        "inputs": {name: _channel_absmax(x) for name, x in inputs.items()},
        "k": jnp.max(jnp.abs(pages.k), axis=(0, 1)).astype(jnp.float32),
        "v": jnp.max(jnp.abs(pages.v), axis=(0, 1)).astype(jnp.float32),
    }


def _channel_absmax(x: Array) -> Array:
    return jnp.max(jnp.abs(x), axis=(0, 1)).astype(jnp.float32)


def _scale(absmax: np.ndarray) -> np.float32:
    return np.float32(absmax.max() / np.float32(e4m3.MAX)) or np.float32(1)


def _power_of_two(x: np.ndarray, w: np.ndarray, alpha: float) -> np.ndarray:
    """Return the factors s rounded to powers of two, 1 for a channel that is always zero."""
    alive = (x > 0) & (w > 0)
    x, w = np.where(alive, x, 1), np.where(alive, w, 1)
    return np.exp2(np.round(alpha * np.log2(x) - (1 - alpha) * np.log2(w))).astype(np.float32)


def column_absmax(weight: LazyArray) -> np.ndarray:
    """Return the largest magnitude in each column of an (out, in) matrix, float32 [in]."""
    return np.max([_columns(part) for part in pieces(weight)], axis=0)


@on_host
def _columns(weight: Array) -> Array:
    return jnp.max(jnp.abs(weight), axis=0).astype(jnp.float32)


def _folded(module: Module, row: np.ndarray | None, column: np.ndarray | None) -> Module:
    """Return the module with its weight's rows and columns multiplied by these factors."""
    if row is None and column is None:
        return module
    source = module.arrays["weight"]
    dtype = np.dtype(np.float32) if source.dtype == np.float16 else source.dtype
    row = np.ones(source.shape[0], np.float32) if row is None else row
    column = np.ones((), np.float32) if column is None else column

    def rows(start: int, stop: int) -> np.ndarray:
        product: np.ndarray = _multiply(source.rows(start, stop), row[start:stop], column, dtype)
        return product

    return Module(WeightFormat(dtype.name), {"weight": LazyArray(dtype, source.shape, rows)})


@partial(on_host, static=("dtype",))
def _multiply(weight: Array, row: Array, column: Array, dtype: np.dtype) -> Array:
    row = row if weight.ndim == 1 else row[:, None]
    return (weight.astype(jnp.float32) * row * column).astype(dtype)
