"""This module answers /v1/files and /v1/batches of OpenAI's API."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from llama_jax.serve.batch_runs import BatchRuns
from llama_jax.serve.batch_store import (
    BatchList,
    BatchObject,
    BatchStore,
    DeletedFile,
    FileList,
    FileObject,
)
from llama_jax.serve.errors import ApiError, bad_request
from llama_jax.serve.middleware import KEY
from llama_jax.serve.schemas import BatchRequest, check_unknown

_MAX_UPLOADS = 16  # at the same time; each is a temporary file before it is kept
_UPLOAD = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "format": "binary"},
                    "purpose": {"type": "string", "enum": ["batch"]},
                },
            }
        }
    },
}


def _owner(request: Request) -> str:
    store: BatchStore = request.app.state.batch_store
    return store.owner_with(request.scope[KEY])


_Owner = Annotated[str, Depends(_owner)]


def add_batches(app: FastAPI, runs: BatchRuns) -> None:
    """Adds the paths of files and batches."""
    _add_files(app, runs)
    store = app.state.batch_store = runs.store

    @app.post("/v1/batches", response_model=BatchObject, tags=["Batches"])
    async def create_batch(body: BatchRequest, owner: _Owner) -> Response:
        """Starts a batch: the lines of an uploaded file are answered."""
        check_unknown(body)
        with _storage():
            return _reply(
                await runs.create(body.input_file_id, body.endpoint, body.metadata, owner)
            )

    @app.get("/v1/batches", response_model=BatchList, tags=["Batches"])
    async def list_batches(
        owner: _Owner, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
    ) -> Response:
        """Lists batches, the newest first."""
        batches = [each for each in store.batches() if each.is_seen_by(owner)][::-1]
        if after is not None:
            ids = [each.id for each in batches]
            batches = batches[ids.index(store.batch(after, owner).id) + 1 :]
        shown = batches[:limit]
        return _reply(
            BatchList(
                data=shown,
                first_id=shown[0].id if shown else None,
                last_id=shown[-1].id if shown else None,
                has_more=len(batches) > limit,
            )
        )

    @app.get("/v1/batches/{batch_id}", response_model=BatchObject, tags=["Batches"])
    async def batch(batch_id: str, owner: _Owner) -> Response:
        """Returns the state of a batch."""
        return _reply(store.batch(batch_id, owner))

    @app.post("/v1/batches/{batch_id}/cancel", response_model=BatchObject, tags=["Batches"])
    async def cancel_batch(batch_id: str, owner: _Owner) -> Response:
        """Cancels a batch. Finished answers are kept."""
        with _storage():
            return _reply(await runs.cancel(batch_id, owner))


def _add_files(app: FastAPI, runs: BatchRuns) -> None:
    store, uploads = runs.store, asyncio.Semaphore(_MAX_UPLOADS)

    @app.post(
        "/v1/files", response_model=FileObject, tags=["Batches"],
        openapi_extra={"requestBody": _UPLOAD},
    )  # fmt: skip
    async def upload(request: Request, owner: _Owner) -> Response:
        """Stores a file of requests for a batch."""
        kind = request.headers.get("content-type", "")
        if not kind.lower().startswith("multipart/form-data"):
            raise ApiError(415, "the header Content-Type has to be multipart/form-data")
        store.check_room(owner)
        if uploads.locked():
            raise ApiError(
                429, f"{_MAX_UPLOADS} files are being uploaded; try again later",
                type="rate_limit_error", code="queue_full", retry_after=5,
            )  # fmt: skip
        with _storage():
            async with uploads, request.form(max_files=1, max_fields=8) as form:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile):
                    raise bad_request("file: expected a file in the form", "file")
                for name in form.keys() - {"file", "purpose"}:
                    raise bad_request(f"{name[:100]}: not supported by this server", name[:100])
                if purpose != "batch":
                    raise bad_request('purpose: only "batch" is possible', "purpose")
                name = (file.filename or "")[:255]
                return _reply(await asyncio.to_thread(store.add, file.file, name, "batch", owner))

    @app.get("/v1/files", response_model=FileList, tags=["Batches"])
    async def list_files(owner: _Owner, purpose: str | None = None) -> Response:
        """Lists files, the newest first: all of them, or those with a purpose."""
        files = [each for each in store.files() if each.is_seen_by(owner)][::-1]
        return _reply(FileList(data=[each for each in files if purpose in (None, each.purpose)]))

    @app.get("/v1/files/{file_id}", response_model=FileObject, tags=["Batches"])
    async def file(file_id: str, owner: _Owner) -> Response:
        return _reply(store.file(file_id, owner))

    @app.get("/v1/files/{file_id}/content", response_class=FileResponse, tags=["Batches"])
    async def content(file_id: str, owner: _Owner) -> Response:
        """Returns the content of a file: uploaded lines, or answers."""
        return FileResponse(store.content(file_id, owner), media_type="application/octet-stream")

    @app.delete("/v1/files/{file_id}", response_model=DeletedFile, tags=["Batches"])
    async def delete_file(file_id: str, owner: _Owner) -> Response:
        runs.check_unused(store.file(file_id, owner).id)
        with _storage():
            await asyncio.to_thread(store.delete, file_id, owner)
        return _reply(DeletedFile(id=file_id))


@contextmanager
def _storage() -> Iterator[None]:
    """Turns errors of the disk into replies with status 507."""
    try:
        yield
    except OSError as error:
        raise ApiError(
            507, f"the server cannot keep it: {error.strerror}", type="server_error", code="storage"
        ) from error


def _reply(model: BaseModel) -> Response:
    """Writes an object, or a list of them as `data`, without its owner."""
    text = model.model_dump_json(exclude={"owner": True, "data": {"__all__": {"owner"}}})
    return Response(text, media_type="application/json")
