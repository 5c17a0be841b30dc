"""Converts any supported checkpoint to an Orbax directory, several modules at a time.

Each worker holds a few pieces of one array, so memory does not grow with the model. Finished
modules are recorded (`converters.journal`), so that the same call continues after a kill.
"""

import hashlib
import logging
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from rich.filesize import decimal

from converters import journal
from converters.dialects.layout import Module, Plan, pieces
from converters.journal import JOURNAL, Checksums
from converters.opened import Opened, open_checkpoint
from converters.orbax_reader import converted_plan
from converters.orbax_writer import tree_metadata
from converters.quantization_report import REPORT
from converters.quantize import Layout, QuantizeOptions, report
from converters.quantize import quantize as quantize_checkpoint
from converters.source import CONVERTER_VERSION, published_name
from converters.staging import staged
from converters.writing import (
    byte_progress,
    check_conversion,
    check_space,
    full_disk_explained,
    package_version,
)
from llama_jax.checkpoint.array_file import WORKERS, Advance, holds, write_array
from llama_jax.checkpoint.store import MANIFEST, PARAMS, Manifest, file_sha256

_log = logging.getLogger(__name__)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    quantize: Layout | QuantizeOptions | None = None,
    quantize_lm_head: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Convert a published checkpoint into a directory that `llama_jax.checkpoint.store` loads.

    source: a directory with config.json, safetensors (one file, or shards with an index) and
        tokenizer files; with Meta's params.json, consolidated.*.pth and tokenizer.model; or a
        converted checkpoint, to quantise it.
    target: appears when it is complete. Until then nothing is there or, with `overwrite`, the
        earlier converted checkpoint. If the call is interrupted or killed, its finished modules are
        kept beside the target, and the same call continues from there to the same bytes.
    quantize: None keeps weights unchanged; "row", "tensor" or "block" quantises the matrices of the
        decoder layers to float8_e4m3fn with a scale per output row, per matrix or per 128x128
        block. `QuantizeOptions` can also calibrate, smooth and report; the report is stored beside
        the manifest (`quantization_report.read_report`).
    quantize_lm_head: whether to quantise the output matrix as well, which is embed_tokens if they
        are tied.

    Raises `CheckpointError` or `ConfigError` for a source that is damaged, incomplete or not
    supported, FileExistsError for a target that may not be replaced, and OSError if the disk is
    full.

    >>> from llama_jax.abacus import SHIPPED_MODEL
    >>> source = SHIPPED_MODEL.parent / "checkpoint_bf16"
    >>> manifest = convert(source, "abacus-fp8", quantize="row", progress=False)
    >>> manifest.formats["layers_0/mlp/up_proj"].scale
    'row'
    """
    directory, target = Path(source).resolve(), Path(target).absolute()
    check_conversion(directory, target, overwrite)
    options = _options(quantize, quantize_lm_head)
    opened = open_checkpoint(directory)
    tokenizer_paths = opened.tokenizer_paths()
    original = plan = opened.plan
    if options:
        original, plan = quantize_checkpoint(opened, options, progress)
    manifest = Manifest(
        dialect=opened.dialect,
        source=published_name(directory),
        config=opened.config,
        formats={path: module.format for path, module in plan.modules.items()},
        kv_scales=plan.kv_scales,
        generation=opened.generation,
        tokenizer_files=opened.tokenizer_files,
        total_bytes=sum(map(_nbytes, plan.modules.values())),
        llama_jax_version=package_version(),
    )
    fingerprint = _fingerprint(opened, manifest, options)
    with staged(target, overwrite, JOURNAL) as work:
        recorded = journal.resume(work, fingerprint)
        done = sum(_nbytes(plan.modules[path]) for path in recorded)
        check_space(target, manifest.total_bytes - done)
        description = f"continuing after {decimal(done)}" if done else "converting"
        with full_disk_explained(target, manifest.total_bytes):
            with byte_progress(description, manifest.total_bytes, progress) as advance:
                checksums = _write_modules(plan, work, recorded, advance)
            for name, path in zip(opened.tokenizer_files, tokenizer_paths, strict=True):
                (work / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, work / name)
            for name, text in tree_metadata(_shapes(plan)).items():
                (work / PARAMS / name).write_text(text)
            if options and options.report:
                found = report(opened, options, original, converted_plan(work, manifest), progress)
                (work / REPORT).write_text(found.to_json(), encoding="utf-8")
            manifest = replace(manifest, checksums=checksums | _file_checksums(work))
            (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _options(quantize: Layout | QuantizeOptions | None, lm_head: bool) -> QuantizeOptions | None:
    if isinstance(quantize, str):
        return QuantizeOptions(quantize, lm_head)
    if lm_head:
        raise ValueError(
            "quantize_lm_head needs quantize='row', 'tensor' or 'block'; QuantizeOptions have "
            "lm_head"
        )
    return quantize


def _nbytes(module: Module) -> int:
    return sum(array.nbytes for array in module.arrays.values())


def _array_path(path: str, leaf: str) -> str:
    """Return an array's path in the directory, in Orbax's layout."""
    return f"{PARAMS}/{path.replace('/', '.')}.{leaf}"


def _shapes(plan: Plan) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {
        (*path.split("/"), leaf): array.shape
        for path, module in plan.modules.items()
        for leaf, array in module.arrays.items()
    }


def _fingerprint(source: Opened, manifest: Manifest, options: QuantizeOptions | None) -> str:
    """Hash everything that the result depends on: versions, options, and the files' identities."""
    paths = source.weight_files | {source.directory / name for name in source.tokenizer_files}
    if options:
        paths |= {path for path in (options.calibrate, options.text) if path}
    parts = [str(CONVERTER_VERSION), repr(options), manifest.to_json()]
    for path in sorted(paths):
        stat = path.stat()
        parts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write_modules(
    plan: Plan, work: Path, recorded: Mapping[str, Checksums], advance: Advance
) -> dict[str, str]:
    """Write all arrays, largest modules first. Returns their checksums."""
    (work / PARAMS).mkdir(exist_ok=True)
    stopping = threading.Event()

    def count(size: int) -> None:
        if stopping.is_set():
            raise CancelledError
        advance(size)

    largest_first = sorted(plan.modules, key=lambda path: -_nbytes(plan.modules[path]))
    written: dict[str, Checksums] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = {
            pool.submit(
                _write_module, path, plan.modules[path], work, recorded.get(path), count
            ): path
            for path in largest_first
        }
        try:
            for future in as_completed(futures):
                path = futures[future]
                written[path] = future.result()
                journal.record(work, path, written[path])
        except BaseException as error:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                _log.warning("interrupted: the same command continues from %s", work)
            raise
    return {name: sha256 for path in plan.modules for name, sha256 in written[path].items()}


def _write_module(
    path: str, module: Module, work: Path, recorded: Checksums | None, advance: Advance
) -> Checksums:
    """Write a module's arrays, unless they exist as recorded. Returns checksums by array."""
    arrays = {_array_path(path, leaf): array for leaf, array in module.arrays.items()}
    if recorded and all(
        holds(work / name, array.dtype, array.shape, recorded.get(name, ""), lambda size: None)
        for name, array in arrays.items()
    ):
        advance(_nbytes(module))
        return recorded
    return {
        name: write_array(work / name, array.dtype, array.shape, pieces(array), advance)
        for name, array in arrays.items()
    }


def _file_checksums(work: Path) -> dict[str, str]:
    """Return the checksum of every file beside the arrays, by path."""
    files = [path for parent in (work, work / PARAMS) for path in parent.iterdir()]
    return {
        path.relative_to(work).as_posix(): file_sha256(path)
        for path in sorted(files)
        if path.is_file() and path.name not in (MANIFEST, JOURNAL)
    }
