"""Tests of the commands that inspect and write checkpoints: inspect, verify, export."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from converters.dialects import DIALECTS
from converters.opened import open_checkpoint
from converters.pipeline import convert
from converters.safetensors_reader import read_checkpoint
from llama_jax import cli
from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.cli import output
from llama_jax.model.kv_cache import PAGE_SIZE
from pallas_kernels.cpu import library
from tests import tiny_checkpoints as tiny
from tests import tiny_meta
from tests.cpu_kernel import needs_cpu_kernel

Run = Callable[..., tuple[int, str, str]]


VARIANTS = (
    "autofp8 with cache scales", "autofp8 dynamic", "compressed-tensors static",
    "compressed-tensors by names", "compressed-tensors block", "fbgemm as Meta's 405B",
    "modelopt with cache scales", "finegrained", "torchao per row",
)  # fmt: skip
SOURCES: dict[str, Callable[[Path], Path]] = {
    "dense": lambda path: tiny.write(path, tiny.dense(), shards=2),
    "friendli static": lambda path: tiny.write(path, tiny.friendli(), tiny.FRIENDLI_03),
    "friendli dynamic": lambda path: tiny.write(
        path, tiny.friendli(dynamic=True), tiny.FRIENDLI_DYNAMIC
    ),
    "meta": lambda path: tiny_meta.write_meta(path, tiny_meta.meta_parts(tiny_meta.meta(), 2)),
    **{name: tiny.VARIANTS[name].write for name in VARIANTS},
}
GENUINE = (
    "autofp8_static", "base_bf16", "ct_fp8_dynamic", "friendli_fmo03_fp8", "hf_fbgemm_fp8",
    "hf_finegrained_fp8", "meta_original_mp2", "modelopt_fp8_kv",
)  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line with arguments; (exit code, stdout, stderr)."""
    monkeypatch.setattr(output.stdout, "width", 300)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int | None)
        return ended.value.code or 0, *capsys.readouterr()

    return run


def facts(run: Run, *arguments: object) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def friendli(tmp_path: Path) -> Path:
    return SOURCES["friendli static"](tmp_path / "source")


@pytest.fixture
def converted(friendli: Path, tmp_path: Path) -> Path:
    convert(friendli, tmp_path / "converted", progress=False)
    return tmp_path / "converted"


@pytest.mark.parametrize("name", SOURCES)
def test_inspect_foretells_what_a_conversion_makes(run: Run, tmp_path: Path, name: str) -> None:
    source = SOURCES[name](tmp_path / "source")
    before = facts(run, "inspect", source)
    manifest = convert(source, tmp_path / "converted", progress=False)
    after = facts(run, "inspect", tmp_path / "converted")
    assert before["container"] == "published checkpoint"
    assert after["container"] == "converted checkpoint"
    assert before["total_bytes"] == manifest.total_bytes
    assert before["disk_bytes"] == sum(path.stat().st_size for path in source.iterdir())
    for key in ("dialect", "config", "total_bytes", "modules", "quantized", "kv_scales"):
        assert before[key] == after[key]
    weights = before["memory"]["weights"]
    assert weights == manifest.total_bytes  # on one device
    code, out, _ = run("inspect", source)
    assert code == 0 and f"{manifest.dialect} layout" in out


def test_every_layout_is_among_the_sources(tmp_path: Path) -> None:
    written = [write(tmp_path / str(i)) for i, write in enumerate(SOURCES.values())]
    assert {open_checkpoint(path).dialect for path in written} == {d.name for d in DIALECTS}


def test_inspect_json_is_complete(run: Run, friendli: Path) -> None:
    found = facts(run, "inspect", friendli)
    assert set(found) == {
        "path", "container", "dialect", "config", "total_bytes", "disk_bytes", "modules",
        "quantized", "kv_scales", "tokenizer", "memory",
    }  # fmt: skip
    assert found["path"] == str(friendli)
    assert found["config"]["num_layers"] == 2
    assert set(found["modules"][0]) == {
        "name", "format", "layers", "everywhere", "count", "shape", "bytes", "weight_scale",
        "input_scale",
    }  # fmt: skip
    assert set(found["quantized"]) == {"matrices", "with_input_scale", "not_quantized"}
    assert set(found["memory"]) == {
        "weights", "kv_cache", "workspace", "total", "limit", "fits", "capacity", "max_batch_size",
        "max_seq_len", "prefill_chunk", "devices", "num_pages",
    }  # fmt: skip
    assert found["kv_scales"] is None
    assert found["tokenizer"] == {
        "kind": "tiktoken", "vocab_size": 257, "special_tokens": 1, "chat_template": False,
    }  # fmt: skip


