import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from converters.pipeline import convert
from converters.resolve import resolve
from llama_jax.checkpoint import array_file, store
from llama_jax.checkpoint.store import CheckpointError, load_params, read_manifest
from llama_jax.model.llama import Llama
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec
from pallas_kernels import e4m3
from tests import tiny_checkpoints as tiny

Q = "layers_1.self_attn.q_proj"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    source = tiny.write(root / "source", tiny.friendli(), tiny.FRIENDLI_03)
    convert(source, root / "out", progress=False)
    return root / "out"


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(pristine, tmp_path / "out")


def test_params_are_exactly_the_declared_tree(pristine: Path) -> None:
    spec = read_manifest(pristine).spec()
    params = load_params(pristine, spec)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(spec))


def test_the_dtype_of_activations_does_not_change_what_is_stored(pristine: Path) -> None:
    manifest = read_manifest(pristine)
    narrow = load_params(pristine, manifest.spec("bfloat16"))
    wide = load_params(pristine, manifest.spec("float32", "static"))
    assert all(
        a.dtype == b.dtype and bool(jnp.array_equal(a, b))
        for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True)
    )


def test_plain_orbax_reads_the_parameters(pristine: Path) -> None:
    ours = load_params(pristine, read_manifest(pristine).spec())
    theirs = ocp.StandardCheckpointer().restore(pristine / "params")
    assert jax.tree.structure(theirs) == jax.tree.structure(ours)
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_bits_are_the_same_bytes(pristine: Path) -> None:
    spec = read_manifest(pristine).spec()
    codes, bits = load_params(pristine, spec), load_params(pristine, spec, bits=True)
    for a, b in zip(jax.tree.leaves(codes), jax.tree.leaves(bits), strict=True):
        assert b.dtype == (jnp.int8 if a.dtype == e4m3.DTYPE else a.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def spoil(directory: Path, **changes: object) -> None:
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_manifest_round_trip(directory: Path) -> None:
    manifest = read_manifest(directory)
    assert manifest.kv_scales is None
    spoil(directory, kv_scales=[[0.5, 2.0], [1.0, 1.5]])
    assert read_manifest(directory).kv_scales == ((0.5, 2.0), (1.0, 1.5))
    spoil(directory, kv_scales=None)
    assert read_manifest(directory) == manifest


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format_version": 99}, "format_version is 99, this version of llama_jax reads 2"),
        ({"config": {}}, "config.vocab_size is missing. The file is damaged"),
        ({"formats": {"lm_head": {"dtype": "float8_e4m3fn"}}}, "only codes .* scales.* is damaged"),
        ({"surprise": 1}, "'surprise' is not known.* is damaged"),
        ({"total_bytes": "5"}, "total_bytes is '5', expected int"),
        ({"kv_scales": [[0.5, -1]]}, r"kv_scales\[0\]\[1\] is -1, expected float > 0"),
        ({"kv_scales": [[0.5]]}, "expected list of length 2"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_why(
    directory: Path, changes: dict, match: str
) -> None:
    spoil(directory, **changes)
    with pytest.raises(CheckpointError, match=match) as error:
        read_manifest(directory)
    assert "manifest.json" in str(error.value)


def test_a_manifest_that_is_no_json(directory: Path) -> None:
    (directory / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        read_manifest(directory)


def refused(directory: Path, match: str, spec: ModelSpec | None = None) -> None:
    with pytest.raises(CheckpointError, match=match):
        load_params(directory, spec or read_manifest(directory).spec())


def test_damage_is_found_before_loading(directory: Path) -> None:
    data = directory / "params" / f"{Q}.weight" / "0.0"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    refused(directory, rf"{Q}.weight/0.0 is missing or truncated")
    data.unlink()
    refused(directory, rf"{Q}.weight/0.0 is missing or truncated")
    data.write_bytes(whole[:-16] + b"\xff" * 16)  # a chunk that zarr takes for zeros
    refused(directory, rf"{Q}.weight/0.0 has a damaged index")
    data.write_bytes(whole)
    header = directory / "params" / f"{Q}.weight" / "zarr.json"
    text = header.read_text()
    header.write_text(text[:20])
    refused(directory, rf"{Q}.weight/zarr.json is damaged")
    header.write_text(text)
    (directory / "params" / f"{Q}.input_scale").rename(directory / "params" / "astray")
    refused(directory, rf"lacks {Q}.input_scale")
    (directory / "params" / "astray").rename(directory / "params" / f"{Q}.input_scale")
    shutil.copytree(directory / "params" / f"{Q}.weight", directory / "params" / "extra")
    refused(directory, "holds extra, which the model does not have")


def test_another_model_than_the_stored_one_is_refused_by_name(pristine: Path) -> None:
    manifest = read_manifest(pristine)
    refused(pristine, r"lacks|does not have", ModelSpec(manifest.config))
    formats = dict(manifest.formats) | {"norm": store.WeightFormat("float32")}
    match = re.escape("norm.weight is stored as bfloat16 [64], expected float32 [64]")
    refused(pristine, match, ModelSpec(manifest.config, formats))


def test_a_sound_checkpoint_is_verified_byte_by_byte(pristine: Path) -> None:
    counted: list[int] = []
    assert store.verify(pristine, counted.append) == {}
    assert sum(counted) == read_manifest(pristine).total_bytes


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_verify_names_what_is_damaged_missing_or_extra(directory: Path) -> None:
    params = directory / "params"
    flip(params / f"{Q}.weight" / "0.0", 77)
    flip(params / f"{Q}.weight_scale" / "0", -1)  # in the index
    flip(params / "norm.weight" / "zarr.json", 5)
    flip(params / "_METADATA", 50)
    shutil.rmtree(params / "lm_head.weight")
    (params / "embed_tokens.weight" / "0.0").unlink()
    (directory / "tokenizer.json").unlink()
    (directory / "notes.txt").touch()
    (params / "norm.weight" / "1").touch()
    assert store.verify(directory) == {
        f"params/{Q}.weight": "damaged",
        f"params/{Q}.weight_scale": "damaged",
        "params/norm.weight": "damaged",
        "params/_METADATA": "damaged",
        "params/lm_head.weight": "missing",
        "params/embed_tokens.weight": "damaged",
        "tokenizer.json": "missing",
        "notes.txt": "extra",
        "params/norm.weight/1": "extra",
    }


def test_large_arrays_are_read_in_runs(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = read_manifest(pristine).spec()
    whole = load_params(pristine, spec)
    monkeypatch.setattr(store, "_RUN_BYTES", 1000)
    counted: list[tuple[slice, slice]] = []
    read_part = array_file.read_part
    monkeypatch.setattr(
        array_file, "read_part", lambda *args: counted.append(args[3]) or read_part(*args)
    )
    in_runs = load_params(pristine, spec)
    assert len(counted) > 2 * len(jax.tree.leaves(whole))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, in_runs))


def test_resolve_finds_and_converts(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(pristine) == pristine
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    found = resolve(pristine.parent / "source")
    assert found.parent == tmp_path / "converted"
    assert read_manifest(found) == read_manifest(pristine)


@pytest.mark.parametrize(
    "name", [pytest.param("base_bf16", marks=pytest.mark.slow), "friendli_fmo03_fp8"]
)
def test_logits_of_genuine_checkpoints(shared_data: Path, tmp_path: Path, name: str) -> None:
    source = shared_data / "checkpoints" / name
    convert(source, tmp_path / "out", progress=False)
    spec = read_manifest(tmp_path / "out").spec("float32")
    reference = np.load(source / "reference.npz")
    for bits in (False, True):
        params = load_params(tmp_path / "out", spec, bits=bits)
        logits = Llama(spec).apply({"params": params}, reference["input_ids"])
        np.testing.assert_allclose(logits, reference["logits"], atol=1e-4, rtol=0)


def test_static_activations_of_a_genuine_checkpoint(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "checkpoints" / "friendli_fmo03_fp8"
    convert(source, tmp_path / "out", progress=False)
    spec = read_manifest(tmp_path / "out").spec("float32", "static")
    reference = np.load(source / "reference.npz")
    params = load_params(tmp_path / "out", spec)
    logits = Llama(spec).apply({"params": params}, reference["input_ids"])
    off = np.abs(logits - reference["logits_w8a8"]).max(axis=-1)
    # One activation of the 48 tokens lies so close to the middle between two codes that the order
    # of a float32 sum decides which it becomes; the others agree as unquantised ones do.
    assert (off > 1e-4).sum() <= 1
    assert off.max() < 0.02
    np.testing.assert_allclose(np.median(off), 0, atol=1e-5)
