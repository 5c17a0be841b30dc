"""Meta's own checkpoints through the converter.

The reference computes with Meta's weights as they are, in float64 and with Meta's formulas: pairs
of neighbours rotated as complex numbers, each file's part multiplied on its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import typer

from converters import resolve as resolving
from converters.dialects import make_plan
from converters.hf_to_orbax import main
from converters.pipeline import convert
from converters.source import read_source
from llama_jax.checkpoint import store
from llama_jax.checkpoint.store import CheckpointError, load_params, read_manifest
from llama_jax.llm import LLM
from llama_jax.model.config import PRESETS, LlamaConfig
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.llama import Llama
from llama_jax.sampling_params import SamplingParams
from tests import tiny_checkpoints as tiny
from tests import tiny_meta
from tests.plans import assert_same, planned
from tests.tiny_checkpoints import Arrays
from tests.tiny_meta import META_PARAMS

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
HF_CONFIG = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "eos_token_id": None,
}  # fmt: skip
IDS = np.random.default_rng(6).integers(0, 96, (2, 11))
HEAD = 8  # the size of one


def hf_name(name: str) -> str:
    stem = name.removesuffix(".weight").replace("tok_embeddings", "embed_tokens")
    if stem.startswith("layers."):
        for meta, hf in HF_NAMES.items():
            stem = stem.replace(meta, hf)
    return "lm_head.weight" if stem == "output" else f"model.{stem}.weight"


def as_hugging_face(arrays: Arrays) -> Arrays:
    """The same model under Hugging Face's names: row j and row j + d / 2 of a head of q and k are
    what Meta rotates as row 2j and row 2j + 1."""
    renamed = {}
    for name, array in arrays.items():
        if name.endswith(("wq.weight", "wk.weight")):
            rows = [
                array[head * HEAD + 2 * (j % (HEAD // 2)) + j // (HEAD // 2)]
                for head in range(len(array) // HEAD)
                for j in range(HEAD)
            ]
            array = np.stack(rows)
        renamed[hf_name(name)] = array
    return renamed


@pytest.mark.parametrize("embedding_axis", [0, 1], ids=["llama3", "llama2"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_files_is_the_same_model_as_hugging_faces(
    tmp_path: Path, count: int, embedding_axis: int
) -> None:
    arrays = tiny_meta.meta()
    meta = tiny_meta.write_meta(
        tmp_path / "meta", tiny_meta.meta_parts(arrays, count, embedding_axis)
    )
    hf = tiny.write(tmp_path / "hf", as_hugging_face(arrays), HF_CONFIG)
    assert read_source(meta).config == read_source(hf).config
    assert make_plan(read_source(meta))[1] == "meta"
    (formats, found), (hf_formats, expected) = planned(meta), planned(hf)
    assert formats == hf_formats
    assert_same(found, expected)


def test_any_rows_can_be_read_alone(tmp_path: Path) -> None:
    """Within a head, across heads, across files."""
    directory = tiny_meta.write_meta(tmp_path, tiny_meta.meta_parts(tiny_meta.meta(), 4))
    plan, _ = make_plan(read_source(directory))
    for path in ("layers_0/self_attn/k_proj", "layers_0/self_attn/o_proj", "embed_tokens"):
        weight = plan.modules[path].arrays["weight"]
        whole = weight.whole()
        for start in range(len(whole)):
            for stop in range(start + 1, len(whole) + 1, 5):
                part = weight.rows(start, stop)
                assert part.tobytes() == whole[start:stop].tobytes()


def rotary(params: Mapping[str, Any], length: int) -> np.ndarray:
    """exp(i angle), [length, head_dim / 2], as `precompute_freqs_cis` and `apply_scaling`."""
    theta = params.get("rope_theta", 10000.0)
    frequencies = 1 / theta ** (np.arange(0, HEAD, 2) / HEAD)
    if params.get("use_scaled_rope"):
        for i, frequency in enumerate(frequencies):
            wavelength = 2 * np.pi / frequency
            smooth = (8192 / wavelength - 1) / (4 - 1)
            if wavelength > 8192 / 1:
                frequencies[i] = frequency / 8
            elif wavelength >= 8192 / 4:
                frequencies[i] = (1 - smooth) * frequency / 8 + smooth * frequency
    return np.exp(1j * np.outer(np.arange(length), frequencies))


def meta_logits(
    parts: Sequence[Arrays], params: Mapping[str, Any], ids: np.ndarray, embedding_axis: int = 0
) -> np.ndarray:
    """Meta's forward pass in float64, [batch, length, vocab]. parts: values, not codes."""
    batch, length = ids.shape
    kv_heads = params.get("n_kv_heads") or params["n_heads"]

    def split_by_rows(x: np.ndarray, name: str) -> np.ndarray:
        return np.concatenate([x @ part[f"{name}.weight"].T for part in parts], axis=-1)

    def split_by_columns(x: np.ndarray, name: str) -> np.ndarray:
        pieces = np.split(x, len(parts), axis=-1)
        return sum(
            piece @ part[f"{name}.weight"].T for piece, part in zip(pieces, parts, strict=True)
        )

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + params["norm_eps"])
        return x / scale * parts[0][f"{name}.weight"]

    def rotated(x: np.ndarray) -> np.ndarray:
        pairs = x.reshape(batch, length, -1, HEAD // 2, 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * rotary(params, length)[None, :, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(batch, length, -1, HEAD)

    embedding = np.concatenate([part["tok_embeddings.weight"] for part in parts], embedding_axis)
    x = embedding[ids]
    for layer in (f"layers.{i}" for i in range(params["n_layers"])):
        h = norm(x, f"{layer}.attention_norm")
        q = rotated(split_by_rows(h, f"{layer}.attention.wq"))
        k = rotated(split_by_rows(h, f"{layer}.attention.wk"))
        v = split_by_rows(h, f"{layer}.attention.wv").reshape(k.shape)
        k, v = (np.repeat(each, params["n_heads"] // kv_heads, axis=2) for each in (k, v))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(HEAD)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, -1)
        x = x + split_by_columns(y, f"{layer}.attention.wo")
        h = norm(x, f"{layer}.ffn_norm")
        gate = split_by_rows(h, f"{layer}.feed_forward.w1")
        up = split_by_rows(h, f"{layer}.feed_forward.w3")
        x = x + split_by_columns(gate / (1 + np.exp(-gate)) * up, f"{layer}.feed_forward.w2")
    return split_by_rows(norm(x, "norm"), "output")


def our_logits(source: Path, target: Path, ids: np.ndarray = IDS) -> np.ndarray:
    convert(source, target, progress=False)
    spec = read_manifest(target).spec("float32")
    return np.asarray(jax.jit(Llama(spec).apply)({"params": load_params(target, spec)}, ids))


def in_float64(parts: Sequence[Arrays]) -> list[Arrays]:
    return [{name: array.astype(np.float64) for name, array in part.items()} for part in parts]


LLAMA2_PARAMS = {
    "dim": 64, "n_layers": 4, "n_heads": 8, "multiple_of": 32, "ffn_dim_multiplier": 0.9,
    "norm_eps": 1e-6, "vocab_size": -1,
}  # fmt: skip


def test_logits_are_those_of_metas_formulas(tmp_path: Path) -> None:
    parts = tiny_meta.meta_parts(tiny_meta.meta(), 2)
    ours = our_logits(tiny_meta.write_meta(tmp_path / "s", parts), tmp_path / "o")
    np.testing.assert_allclose(ours, meta_logits(in_float64(parts), META_PARAMS, IDS), atol=1e-4)


def test_logits_of_llama_2(tmp_path: Path) -> None:
    """Its columns of embeddings, a head of keys for each of queries, constants stored beside."""
    arrays = tiny_meta.meta(np.float16)
    for layer in range(4):
        for name in ("wk", "wv"):
            key = f"layers.{layer}.attention.{name}.weight"
            arrays[key] = np.concatenate([arrays[key], arrays[key][::-1] * np.float16(0.5)])
    parts = tiny_meta.meta_parts(arrays, 2, embedding_axis=1)
    for part in parts:
        part["rope.freqs"] = np.ones(4, np.float32)
        part["layers.0.attention.inner_attention.rope.freqs"] = np.ones(4, np.float32)
    source = tiny_meta.write_meta(tmp_path / "s", parts, LLAMA2_PARAMS)
    ours = our_logits(source, tmp_path / "o")
    expected = meta_logits(in_float64(parts), LLAMA2_PARAMS, IDS, embedding_axis=1)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    config = read_manifest(tmp_path / "o").config
    assert (config.vocab_size, config.dtype, config.num_kv_heads) == (96, "float16", 8)
    assert (config.max_position_embeddings, config.rope_scaling) == (4096, None)


def dequantized(parts: Sequence[Arrays], scales: Sequence[Arrays]) -> list[Arrays]:
    """In float64, each file with its own scales."""
    wide = in_float64(parts)
    for part, of_part in zip(wide, scales, strict=True):
        for name, scale in of_part.items():
            layer, module, _ = name.split("_", 1)[0], *name.split("_", 1)[1].rsplit("_", 1)
            part[f"layers.{layer}.{module}.weight"] *= scale.astype(np.float64).reshape(-1, 1)
    return wide


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fp8_codes_and_the_scales_of_each_file_are_kept(tmp_path: Path, count: int) -> None:
    parts = tiny_meta.meta_parts(tiny_meta.meta(), count)
    scales = tiny_meta.meta_fp8(parts)
    directory = tiny_meta.write_meta(tmp_path / "s", parts, scales=scales)
    formats, found = planned(directory)
    by_row = WeightFormat("float8_e4m3fn", "row", activation_scale_ub=1200.0)
    quantized = {
        f"layers_{layer}/mlp/{name}": form
        for layer in (1, 2)
        for name, form in (
            ("gate_proj", by_row),
            ("up_proj", by_row),
            ("down_proj", replace(by_row, column_groups=count)),
        )
    }
    plain = dict.fromkeys(formats, WeightFormat("bfloat16"))
    assert formats == plain | quantized

    def stored(matrix: str, axis: int) -> tuple[np.ndarray, np.ndarray]:
        codes = [part[f"layers.2.feed_forward.{matrix}.weight"] for part in parts]
        by_part = [each[f"2_feed_forward.{matrix}_{rank}"] for rank, each in enumerate(scales)]
        together = np.stack(by_part, axis=1) if axis and count > 1 else np.concatenate(by_part)
        return np.concatenate(codes, axis), together

    for name, matrix, axis in (
        ("gate_proj", "w1", 0),
        ("up_proj", "w3", 0),
        ("down_proj", "w2", 1),
    ):
        codes, scale = stored(matrix, axis)
        key = f"layers_2/mlp/{name}/weight"
        assert_same(
            {"codes": found[key], "scale": found[f"{key}_scale"]}, {"codes": codes, "scale": scale}
        )


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (0.0, r"holds 0 for codes of .*w2.weight that are not all 0, from row 3"),
        (-1.0, r"holds -1.0: a scale must be"),
        (np.nan, r"holds nan: a scale must be"),
        (np.inf, r"holds inf: a scale must be"),
        (2.0**125, r"holds 4.2.* that overflow with it, from row 3"),
    ],
)
def test_scales_that_make_no_number_are_refused(tmp_path: Path, value: float, match: str) -> None:
    parts = tiny_meta.meta_parts(tiny_meta.meta(), 2)
    scales = tiny_meta.meta_fp8(parts)
    scales[1]["2_feed_forward.w2_1"][3] = value
    with pytest.raises(CheckpointError, match=match):
        planned(tiny_meta.write_meta(tmp_path, parts, scales=scales))


def test_logits_of_fp8_are_those_of_the_values(tmp_path: Path) -> None:
    """Without rounded activations, so that nothing but the order of sums differs."""
    parts = tiny_meta.meta_parts(tiny_meta.meta(), 2)
    scales = tiny_meta.meta_fp8(parts)
    ours = our_logits(tiny_meta.write_meta(tmp_path / "s", parts, scales=scales), tmp_path / "o")
    expected = meta_logits(dequantized(parts, scales), META_PARAMS, IDS)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_scales_may_be_columns(tmp_path: Path) -> None:
    parts = tiny_meta.meta_parts(tiny_meta.meta(), 2)
    scales = tiny_meta.meta_fp8(parts)
    columns = [{name: scale[:, None] for name, scale in part.items()} for part in scales]
    _, found = planned(tiny_meta.write_meta(tmp_path / "a", parts, scales=scales))
    _, expected = planned(tiny_meta.write_meta(tmp_path / "b", parts, scales=columns))
    assert_same(found, expected)


def shared_output(arrays: Arrays) -> None:
    arrays["output.weight"] = arrays["tok_embeddings.weight"]


def copied_output(arrays: Arrays) -> None:
    arrays["output.weight"] = arrays["tok_embeddings.weight"].copy()


def no_output(arrays: Arrays) -> None:
    del arrays["output.weight"]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("tie", [shared_output, copied_output, no_output])
def test_tied_embeddings(tmp_path: Path, tie: Callable[[Arrays], None], count: int) -> None:
    """As one storage under two names, as an equal copy, or as one tensor alone."""
    parts = tiny_meta.meta_parts(tiny_meta.meta(), count)
    for part in parts:
        tie(part)
    directory = tiny_meta.write_meta(tmp_path, parts)
    assert read_source(directory).config.tie_word_embeddings
    formats, found = planned(directory)
    assert "lm_head" not in formats
    embedding = np.concatenate([part["tok_embeddings.weight"] for part in parts])
    assert_same({"": found["embed_tokens/weight"]}, {"": embedding})


def test_an_output_that_differs_in_its_last_row_is_not_tied(tmp_path: Path) -> None:
    [part] = tiny_meta.meta_parts(tiny_meta.meta(), 1)
    copied_output(part)
    part["output.weight"][-1, -1] += 1
    directory = tiny_meta.write_meta(tmp_path, [part])
    assert not read_source(directory).config.tie_word_embeddings
    assert_same({"": planned(directory)[1]["lm_head/weight"]}, {"": part["output.weight"]})


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("llama-2")])
def test_llama_3s_configs(name: str) -> None:
    """Fields that fit every size in which Meta published it; token ids come from the tokenizer."""
    preset = PRESETS[name]
    scaled = preset.rope_scaling is not None
    small = {2048: (1.5, 256), 3072: (1.0, 256), 4096: (1.3, 1024), 16384: (1.2, 4096)}
    multiplier, multiple = small.get(preset.hidden_size, (1.3, 4096))
    config = LlamaConfig.from_params_json(
        {
            "dim": preset.hidden_size, "n_layers": preset.num_layers, "n_heads": preset.num_heads,
            "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": multiplier,
            "multiple_of": multiple, "norm_eps": 1e-5, "rope_theta": 500000.0,
        }
        | ({"use_scaled_rope": True} if scaled else {})
    )  # fmt: skip
    assert config == replace(preset, bos_token_id=None, eos_token_ids=())