def test_inspect_shows_formats_and_the_range_of_scales(run: Run, friendli: Path) -> None:
    arrays = tiny.friendli()
    kinds = {kind["name"]: kind for kind in facts(run, "inspect", friendli)["modules"]}
    down = kinds["down_proj"]
    assert down["format"] == "float8_e4m3fn, scale per tensor, input scale"
    assert down["layers"] == [0, 1] and down["everywhere"] and down["count"] == 2
    assert down["shape"] == [64, 160]
    assert down["bytes"] == 2 * (64 * 160 + 4 * 64 + 4)
    for key, leaf in (("weight_scale", "weight_scale"), ("input_scale", "in_scale")):
        scales = [arrays[f"model.layers.{layer}.mlp.down_proj.{leaf}"] for layer in range(2)]
        assert down[key] == [float(min(scales)), float(max(scales))]
    assert kinds["norm"] == {
        "name": "norm", "format": "bfloat16", "layers": [], "everywhere": True, "count": 1,
        "shape": [64], "bytes": 128, "weight_scale": None, "input_scale": None,
    }  # fmt: skip
    _, out, _ = run("inspect", friendli)
    assert "14 x float8_e4m3fn, scale per tensor, input scale: 90.7 kB" in out
    assert "14 of 15 matrices; not lm_head" in out
    assert "static: an input scale for each quantised matrix" in out


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("friendli dynamic", "float8_e4m3fn, scale per row"),
        ("autofp8 dynamic", "float8_e4m3fn, scale per tensor"),
        ("finegrained", "float8_e4m3fn, scale per 128x128 block, activations by 128"),
        ("fbgemm as Meta's 405B", "float8_e4m3fn, scale per row, activations up to 20.5"),
        ("dense", "bfloat16"),
    ],
)
def test_inspect_names_the_kind_of_scale(run: Run, tmp_path: Path, name: str, stored: str) -> None:
    kinds = facts(run, "inspect", SOURCES[name](tmp_path / "source"))["modules"]
    assert {kind["format"] for kind in kinds if kind["name"] == "down_proj"} == {stored}


def test_inspect_names_what_is_not_quantised(run: Run, tmp_path: Path) -> None:
    source = SOURCES["compressed-tensors by names"](tmp_path / "source")
    found = facts(run, "inspect", source)
    attention = [f"layers_0/self_attn/{x}_proj" for x in "qkvo"]
    plain = {*attention, "layers_1/self_attn/q_proj", "layers_0/mlp/down_proj", "lm_head"}
    assert set(found["quantized"]["not_quantized"]) == plain
    assert len(found["quantized"]["matrices"]) == 15 - len(plain)
    down = {tuple(k["layers"]): k for k in found["modules"] if k["name"] == "down_proj"}
    assert down[(0,)]["format"] == "bfloat16" and not down[(0,)]["everywhere"]
    assert down[(1,)]["format"].startswith("float8_e4m3fn") and not down[(1,)]["everywhere"]
    _, out, _ = run("inspect", source)
    rest = "down_proj, k_proj, o_proj, v_proj in layer 0; q_proj in layers 0-1; lm_head"
    assert f"8 of 15 matrices; not {rest}" in out
    assert "down_proj in layer 0 " in out and "down_proj in layer 1 " in out
    assert "gate_proj in layer" not in out  # all of them are stored in the same way


def test_inspect_shows_scales_of_the_cache(run: Run, tmp_path: Path) -> None:
    source = SOURCES["modelopt with cache scales"](tmp_path / "source")
    scales = facts(run, "inspect", source)["kv_scales"]
    assert np.shape(scales) == (2, 2)
    arrays = tiny.VARIANTS["modelopt with cache scales"].arrays()
    assert scales[1][0] == float(arrays["model.layers.1.self_attn.k_proj.k_scale"][0])
    assert "in 2 layers" in run("inspect", source)[1]


def test_inspect_without_a_path_is_about_the_shipped_model(run: Run) -> None:
    found = facts(run, "inspect")
    assert found["path"] == str(SHIPPED_MODEL) and found["dialect"] == "friendli"
    assert found["tokenizer"]["chat_template"] is True
    code, out, _ = run("inspect")
    assert code == 0 and "with chat template" in out and "It fits." in out


