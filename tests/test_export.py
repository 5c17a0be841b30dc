"""Back to Hugging Face: nothing is lost on the way, and config.json says how to read it.

transformers and compressed-tensors themselves read exports in test_export_parity.py.
"""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import typer

from converters import export as export_module
from converters.compressed_tensors_writer import compressed_tensors
from converters.dialects import layout
from converters.dialects.layout import LazyArray, Module, Plan, constant
from converters.export import dequantized_tensors, export
from converters.opened import open_checkpoint
from converters.orbax_to_hf import main
from converters.pipeline import convert
from converters.safetensors_reader import read_checkpoint, read_rows
from converters.safetensors_writer import write_checkpoint
from llama_jax.checkpoint.store import MANIFEST, CheckpointError, read_manifest
from llama_jax.model.config import PRESETS, LlamaConfig
from llama_jax.model.fp8 import WeightFormat
from tests import tiny_checkpoints as tiny

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
Q = "model.layers.1.self_attn.q_proj"


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return {
        name: read_rows(tensor, 0, (tensor.shape or (1,))[0])
        for name, tensor in read_checkpoint(directory).items()
    }


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def exported(directory: Path, source: Path, format: Any, **quantize: Any) -> Path:
    """`source` converted and exported again."""
    convert(source, directory / "orbax", progress=False, **quantize)
    export(directory / "orbax", directory / "hf", format, progress=False)
    return directory / "hf"


