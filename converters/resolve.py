"""From whatever names a checkpoint to a converted directory: convert once, find it again later."""

import hashlib
import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from converters.pipeline import CONVERTER_VERSION, convert
from converters.quantize import Layout
from converters.source import (
    BIN_FILES,
    META_CONFIG,
    META_FILES,
    META_SCALES,
    QUANTIZATION_FILE,
    SAFETENSORS,
    TOKENIZER_FILES,
    published_name,
)
from llama_jax.checkpoint import MANIFEST, CheckpointError

_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    QUANTIZATION_FILE,
    *TOKENIZER_FILES,
]
# The same weights again where there are safetensors.
_OLDER = [BIN_FILES, META_FILES, META_CONFIG, META_SCALES]
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def locate(path_or_id: str | Path) -> Path:
    """The directory that a name means: the one at this path, or that of a hub id ("org/name"),
    which is downloaded unless it was before.

    Raises `CheckpointError` for a name that is neither, and for an id that cannot be downloaded.
    """
    path = Path(path_or_id).expanduser()
    return path if path.exists() else _download(str(path_or_id))


def resolve(
    path_or_id: str | Path,
    cache_dir: str | Path | None = None,
    *,
    quantize: Layout | None = None,
    progress: bool = True,
) -> Path:
    """The converted directory for a converted or a published directory, or a hub id.

    A directory of Hugging Face's or Meta's files is converted once into `cache_dir` (default
    `$LLAMA_JAX_CACHE`, or else `~/.cache/llama_jax`) and found there as long as its files keep
    their sizes and times. A hub id ("org/name") is downloaded first. Processes that ask for the
    same checkpoint at the same time share one conversion.
    Raises `CheckpointError` for a path that is nothing of this, for an id that cannot be
    downloaded, and for whatever `convert` refuses.
    """
    path = locate(path_or_id)
    if (path / MANIFEST).is_file():
        if quantize is not None:
            raise CheckpointError(
                f"{path} is converted already and quantize={quantize!r} cannot be applied; convert "
                "the original again"
            )
        return path
    name = published_name(path.resolve()).rpartition("/")[2]
    target = _cache(cache_dir) / f"{name}-{_fingerprint(path, quantize)}"
    if not target.exists():
        try:
            convert(path, target, quantize=quantize, progress=progress)
        except FileExistsError:  # another process was faster
            if not (target / MANIFEST).is_file():
                raise
    return target


def _cache(cache_dir: str | Path | None) -> Path:
    root = cache_dir or os.environ.get("LLAMA_JAX_CACHE") or Path.home() / ".cache" / "llama_jax"
    return Path(root).expanduser().absolute() / "converted"


def _fingerprint(directory: Path, quantize: str | None) -> str:
    """A hash of what the conversion depends on: its version, its options, the files' identities."""
    wanted = [path for pattern in [*_WANTED, *_OLDER] for path in directory.glob(pattern)]
    parts = [f"{CONVERTER_VERSION} {quantize}"]
    for path in sorted(wanted):
        stat = path.stat() if path.exists() else path.lstat()
        parts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _download(hub_id: str) -> Path:
    if not _HUB_ID.fullmatch(hub_id):
        raise CheckpointError(
            f"{hub_id} is neither a directory nor a Hugging Face hub id (org/name)"
        )
    try:
        path = Path(snapshot_download(hub_id, allow_patterns=_WANTED))
        if not any(path.glob(SAFETENSORS)):
            path = Path(snapshot_download(hub_id, allow_patterns=[*_WANTED, *_OLDER]))
        return path
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"there is no directory {hub_id}, and it could not be downloaded from the Hugging Face "
            f"hub: {error}\nIf it is gated, log in with `hf auth login`; without a network, give "
            "the path of a downloaded directory."
        ) from error
