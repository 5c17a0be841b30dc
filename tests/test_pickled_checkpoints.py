"""Hugging Face's checkpoints from before safetensors, in pickles, through the converter."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from converters import resolve as resolving
from converters.dialects import make_plan
from converters.source import read_source
from llama_jax.checkpoint.store import CheckpointError
from tests import tiny_checkpoints as tiny
from tests import tiny_meta, torch_files
from tests.plans import assert_same, planned
from tests.tiny_checkpoints import Arrays

BF16 = ml_dtypes.bfloat16


def pickled(directory: Path, arrays: Arrays, shards: int = 1) -> Path:
    """What transformers wrote before safetensors."""
    tiny.write(directory, arrays)
    (directory / "model.safetensors").unlink()
    if shards == 1:
        torch_files.save(directory / "pytorch_model.bin", arrays)
        return directory
    weight_map = {}
    for shard in range(shards):
        name = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = {key: arrays[key] for key in sorted(arrays)[shard::shards]}
        weight_map |= dict.fromkeys(part, name)
        torch_files.save(directory / name, part)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_hugging_face_checkpoints(tmp_path: Path, shards: int) -> None:
    arrays = tiny.dense(np.float16)
    old = pickled(tmp_path / "old", arrays, shards)
    assert make_plan(read_source(old))[1] == "dense"
    assert_same(planned(old)[1], planned(tiny.write(tmp_path / "new", arrays))[1])
    before = resolving._fingerprint(old, None)
    first = next(old.glob("pytorch_model*.bin"))
    first.write_bytes(first.read_bytes() + b" ")
    assert resolving._fingerprint(old, None) != before


def test_pickled_fp8_checkpoints_are_their_dialects(tmp_path: Path) -> None:
    variant = tiny.VARIANTS["fbgemm"]
    arrays = variant.arrays()
    old = variant.write(tmp_path / "old", arrays)
    (old / "model.safetensors").unlink()
    torch_files.save(old / "pytorch_model.bin", arrays)
    assert make_plan(read_source(old))[1] == "fbgemm"
    assert_same(planned(old)[1], planned(variant.write(tmp_path / "new"))[1])


def test_a_pickled_storage_under_two_names_is_tied(tmp_path: Path) -> None:
    arrays = tiny.dense()
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    directory = pickled(tmp_path, arrays)
    config = tiny.CONFIG | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    assert "lm_head" not in planned(directory)[0]


def test_safetensors_are_taken_before_pickles(tmp_path: Path) -> None:
    directory = tiny.write(tmp_path, tiny.dense())
    (directory / "pytorch_model.bin").write_bytes(b"whatever")
    tiny_meta.write_meta(directory, [{"norm.weight": np.ones(4, BF16)}])
    assert make_plan(read_source(directory))[1] == "dense"


def test_gptq_and_awq_are_told_by_their_tensors(tmp_path: Path) -> None:
    arrays = tiny.dense()
    del arrays["model.layers.0.mlp.up_proj.weight"]
    arrays["model.layers.0.mlp.up_proj.qweight"] = np.ones((8, 160), np.int32)
    with pytest.raises(CheckpointError, match=r"GPTQ or AWQ .* not supported. Take an FP8"):
        planned(tiny.write(tmp_path, arrays))
