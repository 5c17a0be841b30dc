"""Resolves the name of a checkpoint to a converted directory: converts once, then finds it."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from converters.locate import locate
from converters.source import CONVERTER_VERSION, OLDER_FILES, WANTED_FILES, published_name
from llama_jax.checkpoint.converted import is_converted
from llama_jax.checkpoint.store import CheckpointError

if TYPE_CHECKING:
    from converters.quantize import Layout


def resolve(
    path_or_id: str | Path,
    cache_dir: str | Path | None = None,
    *,
    quantize: "Layout | None" = None,
    progress: bool = True,
) -> Path:
    """Return the converted directory of a converted or published directory, or a hub id.

        resolve("meta-llama/Llama-3.1-8B-Instruct")    # ~/.cache/llama_jax/...

    A directory of Hugging Face's or Meta's files is converted once into `cache_dir` (by default
    `$LLAMA_JAX_CACHE`, or else `~/.cache/llama_jax`), and found there as long as its files keep
    their sizes and times. A hub id ("org/name") is downloaded first. Processes that resolve the
    same checkpoint at the same time share one conversion.

    Raises `CheckpointError` for a path that is none of these, for an id that cannot be downloaded,
    and for a checkpoint that `convert` refuses.
    """
    path = locate(path_or_id)
    if is_converted(path):
        if quantize is not None:
            raise CheckpointError(
                f"{path} is converted already and quantize={quantize!r} cannot be applied; convert "
                "the original again"
            )
        return path
    name = published_name(path.resolve()).rpartition("/")[2]
    target = _cache(cache_dir) / f"{name}-{_fingerprint(path, quantize)}"
    if not target.exists():
        from converters.pipeline import convert  # slow to import, and rarely needed

        try:
            convert(path, target, quantize=quantize, progress=progress)
        except FileExistsError:  # another process was faster
            if not is_converted(target):
                raise
        except OSError as error:
            failed = Path(str(error.filename))
            if not (failed.is_relative_to(target.parent) or target.is_relative_to(failed)):
                raise
            raise CheckpointError(
                f"{path} is converted into {target.parent}, which cannot be written: "
                f"{error.strerror}. Set LLAMA_JAX_CACHE to a directory that can be."
            ) from error
    return target


def _cache(cache_dir: str | Path | None) -> Path:
    root = cache_dir or os.environ.get("LLAMA_JAX_CACHE") or Path.home() / ".cache" / "llama_jax"
    return Path(root).expanduser().absolute() / "converted"


def _fingerprint(directory: Path, quantize: str | None) -> str:
    """Hash everything that the conversion depends on: its version, options, files' identities."""
    wanted = [path for pattern in [*WANTED_FILES, *OLDER_FILES] for path in directory.glob(pattern)]
    parts = [f"{CONVERTER_VERSION} {quantize}"]
    for path in sorted(wanted):
        stat = path.stat() if path.exists() else path.lstat()
        parts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
