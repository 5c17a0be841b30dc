import errno
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import typer

from converters import dialects, pipeline
from converters.dialects.layout import piece_rows
from converters.export import export
from converters.hf_to_orbax import main
from converters.pipeline import convert
from converters.resolve import resolve
from llama_jax.checkpoint.store import CheckpointError, load_params, read_manifest
from llama_jax.model import fp8
from llama_jax.model.fp8 import WeightFormat
from tests import tiny_checkpoints as tiny
from tests import tiny_meta

Arrays = dict[str, np.ndarray]
Q = "model.layers.1.self_attn.q_proj"
FP8_ROW = WeightFormat("float8_e4m3fn", "row")
FP8_STATIC = WeightFormat("float8_e4m3fn", "row", input_scale=True)


def converted(directory: Path) -> dict[str, np.ndarray]:
    """What was written, by Hugging Face's module name and canonical leaf."""
    manifest = read_manifest(directory)
    params = load_params(directory, manifest.spec())
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    named = {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
    return {name.replace("layers_", "layers."): leaf for name, leaf in named.items()}


def assert_same_bytes(found: np.ndarray, expected: np.ndarray) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


def left_behind(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_dense_weights_are_kept_bit_for_bit(tmp_path: Path, dtype: Any, shards: int) -> None:
    arrays = tiny.dense(dtype)
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    arrays["model.layers.0.self_attn.rotary_emb.cos_cached"] = np.ones((4, 8), np.float32)
    source = tiny.write(tmp_path / "source", arrays, shards=shards)
    manifest = convert(source, tmp_path / "out", progress=False)
    found = converted(tmp_path / "out")
    for name, array in arrays.items():
        if "rotary_emb" not in name:
            assert_same_bytes(found.pop(name.removeprefix("model.")), array)
    assert not found
    assert set(manifest.formats.values()) == {WeightFormat(np.dtype(dtype).name)}
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest.dialect, manifest.source) == ("dense", "source")
    assert manifest.config.eos_token_ids == (2, 3) and manifest.generation == {"temperature": 0.6}
    assert manifest.tokenizer_files == ("tokenizer.json",)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == tiny.byte_tokenizer_json()
    assert left_behind(tmp_path) == ["out", "source"]


@pytest.mark.parametrize("config", [tiny.FRIENDLI_03, tiny.FRIENDLI_05, {}])
def test_friendli_static_keeps_codes_and_scales(tmp_path: Path, config: dict) -> None:
    arrays = tiny.friendli()
    manifest = convert(tiny.write(tmp_path / "s", arrays, config), tmp_path / "o", progress=False)
    found = converted(tmp_path / "o")
    for name, shape in tiny.LINEARS.items():
        short = name.removeprefix("model.")
        codes = arrays[f"{name}.weight"].view(ml_dtypes.float8_e4m3fn)
        assert_same_bytes(found[f"{short}.weight"], codes)
        scale = np.full(shape[0], arrays[f"{name}.weight_scale"])
        assert_same_bytes(found[f"{short}.weight_scale"], scale)
        assert_same_bytes(found[f"{short}.input_scale"], arrays[f"{name}.in_scale"])
    assert manifest.dialect == "friendli"
    assert manifest.formats["layers_1/mlp/up_proj"] == FP8_STATIC
    assert manifest.formats["lm_head"] == WeightFormat("bfloat16")


def test_friendli_dynamic_keeps_a_scale_per_row(tmp_path: Path) -> None:
    arrays = tiny.friendli(dynamic=True)
    source = tiny.write(tmp_path / "s", arrays, tiny.FRIENDLI_DYNAMIC)
    manifest = convert(source, tmp_path / "o", progress=False)
    found = converted(tmp_path / "o")
    for name in tiny.LINEARS:
        short = name.removeprefix("model.")
        assert f"{short}.input_scale" not in found
        scale = arrays[f"{name}.weight_scale"].astype(np.float32)[:, 0]
        assert_same_bytes(found[f"{short}.weight_scale"], scale)
    assert manifest.formats["layers_0/self_attn/q_proj"] == FP8_ROW


@pytest.mark.parametrize("layout", ["row", "block"])
def test_quantising_on_the_way_is_what_fp8_quantize_does(
    tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.dialects.layout.PIECE_BYTES", 128 * 64)
    assert piece_rows((160, 64), 1) == 128  # so 160 rows come in two pieces
    arrays = tiny.dense()
    source = tiny.write(tmp_path / "s", arrays)
    convert(source, tmp_path / "o", quantize=layout, quantize_lm_head=True, progress=False)
    found = converted(tmp_path / "o")
    for name in [*tiny.LINEARS, "lm_head"]:
        weight = jnp.asarray(arrays[f"{name}.weight"])
        blocks = [fp8.quantize(weight[i : i + 128], layout) for i in range(0, len(weight), 128)]
        codes, scale = (jnp.concatenate(parts) for parts in zip(*blocks, strict=True))
        short = name.removeprefix("model.")
        assert_same_bytes(found[f"{short}.weight"], np.asarray(codes))
        assert_same_bytes(found[f"{short}.weight_scale"], np.asarray(scale))
    assert_same_bytes(found["embed_tokens.weight"], arrays["model.embed_tokens.weight"])


def test_lm_head_is_quantised_only_when_asked(tmp_path: Path) -> None:
    manifest = convert(
        tiny.write(tmp_path / "s", tiny.dense()), tmp_path / "o", quantize="row", progress=False
    )
    assert manifest.formats["lm_head"] == WeightFormat("bfloat16")
    assert manifest.formats["layers_0/mlp/down_proj"] == FP8_ROW
    with pytest.raises(ValueError, match="quantize_lm_head needs quantize"):
        convert(tmp_path / "s", tmp_path / "o2", quantize_lm_head=True)


def test_tied_embeddings(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True}
    arrays = tiny.dense()
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens"):
        convert(tiny.write(tmp_path / "s", arrays, tied), tmp_path / "o", progress=False)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    convert(tiny.write(tmp_path / "s", arrays, tied), tmp_path / "o", progress=False)
    assert "lm_head.weight" not in converted(tmp_path / "o")


def change(name: str, edit: Callable[[np.ndarray], Any]) -> Callable[[Arrays], None]:
    def apply(arrays: Arrays) -> None:
        arrays[name] = edit(arrays[name].copy())

    return apply


def put(index: Any, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def edit(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return edit


BAD_FRIENDLI = {
    "missing scale": (lambda a: a.pop(f"{Q}.weight_scale"), rf"{Q}.weight_scale is missing"),
    "missing in_scale": (lambda a: a.pop(f"{Q}.in_scale"), rf"{Q}.in_scale is missing"),
    "missing weight": (lambda a: a.pop(f"{Q}.weight"), rf"{Q}.weight is missing"),
    "missing norm": (lambda a: a.pop("model.norm.weight"), r"model.norm.weight is missing"),
    "wrong shape": (change(f"{Q}.weight", lambda w: w[:-1]), rf"{Q}.weight has shape \[63, 64\]"),
    "scale shape": (
        change(f"{Q}.weight_scale", lambda s: np.ones(7, np.float32)),
        rf"{Q}.weight_scale has shape \[7\]",
    ),
    "scale dtype": (
        change(f"{Q}.weight_scale", lambda s: np.ones((), np.int32)),
        rf"{Q}.weight_scale is int32",
    ),
    "NaN scale": (change(f"{Q}.weight_scale", put((), np.nan)), rf"{Q}.weight_scale holds nan"),
    "infinite scale": (change(f"{Q}.in_scale", put((), np.inf)), rf"{Q}.in_scale holds inf"),
    "negative scale": (change(f"{Q}.weight_scale", put((), -1)), rf"{Q}.weight_scale holds -1"),
    "zero in_scale": (change(f"{Q}.in_scale", put((), 0)), rf"{Q}.in_scale is 0"),
    "NaN code 0x7f": (change(f"{Q}.weight", put((9, 3), 0x7F)), rf"{Q}.weight has NaN.* row 9"),
    "NaN code 0xff": (change(f"{Q}.weight", put((0, 0), -1)), rf"{Q}.weight has NaN.* row 0"),
    "NaN norm": (change("model.norm.weight", put(5, np.nan)), "model.norm.weight has NaN"),
    "left over": (
        lambda a: a.update(what=a["model.norm.weight"]),
        ": what has no place in a friendli",
    ),
    "one layer more": (
        lambda a: a.update({"model.layers.2.mlp.up_proj.weight": a[f"{Q}.weight"]}),
        r"model.layers.2.* has no place",
    ),
}


@pytest.mark.parametrize("case", BAD_FRIENDLI)
def test_bad_tensors_are_named_and_nothing_is_left(tmp_path: Path, case: str) -> None:
    spoil, match = BAD_FRIENDLI[case]
    arrays = tiny.friendli()
    spoil(arrays)
    source = tiny.write(tmp_path / "s", arrays, tiny.FRIENDLI_03)
    with pytest.raises(CheckpointError, match=match):
        convert(source, tmp_path / "o", progress=False)
    assert left_behind(tmp_path) == ["s"]


def test_asymmetric_friendli_weights_are_refused(tmp_path: Path) -> None:
    arrays = tiny.friendli(dynamic=True)
    arrays[f"{Q}.zeros"][3] = 1
    with pytest.raises(CheckpointError, match=rf"{Q}.zeros is not all zero"):
        convert(tiny.write(tmp_path / "s", arrays, tiny.FRIENDLI_DYNAMIC), tmp_path / "o")


def test_bad_dense_weights_are_refused(tmp_path: Path) -> None:
    arrays = tiny.dense()
    arrays[f"{Q}.weight"][4, 4] = np.inf
    for quantize in (None, "row"):
        with pytest.raises(CheckpointError, match=rf"{Q}.weight has NaN or infinity in row 4"):
            convert(tiny.write(tmp_path / "s", arrays), tmp_path / "o", quantize=quantize)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="FP8 already"):
        convert(
            tiny.write(tmp_path / "f", tiny.friendli(), tiny.FRIENDLI_03),
            tmp_path / "o",
            quantize="row",
        )


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'"),
        ({"quantization_config": {"quant_method": "new_fp8"}}, "'new_fp8'"),
        ({"compression_config": {"format": "float-quantized"}}, "float-quantized"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object"),
    ],
)
def test_an_unknown_layout_says_what_was_found_and_what_is_supported(
    tmp_path: Path, config: dict, match: str
) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        convert(tiny.write(tmp_path / "s", tiny.dense(), config), tmp_path / "o")
    if "must be" not in match:
        assert "Supported: dense," in str(error.value) and "friendli," in str(error.value)
        assert "x bfloat16" in str(error.value)


def test_integer_weights_are_not_taken_for_friendli(tmp_path: Path) -> None:
    arrays = {name: a for name, a in tiny.friendli().items() if not name.endswith("scale")}
    with pytest.raises(CheckpointError, match="14 x int8"):
        convert(tiny.write(tmp_path / "s", arrays), tmp_path / "o")


def test_paths_that_cannot_be_converted(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "out" / "s", tiny.dense())
    with pytest.raises(CheckpointError, match="holds the source"):
        convert(source, tmp_path / "out", overwrite=True)
    with pytest.raises(CheckpointError, match="is not a directory"):
        convert(tmp_path / "nowhere", tmp_path / "o")
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        convert(source, tmp_path / "o")


def test_an_existing_target_is_replaced_only_on_request_and_only_when_whole(tmp_path: Path) -> None:
    good = tiny.write(tmp_path / "good", tiny.dense())
    broken = tiny.friendli()
    broken[f"{Q}.weight"][63, 63] = 0x7F  # found late: most of the new one is written by then
    bad = tiny.write(tmp_path / "bad", broken, tiny.FRIENDLI_03)
    convert(good, tmp_path / "o", progress=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")}
    with pytest.raises(FileExistsError, match="exists already"):
        convert(good, tmp_path / "o", progress=False)
    with pytest.raises(CheckpointError, match="NaN"):
        convert(bad, tmp_path / "o", overwrite=True, progress=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "o").rglob("*")} == before
    manifest = convert(good, tmp_path / "o", overwrite=True, quantize="row", progress=False)
    assert read_manifest(tmp_path / "o") == manifest
    assert left_behind(tmp_path) == ["bad", "good", "o"]


def test_overwrite_never_replaces_what_is_no_checkpoint(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "s", tiny.dense())
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="is not a converted checkpoint"):
        convert(source, tmp_path / "o", overwrite=True, progress=False)
    assert left_behind(tmp_path / "o") == ["thesis.tex"]


def test_nothing_is_written_into_a_checkpoint_or_lost_with_one(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "s", tiny.dense())
    (tmp_path / "manifest.json").touch()  # of something else
    convert(source, tmp_path / "b", progress=False)
    export(source, tmp_path / "e", "bf16", progress=False)
    for outer in ("b", "b/params", "e"):
        for write in (convert, partial(export, format="bf16")):
            with pytest.raises(CheckpointError, match=f"lies inside the checkpoint .*/{outer[0]}:"):
                write(source, tmp_path / outer / "inner", progress=False)
    shutil.copytree(tmp_path / "b", tmp_path / "b" / "inner")  # as earlier versions allowed
    with pytest.raises(FileExistsError, match="inner inside was not written with it"):
        convert(source, tmp_path / "b", overwrite=True, progress=False)
    assert read_manifest(tmp_path / "b" / "inner") == read_manifest(tmp_path / "b")
    assert left_behind(tmp_path) == ["b", "e", "manifest.json", "s"]


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.write(tmp_path / "s", tiny.dense())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"not enough disk space: 197.2 kB needed, 1.0 kB") as error:
        convert(source, tmp_path / "o", progress=False)
    assert error.value.errno == errno.ENOSPC
    assert left_behind(tmp_path) == ["s"]