def test_inspect_shows_paths_of_another_device(run: Run, friendli: Path) -> None:
    sizes = ("--max-batch-size", "3", "--max-seq-len", "256", "--prefill-chunk", "32")
    found = facts(run, "inspect", friendli, "--paths", "--device", "h200", *sizes)
    assert set(found) == {"model", "device", "programs"} and found["device"] == "NVIDIA H200"
    prefill, decode, scoring = found["programs"]
    assert (scoring["phase"], scoring["name"]) == ("scoring", "logprobs of 32 tokens")
    assert {call["path"] for call in scoring["calls"]} == {"xla"}
    assert (prefill["phase"], prefill["name"]) == ("prefill", "prefill of 1 x 32 tokens")
    assert (decode["phase"], decode["name"]) == ("decode", "decode of 3 rows")
    fields = {"module", "matrices", "path", "operands", "why_not", "cost", "kernel", "fuses",
              "refusals"}  # fmt: skip
    assert set(decode["calls"][0]) == fields
    attention = [call for call in decode["calls"] if not call["matrices"]]
    refusals = {
        "hopper": "head_dim must be 64 or 128, got 16",
        "cpu": "JAX runs on gpu, not on a CPU",
    }
    assert {call["why_not"] for call in attention} == {"; ".join(refusals.values())}
    assert {call["kernel"] for call in attention} == {"xla"}
    assert [call["refusals"] for call in attention] == [refusals] * len(attention)


@needs_cpu_kernel
def test_inspect_shows_the_paths_of_this_cpu(run: Run, friendli: Path) -> None:
    sizes = ("--max-batch-size", "3", "--max-seq-len", "256", "--prefill-chunk", "32")
    _, out, _ = run("inspect", friendli, "--paths", *sizes)
    assert ["device", "cpu"] in [line.split() for line in out.splitlines()]
    layers, scoring = out.split("logprobs of 32 tokens")
    assert "lm_head" in scoring and "Kernel launches" not in scoring
    for program in layers.split("decode of 3 rows"):
        # Matrices may have notes of their own before it, by what this CPU has.
        note = r"^ *(\(\d\)) not hopper: JAX runs on cpu, not on a GPU *$"
        (mark,) = re.findall(note, program, re.MULTILINE)
        lines = [line.split() for line in program.splitlines()]
        rows = [i for i, line in enumerate(lines) if line[:2] == ["self_attn", "0-1"]]
        names = (library.NORM, library.ROPE, library.ATTENTION)
        for row, name in zip(rows, names, strict=True):
            assert name.startswith(lines[row][2])  # the name may go on in the next line
            assert name == library.NORM or mark in lines[row] + lines[row + 1]


def test_inspect_says_what_fits_and_is_right(run: Run, friendli: Path) -> None:
    def memory(batch: int, length: int, limit: int, *options: object) -> dict[str, Any]:
        size = ("--max-batch-size", batch, "--max-seq-len", length, "--memory", limit)
        return facts(run, "inspect", friendli, *size, *options)["memory"]

    limit = memory(2, 1500, 10**9)["total"]
    found = memory(2, 1024, limit)["capacity"]
    for cache, capacity in found.items():
        options = ("--kv-dtype", cache)
        longest, most = capacity["longest"], capacity["most"]
        assert memory(2, longest, limit, *options)["fits"]
        assert longest == 2048 or not memory(2, longest + PAGE_SIZE, limit, *options)["fits"]
        assert memory(most, 1024, limit, *options)["fits"]
        assert not memory(most + 1, 1024, limit, *options)["fits"]
        assert capacity["longest_alone"] == 2048  # all of the context
    assert found["bf16"]["longest"] - 1500 in range(PAGE_SIZE)
    assert found["fp8"]["longest"] == 2048


@pytest.mark.parametrize(
    ("text", "limit"),
    [("80GiB", 80 * 2**30), ("141 GB", 141 * 10**9), ("1.5g", 15 * 10**8), ("1000000", 10**6)],
)
def test_inspect_takes_the_memory_of_another_device(
    run: Run, friendli: Path, text: str, limit: int
) -> None:
    assert facts(run, "inspect", friendli, "--memory", text)["memory"]["limit"] == limit
    code, out, _ = run("inspect", friendli, "--memory", "100kB")
    assert code == 0 and "It does not fit." in out and "none" in out


