from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import traverse_util

from converters import layerwise
from converters.dialects.layout import LazyArray, Module, Plan
from converters.layerwise import final_hidden, log_likelihoods, logits, read_sequences
from llama_jax.abacus import vocabulary
from llama_jax.model.forward import prefill
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.linear import INPUTS, inputs_of
from llama_jax.model.llama import Llama
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec
from llama_jax.text.tokenizer import load_tokenizer
from pallas_kernels import e4m3
from tests import float64_llama
from tests.tiny import config, fp8_formats, fp8_spec, tokens

ABACUS = Path(vocabulary.__file__).parent / "checkpoint"


@cache
def lively_params(spec: ModelSpec) -> Any:
    """Random parameters that give logits of order 1."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key == "weight_scale":
            return np.full(leaf.shape, 0.16 / 64, leaf.dtype)
        if path[-1].key == "input_scale":
            return np.float32(0.03)
        if leaf.ndim < 2:
            return np.ones(leaf.shape, leaf.dtype)
        return rng.normal(0, 64 if leaf.dtype == e4m3.DTYPE else 0.16, leaf.shape).astype(
            leaf.dtype
        )

    return jax.tree_util.tree_map_with_path(draw, abstract_params(spec))


def plan_of(params: Any, spec: ModelSpec, kv_scales: Any = None, read: Any = None) -> Plan:
    """A plan of arrays in memory; `read` is told the path of each module when it is read."""

    def lazy(path: str, array: np.ndarray) -> LazyArray:
        def rows(start: int, stop: int) -> np.ndarray:
            if read and array.ndim == 2:
                read(path)
            return array[start:stop] if array.ndim else array

        return LazyArray(array.dtype, array.shape, rows)

    modules: dict[str, dict[str, LazyArray]] = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        name = "/".join(path[:-1])
        modules.setdefault(name, {})[path[-1]] = lazy(name, np.asarray(leaf))
    return Plan(
        {name: Module(spec.format_of(tuple(name.split("/"))), m) for name, m in modules.items()},
        frozenset(),
        kv_scales,
    )


def run(plan: Plan, spec: ModelSpec, ids: np.ndarray, **settings: Any) -> np.ndarray:
    """Logits [sequences, length - 1, vocab]."""
    hidden, _ = final_hidden(plan, spec, ids, **settings)
    parts = [np.asarray(part) for part in logits(plan, spec, hidden)]
    return np.concatenate(parts).reshape(len(ids), ids.shape[1] - 1, -1)


TIED = config(tie_word_embeddings=True)
FP8_STATIC = WeightFormat("float8_e4m3fn", "row", input_scale=True)
SPECS = {
    "dense": ModelSpec(config(), dtype="float32"),
    "tied": ModelSpec(TIED, dtype="float32"),
    "row": fp8_spec("row"),
    "block": fp8_spec("block", config(hidden_size=136)),
    "static": fp8_spec("row", activations="static"),
    "tied static": ModelSpec(
        TIED, fp8_formats(TIED) | {"embed_tokens": FP8_STATIC}, "float32", "static"
    ),
}


@partial(jax.jit, static_argnames="spec")
def whole_model(params: Any, ids: Any, spec: ModelSpec) -> tuple[Any, dict[str, Any]]:
    """Logits of the model as one program, and the inputs of its matrices by path."""
    found, left = Llama(spec).apply({"params": params}, ids, mutable=INPUTS)
    return found, inputs_of(left)


def by_layers(params: Any, ids: np.ndarray, spec: ModelSpec) -> tuple[np.ndarray, dict[str, Any]]:
    """As `whole_model`, layer by layer: without the last token's logits."""
    plan = plan_of(params, spec)
    hidden, observed = final_hidden(plan, spec, ids, observe=inputs_alone)
    parts = np.concatenate(list(logits(plan, spec, hidden)))
    inputs = {
        f"layers_{layer}/{name}": np.concatenate([batch[name] for batch in batches])
        for layer, batches in enumerate(observed)
        for name in batches[0]
    }
    inputs[plan.output] = np.concatenate(hidden)
    return parts.reshape(len(ids), ids.shape[1] - 1, -1), inputs


