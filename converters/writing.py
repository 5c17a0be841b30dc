"""Checks a writer's target and the free space, and shows its progress."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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

from llama_jax.checkpoint.converted import PARAMS, is_converted
from llama_jax.errors import CheckpointError
from llama_jax.json_file import read_object
from llama_jax.text.chat_files import TEMPLATE_DIRECTORY

# Bytes besides the arrays: the file system's metadata, and rounding to blocks.
_SPARE_BYTES = 16 * 1024 * 1024
# The field of config.json that marks an export.
EXPORT_MARK = "llama_jax_version"


def check_paths(
    source: Path, target: Path, overwrite: bool, kind: str, is_kind: Callable[[Path], bool]
) -> None:
    """Refuse a target around or inside the source, one inside a directory that this project wrote,
    and one that exists.

    An existing target may be empty or, with `overwrite`, a directory that this project wrote,
    unless there is another one inside.

    source: resolved.
    kind, is_kind: a description of targets that may be replaced, and a function that recognises
        them.
    Raises `CheckpointError` or FileExistsError.
    """
    if source.is_relative_to(target.resolve()):
        raise CheckpointError(f"{target} holds the source {source}: choose another target")
    if target.resolve().is_relative_to(source):
        raise CheckpointError(f"{target} lies inside the source {source}: choose another target")
    for parent in target.resolve().parents:
        if (is_converted(parent) and (parent / PARAMS).is_dir()) or _is_export(parent):
            raise CheckpointError(
                f"{target} lies inside the checkpoint {parent}: choose another target"
            )
    if not target.exists() or is_empty(target):
        return
    if not is_kind(target):
        raise FileExistsError(
            f"{target} exists already and is not {kind}, so it is never overwritten. Remove it "
            "yourself or choose another target."
        )
    if not overwrite:
        raise FileExistsError(
            f"{target} exists already. Choose another target, or overwrite it (--overwrite)."
        )
    for inner in sorted(target.iterdir()):
        if inner.is_dir() and inner.name not in (PARAMS, TEMPLATE_DIRECTORY):
            raise FileExistsError(
                f"{target} cannot be overwritten, because {inner.name} inside was not written with "
                "it and would be lost. Move it away, or choose another target."
            )


def check_conversion(source: Path, target: Path, overwrite: bool) -> None:
    """Call `check_paths` for a conversion."""
    check_paths(source, target, overwrite, "a converted checkpoint", is_converted)


def check_export(source: Path, target: Path, overwrite: bool) -> None:
    """Call `check_paths` for an export."""
    check_paths(source, target, overwrite, "an export of llama-jax", _is_export)


def _is_export(directory: Path) -> bool:
    try:
        return EXPORT_MARK in read_object(directory / "config.json")
    except CheckpointError:
        return False


def is_empty(directory: Path) -> bool:
    """Return whether this is a directory with nothing in it, as a target may be."""
    return directory.is_dir() and not any(directory.iterdir())


def check_space(target: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) unless `needed` bytes fit beside `target`, whose parent exists."""
    free = shutil.disk_usage(target.parent).free
    if free < needed + _SPARE_BYTES:
        raise OSError(
            errno.ENOSPC,
            f"not enough disk space: {decimal(needed)} needed, {decimal(free)} free",
            str(target.parent),
        )


@contextmanager
def full_disk_explained(target: Path, needed: int) -> Iterator[None]:
    """Make the OSError of a disk that fills up in this block say what to do."""
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


@contextmanager
def byte_progress(description: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr with size, rate and time left. Gives a function that new bytes go to."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        yield partial(bar.advance, bar.add_task(description, total=total))


def package_version() -> str:
    """Return this project's version, for the files it writes."""
    try:
        return version("llama-jax")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