def test_a_full_disk_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.write(tmp_path / "s", tiny.dense())
    real, calls = pipeline.write_array, []

    def failing(directory: Path, *args: Any) -> str:
        calls.append(directory)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(directory, *args)

    monkeypatch.setattr(pipeline, "write_array", failing)
    with pytest.raises(OSError, match="the disk is full"):
        convert(source, tmp_path / "o", progress=False)
    assert calls[8].parent.parent.name == ".o.converting"
    assert left_behind(tmp_path) == ["s"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "s", tiny.dense())
    convert(source, tmp_path / "o", progress=False)
    (tmp_path / "o").rename(tmp_path / ".o.replaced")
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "o", progress=False)
    assert read_manifest(tmp_path / "o").dialect == "dense"
    assert left_behind(tmp_path) == ["o", "s"]


def test_resolve_converts_once_and_again_when_the_source_changes(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "model", tiny.dense())
    first = resolve(source, tmp_path / "cache", progress=False)
    assert first.parent == tmp_path / "cache" / "converted" and first.name.startswith("model-")
    made = (first / "manifest.json").stat().st_mtime_ns
    assert resolve(source, tmp_path / "cache", progress=False) == first == resolve(first)
    assert (first / "manifest.json").stat().st_mtime_ns == made
    assert resolve(source, tmp_path / "cache", quantize="row", progress=False) != first
    (source / "tokenizer.json").write_text(tiny.byte_tokenizer_json("<changed>"))
    assert resolve(source, tmp_path / "cache", progress=False) != first
    with pytest.raises(CheckpointError, match="is converted already"):
        resolve(first, quantize="row")


