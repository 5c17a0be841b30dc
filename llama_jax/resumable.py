"""Writes a file of lines that can be continued after an interrupted run.

The lines of OUT are in OUT.partial until it is complete; OUT.journal has the settings of the run. A
run with the same settings continues after the last complete line, so nothing is lost or written
twice.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


@dataclass(frozen=True)
class ResumableFile:
    """The file to which a run appends, after the lines of an earlier one."""

    file: BinaryIO

    def lines(self) -> Iterator[bytes]:
        """Yield the lines that the file has already."""
        self.file.seek(0)
        yield from self.file

    def write(self, text: str) -> None:
        with _named(self.file):
            self.file.write(text.encode())

    def flush(self) -> None:
        """Flush to disk, so that a kill loses nothing that was written."""
        with _named(self.file):
            self.file.flush()


def survey(path: str) -> tuple[int | None, str | None]:
    """Count the input's lines and compute a digest of it; None for stdin, which is read once."""
    if path == "-":
        return None, None
    if not os.path.isfile(path) and os.path.exists(path):
        raise ValueError(f"{path} is not a file, and it would be read twice; give - to read stdin")
    count, digest = 0, hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for line in file:
            digest.update(line)
            count += not line.isspace()
    if not count:
        raise ValueError(f"{path} has no lines")
    return count, digest.hexdigest()


@contextmanager
def resumable_file(
    path: str,
    settings: Mapping[str, Any],
    overwrite: bool,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[ResumableFile]:
    """Open the file `path` for lines; it appears once the block ends without an error.

    settings: JSON values that determine the lines.
    tell: called with a message about the file that is kept if the block ends with an error.

    Raises FileExistsError if another run is writing it, or if a run with other settings was
    interrupted and `overwrite` does not discard it.
    """
    target = Path(path).absolute()
    partial = target.with_name(f"{target.name}.partial")
    journal = target.with_name(f"{target.name}.journal")
    with _locked(journal) as notes:
        if not _continues(notes, partial, settings, overwrite):
            partial.unlink(missing_ok=True)
            _note(notes, settings)
        with partial.open("a+b") as file:
            _cut_torn_line(file)
            try:
                yield ResumableFile(file)
                with _named(file):
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                if file.seek(0, os.SEEK_END):
                    tell(f"{partial} has what was done: the same command continues from there")
                else:
                    partial.unlink()
                    journal.unlink()
                raise
        os.replace(partial, target)
        journal.unlink()


@contextmanager
def _named(file: BinaryIO) -> Iterator[None]:
    """Name the file in errors of writing, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = file.name
        raise


@contextmanager
def _locked(journal: Path) -> Iterator[BinaryIO]:
    """Open the journal, creating it if needed, for this process alone."""
    with journal.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another run is writing {journal.with_suffix('')}") from None
        yield file


def _continues(
    notes: BinaryIO, partial: Path, settings: Mapping[str, Any], overwrite: bool
) -> bool:
    """Return whether an earlier run with the same settings left `partial`."""
    if not partial.exists():
        return False
    notes.seek(0)
    written = notes.read()
    # The journal is written first, so a partial file without a complete one is not ours.
    earlier = json.loads(written) if written else {}
    differing = [name for name, value in settings.items() if earlier.get(name) != value]
    if differing and not overwrite:
        changes = ", ".join(
            f"{name}: {earlier.get(name)} -> {settings[name]}" for name in differing
        )
        raise FileExistsError(
            f"{partial} was begun with other settings ({changes}). Finish it with those, or "
            "discard it with --overwrite."
        )
    return not differing


def _note(notes: BinaryIO, settings: Mapping[str, Any]) -> None:
    notes.truncate(0)
    notes.write(json.dumps(settings).encode())
    notes.flush()
    os.fsync(notes.fileno())


def _cut_torn_line(file: BinaryIO) -> None:
    """Remove an incomplete last line, which a kill may leave."""
    file.seek(0)
    end = 0
    for line in file:
        if line.endswith(b"\n"):
            end += len(line)
    file.truncate(end)