def test_code_llamas_context() -> None:
    config = LlamaConfig.from_params_json(LLAMA2_PARAMS | {"rope_theta": 1000000})
    assert config.max_position_embeddings == 16384


def test_special_tokens_are_the_tokenizers(tmp_path: Path, shared_data: Path) -> None:
    """Whether the model answers or continues cannot be told: every end of a turn ends a text."""
    arrays = tiny_meta.meta()
    for name in ("tok_embeddings.weight", "output.weight"):
        arrays[name] = np.resize(arrays[name], (128256, 64))
    parts = tiny_meta.meta_parts(arrays, 1)
    params = {**META_PARAMS, "vocab_size": -1}
    for kind, ids in (("llama3", (128000, (128001, 128008, 128009))), ("llama2", (1, (2,)))):
        tokenizer = (shared_data / f"{kind}_tokenizer" / "tokenizer.model").read_bytes()
        directory = tiny_meta.write_meta(tmp_path / kind, parts, params, tokenizer=tokenizer)
        config = read_source(directory).config
        assert (config.bos_token_id, config.eos_token_ids) == ids
        assert read_source(directory).tokenizer_files == ("tokenizer.model",)


def test_without_a_tokenizer_there_are_no_special_tokens(tmp_path: Path) -> None:
    directory = tiny_meta.write_meta(tmp_path, tiny_meta.meta_parts(tiny_meta.meta(), 1))
    (directory / "special_tokens_map.json").write_text("{}")
    config = read_source(directory).config
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer of bytes."""
    arrays = tiny_meta.meta()
    rng = np.random.default_rng(7)
    for name in ("tok_embeddings.weight", "output.weight"):
        arrays[name] = rng.normal(0, 0.2, (512, 64)).astype(BF16)
    return tiny_meta.write_meta(
        tmp_path_factory.mktemp("talking") / "Llama3.1-tiny-Instruct",
        tiny_meta.meta_parts(arrays, 2),
        META_PARAMS | {"vocab_size": 512},
        tokenizer=tiny_meta.byte_tokenizer(),
    )


def test_a_directory_of_metas_opens_and_chats(
    talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    llm = LLM.load(talking, max_seq_len=64, max_batch_size=1, dtype="float32", verbose=False)
    assert llm.manifest.dialect == "meta" and llm.spec.config.eos_token_ids == (257, 264, 265)
    messages = [{"role": "user", "content": "Hi"}]
    user, assistant = ([262, *role, 263, *b"\n\n"] for role in (b"user", b"assistant"))
    reply = llm.chat(messages, SamplingParams(max_new_tokens=4, ignore_eos=True))
    assert reply.prompt_token_ids == (256, *user, *b"Hi", 265, *assistant)
    assert len(reply.token_ids) == 4
    [converted] = (tmp_path / "converted").iterdir()
    assert store.verify(converted) == {}


def test_the_scripts_convert_it(talking: Path, tmp_path: Path, capsys: Any) -> None:
    main(talking, tmp_path / "o")
    assert "from meta layout" in (out := capsys.readouterr().out) and "tokenizer.model" in out
    main(talking, tmp_path / "q", quantize="row")
    assert read_manifest(tmp_path / "q").formats["layers_0/mlp/up_proj"].scale == "row"
    with pytest.raises(typer.Exit):
        main(talking, tmp_path / "o")


@pytest.mark.parametrize(
    "name",
    ["consolidated.01.pth", "params.json", "tokenizer.model", "fp8_scales_1.pt"],
)
def test_the_cache_notices_every_file(tmp_path: Path, name: str) -> None:
    parts = tiny_meta.meta_parts(tiny_meta.meta(), 2)
    scales = tiny_meta.meta_fp8(parts)
    source = tiny_meta.write_meta(
        tmp_path / "s", parts, scales=scales, tokenizer=tiny_meta.byte_tokenizer()
    )
    before = resolving._fingerprint(source, None)
    assert resolving._fingerprint(source, None) == before
    (source / name).write_bytes((source / name).read_bytes() + b" ")
    assert resolving._fingerprint(source, None) != before


def hub(contents: Mapping[str, bytes], root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the hub with one repository; the names that are downloaded, in order."""
    downloaded: list[str] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        root.mkdir(exist_ok=True)
        for name, data in contents.items():
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                (root / name).write_bytes(data)
                downloaded.append(name)
        return str(root)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return downloaded


