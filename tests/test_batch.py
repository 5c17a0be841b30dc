"""`llama-jax batch`: the shipped model answers OpenAI's batch files."""

import errno
import json
from pathlib import Path

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from llama_jax.cli import main
from llama_jax.resumable import ResumableFile


def chat_line(number: int, **body) -> dict:
    messages = [{"role": "user", "content": f"What is {number} + 5?"}]
    return {
        "custom_id": f"line {number}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "abacus", "messages": messages, **body},
    }


LINES = [
    *(chat_line(number) for number in range(20, 30)),
    chat_line(1, temperature="hot"),
    chat_line(2, stream=True),
    chat_line(3, model="gpt-5"),
    {"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": {"prompt": "2, 4,"}},
    {"custom_id": "score", "method": "POST", "url": "/v1/score",
     "body": {"prompt": "2 + 2 =", "completions": [" 4", " 5"]}},
    {"custom_id": "files", "method": "POST", "url": "/v1/files", "body": {}},
    {"method": "POST", "url": "/v1/completions", "body": {"prompt": "no id"}},
]  # fmt: skip


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    text = "\n".join(map(json.dumps, LINES))
    path.write_text(f"{text}\n\nno JSON\n")
    return path


def run(*arguments: str | Path) -> int:
    settings = ("--max-batch-size", "4", "--max-seq-len", "512")
    with pytest.raises(SystemExit) as ended:
        main(["batch", *map(str, arguments), *settings])
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_a_batch_is_answered_resumed_and_never_overwritten(requests, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    flush, count = ResumableFile.flush, 0

    def full_after_five(self: ResumableFile) -> None:
        nonlocal count
        count += 1
        if count == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(self)

    monkeypatch.setattr(ResumableFile, "flush", full_after_five)
    assert run(requests, output) == 1
    assert "No space left" in capsys.readouterr().err and not output.exists()
    partial = output.with_name("out.jsonl.partial")
    kept = partial.read_text().splitlines()
    assert len(kept) >= 5
    monkeypatch.setattr(ResumableFile, "flush", flush)
    assert run(requests, output, "--served-model-name", "another") == 2
    assert "served_model_name: None -> another" in capsys.readouterr().err
    assert run(requests, output) == 0
    assert "9 answered" not in capsys.readouterr().err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [json.dumps(each, ensure_ascii=False) for each in answers[: len(kept)]] == kept
    assert [each["custom_id"] for each in answers] == [
        *(line.get("custom_id") for line in LINES), None
    ]  # fmt: skip
    right = 0
    for number, answer in zip(range(20, 30), answers, strict=False):
        assert answer["response"]["status_code"] == 200
        reply = ChatCompletion.model_validate(answer["response"]["body"])
        right += reply.choices[0].message.content == str(number + 5)
    assert right >= 9
    statuses = [each["response"] and each["response"]["status_code"] for each in answers[10:]]
    assert statuses == [400, 400, 404, 200, 200, 400, None, None]
    assert answers[10]["response"]["body"]["error"]["param"] == "temperature"
    Completion.model_validate(answers[13]["response"]["body"])
    assert answers[14]["response"]["body"]["object"] == "score"
    assert "custom_id" in answers[16]["error"]["message"]
    assert "not valid JSON" in answers[17]["error"]["message"]
    assert run(requests, output) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_file_in_which_lines_share_an_id_is_refused(tmp_path, monkeypatch, capsys):
    """Before a model is loaded, and lines without an id are not meant."""
    monkeypatch.setattr("llama_jax.cli.options.load", None)
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"url": "no id"}, {"url": "no id"}, chat_line(1), chat_line(2), chat_line(1)]
    source.write_text("\n".join(map(json.dumps, rows)))
    assert run(source, output) == 2
    assert "lines 3 and 5 have the same custom_id 'line 1'" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not list(tmp_path.glob("out*"))
