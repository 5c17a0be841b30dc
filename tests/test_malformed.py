"""Malformed checkpoints on the command line: one clear error, soon, and nothing is written.

The shipped model's files are damaged one at a time: a value dropped, of another type or size, or
nested; the text cut, of another encoding, or no file at all. A damage that changes nothing that is
read may be accepted.
"""

import copy
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax import cli
from llama_jax.abacus import __file__ as abacus_file

ROOT = Path(__file__).parents[1]
SHIPPED = Path(abacus_file).parent / "checkpoint"
# params.json describes the same model, with Meta's names.
PARAMS = {
    "dim": 256, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 1024,
    "ffn_dim_multiplier": 0.5, "multiple_of": 128, "norm_eps": 1e-5, "rope_theta": 500000.0,
    "use_scaled_rope": True,
}  # fmt: skip
GENERATION = {
    "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": [769, 777],
    "repetition_penalty": 1.1, "max_new_tokens": 100, "stop_strings": ["END"], "pad_token_id": 0,
    "suppress_tokens": [5], "min_p": 0.1, "num_beams": 1,
}  # fmt: skip
FILES = ("config.json", "generation_config.json", "params.json", "model.safetensors")
SECONDS, LINES = 10, 3

ODD = st.sampled_from(
    [None, True, False, 0, -1, 1, 2, 1.5, -0.0, 10**7, 3_000_000_000, 10**30, 1e21, math.inf,
     -math.inf, math.nan, "", "5", "false", "\x1b[2J", "x" * 10_000, [], [1], [None], {}, {"a": 1},
     [[[1]]], 10**4000]
)  # fmt: skip
DAMAGES = st.tuples(
    st.sampled_from(["drop", "retype", "widen", "nest", "add"]), st.integers(0, 10**6), ODD
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) in a JSON value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def damaged(original: Any, how: str, where: int, odd: Any) -> Any:
    value = copy.deepcopy(original)
    found = list(places(value))
    container, key = found[where % len(found)]
    if how == "drop":
        del container[key]
    elif how == "retype":
        container[key] = odd
    elif how == "widen":
        container[key] = [container[key], odd]
    elif how == "nest":
        for _ in range(200 if where % 2 else 3):
            container[key] = [container[key]]
    elif isinstance(container, dict):
        container[f"{key}_2"] = odd
    else:
        container.append(odd)
    return value


def header_of(path: Path) -> tuple[Any, bytes]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


ORIGINALS: dict[str, Any] = {
    "config.json": json.loads((SHIPPED / "config.json").read_text()),
    "generation_config.json": GENERATION,
    "params.json": PARAMS,
}
HEADER, DATA = header_of(SHIPPED / "model.safetensors")
ORIGINALS["model.safetensors"] = HEADER


