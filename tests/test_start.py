"""What is told before JAX is imported, which takes a second or more."""

import contextlib
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax.cli import options

ROOT = Path(__file__).parents[1]

# Runs every call in one process, none of which may import what takes time.
PROGRAM = """
import contextlib, io, json, sys
from llama_jax.cli import main
ended = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
            code = 0
        except SystemExit as error:
            code = error.code or 0
    slow = sorted({"jax", "flax", "orbax", "huggingface_hub", "safetensors"} & sys.modules.keys())
    ended.append([code, out.getvalue() + err.getvalue(), slow])
print(json.dumps(ended))
"""
CALLS = [
    (["--help"], 0, "convert, inspect, run and measure"),
    (["chat", "--help"], 0, "Chat with a model"),
    (["chat", "/nonexistent", "-m", "hi"], 2, "/nonexistent is neither a directory nor"),
    (["chat", "-m", "hi", "--draft", "/nonexistent"], 2, "/nonexistent is neither"),
    (["chat", "-m", "hi", "--temperature", "-1"], 2, "temperature must be finite"),
    (["chat", "-m", "hi", "--top-p", "2"], 2, "top_p must be in (0, 1]"),
    (["chat", "-m", "hi", "--tools", "missing.json"], 2, "missing.json"),
    (["chat", "-m", "hi", "--dtype", "int8"], 2, "int8"),
    (["generate", "/nonexistent", "-p", "a"], 2, "/nonexistent is neither"),
    (["generate"], 2, "--prompt TEXT or --input FILE"),
    (["generate", "-p", "a", "--seed", "-1"], 2, "seed must be in"),
    (["generate", "--input", "missing.txt"], 2, "missing.txt"),
    (["generate", "-p", "a", "--output", "missing/out"], 2, "directory does not exist"),
    (["score", "missing.jsonl", "-"], 2, "missing.jsonl"),
    (["score", "FILE", "-", "--model", "/nonexistent"], 2, "/nonexistent is neither"),
    (["score", "FILE", "-", "--window", "8", "--stride", "8"], 2, "stride must be in"),
    (["score", "FILE", "-", "--window", "9", "--max-seq-len", "8"], 2, "longer than max_seq_len"),
    (["score", "FILE", "-", "--json"], 2, "write OUT.jsonl to a file"),
    (["serve", "/nonexistent"], 2, "/nonexistent is neither"),
    (["serve", "--port", "70000"], 2, "port must be in [0, 65535]"),
    (["serve", "a", "--hf-model-name", "b"], 2, "MODEL or --hf-model-name"),
    (["serve", "--host", "256.0.0.1", "--port", "0"], 1, "256.0.0.1:0"),
    (["serve", "--port", "0", "--batch-dir", "FILE"], 2, "FILE/files: Not a directory"),
    (["serve", "--api-key", "a b"], 2, "printable ASCII without spaces"),
    (["eval", "/nonexistent", "--tasks", "a"], 2, "/nonexistent is neither"),
    (["eval"], 2, "give --tasks"),
    (["convert", "/nonexistent", "target"], 2, "/nonexistent is neither"),
    (["convert", "source", "FILE"], 2, "FILE exists already and is not a converted"),
    (["convert", ".", "target", "--smooth", "0.5"], 2, "go with --quantize"),
    (["convert", ".", "t", "--quantize", "row", "--smooth", "0.5"], 2, "smooth needs a text"),
    (["convert", ".", "t", "--quantize", "row", "--calibrate", "missing"], 2, "missing"),
    (["convert", ".", "t", "--quantize", "row", "--report", "a.csv"], 2, "a report is a .json"),
    (["export", "/nonexistent", "target", "--format", "fp8"], 2, "/nonexistent is neither"),
    (["export", "source", "FILE", "--format", "fp8"], 2, "exists already and is not an export"),
    (["verify", "/nonexistent"], 2, "/nonexistent is not a converted checkpoint"),
    (["inspect", "/nonexistent"], 2, "/nonexistent is neither a directory nor"),
    (["inspect", "--preset", "llama-9", "--paths"], 2, "llama-3.1-8b"),
    (["inspect", "--memory", "much"], 2, "expected a size"),
    (["compare", "/nonexistent", ".", "--text", "FILE"], 2, "/nonexistent is neither"),
    (["compare", ".", ".", "--text", "missing.txt"], 2, "error: --text: missing.txt: No such file"),
    (["bench", "/nonexistent"], 2, "/nonexistent is neither"),
    (["bench", "--preset", "llama-9"], 2, "llama-3.1-8b"),
    (["bench", "--batch", "one"], 2, "expected numbers separated by commas"),
]  # fmt: skip


def test_mistakes_are_told_before_jax_is_imported(tmp_path):
    (tmp_path / "FILE").write_text('{"text": "a"}\n')
    (tmp_path / "source").mkdir()
    calls = json.dumps([arguments for arguments, *_ in CALLS])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, calls], cwd=tmp_path, capture_output=True, text=True,
        check=True, env=os.environ | {"PYTHONPATH": str(ROOT), "TERMINAL_WIDTH": "200"},
    )  # fmt: skip
    for (arguments, code, message), ended in zip(CALLS, json.loads(done.stdout), strict=True):
        words = " ".join(ended[1].replace("│", " ").split())
        assert (ended[0], ended[2]) == (code, []), (arguments, words)
        assert message in words and "Traceback" not in words, (arguments, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", "source"]


@pytest.mark.parametrize("fails", [False, True])
def test_imports_are_not_interrupted_by_garbage_collections(fails):
    expected = pytest.raises(ImportError) if fails else contextlib.nullcontext()
    try:
        with expected, options._importing():
            assert not gc.isenabled()
            if fails:
                raise ImportError
        assert gc.isenabled() and gc.get_freeze_count()
    finally:
        gc.unfreeze()
