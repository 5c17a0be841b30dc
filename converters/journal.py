"""What a conversion has finished, so that the same one continues after a kill.

A text file in the staging directory: a fingerprint of the conversion, then a line of JSON for each
module, `[path, {array: sha256}]`, appended once its arrays are on the disk. Nothing hangs on these
lines being there or being whole: arrays are checked before they are trusted, and what is missing is
done again.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from converters.staging import clear

JOURNAL = "journal.jsonl"
Checksums = Mapping[str, str]


def resume(work: Path, fingerprint: str) -> dict[str, Checksums]:
    """What an interrupted run recorded, by module path; a journal to continue is there afterwards.

    What another conversion than that of this fingerprint left in `work` is removed.
    """
    recorded = _read(work / JOURNAL, fingerprint)
    if not recorded:
        clear(work)
    lines = [fingerprint, *(json.dumps(entry) for entry in recorded.items())]
    fresh = work / f"{JOURNAL}.new"
    fresh.write_text("".join(f"{line}\n" for line in lines))
    fresh.replace(work / JOURNAL)  # without a line that the kill left unfinished
    return recorded


def record(work: Path, path: str, checksums: Checksums) -> None:
    """Note that a module's arrays are written, with their checksums by name."""
    with (work / JOURNAL).open("a") as journal:
        journal.write(f"{json.dumps([path, checksums])}\n")


def _read(journal: Path, fingerprint: str) -> dict[str, Checksums]:
    try:
        first, *lines = journal.read_text(encoding="utf-8").split("\n")[:-1]
        return dict(map(json.loads, lines)) if first == fingerprint else {}
    except (OSError, ValueError, TypeError):  # none, or one that a power cut left unreadable
        return {}
