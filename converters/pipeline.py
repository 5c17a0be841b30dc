"""Conversion of any supported checkpoint into an Orbax directory, a block of rows at a time."""

import shutil
from pathlib import Path
from typing import Literal

from converters.dialects import make_plan
from converters.dialects.layout import LazyArray, Plan, pieces
from converters.orbax_writer import write_array, write_tree_metadata
from converters.quantize import quantize_plan
from converters.source import read_source
from converters.staging import staged
from converters.writing import (
    byte_progress,
    check_paths,
    check_space,
    full_disk_explained,
    package_version,
)
from llama_jax.checkpoint import MANIFEST, PARAMS, Manifest


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
    directory, target = Path(source).resolve(), Path(target).absolute()
    check_paths(directory, target, overwrite, "a converted checkpoint", _is_converted)
    if quantize_lm_head and quantize is None:
        raise ValueError("quantize_lm_head needs quantize='row' or 'block'")
    published = read_source(directory)
    plan, dialect = make_plan(published)
    if quantize is not None:
        plan = quantize_plan(plan, quantize, quantize_lm_head)
    manifest = Manifest(
        dialect=dialect,
        source=directory.name,
        config=published.config,
        formats={path: module.format for path, module in plan.modules.items()},
        kv_scales=plan.kv_scales,
        generation=published.generation,
        tokenizer_files=published.tokenizer_files,
        total_bytes=sum(array.nbytes for array in _arrays(plan).values()),
        llama_jax_version=package_version(),
    )
    with staged(target, overwrite) as work:
        check_space(target, manifest.total_bytes)
        with full_disk_explained(target, manifest.total_bytes):
            _write_params(plan, work / PARAMS, manifest.total_bytes, progress)
            for name in manifest.tokenizer_files:
                shutil.copyfile(directory / name, work / name)
            (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _is_converted(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def _arrays(plan: Plan) -> dict[tuple[str, ...], LazyArray]:
    return {
        (*path.split("/"), leaf): array
        for path, module in plan.modules.items()
        for leaf, array in module.arrays.items()
    }


def _write_params(plan: Plan, directory: Path, total: int, progress: bool) -> None:
    directory.mkdir()
    arrays = _arrays(plan)
    with byte_progress("converting", total, progress) as written:
        for path, array in arrays.items():
            write_array(
                directory / ".".join(path), array.dtype, array.shape, pieces(array), written
            )
    write_tree_metadata(directory, {path: array.shape for path, array in arrays.items()})
