"""`llama-jax score` on a tiny random model: every kind of line, mistakes, and runs cut short."""
# ruff: noqa: F811  # fixtures of test_cli are imported by name

import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from llama_jax import data_rows, jobs
from llama_jax.cli import score_ray
from llama_jax.jsonl import parse_jsonl, read_jsonl
from llama_jax.resumable import resumable_file, survey
from tests.test_cli import ROOT, SMALL, cache_directory, model, run, source  # noqa: F401

PAIRS = [{"prompt": "hello", "completion": " you", "id": 7}, {"prompt": "a", "completion": "b"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "in.jsonl", PAIRS)


def test_score(run, model, pairs, tmp_path):
    scored = tmp_path / "out.jsonl"
    arguments = ("score", pairs, scored, "--model", model, *SMALL)
    code, out, err = run(*arguments, "--tokens", "--json")
    assert code == 0 and err == ""
    first, second = read(scored)
    assert first["id"] == 7 and first["completion"] == " you"
    assert first["num_tokens"] == 4 and first["token_ids"] == list(b" you")
    assert sum(first["logprobs"]) == pytest.approx(first["logprob"])
    assert first["perplexity"] == pytest.approx(math.exp(-first["logprob"] / 4))
    assert first["is_greedy"] is False
    summary = json.loads(out)
    assert summary["scored"] == 2 and summary["bad"] == 0 and summary["num_tokens"] == 5
    mean = (first["logprob"] + second["logprob"]) / 5
    assert summary["perplexity"] == pytest.approx(math.exp(-mean))
    rate = summary["tokens_per_second"] * summary["seconds"]
    assert rate == pytest.approx(len("hello you") + len("ab") + 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]

    before = scored.read_bytes()
    code, _, err = run(*arguments)
    assert code == 2 and "out.jsonl exists already" in err
    assert scored.read_bytes() == before
    code, _, err = run(*arguments, "--overwrite")
    assert code == 0 and "2 scored, 0 bad" in err
    assert set(read(scored)[1]) == {
        "prompt", "completion", "logprob", "num_tokens", "is_greedy", "perplexity",
    }  # fmt: skip
    code, piped, _ = run("score", "-", "-", "--model", model, *SMALL, stdin=pairs.read_text())
    assert code == 0
    assert json.loads(piped.splitlines()[0])["logprob"] == pytest.approx(first["logprob"], abs=1e-4)


def test_choices_and_texts(run, model, tmp_path):
    text = "words and more words, " * 20
    rows = [{"prompt": "2 + 2 =", "choices": [" 4", " 5", " six"]}, {"text": text, "id": "t"}]
    path = write(tmp_path / "in.jsonl", rows)
    code, out, _ = run("score", path, "-", "--model", model, "--window", 64, "--stride", 32, *SMALL)
    choice, whole = map(json.loads, out.splitlines())
    assert code == 0
    assert sum(choice["probabilities"]) == pytest.approx(1)
    totals = [score["logprob"] for score in choice["scores"]]
    assert choice["best"] == totals.index(max(totals))
    assert whole["id"] == "t" and whole["num_tokens"] == len(text) > 256
    mean = -whole["logprob"] / whole["num_tokens"]
    assert whole["perplexity"] == whole["byte_perplexity"] == pytest.approx(math.exp(mean))
    assert whole["word_perplexity"] == pytest.approx(math.exp(-whole["logprob"] / 80))
    code, out, _ = run("score", path, "-", "--model", model, *SMALL)
    # Another stride, another context: the scores move.
    assert json.loads(out.splitlines()[1])["logprob"] != pytest.approx(whole["logprob"], abs=1e-2)


BAD_LINES = {
    b"[1]": "expected an object, got list",
    b'{"prompt": "a"': "not valid JSON",
    b'{"prompt": "a", "completion": NaN}': "not valid JSON (NaN is not JSON)",
    b'{"prompt": "\xff", "completion": "b"}': "not valid UTF-8",
    b"[" * 100_000: "not valid JSON",
    b'{"prompt": "a"}': 'got "prompt"',
    b'{"prompt": 3, "completion": "b"}': '"prompt" must be a text, got 3',
    b'{"prompt": "a", "completion": ""}': "the completion '' is empty",
    b'{"prompt": "\\ud800", "choices": []}': "labels must be a list of at least one",
    b'{"prompt": "a", "completion": "%s"}'
    % (b"x" * 300): "the prompt has 302 tokens; max_seq_len is 256",
}


def test_a_file_from_windows_is_read(run, model, pairs, tmp_path):
    lines = pairs.read_bytes()
    pairs.write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"))
    code, out, err = run("score", pairs, "-", "--model", model, *SMALL)
    assert code == 0 and "2 scored, 0 bad" in err
    assert json.loads(out.splitlines()[0])["prompt"] == json.loads(lines.splitlines()[0])["prompt"]


def test_bad_lines_say_why_and_the_others_go_on(run, model, pairs, tmp_path):
    good = pairs.read_bytes()
    pairs.write_bytes(good + b"\n" + b"".join(line + b"\n" for line in BAD_LINES) + good)
    code, _, err = run("score", pairs, tmp_path / "out.jsonl", "--model", model, *SMALL)
    rows = read(tmp_path / "out.jsonl")
    assert code == 0
    assert ["error" in row for row in rows] == [False] * 2 + [True] * len(BAD_LINES) + [False] * 2
    for number, (row, message) in enumerate(zip(rows[2:-2], BAD_LINES.values(), strict=True), 4):
        assert f"in.jsonl, line {number}: " in row["error"] and message in row["error"]
        assert "logprob" not in row
    assert rows[7]["prompt"] == "a" and rows[10]["prompt"] == "\ud800"
    assert rows[-1]["logprob"] == pytest.approx(rows[1]["logprob"], abs=1e-4)
    assert f"4 scored, {len(BAD_LINES)} bad" in err
    assert "the first bad one is" in err and "in.jsonl, line 4: expected an object" in err


def test_nothing_but_bad_lines_is_a_mistake(run, model, tmp_path):
    path = write(tmp_path / "in.jsonl", [{"question": "a"}] * 2)
    code, out, err = run("score", path, "-", "--model", model, *SMALL)
    assert code == 2 and "no line could be scored" in err and 'got "question"' in err
    assert len(out.splitlines()) == 2


def test_results_come_before_the_input_ends(run, model, monkeypatch):
    """A stream of lines from a pipe is not collected first."""
    monkeypatch.setattr(jobs, "_READ_AHEAD", 4)
    monkeypatch.setattr(jobs, "_READ_AHEAD_PER_SLOT", 1)
    out, read_when_written = io.StringIO(), []
    monkeypatch.setattr(sys, "stdout", out)
    lines = (json.dumps({"prompt": "p" * (i % 20), "completion": "c"}) + "\n" for i in range(100))

    class Pipe(io.StringIO):
        def __iter__(self):
            for number, line in enumerate(lines):
                read_when_written.append((number, out.getvalue().count("\n")))
                yield line

    code, _, _ = run("score", "-", "-", "--model", model, *SMALL, stdin=Pipe())
    assert code == 0 and len(out.getvalue().splitlines()) == 100
    behind = [number - written for number, written in read_when_written]
    assert max(behind) < 50


MANY = [
    {"id": i, "prompt": "p" * (37 * i % 90), "completion": f" {i}"} if i % 7 else {"id": i}
    for i in range(60)
]


def fail_after(monkeypatch, count):
    """`score_rows` raises once it has given so many rows."""
    whole = data_rows.score_rows

    def failing(*args, **kwargs):
        for done, row in enumerate(whole(*args, **kwargs)):
            if done == count:
                raise RuntimeError("the device is gone")
            yield row

    monkeypatch.setattr(data_rows, "score_rows", failing)


def test_a_run_that_failed_goes_on_where_it_stopped(run, model, tmp_path, monkeypatch):
    path, scored = write(tmp_path / "in.jsonl", MANY), tmp_path / "out.jsonl"
    arguments = ("score", path, scored, "--model", model, *SMALL)
    assert run("score", path, tmp_path / "expected.jsonl", "--model", model, *SMALL)[0] == 0
    expected = read(tmp_path / "expected.jsonl")
    with monkeypatch.context() as patch:
        fail_after(patch, 25)
        code, _, err = run(*arguments)
        assert code == 1 and "the device is gone" in err and "Traceback" not in err
        assert "out.jsonl.partial has what was done" in err
    partial = tmp_path / "out.jsonl.partial"
    assert not scored.exists() and len(read(partial)) == 25
    with partial.open("a") as file:
        file.write('{"id": 25, "pro')  # as a kill may leave it

    code, _, err = run(*arguments, "--tokens")
    assert code == 2 and "other settings (tokens: False -> True)" in err
    write(path, [*MANY, MANY[0]])
    code, _, err = run(*arguments)
    assert code == 2 and "other settings (input: " in err
    write(path, MANY)

    seen, whole = [], data_rows.score_rows

    def watching(llm, rows, **options):
        return whole(llm, (seen.append(row) or row for row in rows), **options)

    monkeypatch.setattr(data_rows, "score_rows", watching)
    code, out, _ = run(*arguments, "--json")
    summary = json.loads(out)
    assert code == 0 and [row["id"] for row in seen] == list(range(25, 60))
    assert (summary["scored"], summary["bad"], summary["resumed"]) == (51, 9, 25)
    rows = read(scored)
    assert [row["id"] for row in rows] == list(range(60))
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        assert row.get("logprob") == pytest.approx(other.get("logprob"), abs=1e-4)
    total = sum(row.get("logprob", 0) for row in rows)
    assert summary["perplexity"] == pytest.approx(math.exp(-total / summary["num_tokens"]))
    names = sorted(each.name for each in tmp_path.iterdir())
    assert names == ["expected.jsonl", "in.jsonl", "out.jsonl"]


def test_overwrite_discards_a_run_with_other_settings(run, model, pairs, tmp_path, monkeypatch):
    arguments = ("score", pairs, tmp_path / "out.jsonl", "--model", model, *SMALL)
    with monkeypatch.context() as patch:
        fail_after(patch, 1)
        assert run(*arguments)[0] == 1
    assert run(*arguments, "--tokens", "--overwrite")[0] == 0
    assert all("token_ids" in row for row in read(tmp_path / "out.jsonl"))


def test_a_run_that_fails_at_once_leaves_nothing(run, model, pairs, tmp_path, monkeypatch):
    fail_after(monkeypatch, 0)
    assert run("score", pairs, tmp_path / "out.jsonl", "--model", model, *SMALL)[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_two_runs_do_not_write_one_file(run, model, pairs, tmp_path):
    with resumable_file(str(tmp_path / "out.jsonl"), {}, False):
        code, _, err = run("score", pairs, tmp_path / "out.jsonl", "--model", model, *SMALL)
    assert code == 2 and "another run is writing" in err and "out.jsonl" in err


def test_a_journal_without_lines_is_begun_afresh(tmp_path):
    """A kill may come between the journal and the first line, or after the last rename."""
    for content in ("", '{"a": 1}'):
        (tmp_path / "out.journal").write_text(content)
        with resumable_file(str(tmp_path / "out"), {"a": 2}, False) as file:
            assert list(file.lines()) == []
            file.write("line\n")
        assert (tmp_path / "out").read_text() == "line\n"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_progress_is_noted_where_there_is_no_terminal(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["llama_jax.cli.score"], "_NOTE_EVERY", 0.0)
    path = write(tmp_path / "in.jsonl", MANY[:10])
    _, _, err = run("score", path, tmp_path / "out.jsonl", "--model", model, *SMALL)
    assert "10 of 10 lines" in err and "lines/s" in err and "tok/s · 0 s left" in err


@pytest.mark.slow
def test_killed_again_and_again_it_loses_nothing_and_repeats_nothing(
    model, tmp_path, no_shared_cache
):
    rows = [
        {"id": i, "prompt": "p" * (37 * i % 90), "completion": f" {i}"} if i % 97 else {"id": i}
        for i in range(4000)
    ]
    path, scored = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    environment = os.environ | {"LLAMA_JAX_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "llama_jax.cli", "score", str(path), str(scored), "--model",
               str(model), *SMALL]  # fmt: skip
    partial, kept = tmp_path / "out.jsonl.partial", b""

    def start():
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    for least in (1, 900, 2300):  # lines that have to stand there when the kill comes
        process = start()
        while process.poll() is None:
            if partial.exists() and partial.read_bytes().count(b"\n") >= least:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait() == -signal.SIGKILL, process.communicate()[1]
        assert not scored.exists()
        now = partial.read_bytes()
        assert now[: kept.rfind(b"\n") + 1] == kept[: kept.rfind(b"\n") + 1]
        kept = now
    last = start()
    assert last.wait() == 0, last.communicate()[1]
    assert scored.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    found = read(scored)
    assert [row["id"] for row in found] == list(range(4000))
    assert all(("logprob" in row) == bool(row["id"] % 97) for row in found)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cache", "in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("done", [0, 1, 5])
@pytest.mark.parametrize("most_lines", [1, 3, 100])
def test_pieces_of_a_file_are_the_whole(tmp_path, monkeypatch, done, most_lines):
    monkeypatch.setattr(score_ray, "_MOST_BYTES", 100)
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'\n{"a": 1}\r\n \t\n{"b": "\xc2\x85"}\n\xc2\xa0\n{"c": 1}\r{"d": 1}\n\n\n[1]\n'
        b'{"e": "%s"}\n{"f": 1}\n{"g": 1}' % (b"x" * 200)
    )
    expected = [(number, str(row)) for number, row in read_jsonl(str(path))]
    assert [number for number, _ in expected] == [2, 4, 5, 6, 9, 10, 11, 12]
    assert survey(str(path))[0] == len(expected)
    found = []
    for piece in score_ray.pieces(str(path), done, most_lines):
        lines = path.read_bytes()[piece["begin"] : piece["end"]]
        some = [(number, str(row)) for number, row in parse_jsonl(lines, piece["number"])]
        assert 1 <= len(some) <= most_lines
        found += some
    assert found == expected[done:]


def test_ray_is_not_there(run, model, pairs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ("--model", model, *SMALL)
    code, _, err = run("score", pairs, tmp_path / "o.jsonl", "--ray", "local", *arguments)
    assert code == 2 and 'pip install "llama-jax[ray]"' in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    code, _, err = run("score", "-", "-", "--ray", "local", *arguments)
    assert code == 2 and "give a file, not stdin" in err
    code, _, err = run("score", pairs, "-", "--actors", 2, *arguments)
    assert code == 2 and "--actors needs --ray" in err


def test_a_disk_that_is_full_is_named_with_the_file(tmp_path):
    """A limit of the process stands for the disk's: its error comes the same way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_too_much():
        with resumable_file(str(tmp_path / "out.jsonl"), {}, False) as file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            try:
                file.write("x" * 200)
                file.flush()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with pytest.raises(OSError, match=r"File too large: '.*/out\.jsonl\.partial'"):
        write_too_much()