def test_older_files_are_downloaded_only_where_there_are_no_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = tiny_meta.write_meta(tmp_path / "meta", tiny_meta.meta_parts(tiny_meta.meta(), 2))
    files = {path.name: path.read_bytes() for path in meta.iterdir()}
    hub(files, tmp_path / "hub", monkeypatch)
    found = resolving.resolve("org/meta", tmp_path / "cache", progress=False)
    assert read_manifest(found).dialect == "meta"
    hf = tiny.write(tmp_path / "hf", tiny.dense())
    names = {path.name: path.read_bytes() for path in hf.iterdir()} | files
    names["pytorch_model.bin"] = b"the same again"
    downloaded = hub(names, tmp_path / "hub2", monkeypatch)
    found = resolving.resolve("org/hf", tmp_path / "cache", progress=False)
    assert read_manifest(found).dialect == "dense"
    assert not any(name.endswith((".pth", ".bin")) for name in downloaded)


def test_a_genuine_checkpoint(shared_data: Path, tmp_path: Path) -> None:
    """Bit for bit the one it was made from, and transformers' logits."""
    source = shared_data / "checkpoints" / "meta_original_mp2"
    assert_same(planned(source)[1], planned(shared_data / "checkpoints" / "base_bf16")[1])
    reference = np.load(source / "reference.npz")
    ours = our_logits(source, tmp_path / "o", reference["input_ids"])
    np.testing.assert_allclose(ours, reference["logits"], atol=1e-4)


