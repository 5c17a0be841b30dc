"""Exports any checkpoint that can be read to a Hugging Face directory.

In bf16 a quantised matrix is written as code * scale, rounded once. In fp8 codes and scales are
written unchanged, with a `quantization_config` of compressed-tensors (format `float-quantized`),
which transformers, vLLM and SGLang read. Scales are float32, so this is exact.

A quantised embedding is written in bfloat16 in both formats, with a warning: of compressed-tensors'
embeddings vLLM reads only integer weights (`CompressedTensorsEmbeddingWNA16Int`), and others read
none. A directory that loads anywhere is more useful than a refusal because of one matrix.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from converters.compressed_tensors_writer import compressed_tensors
from converters.dialects.layout import LazyArray, Module, Plan, source_name
from converters.on_host import on_host
from converters.opened import open_checkpoint
from converters.safetensors_writer import write_checkpoint
from converters.staging import staged
from converters.writing import (
    EXPORT_MARK,
    byte_progress,
    check_export,
    check_space,
    full_disk_explained,
    package_version,
)
from llama_jax.model import fp8
from pallas_kernels.fp8_matmul.reference import BLOCK

_log = logging.getLogger(__name__)
ExportFormat = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Exported:
    """The result of an export. total_bytes: of all tensors. shards: names of safetensors files."""

    total_bytes: int
    shards: tuple[str, ...]
    tokenizer_files: tuple[str, ...]


def export(
    source: str | Path,
    target: str | Path,
    format: ExportFormat,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Exported:
    """Write a Hugging Face directory: config.json, safetensors of 5 GB, the tokenizer's files.

    source: a converted checkpoint, or a published one of any dialect.
    target: appears when it is complete. With `overwrite`, it replaces an earlier export then.
    format: "bf16" writes quantised matrices as code * scale, rounded once to bfloat16, and drops
        scales of activations and of the cache. "fp8" keeps them: activations are static if the
        checkpoint has input scales, and otherwise dynamic (per token, or per 128 features for block
        scales), as engines expect. Unquantised weights keep their dtype in both, and a quantised
        embedding becomes bfloat16 in both.

    Raises `CheckpointError` or `ConfigError` for a source that cannot be read or not be written as
    fp8, FileExistsError for a target that may not be replaced, and OSError if the disk is full.
    """
    directory, target = Path(source).resolve(), Path(target).absolute()
    check_export(directory, target, overwrite)
    opened = open_checkpoint(directory)
    tokenizer_paths = opened.tokenizer_paths()
    config = opened.config.to_hf() | {EXPORT_MARK: package_version()}
    if format == "fp8":
        tensors, config["quantization_config"] = compressed_tensors(
            _with_plain_embedding(opened.plan)
        )
    else:
        tensors = dequantized_tensors(opened.plan)
    total = sum(array.nbytes for array in tensors.values())
    with staged(target, overwrite) as work:
        check_space(target, total)
        with (
            full_disk_explained(target, total),
            byte_progress("exporting", total, progress) as written,
        ):
            shards = write_checkpoint(work, tensors, written)
            _write_json(work / "config.json", config)
            if opened.generation:
                _write_json(work / "generation_config.json", opened.generation)
            for name, path in zip(opened.tokenizer_files, tokenizer_paths, strict=True):
                (work / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, work / name)
    return Exported(total, shards, opened.tokenizer_files)


def _with_plain_embedding(plan: Plan) -> Plan:
    """Replace a quantised embedding by code * scale in bfloat16, with a warning."""
    embedding = plan.modules["embed_tokens"]
    if embedding.format.scale is None:
        return plan
    _log.warning(
        "embed_tokens is FP8, for which other engines have no layout: the export has it in bfloat16"
    )
    plain = Module(fp8.WeightFormat("bfloat16"), {"weight": _dequantized(embedding)})
    return replace(plan, modules={**plan.modules, "embed_tokens": plain})


def dequantized_tensors(plan: Plan) -> dict[str, LazyArray]:
    """Return the weights by Hugging Face's names, quantised ones as code * scale in bfloat16."""
    return {
        f"{source_name(path)}.weight": _dequantized(module)
        if module.format.scale
        else module.arrays["weight"]
        for path, module in plan.modules.items()
    }


def _dequantized(module: Module) -> LazyArray:
    codes, scale = module.arrays["weight"], module.arrays["weight_scale"]
    per = BLOCK if module.format.scale == "block" else 1

    def rows(start: int, stop: int) -> np.ndarray:
        scales = scale.rows(start // per, -(-stop // per))
        values: np.ndarray = _to_bfloat16(codes.rows(start, stop), scales)
        return values

    return LazyArray(np.dtype(ml_dtypes.bfloat16), codes.shape, rows)


@on_host
def _to_bfloat16(codes: Array, scale: Array) -> Array:
    return fp8.dequantize(codes, scale).astype(jnp.bfloat16)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