def inputs_alone(inputs: Any, cache: Any, params: Any) -> dict[str, Any]:
    return dict(inputs)


# Finite e4m3fn numbers in order, and where rounding goes from one to the next.
CODES = np.arange(256, dtype=np.uint8).view(e4m3.DTYPE).astype(np.float64)
CODES = np.unique(CODES[np.isfinite(CODES)])
MIDDLES = (CODES[1:] + CODES[:-1]) / 2


@pytest.mark.parametrize("run", [whole_model, by_layers], ids=["whole model", "by layers"])
@pytest.mark.parametrize("case", SPECS)
def test_agrees_with_float64(case: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sum in float32, in orders that hang on the CPU: logits, which reach 7, are up to 2e-5
    from float64.

    A static activation in the middle between two FP8 codes may fall to either side, which moves the
    logits of this token and of later ones by up to 0.2. So the float64 model takes the codes that
    the run took; they differ from its own only where its own input is that near to the middle.
    """
    monkeypatch.setattr(layerwise, "_BATCH_TOKENS", 48)
    monkeypatch.setattr(layerwise, "_LOGIT_TOKENS", 10)  # 12 sequences of 7 do not divide by it
    spec = SPECS[case]
    params, ids = lively_params(spec), tokens(12, 8)
    found, inputs = run(params, ids, spec=spec)
    is_sure = np.ones(ids.shape, bool)

    def rounded(path: str, x: np.ndarray) -> np.ndarray:
        if spec.activations != "static" or path not in spec.formats:
            return x
        taken = np.asarray(inputs[path])
        # Of numbers up to 12; the steps between codes are 6e-5 or more, most of them near 0.1.
        np.testing.assert_allclose(taken[is_sure], x[is_sure], rtol=0, atol=1e-5)
        scale = float64_llama.read(params, path)["input_scale"]
        # XLA may compute the input twice, to round it and to return it: 2 ulp apart at most.
        codes, other = (
            np.asarray(e4m3.cast((taken + ulps * np.spacing(taken)) / scale), np.float64)
            for ulps in (-2, 2)
        )
        is_sure[:] &= np.logical_and.accumulate((codes == other).all(axis=-1), axis=1)
        return codes * np.float64(scale)

    expected, _ = float64_llama.forward(params, spec.config, ids, rounded)
    assert 0.3 < np.abs(expected).mean() < 10
    is_sure = is_sure[:, : found.shape[1]]
    assert is_sure.mean() > (0.5 if spec.activations == "static" else 0.99)
    expected = expected[:, : found.shape[1]]
    np.testing.assert_allclose(found[is_sure], expected[is_sure], rtol=1e-5, atol=2e-5)


def test_each_matrix_is_read_once_and_layer_after_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_BATCH_TOKENS", 8)
    spec = SPECS["dense"]
    read: list[str] = []
    plan = plan_of(lively_params(spec), spec, read=read.append)
    done: list[int] = []
    run(plan, spec, tokens(6, 8), advance=done.append)
    assert sorted(read) == sorted(path for path in plan.modules if "norm" not in path)
    assert [path[:8] for path in read[1:-1]] == ["layers_0"] * 7 + ["layers_1"] * 7
    assert done == [8] * 6 * 2


def test_layers_in_different_formats() -> None:
    spec = fp8_spec("row")
    mixed = ModelSpec(
        spec.config, {p: f for p, f in spec.formats.items() if p.startswith("layers_1")}, "float32"
    )
    params, ids = lively_params(mixed), tokens(2, 9)
    expected = jax.jit(Llama(mixed).apply)({"params": params}, ids)[:, :-1]
    np.testing.assert_allclose(run(plan_of(params, mixed), mixed, ids), expected, atol=1e-5)


def test_an_fp8_cache_rounds_as_in_prefill() -> None:
    """No key or value of these tokens is so near the middle between two codes, says float64, that
    sums in float32, in whatever order, could fall to the other side."""
    spec, scales = SPECS["dense"], ((0.01, 0.02), (0.005, 0.01))
    params, ids = lively_params(spec), tokens(3, 10, seed=27)

    def rounded(path: str, x: np.ndarray) -> np.ndarray:
        layer, _, name = path.removeprefix("layers_").partition("/")
        if name not in ("k", "v"):
            return x
        scale = scales[int(layer)]["kv".index(name)]
        assert np.abs(MIDDLES - x[..., None] / scale).min() * scale > 1e-5
        return CODES[np.searchsorted(MIDDLES, x / scale)] * scale

    truth, _ = float64_llama.forward(params, spec.config, ids[:, :-1], rounded)
    plan = plan_of(params, spec, scales)
    cache = init_cache(spec.config, 3, 9, jnp.int8, jnp.array(scales))
    whole, _ = prefill(params, cache, ids[:, :-1], jnp.full(3, 9), spec=spec)
    found = run(plan, spec, ids, kv_dtype="fp8")[:, -1]
    np.testing.assert_allclose(whole, truth[:, -1], atol=2e-5)
    np.testing.assert_allclose(found, truth[:, -1], atol=2e-5)
    np.testing.assert_allclose(found, whole, atol=1e-5)
    assert np.abs(found - run(plan, spec, ids)[:, -1]).max() > 1e-3


def test_log_likelihoods() -> None:
    spec = SPECS["dense"]
    params, ids = lively_params(spec), tokens(3, 7)
    plan = plan_of(params, spec)
    hidden, _ = final_hidden(plan, spec, ids)
    logits, _ = float64_llama.forward(params, spec.config, ids)
    log_probs = scipy.special.log_softmax(logits[:, :-1], axis=-1)
    expected = np.take_along_axis(log_probs, ids[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(log_likelihoods(plan, spec, ids, hidden), expected, atol=1e-5)


def test_texts_are_cut_into_whole_sequences(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ABACUS)
    path = tmp_path / "text"
    path.write_text("7" * 50)  # digits are single tokens
    bos = tokenizer.bos_id
    ids = read_sequences(path, tokenizer, config(), tokens=30, length=10)
    assert ids.shape == (3, 10) and ids.dtype == np.int32
    assert (ids[:, 0] == bos).all() and (ids[:, 1:] == tokenizer.encode("7")[0]).all()
    assert read_sequences(path, tokenizer, config(), 1000, 10).shape == (
        5,
        10,
    )  # 50 // 9: the rest is left
    assert read_sequences(path, tokenizer, config(), 1000, 500).shape == (1, 51)
    path.write_text("<|eot_id|>" * 3)
    eot = tokenizer.special_tokens["<|eot_id|>"]
    assert read_sequences(path, tokenizer, config(), 16, 16).tolist() == [[bos, eot, eot, eot]]


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ABACUS)
    path = tmp_path / "text"
    path.write_text("")
    with pytest.raises(ValueError, match=r"text holds 0 tokens: too few"):
        read_sequences(path, tokenizer, config(), 100, 10)
    path.write_bytes(b"\xff\xfe1")
    with pytest.raises(ValueError, match="is not a UTF-8 text file"):
        read_sequences(path, tokenizer, config(), 100, 10)
    with pytest.raises(FileNotFoundError):
        read_sequences(tmp_path / "nowhere", tokenizer, config(), 100, 10)
    for size in ((100, 1), (9, 10)):
        with pytest.raises(ValueError, match="a sequence needs at least 2 tokens"):
            read_sequences(path, tokenizer, config(), *size)
    with pytest.raises(ValueError, match="longer than the model's context of 64 tokens"):
        read_sequences(path, tokenizer, config(max_position_embeddings=64), 100, 65)
