"""OpenAI's files and batches (`--batch-dir`), by its own client over a socket."""

import errno
import json
import shutil
import socket
import time
from pathlib import Path

import httpx2
import openai
import pytest
from openai.types import Batch

from llama_jax import LLM
from llama_jax.engine.compile_cache import CompileReport
from llama_jax.resumable import ResumableFile
from llama_jax.serve import batch_runs, middleware
from tests.served import PATIENCE, Served, serving

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def llm() -> LLM:
    """Without the warm-up, see tests/test_serve.py."""
    llm = LLM.load(max_batch_size=4, max_seq_len=256, prefill_chunk=128, verbose=False)
    llm.warmup = lambda output_kinds, structured: CompileReport(0, 0, 0.0)
    return llm


@pytest.fixture
def server(llm, tmp_path):
    with serving(llm, batch_dir=tmp_path / "batches") as served:
        yield served


def lines(count: int, **changes) -> list[dict]:
    return [
        {
            "custom_id": f"line {i}", "method": "POST", "url": CHAT,
            "body": {"messages": [{"role": "user", "content": f"What is {i} + 5?"}], **changes},
        }
        for i in range(20, 20 + count)
    ]  # fmt: skip


def as_file(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def begin(client: openai.OpenAI, rows: list, **settings) -> Batch:
    file = client.files.create(file=("in.jsonl", as_file(rows)), purpose="batch")
    asked = {"endpoint": CHAT, "completion_window": "24h", **settings}
    return client.batches.create(input_file_id=file.id, **asked)


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    ends = time.monotonic() + PATIENCE
    while (found := client.batches.retrieve(batch.id)).status not in (
        "completed", "failed", "cancelled"
    ):  # fmt: skip
        assert time.monotonic() < ends, found
        time.sleep(0.05)
    return found


def answers(client: openai.OpenAI, file_id: str) -> list[dict]:
    return [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def kept(tmp_path: Path) -> list[str]:
    """What there is beside records and files."""
    names = [path.name for path in (tmp_path / "batches" / "batches").iterdir()]
    return [name for name in names if not name.endswith(".json")]


def leaves_nothing(tmp_path: Path) -> bool:
    """A batch's last state can be read a moment before its files are in order."""
    ends = time.monotonic() + PATIENCE
    while kept(tmp_path) and time.monotonic() < ends:
        time.sleep(0.05)
    return not kept(tmp_path)


def test_a_batch_is_uploaded_answered_and_downloaded(server, tmp_path):
    client = server.client()
    wrong = [{**lines(1, temperature="hot")[0], "custom_id": "hot"}]
    batch = begin(client, lines(6) + wrong, metadata={"for": "a test"})
    assert batch.status == "validating" and batch.metadata == {"for": "a test"}
    chat = client.chat.completions.create(  # beside it
        model="abacus", messages=[{"role": "user", "content": "What is 47 + 85?"}]
    )
    assert chat.choices[0].message.content == "132"
    done = ended(client, batch)
    counts = done.request_counts
    assert (done.status, counts.total, counts.completed, counts.failed) == ("completed", 7, 6, 1)
    found = answers(client, done.output_file_id)
    assert [each["custom_id"] for each in found] == [f"line {i}" for i in range(20, 26)]
    texts = [each["response"]["body"]["choices"][0]["message"]["content"] for each in found]
    assert sum(text == str(i + 5) for i, text in enumerate(texts, 20)) >= 5
    (error,) = answers(client, done.error_file_id)
    assert error["response"]["body"]["error"]["param"] == "temperature"
    output = client.files.retrieve(done.output_file_id)
    assert output.purpose == "batch_output" and output.bytes > 0 and leaves_nothing(tmp_path)
    assert [each.id for each in client.batches.list()] == [batch.id]
    results = {done.output_file_id, done.error_file_id}
    assert {each.id for each in client.files.list()} == {batch.input_file_id, *results}
    assert {each.id for each in client.files.list(purpose="batch_output")} == results
    assert client.files.delete(batch.input_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(batch.input_file_id)


def test_a_file_that_is_no_batch_is_told_line_by_line(server):
    client = server.client()
    rows = [
        *lines(1), {**lines(1)[0], "url": "/v1/completions"}, {"custom_id": 5}, "text",
        {**lines(2)[1], "method": "GET"},
    ]  # fmt: skip
    failed = ended(client, begin(client, rows))
    assert failed.status == "failed" and failed.output_file_id is None
    told = [(each.line, each.param) for each in failed.errors.data]
    assert told == [
        (2, "custom_id"), (2, "url"), (3, "custom_id"), (3, "url"), (3, "method"), (3, "body"),
        (4, None), (5, "method"),
    ]  # fmt: skip
    empty = ended(client, begin(client, []))
    assert empty.errors.data[0].code == "empty_file"


def test_a_batch_is_cancelled_and_its_file_is_in_use_until_then(server, llm, tmp_path):
    client = server.client()
    batch = begin(client, lines(40, max_tokens=200, ignore_eos=True))
    waiting = begin(client, lines(1))
    with pytest.raises(openai.BadRequestError, match="still reads"):
        client.files.delete(batch.input_file_id)
    assert [each.id for each in client.batches.list(limit=1)] == [waiting.id, batch.id]
    assert client.batches.cancel(batch.id).status == "cancelling"
    cancelled = ended(client, batch)
    assert cancelled.status == "cancelled" and cancelled.request_counts.completed < 40
    assert ended(client, waiting).status == "completed"
    with pytest.raises(openai.BadRequestError, match="completed and cannot"):
        client.batches.cancel(waiting.id)
    assert leaves_nothing(tmp_path)
    ends = time.monotonic() + PATIENCE
    while llm.engine.has_work and time.monotonic() < ends:
        time.sleep(0.02)
    assert llm.engine.pages.num_available == llm.engine.pages.num_pages


def test_a_batch_goes_on_where_a_server_was_stopped(llm, tmp_path, monkeypatch):
    rows = lines(12)
    written = ResumableFile.write
    texts: list[str] = []

    def write(self: ResumableFile, text: str) -> None:
        written(self, text)
        texts.append(text)
        if len(texts) == 3:
            served.service.thread.loop.call_soon_threadsafe(served.service.end_server)
            time.sleep(0.2)

    monkeypatch.setattr(ResumableFile, "write", write)
    directory = tmp_path / "batches"
    with serving(llm, batch_dir=directory) as served:
        batch = begin(served.client(), rows)
        assert served.ended.wait(PATIENCE)
    assert 3 <= len(texts) < 12 and kept(tmp_path)
    with serving(llm, batch_dir=directory) as served:
        done = ended(served.client(), batch)
        found = answers(served.client(), done.output_file_id)
    assert (done.status, done.request_counts.completed) == ("completed", 12)
    assert [each["custom_id"] for each in found] == [row["custom_id"] for row in rows]
    assert len(texts) == 12 and leaves_nothing(tmp_path)


def test_a_full_disk_ends_a_batch_and_nothing_else(server, tmp_path, monkeypatch):
    client = server.client()

    def full(self: ResumableFile) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ResumableFile, "flush", full)
        failed = ended(client, begin(client, lines(3)))
    assert failed.status == "failed" and "No space left" in failed.errors.data[0].message
    assert leaves_nothing(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", lambda source, target: full(None))
        with pytest.raises(openai.InternalServerError, match="No space left") as caught:
            begin(client, lines(1))
        assert caught.value.status_code == 507
    assert ended(client, begin(client, lines(1))).status == "completed"


def test_what_is_wrong_with_uploads_and_batches(server: Served, monkeypatch):
    def post(path: str, **sent) -> tuple[int, str | None]:
        reply = httpx2.post(server.url + path, timeout=PATIENCE, **sent)
        return reply.status_code, reply.json()["error"]["param"]

    file = {"file": ("a", b"{}")}
    assert post("/v1/files", files=file, data={"purpose": "fine-tune"}) == (400, "purpose")
    assert post("/v1/files", files=file) == (400, "purpose")
    assert post("/v1/files", files={"x": ("a", b"{}")}, data={"purpose": "batch"}) == (400, "file")
    assert post("/v1/files", json={"purpose": "batch"})[0] == 415
    expires = {"purpose": "batch", "expires_after[anchor]": "created_at"}
    assert post("/v1/files", files=file, data=expires) == (400, "expires_after[anchor]")
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert post("/v1/files", content=b"--y\r\n", headers=headers)[0] == 400
    monkeypatch.setattr(middleware, "MAX_FILE_BYTES", 1000)
    big = {"file": ("a", b"{}" * 1000)}
    assert post("/v1/files", files=big, data={"purpose": "batch"}) == (413, None)
    asked = {"input_file_id": "file-0", "endpoint": CHAT, "completion_window": "24h"}
    assert post("/v1/batches", json=asked) == (400, "input_file_id")
    expires = {"output_expires_after": {"anchor": "created_at", "seconds": 3600}}
    assert post("/v1/batches", json=asked | expires) == (400, "output_expires_after")
    assert post("/v1/batches", json=asked | {"completion_window": "1h"}) == (
        400,
        "completion_window",
    )
    asked["input_file_id"] = server.client().files.create(file=b"{}", purpose="batch").id
    assert post("/v1/batches", json=asked | {"endpoint": "/v1/embeddings"}) == (400, "endpoint")
    monkeypatch.setattr(batch_runs, "MAX_OPEN_BATCHES", 0)
    assert post("/v1/batches", json=asked)[0] == 429
    for path in ("files/..%2Flock", "files/../lock", "files/lock/content", "batches/x"):
        assert server.get(f"/v1/{path}").status_code == 404


def test_an_upload_that_breaks_off_leaves_nothing(server, tmp_path, caplog):
    head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    head += b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    address = server.url.removeprefix("http://").split(":")
    held = [socket.create_connection(address) for _ in range(16)]
    for count, sender in enumerate(held):
        sender.sendall(head + b"a" * count * 200_000)
    file = ("a", as_file(lines(1)))

    def upload_until_refused() -> None:
        ends = time.monotonic() + PATIENCE
        while time.monotonic() < ends:
            server.client().files.create(file=file, purpose="batch")

    with pytest.raises(openai.RateLimitError, match="16 files are being uploaded"):
        upload_until_refused()
    for sender in held:
        sender.close()
    made = server.client(max_retries=20).files.create(file=file, purpose="batch")
    assert made.filename == "a"
    names = {path.name for path in (tmp_path / "batches" / "files").iterdir()}
    known = {each.id for each in server.client().files.list()}
    assert names == known | {f"{each}.json" for each in known}
    assert "while a request was answered" not in caplog.text


def test_an_upload_that_stands_still_gives_its_place_to_another(server, monkeypatch):
    monkeypatch.setattr(middleware, "BODY_SECONDS", 0.3)
    head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Length: 5000000\r\n"
    head += b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as sender:
        sender.settimeout(PATIENCE)
        sender.sendall(head)
        assert sender.recv(1000).startswith(b"HTTP/1.1 408")
    assert not list(server.client().files.list())


def test_one_server_uses_a_directory(server, llm, tmp_path):
    from llama_jax.serve.batch_store import BatchStore

    with pytest.raises(FileExistsError, match="another server"):
        BatchStore(tmp_path / "batches")
    assert server.get("/v1/batches?limit=0").json()["error"]["param"] == "limit"


def test_files_and_batches_exist_only_for_the_key_that_made_them(llm, tmp_path):
    directory = tmp_path / "batches"
    with serving(llm, batch_dir=directory) as served:
        shared = served.client().files.create(file=("a", as_file(lines(1))), purpose="batch")
    kept = {shared.id}
    for _ in range(2):  # the second server reads what the first has kept
        with serving(llm, batch_dir=directory, api_keys=("one", "two")) as served:
            one, two = served.client(api_key="one"), served.client(api_key="two")
            own = begin(one, lines(1))
            done = ended(one, own)
            files = {own.input_file_id, done.output_file_id}
            kept |= files
            assert kept == {each.id for each in one.files.list()}
            assert [each.id for each in two.files.list()] == [shared.id]
            assert own.id in [each.id for each in one.batches.list()]
            assert not list(two.batches.list())
            for call in (two.batches.retrieve, two.batches.cancel):
                with pytest.raises(openai.NotFoundError):
                    call(own.id)
            for call in (two.files.retrieve, two.files.content, two.files.delete):
                for file_id in files:
                    with pytest.raises(openai.NotFoundError):
                        call(file_id)
            asked = {"endpoint": CHAT, "completion_window": "24h"}
            with pytest.raises(openai.BadRequestError, match="there is no file"):
                two.batches.create(input_file_id=own.input_file_id, **asked)
            headers = {"Authorization": "Bearer one"}
            for path in ("files", "batches", f"files/{own.input_file_id}", f"batches/{own.id}"):
                assert "owner" not in served.get(f"/v1/{path}", headers=headers).text
            assert "owner" not in served.get("/openapi.json", headers=headers).text
    assert (directory / "salt").stat().st_mode & 0o777 == 0o600