def test_inspect_explains_mistakes(run: Run, friendli: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in {
        (tmp_path / "missing",): "missing is neither a directory nor",
        (friendli / "config.json",): "config.json is not a directory",
        (tmp_path / "empty",): "config.json is missing",
        (friendli, "--memory", "much"): "expected a size such as 80GiB",
        (friendli, "--max-seq-len", 4096): "the model's context is 2048 tokens",
    }.items():
        code, out, err = run("inspect", *arguments)
        assert code == 2 and out == "" and "Traceback" not in err
        assert message in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_checkpoints_from_end_to_end(
    run: Run, shared_data: Path, tmp_path: Path, name: str
) -> None:
    source = shared_data / "checkpoints" / name
    before = facts(run, "inspect", source)
    facts(run, "convert", source, tmp_path / "converted")
    assert facts(run, "verify", tmp_path / "converted")["problems"] == {}
    form = "fp8" if before["quantized"]["matrices"] else "bf16"
    facts(run, "export", tmp_path / "converted", tmp_path / "exported", "--format", form)
    after = facts(run, "inspect", tmp_path / "exported")
    for key in ("config", "total_bytes", "quantized", "kv_scales"):
        assert after[key] == before[key]
    if name == "meta_original_mp2":  # which has none
        assert "no tokenizer.json and no tokenizer.model" in after["tokenizer"]["error"]
    else:
        assert after["tokenizer"] == before["tokenizer"]
    assert after["dialect"] == ("compressed-tensors" if form == "fp8" else "dense")


def test_verify(run: Run, converted: Path) -> None:
    code, out, _ = run("verify", converted)
    assert code == 0 and "converted is sound: 115.9 kB read" in out
    assert facts(run, "verify", converted)["sound"] is True
    path = converted / "params" / "norm.weight" / "0"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    (converted / "notes.txt").touch()
    (converted / "tokenizer.json").unlink()
    code, out, _ = run("verify", converted)
    assert code == 1 and "is not sound" in out
    assert all(word in out for word in ("damaged", "params/norm.weight", "extra", "missing"))
    code, out, _ = run("verify", converted, "--json")
    found = json.loads(out)
    assert code == 1 and set(found) == {"directory", "sound", "problems", "total_bytes", "seconds"}
    assert found["sound"] is False
    assert found["problems"] == {
        "params/norm.weight": "damaged", "notes.txt": "extra", "tokenizer.json": "missing",
    }  # fmt: skip


def test_verify_wants_a_converted_checkpoint(run: Run, friendli: Path, tmp_path: Path) -> None:
    for path in (friendli, tmp_path / "missing"):
        code, out, err = run("verify", path)
        assert code == 2 and out == ""
        assert f"{path} is not a converted checkpoint" in err and "llama-jax convert" in err


@pytest.mark.parametrize("origin", ["published", "converted"])
def test_export_fp8(run: Run, friendli: Path, converted: Path, tmp_path: Path, origin: str) -> None:
    source = {"published": friendli, "converted": converted}[origin]
    arguments = ("export", source, tmp_path / "out", "--format", "fp8")
    found = facts(run, *arguments)
    assert set(found) == {
        "target", "format", "total_bytes", "shards", "tokenizer_files", "seconds"
    }  # fmt: skip
    assert found["shards"] == ["model.safetensors"] and found["format"] == "fp8"
    assert found["tokenizer_files"] == ["tokenizer.json"]
    stored = read_checkpoint(tmp_path / "out")
    assert found["total_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == ml_dtypes.float8_e4m3fn
    code, _, err = run(*arguments)
    assert code == 2 and "exists already" in err
    code, out, _ = run(*arguments, "--overwrite")
    assert code == 0 and "model.safetensors" in out


def test_export_bf16(run: Run, friendli: Path, tmp_path: Path) -> None:
    facts(run, "export", friendli, tmp_path / "out", "--format", "bf16")
    stored = read_checkpoint(tmp_path / "out").values()
    assert {tensor.dtype.name for tensor in stored} == {"bfloat16"}


def test_hub_ids_are_downloaded(
    run: Run, friendli: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(hub_id: str, allow_patterns: list[str]) -> str:
        assert hub_id == "org/name"
        return str(friendli)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert facts(run, "inspect", "org/name")["path"] == str(friendli)
    assert facts(run, "convert", "org/name", tmp_path / "o")["dialect"] == "friendli"
    facts(run, "export", "org/name", tmp_path / "out", "--format", "fp8")
    assert read_checkpoint(tmp_path / "out").keys() >= {"model.layers.0.mlp.up_proj.weight_scale"}


def test_export_explains_mistakes(run: Run, friendli: Path, tmp_path: Path) -> None:
    dense = SOURCES["dense"](tmp_path / "dense")
    for arguments, message in {
        (dense, tmp_path / "out", "--format", "fp8"): "no FP8 weights",
        (tmp_path / "missing", tmp_path / "out", "--format", "fp8"): "missing is neither a",
        (friendli, friendli / "out", "--format", "fp8"): "lies inside the source",
        (friendli, tmp_path / "out", "--format", "gguf"): "gguf",
        (friendli, dense, "--format", "fp8", "--overwrite"): "is not an export of llama-jax",
    }.items():
        code, out, err = run("export", *arguments)
        assert code == 2 and out == "" and "Traceback" not in err
        assert message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "out").exists() and not (friendli / "out").exists()