def publish(directory: Path, name: str, raw: bytes) -> Path:
    """The shipped model with one file replaced."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(SHIPPED, directory)
    if name == "params.json":
        for other in ("config.json", "model.safetensors"):
            (directory / other).unlink()
        (directory / "consolidated.00.pth").write_bytes(b"")
    (directory / name).write_bytes(raw)
    return directory


def encoded(name: str, value: Any) -> bytes:
    text = json.dumps(value).encode()
    if name != "model.safetensors":
        return text
    return len(text).to_bytes(8, "little") + text + DATA


def run(*arguments: object) -> tuple[int, str, float]:
    """The command line in this process: exit code, stderr, seconds of CPU time."""
    began = time.process_time()
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(cli.output.stderr, "width", 80)
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0), err.getvalue(), time.process_time() - began


def hold(directory: Path, name: str, raw: bytes) -> tuple[int, str]:
    """Inspect and, where that is refused, convert; returns the exit code and the error."""
    publish(directory, name, raw)
    code, message, seconds = run("inspect", directory, "--json")
    described = f"{name}: {raw[-300:]!r}\n{message}"
    assert code in (0, 2) and seconds < SECONDS, described
    assert "Traceback" not in message, described
    if code == 2:
        assert message.startswith("error:") and message.count("\n") <= LINES, described
        assert str(directory) in message and len(message) < 1000, described
        target = directory.with_name("target")
        again, refused, _ = run("convert", directory, target)
        assert (again, refused) == (2, message), f"{described}\n{refused}"
        assert sorted(p.name for p in directory.parent.iterdir()) == [directory.name], described
    return code, message


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run("inspect", SHIPPED, "--json")  # imports what takes time
    return tmp_path_factory.mktemp("malformed") / "model"


def check(directory: Path, name: str, damage: tuple[str, int, Any]) -> None:
    value = damaged(ORIGINALS[name], *damage)
    hold(directory, name, encoded(name, value))


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_value_is_told(directory: Path, name: str) -> None:
    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(DAMAGES)
    def each(damage: tuple[str, int, Any]) -> None:
        check(directory, name, damage)

    each()


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_any_damaged_value_is_told(directory: Path, name: str) -> None:
    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(DAMAGES)
    def each(damage: tuple[str, int, Any]) -> None:
        check(directory, name, damage)

    each()


TOLERANT = ("dialect", "source", "llama_jax_version", "generation", "total_bytes")


def test_a_damaged_manifest_is_told(tmp_path: Path) -> None:
    target = tmp_path / "converted"
    assert run("convert", SHIPPED, target, "--json")[0] == 0
    path = target / "manifest.json"
    original = json.loads(path.read_text())
    for key in original:
        for odd in (5, "x", [[]], {"a": [1]}, -1.5, True):
            path.write_text(json.dumps(original | {key: odd}))
            code, message, _ = run("verify", target, "--json")
            assert "Traceback" not in message
            # A text for a text, and settings of generation that nobody knows, may stand.
            if not (type(odd) is type(original[key]) and key in TOLERANT):
                assert code == 2 and str(path) in message, (key, odd, message)
        path.write_text(json.dumps({k: v for k, v in original.items() if k != key}))
        code, message, _ = run("verify", target, "--json")
        assert "Traceback" not in message and code in ((1, 2) if key == "checksums" else (2,)), key


TEXTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"vocab_size": 10',
    "a list": b"[]",
    "null": b"null",
    "UTF-16": '{"vocab_size": 1024}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "latin-1": b'{"name": "\xe9"}',
    "digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "brackets": b'{"vocab_size": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "twice": b'{"vocab_size": 1, "vocab_size": 2}',
    "half a character": b'{"vocab_size": "\\ud800"}',
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "params.json"])
def test_a_file_that_is_no_json_is_named(directory: Path, name: str) -> None:
    for text in TEXTS.values():
        code, message = hold(directory, name, text)
        assert code == 2 and f"{directory}/{name}" in message


@pytest.mark.parametrize("case", TEXTS)
def test_a_header_that_is_no_json_is_named(directory: Path, case: str) -> None:
    header = TEXTS[case]
    raw = len(header).to_bytes(8, "little") + header + DATA
    code, message = hold(directory, "model.safetensors", raw)
    assert code == 2 and f"{directory}/model.safetensors" in message


@pytest.mark.parametrize(
    "name", [*FILES, "manifest.json", "model.safetensors.index.json", "tokenizer.json"]
)
@pytest.mark.parametrize("kind", ["FIFO", "directory", "loop"])
def test_what_is_no_file_is_named(directory: Path, name: str, kind: str) -> None:
    publish(directory, name, b"")
    path = directory / name
    path.unlink()
    if name.endswith("index.json"):
        (directory / "model.safetensors").unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path)
    for command in (("inspect", directory), ("convert", directory, directory.with_name("target"))):
        code, message, seconds = run(*command)
        assert code == 2 and str(directory) in message and seconds < SECONDS, message
        assert message.count("\n") <= LINES, message
        assert kind == "loop" or "is missing" not in message, message
    assert not directory.with_name("target").exists()


def test_ten_million_layers_are_not_built(directory: Path) -> None:
    config = ORIGINALS["config.json"] | {"num_hidden_layers": 60_000}
    code, message = hold(directory, "config.json", encoded("config.json", config))
    assert code == 2 and "60000 layers, the weights have 5" in message
    config = ORIGINALS["config.json"] | {"num_hidden_layers": 10**7}
    code, message = hold(directory, "config.json", encoded("config.json", config))
    assert code == 2 and "num_hidden_layers is 10000000, expected int <=" in message


def test_a_directory_that_may_not_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        closed = Path(parent) / "closed"
        shutil.copytree(SHIPPED, closed)
        closed.chmod(0)
        root = os.geteuid() == 0
        try:
            if root:
                os.seteuid(65534)
            code, message, _ = run("inspect", closed)
        finally:
            if root:
                os.seteuid(0)
            closed.chmod(0o755)
    assert code == 2 and f"{closed} cannot be read: Permission denied" in message


@pytest.mark.parametrize("command", ["convert", "export"])
def test_an_empty_directory_may_be_the_target(tmp_path: Path, command: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    options = () if command == "convert" else ("--format", "fp8")
    code, message, _ = run(command, SHIPPED, target, *options, "--json")
    assert code == 0, message
    assert any(target.iterdir()) and [path.name for path in tmp_path.iterdir()] == ["target"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    code, message, _ = run(command, SHIPPED, tmp_path / "other", *options)
    assert code == 2 and "exists already and is not" in message


# Sends the program a signal when it begins to import a module, then runs it.
SIGNALLED = """
import os, runpy, sys

