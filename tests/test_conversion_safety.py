"""Conversions that are killed, interrupted, crowded or misled: what is left, and what comes out."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from converters import journal, pipeline
from converters.dialects.layout import LazyArray, piece_rows, source_name
from converters.export import export
from converters.pipeline import convert
from converters.safetensors_writer import write_checkpoint
from llama_jax.checkpoint import array_file
from llama_jax.checkpoint.store import CheckpointError, read_manifest, verify
from llama_jax.model.config import PRESETS
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec
from tests import tiny_checkpoints as tiny

# Runs conversions in children of its own, which share its imports, and ends each at its n-th event
# in the file system (opening, making, renaming, removing), or after some time; n or the time are
# drawn at random. When that happened `times`, one is left alone and comes through. Whatever lies at
# the target at any of these moments is whole.
ENDED = """
import os, random, signal, sys, time
from pathlib import Path
from converters.pipeline import convert

source, target, whole, ending, times, seconds = sys.argv[1:]
parent = str(Path(target).parent)
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
rng = random.Random(0)
seconds = float(seconds)

def attempt(end):
    limit = rng.randint(1, 400)
    child = os.fork()
    if child:
        if end and seconds:
            time.sleep(rng.uniform(0, seconds))
            os.kill(child, getattr(signal, ending))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0
    def watch(event, arguments):
        nonlocal count
        if event in EVENTS and str(arguments[0]).startswith(parent):
            count += 1
            if end and count == limit and not seconds:
                os.kill(os.getpid(), getattr(signal, ending))
    sys.addaudithook(watch)
    code = 1
    try:
        convert(source, target, overwrite=True, progress=False)
        code = 0
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)

def contents(directory):
    files = (path for path in Path(directory).rglob("*") if path.is_file())
    return {path.relative_to(directory): path.read_bytes() for path in files}

expected = contents(whole)
ended, code = 0, None
while ended < int(times) or code != 0:
    code = attempt(ended < int(times))
    assert code in (0, 130, -signal.SIGKILL), code
    if code == 0 or os.path.exists(target):
        assert contents(target) == expected
    ended += code != 0
"""


def run(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published") / "s"
    return tiny.write(directory, tiny.friendli(), tiny.FRIENDLI_03, shards=2)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted conversion makes."""
    directory = tmp_path_factory.mktemp("converted") / "o"
    convert(source, directory, progress=False)
    return directory


@pytest.mark.parametrize(
    ("ending", "times"),
    [
        ("SIGKILL", 3),
        pytest.param("SIGKILL", 100, marks=pytest.mark.slow),
        pytest.param("SIGINT", 100, marks=pytest.mark.slow),
    ],
)
def test_a_conversion_that_is_ended_anywhere_finishes_to_the_same_bytes(
    source: Path, whole: Path, tmp_path: Path, ending: str, times: int, no_shared_cache: None
) -> None:
    run(ENDED, source, tmp_path / "o", whole, ending, times, 0)
    assert contents(tmp_path / "o") == contents(whole)
    assert left_behind(tmp_path) == ["o"]


def interrupt(
    monkeypatch: pytest.MonkeyPatch, source: Path, target: Path, **options: Any
) -> set[Path]:
    """Convert until Ctrl-C comes after 20 arrays; the data files of what was finished."""
    real, count = pipeline.write_array, iter(range(100))

    def interrupted(*arguments: Any) -> str:
        if next(count) == 20:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_array", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, progress=False, **options)
    work = target.with_name(f".{target.name}.converting")
    lines = (work / journal.JOURNAL).read_text().splitlines()[1:]
    recorded = [name for line in lines for name in json.loads(line)[1]]
    assert 0 < len(recorded) <= 20
    return {work / name / ("0.0" if (work / name / "0.0").exists() else "0") for name in recorded}