def canonical(directory: Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint in canonical terms."""
    return {
        f"{path}/{leaf}": array.rows(0, (array.shape or (1,))[0])
        for path, module in open_checkpoint(directory).plan.modules.items()
        for leaf, array in module.arrays.items()
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_survives_the_way_out_and_back(preset: str) -> None:
    config = PRESETS[preset]
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("ids", [(), (2,), (2, 3)])
def test_token_ids_are_written_as_transformers_does(ids: tuple[int, ...]) -> None:
    values = PRESETS["llama-2-7b"].to_dict() | {"eos_token_ids": ids, "bos_token_id": None}
    config = LlamaConfig.from_dict(values)
    assert config.to_hf()["eos_token_id"] == {0: None, 1: 2, 2: [2, 3]}[len(ids)]
    assert LlamaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_dense_weights_come_back_byte_for_byte(tmp_path: Path, dtype: Any) -> None:
    arrays = tiny.dense(dtype)
    changes = {"torch_dtype": np.dtype(dtype).name}
    source = tiny.write(tmp_path / "source", arrays, changes, shards=3)
    out = exported(tmp_path, source, "bf16")
    assert_same(tensors(out), arrays)
    config = read_json(out / "config.json")
    assert LlamaConfig.from_hf(config) == LlamaConfig.from_pretrained(source)
    assert "quantization_config" not in config
    assert read_json(out / "generation_config.json") == {"temperature": 0.6}
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    arrays = tiny.dense()
    del arrays["lm_head.weight"]
    source = tiny.write(tmp_path / "source", arrays, {"tie_word_embeddings": True})
    out = exported(tmp_path, source, "bf16")
    assert_same(tensors(out), arrays)
    assert read_json(out / "config.json")["tie_word_embeddings"] is True


def test_a_checkpoint_without_generation_config_has_none_afterwards(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.dense())
    (source / "generation_config.json").unlink()
    assert not (exported(tmp_path, source, "bf16") / "generation_config.json").exists()


@pytest.mark.parametrize("dynamic", [False, True])
def test_fp8_keeps_codes_and_scales(tmp_path: Path, dynamic: bool) -> None:
    arrays = tiny.friendli(dynamic)
    config = tiny.FRIENDLI_DYNAMIC if dynamic else tiny.FRIENDLI_05
    out = exported(tmp_path, tiny.write(tmp_path / "source", arrays, config), "fp8")
    expected = tiny.dense()
    for name in tiny.LINEARS:
        expected[f"{name}.weight"] = arrays[f"{name}.weight"].view(E4M3)
        scale = arrays[f"{name}.weight_scale"].astype(np.float32)
        expected[f"{name}.weight_scale"] = scale if dynamic else scale.reshape(1)
        if not dynamic:
            expected[f"{name}.input_scale"] = arrays[f"{name}.in_scale"].reshape(1)
    assert_same(tensors(out), expected)
    quantization = read_json(out / "config.json")["quantization_config"]
    (group,) = quantization["config_groups"].values()
    assert group["weights"]["strategy"] == ("channel" if dynamic else "tensor")
    assert group["input_activations"]["strategy"] == ("token" if dynamic else "tensor")
    assert group["input_activations"]["dynamic"] is dynamic
    assert group["targets"] == ["Linear"] and quantization["ignore"] == ["lm_head"]
    assert quantization["kv_cache_scheme"] is None


def test_block_scales_keep_their_shape(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.dense())
    out = tensors(exported(tmp_path, source, "fp8", quantize="block", quantize_lm_head=True))
    assert out["model.layers.0.mlp.gate_proj.weight_scale"].shape == (2, 1)
    assert out["model.layers.0.mlp.down_proj.weight_scale"].shape == (1, 2)
    assert out["lm_head.weight"].dtype == E4M3
    quantization = read_json(tmp_path / "hf" / "config.json")["quantization_config"]
    (group,) = quantization["config_groups"].values()
    assert group["weights"]["block_structure"] == [128, 128]
    assert group["input_activations"] | {"group_size": 0} == {
        "num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "group",
        "group_size": 0, "block_structure": None,
    }  # fmt: skip
    assert group["input_activations"]["group_size"] == 128
    assert quantization["ignore"] == []


def fp8_module(rows: int = 8, input_scale: bool = False, uniform: bool = False) -> Module:
    codes = np.arange(rows * 4, dtype=np.uint8).reshape(rows, 4).view(E4M3)
    scale = np.full(rows, 0.5, np.float32) if uniform else np.arange(1, rows + 1, dtype=np.float32)
    arrays = {"weight": constant(codes), "weight_scale": constant(scale)}
    if input_scale:
        arrays["input_scale"] = constant(np.array(0.25, np.float32))
    return Module(WeightFormat("float8_e4m3fn", "row", input_scale), arrays)


def dense_module() -> Module:
    return Module(WeightFormat("bfloat16"), {"weight": constant(np.ones((8, 4), BF16))})


def test_formats_that_differ_are_groups_with_their_targets() -> None:
    modules = {
        "embed_tokens": dense_module(),
        "layers_0/self_attn/q_proj": dense_module(),
        "layers_0/mlp/up_proj": fp8_module(uniform=True),
        "layers_0/mlp/down_proj": fp8_module(),
        "layers_1/mlp/up_proj": fp8_module(input_scale=True, uniform=True),
    }
    kv_scales = ((0.5, 0.25), (1.0, 2.0))
    found, config = compressed_tensors(Plan(modules, frozenset(), kv_scales))
    one, two = config["config_groups"].values()
    assert one["targets"] == ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    # A matrix with equal scales has to be like the others of its group.
    assert one["weights"]["strategy"] == "channel"
    assert found["model.layers.0.mlp.up_proj.weight_scale"].shape == (8, 1)
    assert two["targets"] == ["model.layers.1.mlp.up_proj"]
    assert two["weights"]["strategy"] == "tensor"
    assert found["model.layers.1.mlp.up_proj.weight_scale"].shape == (1,)
    assert config["ignore"] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert config["kv_cache_scheme"]["strategy"] == "tensor"
    for layer, pair in enumerate(kv_scales):
        for letter, value in zip("kv", pair, strict=True):
            scale = found[f"model.layers.{layer}.self_attn.{letter}_scale"]
            assert scale.rows(0, 1) == np.array([value], np.float32)


def several_scales_a_row() -> Module:
    scale = constant(np.ones((8, 2), np.float32))
    stored = WeightFormat("float8_e4m3fn", "row", column_groups=2)
    return Module(stored, {**fp8_module().arrays, "weight_scale": scale})


def codes_in_bfloat16() -> Module:
    weight = constant(np.ones((8, 4), BF16))
    return Module(WeightFormat("bfloat16", "row"), {**fp8_module().arrays, "weight": weight})


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            several_scales_a_row,
            r"layers_0/mlp/up_proj has scales for each of 2 groups.*--format bf16",
        ),
        (codes_in_bfloat16, r"layers_0/mlp/up_proj has codes in bfloat16.*--format bf16"),
        (dense_module, "no FP8 weights.*--format bf16.*convert --quantize row"),
    ],
)
def test_what_compressed_tensors_cannot_hold_is_refused(module: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        compressed_tensors(Plan({"layers_0/mlp/up_proj": module()}, frozenset()))


def test_a_lost_bound_on_activations_is_said(caplog: pytest.LogCaptureFixture) -> None:
    stored = WeightFormat("float8_e4m3fn", "row", activation_scale_ub=1200.0)
    module = Module(stored, fp8_module().arrays)
    compressed_tensors(Plan({"layers_0/mlp/up_proj": module}, frozenset()))
    assert "activation_scale_ub" in caplog.text


@pytest.mark.parametrize("scales", ["row", "row of two column groups", "block"])
def test_bf16_is_code_times_scale_rounded_once(
    scales: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several pieces, the last of which is ragged."""
    monkeypatch.setattr(layout, "PIECE_BYTES", 128 * 200 * 2)
    rng = np.random.default_rng(0)
    shape = (300, 200)
    finite = np.setdiff1d(np.arange(256), [0x7F, 0xFF]).astype(np.uint8)
    codes = rng.choice(finite, shape).view(E4M3)
    scale = rng.uniform(1e-3, 1, {"row": 300, "block": (3, 2)}.get(scales, (300, 2)))
    scale = scale.astype(np.float32)
    if scales == "row":
        stored, wide = WeightFormat("float8_e4m3fn", "row"), scale[:, None]
    elif scales == "block":
        stored = WeightFormat("float8_e4m3fn", "block")
        wide = scale.repeat(128, axis=0)[:300].repeat(128, axis=1)[:, :200]
    else:
        stored = WeightFormat("float8_e4m3fn", "row", column_groups=2)
        wide = scale.repeat(100, axis=1)
    module = Module(stored, {"weight": constant(codes), "weight_scale": constant(scale)})
    found = dequantized_tensors(Plan({"lm_head": module}, frozenset()))["lm_head.weight"]
    parts = list(layout.pieces(found))
    assert [len(part) for part in parts] == [128, 128, 44]
    expected = (codes.astype(np.float32) * wide).astype(BF16)
    assert np.concatenate(parts).tobytes() == expected.tobytes()


def test_shards_are_what_safetensors_itself_reads(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(7, dtype=np.uint8).view(E4M3),
        "b": np.ones((3, 5), BF16),
        "c": np.array(2.5, np.float32),
        "d": np.ones((4, 4), np.float32),
    }
    counted: list[int] = []
    lazy = {name: constant(array) for name, array in arrays.items()}
    names = write_checkpoint(tmp_path, lazy, counted.append, shard_bytes=64)
    assert names == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    total = sum(array.nbytes for array in arrays.values())
    assert sum(counted) == total
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": total}
    found = {}
    for name in names:
        raw = (tmp_path / name).read_bytes()
        assert int.from_bytes(raw[:8], "little") % 8 == 0
        for key, value in safetensors.deserialize(raw):
            assert index["weight_map"][key] == name
            found[key] = bytes(value["data"]), value["shape"]
    assert found == {name: (array.tobytes(), list(array.shape)) for name, array in arrays.items()}
    for tensor in read_checkpoint(tmp_path).values():
        assert tensor.offset % tensor.dtype.itemsize == 0
    assert_same(tensors(tmp_path), arrays)


def test_a_large_tensor_is_never_whole_in_memory(tmp_path: Path) -> None:
    asked: list[int] = []

    def rows(start: int, stop: int) -> np.ndarray:
        asked.append((stop - start) * 4096 * 4)
        return np.broadcast_to(np.float32(0), (stop - start, 4096))

    array = LazyArray(np.dtype(np.float32), (10_000, 4096), rows)
    write_checkpoint(tmp_path, {"a": array}, lambda count: None)
    assert max(asked) <= layout.PIECE_BYTES and sum(asked) == array.nbytes


def test_an_unconverted_checkpoint_can_be_exported(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.friendli(), tiny.FRIENDLI_03)
    converted = exported(tmp_path, source, "fp8")
    export(source, tmp_path / "direct", "fp8", progress=False)
    assert_same(tensors(tmp_path / "direct"), tensors(converted))


@pytest.mark.parametrize("kind", ["tensor", "channel", "block", "lm_head"])
def test_fp8_goes_round_without_a_bit_lost(tmp_path: Path, kind: str) -> None:
    """Orbax to compressed-tensors and back: codes, scales, the cache's scales, the config."""
    if kind == "tensor":
        source = tiny.write(tmp_path / "source", tiny.friendli(), tiny.FRIENDLI_05)
        quantize: dict[str, Any] = {}
    else:
        source = tiny.write(tmp_path / "source", tiny.dense())
        quantize = {"quantize": "block" if kind == "block" else "row"}
        quantize["quantize_lm_head"] = kind == "lm_head"
    convert(source, tmp_path / "orbax", progress=False, **quantize)
    manifest = tmp_path / "orbax" / MANIFEST
    kv_scales = [[0.1, 0.3], [1.5, 2e-3]]  # as float32, which is what scales are
    kv_scales = [[float(np.float32(each)) for each in pair] for pair in kv_scales]
    manifest.write_text(json.dumps(read_json(manifest) | {"kv_scales": kv_scales}))
    export(tmp_path / "orbax", tmp_path / "hf", "fp8", progress=False)
    convert(tmp_path / "hf", tmp_path / "again", progress=False)
    assert_same(canonical(tmp_path / "again"), canonical(tmp_path / "orbax"))
    before, after = (read_manifest(tmp_path / name) for name in ("orbax", "again"))
    assert after == replace(before, dialect=after.dialect, source="hf", checksums=after.checksums)


def test_only_exports_are_overwritten(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", tiny.dense())
    other = tiny.write(tmp_path / "other", tiny.dense())
    out = exported(tmp_path, source, "bf16")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(source, out, "bf16", progress=False)
    (out / "stale").touch()
    export(source, out, "bf16", overwrite=True, progress=False)
    assert not (out / "stale").exists()
    for target in (other, tmp_path / "orbax"):
        with pytest.raises(FileExistsError, match="not an export"):
            export(source, target, "bf16", overwrite=True, progress=False)
    with pytest.raises(CheckpointError, match="holds the source"):
        export(source, tmp_path, "bf16", overwrite=True, progress=False)


def test_a_failure_leaves_nothing_and_an_earlier_export_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.write(tmp_path / "source", tiny.dense())
    export(source, tmp_path / "out", "bf16", progress=False)
    before = tensors(tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "write_checkpoint", full)
    for target, overwrite in (("new", False), ("out", True)):
        with pytest.raises(OSError, match="the disk is full"):
            export(source, tmp_path / target, "bf16", overwrite=overwrite, progress=False)
    assert_same(tensors(tmp_path / "out"), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.write(tmp_path / "source", tiny.dense())
    main(source, tmp_path / "out", "bf16")
    assert "model.safetensors" in capsys.readouterr().out
    with pytest.raises(typer.Exit):
        main(source, tmp_path / "fp8", "fp8")
    assert "no FP8 weights" in capsys.readouterr().err