class Sender:
    def find_spec(self, name, *rest):
        if name == {module!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Sender())
sys.argv = ["llama-jax", "inspect"]
runpy.run_module("llama_jax.cli", run_name="__main__", alter_sys=True)
"""


def ended_by(number: int, module: str) -> tuple[int, str]:
    """Exit code and stderr of the program that gets a signal while it imports a module."""
    code = SIGNALLED.format(module=module, number=int(number))
    done = subprocess.run(
        [sys.executable, "-c", code], text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("module", ["typer", "jax", "jax.numpy", "flax"])
def test_ctrl_c_during_imports_shows_no_traceback(module: str) -> None:
    code, message = ended_by(signal.SIGINT, module)
    assert (code, message) == (130, "")


def test_sigterm_is_told_in_a_line() -> None:
    assert ended_by(signal.SIGTERM, "jax") == (143, "llama-jax: terminated\n")


# Runs a command and adds a line: the most memory that it had, in KiB, and its seconds of CPU time.
# Of a child of pytest's own pytest's memory would count, from before it runs the command.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss, used.ru_utime + used.ru_stime)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["brackets", "digits", "layers", "FIFO", "shapes"])
def test_a_process_ends_soon_and_small(directory: Path, case: str) -> None:
    """In a process of its own: seconds and memory."""
    name, raw = "config.json", TEXTS.get(case, b"{}")
    if case == "layers":
        raw = encoded(name, ORIGINALS[name] | {"num_hidden_layers": 60_000})
    if case == "shapes":
        name = "model.safetensors"
        raw = encoded(name, HEADER | {f"model.layers.{i}.x": {} for i in range(100_000)})
    publish(directory, name, raw)
    if case == "FIFO":
        (directory / name).unlink()
        os.mkfifo(directory / name)
    inspect = (sys.executable, "-m", "llama_jax.cli", "inspect", directory)
    program = subprocess.Popen(
        [sys.executable, "-c", MEASURED, *inspect], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    out, message = program.communicate(timeout=60)
    assert program.returncode == 2 and message.count("\n") <= LINES, message
    assert str(directory / name) in message or str(directory) in message
    memory, seconds = out.split()[-2:]
    assert int(memory) < 10**6 and float(seconds) < SECONDS


def test_words_of_a_file_do_not_reach_the_terminal_as_they_are(directory: Path) -> None:
    def told(template: str) -> str:
        publish(directory, "chat_template.jinja", template.encode())
        code, message, _ = run("chat", directory, "-m", "hi", "--json")
        lines = message[message.index("error:") :]
        assert code == 2 and lines.count("\n") <= LINES and "\x1b" not in lines
        assert f"{directory}/chat_template.jinja" in lines.replace("\n", "")
        return lines

    assert "a a a" in told("{{ raise_exception('a\\n' * 500) }}")
    assert "\\x1b[2J" in told("{{ raise_exception('\x1b[2J') }}")


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        *[(name, kind) for name in ("score", "tools", "calibrate") for kind in ("FIFO", "folder")],
        ("tools", "[" * 200_000),
        ("tools", "[5]"),
    ],
    ids=lambda value: value[:9],
)
def test_an_input_that_is_no_file_is_named(tmp_path: Path, command: str, kind: str) -> None:
    path = tmp_path / "input"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text(kind)
    arguments: dict[str, tuple[object, ...]] = {
        "score": ("score", path, tmp_path / "out"),
        "tools": ("chat", "--tools", path, "-m", "hi"),
        "calibrate": ("convert", SHIPPED, tmp_path / "t", "--quantize", "row", "--calibrate", path),
    }
    code, message, _ = run(*arguments[command])
    assert code == 2 and str(path) in message and message.count("\n") <= LINES
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/x", "a\n\n\n\n\x1b[2J"])
def test_an_odd_name_of_a_model_is_told(name: str) -> None:
    code, message, _ = run("inspect", name)
    assert code == 2 and message.count("\n") <= LINES and len(message) < 1100
    assert "\x1b" not in message


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in ("/dev/null", "/proc/no/such"):
        monkeypatch.setenv("LLAMA_JAX_CACHE", cache)
        code, message, _ = run("chat", "-m", "hi")
        assert code == 2 and "which cannot be written" in message and "LLAMA_JAX_CACHE" in message
