"""Names in the directory of a converted checkpoint (see `checkpoint.store`). Needs no JAX."""

from pathlib import Path

from llama_jax.errors import CheckpointError
from llama_jax.json_file import is_there

MANIFEST = "manifest.json"
PARAMS = "params"


def is_converted(directory: Path) -> bool:
    """Whether a directory is a converted checkpoint.

    Raises `CheckpointError` for one that may not be looked into.
    """
    return is_there(directory / MANIFEST)


def not_converted(directory: str | Path) -> CheckpointError:
    """What to raise where a converted checkpoint is needed and there is none."""
    return CheckpointError(
        f"{directory} is not a converted checkpoint: it has no {MANIFEST}. Convert one with "
        "llama-jax convert."
    )