@pytest.mark.parametrize("folder", ["", "original", "original/mp8"])
def test_files_in_the_cache_of_the_hub_are_links(tmp_path: Path, folder: str) -> None:
    """As `hf download` leaves them, with Meta's files in a folder of the repository."""
    model = tmp_path / "models--org--name"
    blobs = tiny_meta.write_meta(
        model / "blobs",
        tiny_meta.meta_parts(tiny_meta.meta(), 2),
        tokenizer=tiny_meta.byte_tokenizer(),
    )
    directory = model / "snapshots" / "0123abcd" / folder
    directory.mkdir(parents=True)
    for path in blobs.iterdir():
        (directory / path.name).symlink_to(path)
    assert convert(directory, tmp_path / "o", progress=False).dialect == "meta"
    (directory / "consolidated.00.pth").unlink()
    (directory / "consolidated.00.pth").symlink_to(tmp_path / "o" / "manifest.json")
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        planned(directory)


def test_params_json_may_be_wrapped(tmp_path: Path) -> None:
    parts = tiny_meta.meta_parts(tiny_meta.meta(), 1)
    plain = read_source(tiny_meta.write_meta(tmp_path / "a", parts))
    wrapped = read_source(tiny_meta.write_meta(tmp_path / "b", parts, {"model": META_PARAMS}))
    assert wrapped.config == plain.config


