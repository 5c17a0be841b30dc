"""This module keeps OpenAI's files and batches in a directory, where they survive a restart.

`files/ID` is a file's content and `files/ID.json` its description; `batches/ID.json` is a batch.
All descriptions are in memory too. Files are written atomically.

What a client with a key made does not exist for others: a digest of the key, with a salt that the
directory keeps for its user alone, is recorded as its owner. What a client without a key made has
the owner "", and is everybody's.
"""

import fcntl
import hmac
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema

from llama_jax.serve.errors import ApiError, bad_request
from llama_jax.serve.replies import new_id

# Of one owner.
MAX_FILES = 1000
MAX_BATCHES = 1000  # of which the oldest that have ended are forgotten
MAX_OPEN_BATCHES = 100

OPEN = ("validating", "in_progress", "finalizing", "cancelling")


class _Owned(BaseModel):
    owner: SkipJsonSchema[str] = ""  # never part of a reply

    def is_seen_by(self, owner: str) -> bool:
        return self.owner in ("", owner)


class FileObject(_Owned):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    has_more: Literal[False] = False


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class BatchError(BaseModel):
    code: str
    line: int | None
    message: str
    param: str | None = None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchObject(_Owned):
    """A batch. Times are in seconds since 1970, or None for events that have not happened."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled"
    ] = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None

    @property
    def is_open(self) -> bool:
        return self.status in OPEN

    @property
    def is_cancelling(self) -> bool:
        """Returns whether a client wants it to end early."""
        return self.status == "cancelling"


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchStore:
    """Files and batches in a directory that no other process uses.

    Raises OSError where that cannot be, ValueError for a damaged record.
    """

    def __init__(self, directory: Path) -> None:
        self._files_at, self._batches_at = directory / "files", directory / "batches"
        for each in (self._files_at, self._batches_at):
            each.mkdir(parents=True, exist_ok=True)
        self._lock = (directory / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another server uses {directory}") from None
        self._salt = _salt(directory / "salt")
        self._files = _read(self._files_at, FileObject)
        self._batches = _read(self._batches_at, BatchObject)
        for path in self._files_at.iterdir():  # uploads that were cut short
            if path.name.startswith("file-") and path.stem not in self._files:
                path.unlink()

    def close(self) -> None:
        self._lock.close()

    def owner_with(self, key: str) -> str:
        """Returns the owner that a client with a key is; "" for a client without."""
        return key and hmac.digest(self._salt, key.encode(), "sha256").hex()

    def files(self) -> list[FileObject]:
        """Returns all files, the oldest first."""
        return list(self._files.values())  # at once: threads add and delete

    def batches(self) -> list[BatchObject]:
        """Returns all batches, the oldest first."""
        return list(self._batches.values())

    def file(self, file_id: str, owner: str) -> FileObject:
        """Returns a file. Raises `ApiError` for one that does not exist for `owner`."""
        return _found(self._files, file_id, owner, "file")

    def batch(self, batch_id: str, owner: str) -> BatchObject:
        """Returns a batch. Raises `ApiError` for one that does not exist for `owner`."""
        return _found(self._batches, batch_id, owner, "batch")

    def content(self, file_id: str, owner: str) -> Path:
        """Returns the path of a file's content."""
        return self._files_at / self.file(file_id, owner).id

    def answers(self, batch: BatchObject) -> Path:
        """Returns the path of a batch's answers until it is complete."""
        return self._batches_at / f"{batch.id}.jsonl"

    def forget_answers(self, batch: BatchObject) -> None:
        path = self.answers(batch)
        for suffix in ("", ".partial", ".journal"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)

    def check_room(self, owner: str) -> None:
        if sum(each.owner == owner for each in self.files()) >= MAX_FILES:
            raise bad_request(f"there are {MAX_FILES} files, which is the most: delete some")

    def add(
        self, source: BinaryIO, filename: str, purpose: Literal["batch", "batch_output"], owner: str
    ) -> FileObject:
        """Stores a copy of a file, read from its start."""
        file = FileObject(
            id=new_id("file"), bytes=0, created_at=int(time.time()), filename=filename,
            purpose=purpose, owner=owner,
        )  # fmt: skip
        path = self._files_at / file.id
        try:
            source.seek(0)
            with path.open("wb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
            file.bytes = path.stat().st_size
            _write(path.with_name(f"{file.id}.json"), file)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self._files[file.id] = file
        return file

    def delete(self, file_id: str, owner: str) -> None:
        path = self.content(file_id, owner)
        del self._files[file_id]
        path.with_name(f"{file_id}.json").unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def save(self, batch: BatchObject) -> None:
        """Stores the state of a batch, and deletes its owner's oldest if there are too many."""
        self._batches[batch.id] = batch
        _write(self._batches_at / f"{batch.id}.json", batch)
        own = [each for each in self.batches() if each.owner == batch.owner]
        ended = [each.id for each in own if not each.is_open]
        for old in ended[: max(0, len(own) - MAX_BATCHES)]:
            del self._batches[old]
            (self._batches_at / f"{old}.json").unlink(missing_ok=True)


def _salt(path: Path) -> bytes:
    """Returns 16 random bytes, always the same ones, which only the directory's user can read."""
    if not path.exists():
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.urandom(16))
        os.replace(new, path)
    return path.read_bytes()


def _read[T: (FileObject, BatchObject)](directory: Path, kind: type[T]) -> dict[str, T]:
    """Returns the objects stored in a directory, by id, the oldest first."""
    found = []
    for path in directory.glob("*.json"):
        try:
            found.append(kind.model_validate_json(path.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    found.sort(key=lambda each: (each.created_at, each.id))
    return {each.id: each for each in found}


def _found[T: _Owned](known: Mapping[str, T], wanted: str, owner: str, what: str) -> T:
    if wanted not in known or not known[wanted].is_seen_by(owner):
        raise ApiError(404, f"there is no {what} {wanted[:100]!r}", param="id", code="not_found")
    return known[wanted]


def _write(path: Path, record: BaseModel) -> None:
    new = path.with_suffix(".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(record.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
