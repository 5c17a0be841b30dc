"""Records what a conversion has finished, so that the same one can continue after a kill.

The journal is a text file in the staging directory: a fingerprint of the conversion, then a line of
JSON for each module, `[path, {array: sha256}]`, appended once its arrays are on the disk. A missing
or truncated line does no harm: arrays are checked before they are used, and missing ones are
written again.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from converters.staging import clear

JOURNAL = "journal.jsonl"
Checksums = Mapping[str, str]


def resume(work: Path, fingerprint: str) -> dict[str, Checksums]:
    """Return what an interrupted run recorded, by module path, and leave a journal to continue.

    Files of a conversion with another fingerprint are removed from `work`.
    """
    recorded = _read(work / JOURNAL, fingerprint)
    if not recorded:
        clear(work)
    lines = [fingerprint, *(json.dumps(entry) for entry in recorded.items())]
    fresh = work / f"{JOURNAL}.new"
    fresh.write_text("".join(f"{line}\n" for line in lines))
    fresh.replace(work / JOURNAL)  # drops a truncated last line
    return recorded


def record(work: Path, path: str, checksums: Checksums) -> None:
    """Record that a module's arrays are written. checksums: by the arrays' names."""
    with (work / JOURNAL).open("a") as journal:
        journal.write(f"{json.dumps([path, checksums])}\n")


def _read(journal: Path, fingerprint: str) -> dict[str, Checksums]:
    try:
        first, *lines = journal.read_text(encoding="utf-8").split("\n")[:-1]
        return dict(map(json.loads, lines)) if first == fingerprint else {}
    except (OSError, ValueError, TypeError):  # missing, or damaged by a power cut
        return {}
