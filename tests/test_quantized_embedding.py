"""A tied matrix in FP8 is looked up, multiplied by, converted, reported on and exported."""

import json
import logging
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters.compare import Setting, compare
from converters.dialects.layout import as_stored
from converters.export import export
from converters.opened import open_checkpoint
from converters.pipeline import convert
from converters.quantization_report import read_report, tables
from converters.quantize import QuantizeOptions
from converters.safetensors_reader import read_checkpoint, read_rows
from converters.safetensors_writer import write_checkpoint
from llama_jax import LLM, SamplingParams
from llama_jax.abacus import evaluate
from llama_jax.checkpoint.store import load_params, read_manifest, verify
from llama_jax.cli import main
from llama_jax.model import fp8
from llama_jax.model.forward import decode, prefill
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.llama import Llama
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec
from pallas_kernels import e4m3
from tests import float64_llama
from tests.test_conversion_safety import contents, interrupt
from tests.tiny import config, fp8_formats, tokens

ROW = WeightFormat("float8_e4m3fn", "row")
# Neither the vocabulary nor the hidden size is a multiple of 128.
TIED = config(tie_word_embeddings=True, vocab_size=320, hidden_size=192, num_layers=1)


@cache
def spec_of(stored: WeightFormat = ROW, dtype: str = "float32") -> ModelSpec:
    formats = fp8_formats(TIED, stored.scale or "row", input_scale=False)
    return ModelSpec(TIED, {**formats, "embed_tokens": stored}, dtype)


@cache
def random_params(spec: ModelSpec) -> Any:
    """All finite codes, and scales that differ, so that one in another's place is noticed."""
    rng = np.random.default_rng(0)
    finite = np.arange(256, dtype=np.uint8)
    finite = finite[(finite & 0x7F) != 0x7F].view(e4m3.DTYPE)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key == "weight_scale":
            return (rng.uniform(0.5, 2, leaf.shape) * 0.1 / 128).astype(np.float32)
        if leaf.dtype == e4m3.DTYPE:
            return rng.choice(finite, leaf.shape)
        return rng.uniform(0.5, 2, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(spec))


def as_on_a_cpu(params: Any) -> Any:
    return jax.tree.map(lambda a: a.view(np.int8) if a.dtype == e4m3.DTYPE else a, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "stored", [ROW, replace(ROW, scale="block"), replace(ROW, column_groups=3)], ids=str
)
def test_looked_up_rows_are_exactly_code_times_scale(stored: WeightFormat, dtype: str) -> None:
    spec = spec_of(stored, dtype)
    params = {"embed_tokens": random_params(spec)["embed_tokens"]}
    codes, scale = params["embed_tokens"]["weight"], params["embed_tokens"]["weight_scale"]
    wide = {
        "row": lambda: scale[:, None] if scale.ndim == 1 else np.repeat(scale, 64, 1),
        "block": lambda: np.kron(scale, np.ones((128, 128), np.float32))[:320, :192],
    }[str(stored.scale)]()
    expected = (codes.astype(np.float32) * wide).astype(dtype)
    ids = np.array([[0, 319, 7], [128, 255, 256]])
    for each in (params, as_on_a_cpu(params)):
        found = Llama(spec).apply(
            {"params": each}, ids, method=lambda model, x: model.embed_tokens.lookup(x)
        )
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected[ids])


def test_prefill_and_decode_agree_with_float64() -> None:
    """The float64 model multiplies by the dequantised matrix. Logits reach 40; all else is summed
    in float32."""
    spec, ids = spec_of(), tokens(2, 12)
    params = random_params(spec)
    expected, _ = float64_llama.forward(params, TIED, ids)
    assert np.abs(expected).mean() > 1
    params = as_on_a_cpu(params)
    cache = init_cache(TIED, 2, 64, "float32")
    logits, cache = prefill(params, cache, ids[:, :9], jnp.array([9, 9]), spec=spec)
    found = [logits]
    for i in (9, 10, 11):
        logits, cache = decode(params, cache, ids[:, i], spec=spec)
        found.append(logits)
    found = np.stack(found, axis=1)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected[:, 8:], rtol=0, atol=2e-6 * scale)
    np.testing.assert_array_equal(found.argmax(-1), expected[:, 8:].argmax(-1))


