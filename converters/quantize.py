"""Quantises matrices to FP8 while they are converted.

Codes and scales are computed from the source's rows each time they are read, and not stored in
between. So they are the same in any order, in any number of threads, and after an interruption.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.calibrate import Ranges, calibrate, column_absmax, smooth
from converters.dialects.layout import LazyArray, Module, Plan, is_linear, pieces
from converters.layerwise import read_sequences, token_progress
from converters.on_host import on_host
from converters.opened import Opened
from converters.quantization_report import (
    QuantizationReport,
    activations_of,
    measure,
    with_perplexity,
)
from converters.quantize_options import Layout as Layout
from converters.quantize_options import QuantizeOptions as QuantizeOptions
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.model import fp8
from llama_jax.text.tokenizer import load_tokenizer
from pallas_kernels.fp8_matmul.reference import BLOCK


def quantize(
    checkpoint: Opened, options: QuantizeOptions, progress: bool = True
) -> tuple[Plan, Plan]:
    """Quantise the matrices of the decoder layers, and the output matrix if `options` say so.

    The output matrix is the embedding if they are tied. Other embeddings and norms are not changed.

    progress: show the calibration's progress on stderr.
    Returns the plan before quantisation (after smoothing, if any) and the quantised plan.
    Raises `CheckpointError` if the checkpoint has FP8 weights already, and ValueError for a text
    that cannot be used.
    """
    plan, ranges = checkpoint.plan, None
    _check_unquantized(plan)
    if options.text is not None:
        _read(checkpoint, options, options.text)  # raises now for a text that cannot be used
    if options.calibrate is not None:
        tokens = _read(checkpoint, options, options.calibrate)
        layers = checkpoint.config.num_layers
        with token_progress("calibrating", tokens.size, layers, progress) as advance:
            ranges = calibrate(plan, checkpoint.spec(_dtype(checkpoint)), tokens, advance)
        if options.smooth is not None:
            plan, ranges = smooth(plan, checkpoint.config, ranges, options.smooth)
    return plan, quantize_plan(plan, options.layout, options.lm_head, ranges)


def report(
    checkpoint: Opened,
    options: QuantizeOptions,
    original: Plan,
    quantized: Plan,
    progress: bool = True,
) -> QuantizationReport:
    """Report the errors of `quantize` and, if there is a text, perplexities.

    original, quantized: the plans that it returned, or the same modules from elsewhere.
    """
    errors = measure(original, quantized)
    text = options.text or options.calibrate
    if text is None:
        return errors
    tokens, config = _read(checkpoint, options, text), checkpoint.config
    runs = 1 + len(activations_of(quantized))
    with token_progress("scoring", runs * tokens.size, config.num_layers, progress) as advance:
        return with_perplexity(
            errors, original, quantized, config, _dtype(checkpoint), tokens, advance
        )


def _read(checkpoint: Opened, options: QuantizeOptions, text: Path) -> np.ndarray:
    tokenizer = load_tokenizer(checkpoint.directory, checkpoint.config)
    return read_sequences(
        text, tokenizer, checkpoint.config, options.tokens, options.sequence_length
    )


def _dtype(checkpoint: Opened) -> str:
    """Return the dtype of activations for calibration and scoring: that of serving."""
    return "float32" if checkpoint.config.dtype == "float32" else "bfloat16"


def quantize_plan(
    plan: Plan, layout: Layout, lm_head: bool = False, ranges: Ranges | None = None
) -> Plan:
    """Quantise the matrices of a plan. With `ranges`, add static input and KV scales.

    Raises `CheckpointError` like `quantize`.
    """
    _check_unquantized(plan)
    modules = {
        path: _quantized(path, module, layout, ranges)
        if (lm_head if path == plan.output else is_linear(path))
        else module
        for path, module in plan.modules.items()
    }
    kv_scales = plan.kv_scales if ranges is None else ranges.kv_scales()
    return replace(plan, modules=modules, kv_scales=kv_scales)


def _check_unquantized(plan: Plan) -> None:
    stored = [path for path, module in plan.modules.items() if module.format.scale]
    if stored:
        raise CheckpointError(
            f"{stored[0]} and {len(stored) - 1} more matrices are FP8 already; convert without "
            "quantize (--quantize)"
        )


def _quantized(path: str, module: Module, layout: Layout, ranges: Ranges | None) -> Module:
    weight = module.arrays["weight"]
    stored: fp8.ScaleLayout = "block" if layout == "block" else "row"

    @cache
    def whole_scale() -> np.ndarray:
        scale: np.ndarray = _scales(column_absmax(weight)[None], "row")
        return scale

    def scales_of(part: np.ndarray) -> np.ndarray:
        if layout == "tensor":
            return np.broadcast_to(whole_scale(), len(part))
        scales: np.ndarray = _scales(part, stored)
        return scales

    def codes(start: int, stop: int) -> np.ndarray:
        part = weight.rows(start, stop)
        codes: np.ndarray = _encode(part, scales_of(part))
        return codes

    def scales(start: int, stop: int) -> np.ndarray:
        return np.concatenate([scales_of(part) for part in pieces(weight)])[start:stop]

    shape = (weight.shape[0], weight.shape[1])
    arrays = {
        "weight": LazyArray(np.dtype(ml_dtypes.float8_e4m3fn), shape, codes),
        "weight_scale": LazyArray(np.dtype(np.float32), fp8.scale_shape(shape, stored), scales),
    }
    if ranges is not None:
        input_scale = np.asarray(ranges.input_scale(path))
        arrays["input_scale"] = LazyArray(input_scale.dtype, (), lambda start, stop: input_scale)
    # As in compressed-tensors and DeepSeek with blocks.
    group = BLOCK if stored == "block" else None
    is_static = ranges is not None
    stored_as = fp8.WeightFormat("float8_e4m3fn", stored, is_static, activation_group=group)
    return Module(stored_as, arrays)


_encode = on_host(fp8.encode)
_scales = on_host(fp8.weight_scale, static=("layout",))