def test_ctrl_c_keeps_what_is_done_and_says_so(
    source: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = {path: path.stat().st_ino for path in interrupt(monkeypatch, source, tmp_path / "o")}
    assert "the same command continues" in caplog.text and ".o.converting" in caplog.text
    assert left_behind(tmp_path) == [".o.converting"]
    with pytest.raises(CheckpointError, match="not a converted checkpoint"):
        read_manifest(tmp_path / ".o.converting")
    convert(source, tmp_path / "o")
    assert "continuing after" in capsys.readouterr().err
    assert contents(tmp_path / "o") == contents(whole)
    assert left_behind(tmp_path) == ["o"]
    for path, inode in done.items():  # not written again
        assert (tmp_path / "o" / path.relative_to(path.parents[2])).stat().st_ino == inode


@pytest.mark.parametrize("damage", ["one bit", "truncated", "missing", "journal"])
def test_what_was_damaged_since_is_done_again(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = sorted(interrupt(monkeypatch, source, tmp_path / "o"))[0]
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[len(data) // 3] ^= 4
        path.write_bytes(data)
    elif damage == "truncated":
        path.write_bytes(data[:-3])
    elif damage == "missing":
        shutil.rmtree(path.parent)
    else:
        with (tmp_path / ".o.converting" / journal.JOURNAL).open("ab") as file:
            file.write(b"\0\0\xff torn")
    convert(source, tmp_path / "o", progress=False)
    assert contents(tmp_path / "o") == contents(whole)


@pytest.mark.parametrize("change", ["source", "options"])
def test_another_conversion_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    arrays = tiny.dense()
    source = tiny.write(tmp_path / "s", arrays)
    interrupt(monkeypatch, source, tmp_path / "o")
    quantize: Any = None
    if change == "source":
        arrays = {name: -array for name, array in arrays.items()}
        tiny.write(tmp_path / "s", arrays)
    else:
        quantize = "row"
    (tmp_path / ".o.converting" / "stray").touch()
    convert(source, tmp_path / "o", quantize=quantize, progress=False)
    convert(source, tmp_path / "fresh", quantize=quantize, progress=False)
    assert contents(tmp_path / "o") == contents(tmp_path / "fresh")


def test_room_is_needed_only_for_what_is_not_yet_written(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, source, tmp_path / "o")
    a_byte_short = 2**24 + read_manifest(whole).total_bytes - 1
    usage = shutil.disk_usage(tmp_path)._replace(free=a_byte_short)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="not enough disk space"):
        convert(source, tmp_path / "p", progress=False)
    convert(source, tmp_path / "o", progress=False)
    assert verify(tmp_path / "o") == {}


def test_links_and_nested_paths_are_refused(source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("1234")
    (tmp_path / "o").symlink_to(secret)
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "o", overwrite=True, progress=False)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="is a link"):
        convert(source, tmp_path / "dangling", progress=False)
    (tmp_path / ".p.converting").symlink_to(secret)
    with pytest.raises(FileExistsError, match=r"\.p\.converting is a link"):
        convert(source, tmp_path / "p", progress=False)
    with pytest.raises(CheckpointError, match="lies inside the source"):
        convert(source, source / "converted", progress=False)
    copied = shutil.copytree(source, tmp_path / "s")
    (copied / "tokenizer.json").unlink()
    (copied / "tokenizer.json").symlink_to(secret / "key")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        convert(copied, tmp_path / "q", progress=False)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        export(copied, tmp_path / "q", "bf16", progress=False)
    assert contents(secret) == {"key": b"1234"}
    assert not (tmp_path / "q").exists() and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_is_not_read_through_a_link_that_leads_out(
    source: Path, tmp_path: Path, name: str
) -> None:
    copied = shutil.copytree(source, tmp_path / "s")
    (copied / name).rename(tmp_path / name)
    (copied / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        convert(copied, tmp_path / "o", progress=False)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "elsewhere", ["../secret", "additional_chat_templates/../../secret", "/etc/hostname"]
)
def test_a_manifest_cannot_name_files_elsewhere(
    whole: Path, tmp_path: Path, elsewhere: str
) -> None:
    copied = shutil.copytree(whole, tmp_path / "a" / "s")
    (tmp_path / "a" / "secret").write_text("1234")
    manifest = copied / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"tokenizer.json"\n ]', f'"tokenizer.json", "{elsewhere}"\n ]')
    )
    assert read_manifest(copied).tokenizer_files == ("tokenizer.json", elsewhere)
    for make in (convert, partial(export, format="bf16")):
        with pytest.raises(CheckpointError, match="a plain file name is expected"):
            make(copied, tmp_path / "b" / "o", progress=False)
    assert not (tmp_path / "b").exists()


