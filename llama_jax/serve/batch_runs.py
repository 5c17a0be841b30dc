"""This module runs OpenAI's batches in a server, beside the requests of its clients.

One batch runs at a time, the oldest first. It uses half of the engine's slots while clients have
requests, and otherwise all of them. Its answers go through a `resumable_file`, so that a restarted
server continues it.
"""

import asyncio
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO

from llama_jax.jsonl import json_line, read_jsonl
from llama_jax.resumable import ResumableFile, resumable_file, survey
from llama_jax.serve.batch import ENDPOINTS, answers
from llama_jax.serve.batch_store import (
    MAX_OPEN_BATCHES,
    BatchError,
    BatchErrors,
    BatchObject,
    BatchStore,
    RequestCounts,
)
from llama_jax.serve.errors import ApiError, bad_request
from llama_jax.serve.replies import new_id
from llama_jax.serve.service import Service

_log = logging.getLogger(__name__)

MAX_LINES = 50_000
_MOST_ERRORS = 20  # of a file's lines that are told


class BatchRuns:
    """Runs the batches of a store. For use in the event loop only."""

    def __init__(self, service: Service, store: BatchStore) -> None:
        self._service, self.store = service, store
        self._is_new = asyncio.Event()
        self._answering: tuple[str, asyncio.Future[None]] | None = None

    async def create(
        self, input_file_id: str, endpoint: str, metadata: dict[str, str] | None, owner: str
    ) -> BatchObject:
        seen = {each.id for each in self.store.files() if each.is_seen_by(owner)}
        if input_file_id not in seen:
            raise bad_request(f"there is no file {input_file_id[:100]!r}", "input_file_id")
        if endpoint not in ENDPOINTS:
            raise bad_request(f"endpoint must be one of {', '.join(ENDPOINTS)}", "endpoint")
        own = [each for each in self.store.batches() if each.owner == owner]
        if sum(each.is_open for each in own) >= MAX_OPEN_BATCHES:
            raise ApiError(
                429, f"{MAX_OPEN_BATCHES} batches are waiting; try again later",
                type="rate_limit_error", code="queue_full", retry_after=60,
            )  # fmt: skip
        batch = BatchObject(
            id=new_id("batch"), endpoint=endpoint, input_file_id=input_file_id,
            completion_window="24h", created_at=_now(), request_counts=RequestCounts(),
            metadata=metadata, owner=owner,
        )  # fmt: skip
        await asyncio.to_thread(self.store.save, batch)
        self._is_new.set()
        return batch

    async def cancel(self, batch_id: str, owner: str) -> BatchObject:
        batch = self.store.batch(batch_id, owner)
        if batch.status not in ("validating", "in_progress"):
            raise bad_request(f"the batch is {batch.status} and cannot be cancelled", "id")
        batch.status, batch.cancelling_at = "cancelling", _now()
        await asyncio.to_thread(self.store.save, batch)
        if self._answering and self._answering[0] == batch_id:
            self._answering[1].cancel()
        return batch

    def check_unused(self, file_id: str) -> None:
        """Raises `ApiError` if an unfinished batch reads the file."""
        for batch in self.store.batches():
            if batch.is_open and batch.input_file_id == file_id:
                raise bad_request(f"{batch.id} still reads the file", "id")

    async def run(self) -> None:
        """Runs batches until it is cancelled or the server shuts down."""
        if not await self._service.ready():
            return
        while not (self._service.thread.failure or self._service.is_draining):
            self._is_new.clear()
            batch = next((each for each in self.store.batches() if each.is_open), None)
            if batch is None:
                await self._is_new.wait()
                continue
            try:
                await self._run(batch)
            except Exception as error:
                if self._service.thread.failure or self._service.is_draining:
                    return  # it goes on when the server is back
                _log.error("%s ended by %s", batch.id, type(error).__name__)
                await self._fail(batch, [_server_error(error)])

    async def _run(self, batch: BatchObject) -> None:
        path = self.store.content(batch.input_file_id, batch.owner)
        if batch.status == "validating":
            total, mistakes = await asyncio.to_thread(_check, str(path), batch.endpoint)
            if mistakes:
                await self._fail(batch, mistakes)
                return
            batch.request_counts.total = total
            if batch.status == "validating":  # nobody has cancelled it meanwhile
                batch.status, batch.in_progress_at = "in_progress", _now()
                await asyncio.to_thread(self.store.save, batch)
        _, digest = await asyncio.to_thread(survey, str(path))
        llm = self._service.llm
        settings = {"input": digest, "model": llm.manifest.digest, "max_seq_len": llm.max_seq_len}
        answers_at = self.store.answers(batch)
        if not answers_at.exists():
            with ExitStack() as stack:
                file = await asyncio.to_thread(
                    stack.enter_context, resumable_file(str(answers_at), settings, overwrite=False)
                )
                await self._answer(batch, str(path), file)
        if batch.status == "in_progress":
            batch.status, batch.finalizing_at = "finalizing", _now()
        await asyncio.to_thread(self._finalize, batch)

    async def _answer(self, batch: BatchObject, path: str, file: ResumableFile) -> None:
        """Answers the lines that have no answer yet, until a client cancels the batch."""
        if batch.is_cancelling:
            return
        work = asyncio.ensure_future(self._answer_lines(batch, path, file))
        self._answering = batch.id, work
        try:
            await work
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not batch.is_cancelling or (task and task.cancelling()):
                raise
        finally:
            self._answering = None

    async def _answer_lines(self, batch: BatchObject, path: str, file: ResumableFile) -> None:
        counts = batch.request_counts
        done = await asyncio.to_thread(lambda: [_is_right(line) for line in file.lines()])
        counts.completed, counts.failed = sum(done), len(done) - sum(done)
        lines = (line for _, line in itertools.islice(read_jsonl(path), len(done), None))

        def write(text: str) -> None:
            file.write(text)
            file.flush()

        async for answer in answers(self._service, lines, self._most):
            line = json_line(answer) + "\n"
            await asyncio.to_thread(write, line)
            if _is_right(line):
                counts.completed += 1
            else:
                counts.failed += 1

    def _most(self, under_way: int) -> int:
        """Returns the most lines that may run at the same time."""
        slots = self._service.llm.engine.options.max_batch_size
        is_alone = self._service.thread.num_open <= under_way
        return slots if is_alone else max(1, slots // 2)

    def _finalize(self, batch: BatchObject) -> None:
        """Writes the two files of a batch's answers, and sets its final status."""
        answers_at = self.store.answers(batch)
        with answers_at.open("rb") as file, _temporary() as right, _temporary() as wrong:
            counts = batch.request_counts
            counts.completed = counts.failed = 0
            for line in file:
                if _is_right(line):
                    counts.completed += 1
                    right.write(line)
                else:
                    counts.failed += 1
                    wrong.write(line)
            for kind, part in (("output", right), ("error", wrong)):
                if part.tell():
                    name = f"{batch.id}_{kind}.jsonl"
                    made = self.store.add(part, name, "batch_output", batch.owner)
                    setattr(batch, f"{kind}_file_id", made.id)
        if batch.is_cancelling:
            batch.status, batch.cancelled_at = "cancelled", _now()
        else:
            batch.status, batch.completed_at = "completed", _now()
        self.store.save(batch)
        self.store.forget_answers(batch)

    async def _fail(self, batch: BatchObject, mistakes: list[BatchError]) -> None:
        batch.status, batch.failed_at = "failed", _now()
        batch.errors = BatchErrors(data=mistakes)
        try:
            await asyncio.to_thread(self.store.forget_answers, batch)
            await asyncio.to_thread(self.store.save, batch)
        except OSError as error:
            _log.error("%s cannot be kept: %s", batch.id, error.strerror)


def _now() -> int:
    return int(time.time())


def _temporary() -> BinaryIO:
    return tempfile.SpooledTemporaryFile(1 << 20)  # type: ignore[return-value]


def _is_right(line: str | bytes) -> bool:
    response = json.loads(line)["response"]
    return response is not None and response["status_code"] == 200


def _server_error(error: Exception) -> BatchError:
    """Returns an error of the server itself, without any user's text."""
    if isinstance(error, FileExistsError):
        text = "the server was started again with another model or context than it began with"
        return BatchError(code="model_changed", line=None, message=text)
    kind = error.strerror if isinstance(error, OSError) else type(error).__name__
    return BatchError(code="server_error", line=None, message=f"the server failed: {kind}")


def _check(path: str, endpoint: str) -> tuple[int, list[BatchError]]:
    """Returns the number of lines in a batch's file, and the first mistakes in them."""
    seen: set[str] = set()
    mistakes: list[BatchError] = []
    number = 0
    for count, (number, line) in enumerate(read_jsonl(path), 1):
        if count > MAX_LINES:
            mistakes.append(_mistake(number, f"more than {MAX_LINES:,} lines", "too_many_lines"))
        else:
            mistakes += _mistakes(number, line, endpoint, seen)
        if count > MAX_LINES or len(mistakes) >= _MOST_ERRORS:
            break
    if not number:
        mistakes.append(BatchError(code="empty_file", line=None, message="the file has no lines"))
    return len(seen), mistakes


def _mistakes(
    number: int, line: dict[str, object] | ValueError, endpoint: str, seen: set[str]
) -> Iterator[BatchError]:
    """Yields the mistakes in a line. seen: custom ids, to which its own is added."""
    if isinstance(line, ValueError):
        yield _mistake(number, str(line), "invalid_json_line")
        return
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or custom_id in seen:
        text = "custom_id: expected a text that no other line has"
        yield _mistake(number, text, "invalid_custom_id", "custom_id")
    else:
        seen.add(custom_id)
    if line.get("url") != endpoint:
        yield _mistake(number, f"url: expected {endpoint}, as the batch has", "invalid_url", "url")
    if line.get("method") != "POST":
        yield _mistake(number, "method: expected POST", "invalid_method", "method")
    if not isinstance(line.get("body"), dict):
        yield _mistake(number, "body: expected an object", "invalid_request", "body")


def _mistake(number: int, message: str, code: str, param: str | None = None) -> BatchError:
    return BatchError(code=code, line=number, message=message[:500], param=param)
