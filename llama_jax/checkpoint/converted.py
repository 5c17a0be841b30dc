"""Recognises the directory of a converted checkpoint (see `checkpoint.store`). Needs no JAX."""

from pathlib import Path

from llama_jax.errors import CheckpointError
from llama_jax.json_file import is_there

MANIFEST = "manifest.json"
PARAMS = "params"


def is_converted(directory: Path) -> bool:
    """Return whether a directory is a converted checkpoint.

    Raises `CheckpointError` if the directory may not be read.
    """
    return is_there(directory / MANIFEST)


def not_converted(directory: str | Path) -> CheckpointError:
    """Return the error for a directory that is not a converted checkpoint but should be one."""
    return CheckpointError(
        f"{directory} is not a converted checkpoint: it has no {MANIFEST}. Convert one with "
        "llama-jax convert."
    )