def test_templates_cannot_lie_elsewhere(source: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(source, tmp_path / "s")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tool_use.jinja").write_text("{{ messages }}")
    (copied / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link, expected a folder of the checkpoint"):
        convert(copied, tmp_path / "o", progress=False)
    assert not (tmp_path / "o").exists()


def test_one_that_waits_takes_over_from_one_that_is_interrupted(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*arguments: Any) -> str:
        code = (
            "import sys; from converters.pipeline import convert\n"
            "print('ready', flush=True)\n"
            "convert(sys.argv[1], sys.argv[2], progress=False)"
        )
        waiting.append(
            subprocess.Popen(
                [sys.executable, "-c", code, source, tmp_path / "o"],
                cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        assert waiting[0].stdout is not None and waiting[0].stderr is not None
        assert waiting[0].stdout.readline() == "ready\n"
        assert "waiting for another process" in waiting[0].stderr.readline()
        raise KeyboardInterrupt

    waiting: list[subprocess.Popen[str]] = []
    monkeypatch.setattr(pipeline, "check_space", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "o", progress=False)
    waiting[0].communicate()
    assert waiting[0].returncode == 0
    assert contents(tmp_path / "o") == contents(whole)


def test_the_pieces_of_405b_fit_the_bound_on_memory() -> None:
    """Of each element in a piece a worker holds at most 16 bytes: what was read, two float32 arrays
    on the way to FP8, and what is written, twice."""
    config = replace(PRESETS["llama-3.1-405b"], num_layers=1)
    elements = [
        piece_rows(leaf.shape, itemsize=1) * math.prod(leaf.shape[1:])
        for leaf in jax.tree.leaves(abstract_params(ModelSpec(config)))
    ]
    assert array_file.WORKERS <= 8
    assert 8 * 16 * max(elements) < 1.5e9


PEAK = """
import re, sys
from pathlib import Path
from converters.pipeline import convert

def resident(what):
    return 1024 * int(re.search(rf"{what}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
convert(sys.argv[1], sys.argv[2], progress=False, quantize=sys.argv[3] or None)
print(resident("VmHWM") - before)
"""


def large(directory: Path, layers: int) -> Path:
    """A dense bf16 checkpoint of zeros: 56 MB in each layer, and 131 MB beside them."""
    config = replace(
        PRESETS["llama-3.2-1b"], vocab_size=16000, bos_token_id=1, eos_token_ids=(2,),
        num_layers=layers, intermediate_size=3072,
        tie_word_embeddings=False,
    )  # fmt: skip
    weights = traverse_util.flatten_dict(abstract_params(ModelSpec(config)), sep="/")
    tensors = {
        f"{source_name(path.removesuffix('/weight'))}.weight": LazyArray(
            np.dtype(ml_dtypes.bfloat16),
            leaf.shape,
            lambda start, stop, leaf=leaf: np.zeros(
                (stop - start, *leaf.shape[1:]), ml_dtypes.bfloat16
            ),
        )
        for path, leaf in weights.items()
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    write_checkpoint(directory, tensors, lambda size: None)
    return directory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = {}
    for layers in (6, 14):
        source = large(tmp_path / f"s{layers}", layers)
        for quantize in ("", "row", "block"):
            target = tmp_path / f"o{layers}{quantize}"
            peaks[layers, quantize] = int(run(PEAK, source, target, quantize))
    # 467 MB and 915 MB of weights. The interpreter, JAX included, is in memory before. What the
    # workers hold at once differs from run to run: by 100 MB where no more layers are added.
    assert max(peaks.values()) < 1.5e9, peaks
    for quantize in ("", "row", "block"):
        assert peaks[14, quantize] < peaks[6, quantize] + 200e6, peaks


@pytest.mark.slow
def test_a_large_conversion_that_is_killed_at_any_time_finishes_to_the_same_bytes(
    tmp_path: Path, no_shared_cache: None
) -> None:
    source = large(tmp_path / "s", 2)
    began = time.perf_counter()
    convert(source, tmp_path / "whole", progress=False)
    seconds = time.perf_counter() - began
    run(ENDED, source, tmp_path / "o", tmp_path / "whole", "SIGKILL", 30, seconds)
    assert verify(tmp_path / "o") == {}