@pytest.mark.parity
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("count", [1, 2])
def test_what_torch_saves_computes_what_transformers_computes(
    tmp_path: Path, count: int, fp8: bool
) -> None:
    """Torch puts the parts together and permutes with its own operations."""
    import torch
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    def as_torch(array: np.ndarray) -> Any:
        kinds = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
        return torch.from_numpy(array.astype(np.float32)).to(
            kinds.get(array.dtype.name, torch.float32)
        )

    parts = tiny_meta.meta_parts(tiny_meta.meta(), count)
    scales = tiny_meta.meta_fp8(parts) if fp8 else []
    source = tiny_meta.write_meta(tmp_path / "s", parts)
    for rank, part in enumerate(parts):
        state = {name: as_torch(array) for name, array in part.items()}
        torch.save(state, source / f"consolidated.{rank:02d}.pth")
    for rank, part in enumerate(scales):
        state = {name: as_torch(array) for name, array in part.items()}
        torch.save(state, source / f"fp8_scales_{rank}.pt")

    values = dequantized(parts, scales) if fp8 else in_float64(parts)
    state = {}
    for name in values[0]:
        split = [torch.from_numpy(part[name]).float() for part in values]
        by_columns = name.split(".")[-2] in ("wo", "w2")
        whole = torch.cat(split, dim=int(by_columns)) if split[0].ndim == 2 else split[0]
        if name.endswith(("wq.weight", "wk.weight")):
            pairs = whole.view(-1, HEAD // 2, 2, whole.shape[1])
            whole = pairs.transpose(1, 2).reshape(whole.shape)
        state[hf_name(name)] = whole
    config = read_source(source).config
    model = LlamaForCausalLM(HFConfig(**config.to_hf(), attn_implementation="eager")).float()
    model.load_state_dict(state)
    with torch.no_grad():
        theirs = model(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(our_logits(source, tmp_path / "o"), theirs, atol=1e-4)