# --- A checkpoint: the one that ships, made tied.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published") / "s"
    shipped = evaluate.PACKAGE / "checkpoint_bf16"
    shutil.copytree(shipped, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    stored = read_checkpoint(shipped).items()
    arrays = {name: as_stored(tensor) for name, tensor in stored if name != "lm_head.weight"}
    write_checkpoint(directory, arrays, lambda count: None)
    described = json.loads((directory / "config.json").read_text())
    described["tie_word_embeddings"] = True
    (directory / "config.json").write_text(json.dumps(described))
    return directory


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "o"
    options = QuantizeOptions("row", lm_head=True, report=True)
    convert(source, directory, quantize=options, progress=False)
    return directory


def test_codes_and_scales_are_those_of_the_embedding(source: Path, converted: Path) -> None:
    manifest = read_manifest(converted)
    assert verify(converted) == {}
    assert manifest.formats["embed_tokens"] == ROW and manifest.formats["norm"].scale is None
    stored = read_checkpoint(source)["model.embed_tokens.weight"]
    expected = fp8.quantize(jnp.asarray(read_rows(stored, 0, stored.shape[0])), "row")
    found = load_params(converted, manifest.spec())["embed_tokens"]
    np.testing.assert_array_equal(found["weight"].view(jnp.int8), expected[0].view(jnp.int8))
    np.testing.assert_array_equal(found["weight_scale"], expected[1])
    plain = convert(source, converted.with_name("plain"), quantize="row", progress=False)
    assert plain.formats["embed_tokens"] == WeightFormat("bfloat16")
    words, width = stored.shape
    assert plain.total_bytes - manifest.total_bytes == words * width - 4 * words


def test_an_interrupted_conversion_finishes_to_the_same_bytes(
    source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QuantizeOptions("row", lm_head=True, report=True)
    interrupt(monkeypatch, source, tmp_path / "o", quantize=options)
    convert(source, tmp_path / "o", quantize=options, progress=False)
    assert contents(tmp_path / "o") == contents(converted)


def test_the_report_has_the_embedding_last(converted: Path) -> None:
    report = read_report(converted)
    last = report.matrices[-1]
    assert (last.path, last.kind, last.layer) == ("embed_tokens", "embed_tokens", None)
    assert 0.01 < last.relative_error < 0.04 and last.clipped == 0
    assert all(table.row_count for table in tables(report))


def test_inspect_lists_it(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(converted), "--json"])
    quantized = json.loads(capsys.readouterr().out)["quantized"]
    assert "embed_tokens" in quantized["matrices"] and not quantized["not_quantized"]


@pytest.mark.slow
def test_predictions_stay_close(source: Path, converted: Path) -> None:
    """Every matrix has three bits of mantissa; other tokens become likeliest at few places."""
    ids = tokens(4, 32, vocab_size=768)
    settings = (Setting(open_checkpoint(each)) for each in (source, converted))
    found = compare(*settings, ids).to_dict()
    assert 0 < found["kl_mean"] < 0.1 and found["top_1_agreement"] > 0.8


@pytest.mark.slow
def test_an_engine_draws_what_it_scores_highest(converted: Path) -> None:
    llm = LLM.load(
        converted, dtype="float32", max_batch_size=2, max_seq_len=128, prefill_chunk=64,
        verbose=False,
    )  # fmt: skip
    prompts = [[768, 5, 6, 7], [768, 300, 20]]
    replies = llm.generate(prompts, SamplingParams(temperature=0, max_new_tokens=12))
    drawn = [list(reply.token_ids) for reply in replies]
    assert all(drawn) and all(score.is_greedy for score in llm.score(prompts, drawn))


@pytest.mark.parametrize("format", ["fp8", "bf16"])
def test_an_export_has_it_in_bfloat16(
    converted: Path, tmp_path: Path, format: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        export(converted, tmp_path / "hf", format, progress=False)
    assert ("the export has it in bfloat16" in caplog.text) == (format == "fp8")
    tensors = read_checkpoint(tmp_path / "hf")
    assert "lm_head.weight" not in tensors and "model.embed_tokens.weight_scale" not in tensors
    stored = tensors["model.embed_tokens.weight"]
    module = open_checkpoint(converted).plan.modules["embed_tokens"].arrays
    codes, scale = (module[name].whole() for name in ("weight", "weight_scale"))
    expected = (codes.astype(np.float32) * scale[:, None]).astype(ml_dtypes.bfloat16)
    assert stored.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read_rows(stored, 0, stored.shape[0]), expected)
    again = open_checkpoint(tmp_path / "hf")
    assert again.plan.modules["embed_tokens"].format == WeightFormat("bfloat16")
    q_proj = again.plan.modules["layers_0/self_attn/q_proj"].format
    assert q_proj.scale == ("row" if format == "fp8" else None)
