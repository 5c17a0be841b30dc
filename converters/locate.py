"""Finds the directory of a checkpoint by its path or hub id.

Imports no JAX, so that a wrong name is reported at once.
"""

import re
from pathlib import Path

from llama_jax.errors import CheckpointError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def locate(path_or_id: str | Path) -> Path:
    """Return the directory at a path, or that of a hub id ("org/name").

    A hub id is downloaded, unless it was before.

    Raises `CheckpointError` for a name that is neither, and for an id that cannot be downloaded.
    """
    try:
        path = Path(path_or_id).expanduser()
    except RuntimeError as error:  # "~name" of an unknown user
        raise CheckpointError(f"{path_or_id}: {error}") from error
    return path if path.exists() else _download(str(path_or_id))


def _download(hub_id: str) -> Path:
    if not _HUB_ID.fullmatch(hub_id):
        raise CheckpointError(
            f"{hub_id} is neither a directory nor a Hugging Face hub id (org/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from converters.source import OLDER_FILES, SAFETENSORS, WANTED_FILES

    try:
        path = Path(snapshot_download(hub_id, allow_patterns=[*WANTED_FILES]))
        if not any(path.glob(SAFETENSORS)):
            path = Path(snapshot_download(hub_id, allow_patterns=[*WANTED_FILES, *OLDER_FILES]))
        return path
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"there is no directory {hub_id}, and it could not be downloaded from the Hugging Face "
            f"hub: {error}\nIf it is gated, log in with `hf auth login`; without a network, give "
            "the path of a downloaded directory."
        ) from error
