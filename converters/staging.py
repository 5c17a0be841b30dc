"""Makes a directory appear complete or not at all, even if several processes write it.

Files are written in `.<name>.converting` beside the target. A file lock there shows that its writer
is alive. The directory of a killed writer is unlocked, and the next writer clears it or continues.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.writing import is_empty

_log = logging.getLogger(__name__)


@contextmanager
def staged(target: Path, overwrite: bool, journal: str | None = None) -> Iterator[Path]:
    """Yield a directory to fill, which becomes `target` if the block ends without an error.

    Waits for another process that is writing the same target. An existing target is replaced only
    at the end; an empty directory needs no `overwrite`.

    journal: the name of a file in the directory that records finished work. With it, the directory
        of a killed writer is continued, that of an interrupted writer (Ctrl-C) is kept, and the
        journal is removed at the end. Without it, the directory is empty at first.

    Raises FileExistsError if the target is not empty and `overwrite` is false, and if the target or
    the directory is a link.
    """
    if target.is_symlink():
        raise FileExistsError(f"{target} is a link: give the directory itself, or remove the link")
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = target.with_name(f".{target.name}.replaced")
    lock, work = _claim(target.with_name(f".{target.name}.converting"))
    if journal is None or not (work / journal).is_file():
        clear(work)
    try:
        if replaced.exists():  # a writer was killed between the two renames below
            if target.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(target)
        if target.exists() and not overwrite and not is_empty(target):
            raise FileExistsError(
                f"{target} exists already. Choose another target, or overwrite it (--overwrite)."
            )
        yield work
        _sync(work)
        if journal is not None:
            (work / journal).unlink()
        if target.exists():
            target.rename(replaced)
        work.rename(target)
        _fsync(target.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    except BaseException as error:
        if _is(work, lock) and (journal is None or isinstance(error, Exception)):
            shutil.rmtree(work)
        raise
    finally:
        os.close(lock)


def clear(directory: Path) -> None:
    """Remove everything in a directory."""
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _claim(work: Path) -> tuple[int, Path]:
    """Make the directory `work`, locked by this process alone."""
    while True:
        if work.is_symlink():
            raise FileExistsError(f"{work} is a link where a directory is to be made: remove it")
        work.mkdir(exist_ok=True)
        try:
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # its writer just finished
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process that is writing %s", work)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is(work, lock):
            return lock, work
        os.close(lock)


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sync(directory: Path) -> None:
    """Flush every file below a directory, and the directories, to the disk."""
    for path in [*directory.rglob("*"), directory]:
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
