"""Saves results of benchmarks: a table for people, and all figures for programs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save(path: Path, table: str, result: Mapping[str, Any]) -> None:
    """Write PATH.md and PATH.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(table)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
