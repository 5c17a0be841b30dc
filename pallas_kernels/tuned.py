"""Reads and writes tuned configurations: one table per kind of GPU, tuned/<device>.json.

`python -m pallas_kernels.dev.tune` writes the table of the GPU that it runs on. Kernels look up
their configurations when they are lowered, and use a heuristic for problems without an entry.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pallas_kernels import device

FOLDER = Path(__file__).with_name("tuned")


def find(kernel: str, problem: str) -> Mapping[str, Any] | None:
    """Return the fields of a kernel's configuration for a problem on the GPU in use, if tuned."""
    kind = device.kind()
    entry = read(kind).get(kernel, {}).get(problem) if kind else None
    return entry["config"] if entry else None


@cache
def read(kind: str) -> Mapping[str, Any]:
    """Read a GPU's table: kernel to problem to {"config": fields, and what was measured}."""
    path = path_of(kind)
    return json.loads(path.read_text()) if path.exists() else {}


def write(kind: str, kernel: str, problem: str, entry: Mapping[str, Any]) -> None:
    """Add an entry to a GPU's table, or replace it."""
    table = dict(read(kind))
    table[kernel] = {**table.get(kernel, {}), problem: entry}
    FOLDER.mkdir(exist_ok=True)
    path_of(kind).write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    read.cache_clear()


def path_of(kind: str) -> Path:
    return FOLDER / f"{kind.lower().replace(' ', '_')}.json"