def test_resolve_of_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tiny.write(tmp_path / "models--org--name" / "snapshots" / "abc", tiny.dense())

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        assert hub_id == "org/name" and "*.safetensors" in allow_patterns
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = resolve("org/name", tmp_path / "cache", progress=False)
    assert found.name.startswith("name-")
    assert (read_manifest(found).dialect, read_manifest(found).source) == ("dense", "org/name")


def test_resolve_of_nothing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(hub_id: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"could not be downloaded .*: no network"):
        resolve("org/name", tmp_path)
    with pytest.raises(CheckpointError, match="neither a directory nor a Hugging Face hub id"):
        resolve(tmp_path / "nowhere", tmp_path)
    with pytest.raises(CheckpointError, match="neither a directory nor a Hugging Face hub id"):
        resolve("./nowhere", tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        resolve("not--a/name", tmp_path)


@pytest.mark.slow
def test_two_processes_share_one_conversion(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "s", tiny.dense())
    code = (
        "import sys\nfrom converters.resolve import resolve\n"
        "print(resolve(sys.argv[1], sys.argv[2], progress=False))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, source, tmp_path / "cache"],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    found = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0]
    assert len(found) == 1 and read_manifest(found.pop()).dialect == "dense"
    assert len(left_behind(tmp_path / "cache" / "converted")) == 1


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.write(tmp_path / "s", tiny.dense())
    main(source, tmp_path / "o", quantize="row", as_json=True)
    assert json.loads(capsys.readouterr().out)["dialect"] == "dense"
    main(source, tmp_path / "o", overwrite=True)
    out = capsys.readouterr().out
    assert "21 x bfloat16" in out and "tokenizer.json" in out
    with pytest.raises(typer.Exit) as stopped:
        main(source, tmp_path / "o")
    assert stopped.value.exit_code == 1
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(typer.Exit):
        main(source, tmp_path / "p", quantize_lm_head=True)
    assert "quantize_lm_head needs quantize" in capsys.readouterr().err


def test_the_scripts_run_as_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_meta.write_meta(tmp_path / "s", tiny_meta.meta_parts(tiny_meta.meta(), 2))
    converted, exported, again = (str(tmp_path / name) for name in ("o", "e", "a"))
    for module, arguments in (
        ("meta_to_orbax", [str(source), converted, "--quantize", "row"]),
        ("orbax_to_hf", [converted, exported, "--format", "fp8"]),
        ("hf_to_orbax", [exported, again]),
    ):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        monkeypatch.delitem(sys.modules, f"converters.{module}", raising=False)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_module(f"converters.{module}", run_name="__main__")
        assert not stopped.value.code
    before, after = (read_manifest(Path(directory)) for directory in (converted, again))
    assert after.dialect == "compressed-tensors"
    assert (after.formats, after.checksums) == (before.formats, before.checksums)


def test_the_dialect_that_its_page_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "converters/dialects/README.md").read_text()
    module, fixture = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    added: dict[str, Any] = {}
    exec(module, added)
    variant = eval(fixture, vars(tiny))["acme"]
    monkeypatch.setattr(dialects, "DIALECTS", (*dialects.DIALECTS, added["ACME"]))
    convert(variant.write(tmp_path / "s"), tmp_path / "o", progress=False)
    manifest, found, arrays = (
        read_manifest(tmp_path / "o"), converted(tmp_path / "o"), variant.arrays(),
    )  # fmt: skip
    assert manifest.dialect == "acme"
    for name, stored in {
        f"{Q}.weight": f"{Q}.qweight",
        f"{Q}.weight_scale": f"{Q}.scale",
        f"{tiny.DOWN}.weight": f"{tiny.DOWN}.weight",
        "lm_head.weight": "lm_head.weight",  # plain without being skipped
    }.items():
        assert_same_bytes(found[name.removeprefix("model.")], arrays[stored])
    unknown = replace(variant, config={"quantization_config": {"quant_method": "acme", "a": 1}})
    with pytest.raises(CheckpointError, match=r"quantization_config\.a = 1 is not known"):
        convert(unknown.write(tmp_path / "t"), tmp_path / "p", progress=False)
