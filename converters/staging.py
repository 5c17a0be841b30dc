"""A directory that appears whole or not at all, whoever else is writing the same one.

The work happens in `.<name>.converting` beside the target, whose file lock says that its writer
lives: what a killed writer left behind is unlocked, and the next one clears it away.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)


@contextmanager
def staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """An empty directory to fill, which becomes `target` when the block ends without an error.

    Waits for another process that is writing the same target. An existing target is replaced only
    then. Raises FileExistsError if it exists and `overwrite` is false.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = target.with_name(f".{target.name}.replaced")
    lock, work = _claim(target.with_name(f".{target.name}.converting"))
    try:
        if replaced.exists():  # a writer was killed between the two renames below
            if target.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(target)
        if target.exists() and not overwrite:
            raise FileExistsError(
                f"{target} exists already. Choose another target, or overwrite it (--overwrite)."
            )
        yield work
        _sync(work)
        if target.exists():
            target.rename(replaced)
        work.rename(target)
        _fsync(target.parent)
        if replaced.exists():
            shutil.rmtree(replaced)
    finally:
        if _is(work, lock):
            shutil.rmtree(work)
        os.close(lock)


def _claim(work: Path) -> tuple[int, Path]:
    """Make `work` an empty directory that this process alone has locked."""
    while True:
        work.mkdir(exist_ok=True)
        try:
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # its writer just finished
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("waiting for another process that is writing %s", work)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is(work, lock):
            for entry in work.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
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
