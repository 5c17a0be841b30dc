"""Conversion of any supported checkpoint into an Orbax directory, a block of rows at a time."""

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import traverse_util
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from converters.dialects import detect
from converters.dialects.layout import LazyArray, Plan, Tensors, as_stored
from converters.orbax_writer import chunk_rows, write_array, write_tree_metadata
from converters.quantize import quantize_plan
from converters.safetensors_reader import read_checkpoint
from converters.staging import staged
from llama_jax.checkpoint import MANIFEST, PARAMS, CheckpointError, Manifest
from llama_jax.config import LlamaConfig
from llama_jax.model import ModelSpec, abstract_params

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Room beside the parameters: file system metadata and the rounding up to blocks.
_SPARE_BYTES = 16 * 1024 * 1024


def convert(
    source: str | Path,
    target: str | Path,
    *,
    quantize: Literal["row", "block"] | None = None,
    quantize_lm_head: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Convert a Hugging Face directory into a directory that `llama_jax.checkpoint` loads.

    source: config.json, safetensors (one file, or shards with an index) and tokenizer files.
    target: appears when it is whole; until then nothing is there, and with `overwrite` a converted
        checkpoint that was there stays.
    quantize: None keeps weights as they are; "row" or "block" quantises the matrices of the decoder
        layers to float8_e4m3fn with a scale per output row or per 128x128 block, and lm_head too
        with `quantize_lm_head`.
    Raises `CheckpointError` or `ConfigError` for a source that is damaged, incomplete or not
    supported, FileExistsError for a target that may not be replaced, OSError when the disk is full.
    """
    source, target = Path(source).resolve(), Path(target).absolute()
    _check_paths(source, target, overwrite)
    if quantize_lm_head and quantize is None:
        raise ValueError("quantize_lm_head needs quantize='row' or 'block'")
    hf_config = _read_object(source / "config.json")
    config = LlamaConfig.from_pretrained(source)
    tensors = read_checkpoint(source)
    plan, dialect = make_plan(hf_config, config, tensors)
    if quantize is not None:
        plan = quantize_plan(plan, quantize, quantize_lm_head)
    generation = source / "generation_config.json"
    manifest = Manifest(
        dialect=dialect,
        source=source.name,
        config=config,
        formats={path: module.format for path, module in plan.modules.items()},
        kv_scales=plan.kv_scales,
        generation=_read_object(generation) if generation.is_file() else {},
        tokenizer_files=tuple(name for name in TOKENIZER_FILES if (source / name).is_file()),
        total_bytes=sum(_nbytes(array) for array in _arrays(plan).values()),
        llama_jax_version=_version(),
    )
    with staged(target, overwrite) as work:
        _check_space(target, manifest.total_bytes)
        with _full_disk_explained(target, manifest.total_bytes):
            _write_params(plan, work / PARAMS, manifest.total_bytes, progress)
            for name in manifest.tokenizer_files:
                shutil.copyfile(source / name, work / name)
            (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def make_plan(
    hf_config: Mapping[str, Any], config: LlamaConfig, tensors: Tensors
) -> tuple[Plan, str]:
    """Every module of the model with where its arrays come from, and the dialect's name.

    Raises `CheckpointError` if a tensor is missing, malformed, or left over.
    """
    dialect = detect(hf_config, tensors)
    tree = traverse_util.flatten_dict(abstract_params(ModelSpec(config)))
    weights = {"/".join(path[:-1]): leaf.shape for path, leaf in tree.items()}
    plan = dialect.plan(hf_config, config, tensors, weights)
    left = {
        name
        for name in tensors.keys() - plan.used
        if not name.endswith("rotary_emb.inv_freq")  # a constant that old versions stored
    }
    if config.tie_word_embeddings and "lm_head.weight" in left:
        _check_tied(tensors)
        left.remove("lm_head.weight")
    if left:
        raise CheckpointError(
            f"{sorted(left)[0]} (and {len(left) - 1} more) has no place in a {dialect.name} "
            f"checkpoint of {config.num_layers} layers. The config and the weights do not belong "
            "together, or this variant is not supported."
        )
    return plan, dialect.name


def _check_paths(source: Path, target: Path, overwrite: bool) -> None:
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a directory; a Hugging Face checkpoint is expected")
    if source.is_relative_to(target.resolve()):
        raise CheckpointError(f"{target} holds the source {source}: choose another target")
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists already. Choose another target, or overwrite it (--overwrite)."
        )
    if not (target / MANIFEST).is_file():
        raise FileExistsError(
            f"{target} is not a converted checkpoint, so it is not overwritten. Remove it yourself "
            "or choose another target."
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a Hugging Face checkpoint") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    for key in ("quantization_config", "compression_config"):
        if not isinstance(values.get(key), dict | None):
            raise CheckpointError(f"{path}: {key} must be an object, got {values[key]!r}")
    return values


def _check_tied(tensors: Tensors) -> None:
    head, embedding = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    chunks = (_chunks(as_stored(tensor)) for tensor in (head, embedding))
    if not same or not all(map(np.array_equal, *chunks)):
        raise CheckpointError(
            "lm_head.weight differs from model.embed_tokens.weight although the config says "
            "tie_word_embeddings. Set it to false if lm_head is meant to be used."
        )


def _arrays(plan: Plan) -> dict[tuple[str, ...], LazyArray]:
    return {
        (*path.split("/"), leaf): array
        for path, module in plan.modules.items()
        for leaf, array in module.arrays.items()
    }


def _nbytes(array: LazyArray) -> int:
    return int(np.prod(array.shape, dtype=np.int64)) * array.dtype.itemsize


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed + _SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"not enough disk space: {decimal(needed)} needed, {decimal(free)} free",
            str(target.parent),
        )


@contextmanager
def _full_disk_explained(target: Path, needed: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: {decimal(needed)} are to be written. Free space, or choose a "
            "target on another disk",
            str(target),
        ) from error


def _write_params(plan: Plan, directory: Path, total: int, progress: bool) -> None:
    directory.mkdir()
    arrays = _arrays(plan)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("converting", total=total)
        for path, array in arrays.items():
            write_array(
                directory / ".".join(path),
                array.dtype,
                array.shape,
                _chunks(array),
                lambda count: bar.advance(task, count),
            )
    write_tree_metadata(directory, {path: array.shape for path, array in arrays.items()})


def _chunks(array: LazyArray) -> Iterator[np.ndarray]:
    rows = (array.shape or (1,))[0]
    step = chunk_rows(array.shape, array.dtype.itemsize)
    for start in range(0, rows, step):
        yield array.rows(start, min(start + step, rows))


def _version() -> str:
    try:
        return version("llama-jax")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
