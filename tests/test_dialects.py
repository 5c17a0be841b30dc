"""Every layout that other tools publish FP8 checkpoints in, through the converter."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters.pipeline import convert
from converters.source import read_source
from llama_jax.checkpoint.store import CheckpointError, load_params, read_manifest
from llama_jax.model.forward import prefill
from llama_jax.model.fp8 import WeightFormat, dequantize
from llama_jax.model.kv_cache import init_cache
from tests import tiny_checkpoints as tiny
from tests.plans import planned_as_published
from tests.tiny_checkpoints import DOWN, VARIANTS, Arrays, Q, Variant

E4M3 = ml_dtypes.float8_e4m3fn
FNUZ = ml_dtypes.float8_e4m3fnuz


def same_bytes(found: np.ndarray, expected: np.ndarray) -> bool:
    return (found.shape, found.dtype) == (expected.shape, expected.dtype) and (
        found.tobytes() == expected.tobytes()
    )


def as_scales(stored: np.ndarray) -> np.ndarray:
    return (stored.view(ml_dtypes.float8_e8m0fnu) if stored.dtype == np.uint8 else stored).astype(
        np.float32
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_codes_and_scales_are_kept_bit_for_bit(tmp_path: Path, name: str) -> None:
    variant, arrays = VARIANTS[name], VARIANTS[name].arrays()
    directory = variant.write(tmp_path, shards=2)
    layout = "block" if "blocks" in variant.scale else "row"
    bound = variant.config.get("quantization_config", {}).get("activation_scale_ub")
    quantized = WeightFormat(
        "float8_e4m3fn", layout, variant.input_scale is not None, bound,
        activation_group=variant.activation_group,
    )  # fmt: skip
    formats, found = planned_as_published(directory)
    for module, (rows, _) in tiny.LINEARS.items():
        if module in variant.plain:
            assert formats[module] == WeightFormat("bfloat16")
            continue
        assert formats[module] == quantized
        codes = arrays.pop(f"{module}.{variant.weight}")
        assert same_bytes(found.pop(f"{module}.weight"), codes)
        scale = as_scales(arrays.pop(f"{module}.{variant.weight_scale}"))
        if layout == "row":
            scale = np.broadcast_to(scale.reshape(-1), (rows,))
        if variant.scale == "spread blocks":
            scale = scale[:, 0, :, 0]
        assert same_bytes(found.pop(f"{module}.weight_scale"), scale)
        if variant.input_scale:
            static = arrays.pop(f"{module}.{variant.input_scale}").astype(np.float32)
            assert same_bytes(found.pop(f"{module}.input_scale"), static.reshape(()))
    for leaf in variant.cache_scales:
        del arrays[f"model.layers.0.self_attn.{leaf}"], arrays[f"model.layers.1.self_attn.{leaf}"]
    assert found.keys() == arrays.keys()
    assert all(same_bytes(found[each], arrays[each]) for each in found)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_manifest_says_what_it_was(tmp_path: Path, name: str) -> None:
    variant, arrays = VARIANTS[name], VARIANTS[name].arrays()
    manifest = convert(variant.write(tmp_path / "s"), tmp_path / "o", progress=False)
    assert manifest == read_manifest(tmp_path / "o")
    assert manifest.dialect == variant.dialect
    load_params(tmp_path / "o", manifest.spec())
    if variant.cache_scales:
        leaves = (variant.cache_scales * 2)[:2]
        found = np.array(manifest.kv_scales, np.float32)
        for i in range(2):
            for j, leaf in enumerate(leaves):
                scale = arrays[f"model.layers.{i}.self_attn.{leaf}"]
                np.testing.assert_array_equal(found[i, j].reshape(scale.shape), scale)
    else:
        assert manifest.kv_scales is None


def test_fbgemm_without_a_bound_has_that_of_transformers(tmp_path: Path) -> None:
    config = tiny.fbgemm()
    del config["quantization_config"]["activation_scale_ub"]
    formats, _ = planned_as_published(replace(VARIANTS["fbgemm"], config=config).write(tmp_path))
    assert formats[Q].activation_scale_ub == 1200.0


def test_lm_head_may_be_quantised(tmp_path: Path) -> None:
    variant = replace(
        VARIANTS["autofp8 dynamic"], config=tiny.autofp8("dynamic", ignored_layers=[])
    )
    arrays = variant.arrays()
    arrays["lm_head.weight"] = arrays["lm_head.weight"].astype(np.float32).astype(E4M3)
    arrays["lm_head.weight_scale"] = np.float32(0.5).reshape(1)
    formats, found = planned_as_published(variant.write(tmp_path, arrays))
    assert formats["lm_head"] == WeightFormat("float8_e4m3fn", "row")
    assert same_bytes(found["lm_head.weight_scale"], np.full(96, 0.5, np.float32))


def test_the_closest_target_decides(tmp_path: Path) -> None:
    """By name before by expression before by class: otherwise the activations would be static."""
    static = tiny.group(tiny.numbers("channel"), tiny.numbers("tensor"))
    dynamic = tiny.group(tiny.numbers("channel"), tiny.TOKEN, targets=["re:.*proj"])
    weight_only = tiny.group(tiny.numbers("channel"), None, targets=[Q])
    variant = Variant(
        "compressed-tensors", tiny.compressed(static, dynamic, weight_only), scale="column"
    )
    formats, _ = planned_as_published(variant.write(tmp_path))
    assert not formats[Q].input_scale and not formats[DOWN].input_scale


# e4m3fnuz: bits worth half of what they are in e4m3fn, with 240 and odd multiples of 2^-10 beside.
LARGEST, ODD, EVEN = (np.array(code, np.uint8) for code in (0x7F, 0x03, 0x30))


def fnuz(scale: str) -> Arrays:
    """Matrices that keep their bits, keep their values, mix the two by rows, and can do neither."""
    variant = Variant("", {}, scale=scale)
    arrays = variant.arrays()
    rng = np.random.default_rng(5)
    common = np.setdiff1d(np.arange(0x10, 0x7F), [0x7F])
    common = np.concatenate([common, common + 0x80, [0]]).astype(np.uint8)
    for i, (name, shape) in enumerate(tiny.LINEARS.items()):
        bits = rng.choice(common, shape)
        if i % 4 in (0, 2):
            bits[: shape[0] // 2, 5] = ODD
        if i % 4 in (1, 2):
            bits[shape[0] // 2 :, 7] = LARGEST | 0x80
        if i % 4 == 3:
            bits[3, 3:5] = ODD, LARGEST
        arrays[f"{name}.weight"] = bits.view(FNUZ)
    return arrays


@pytest.mark.parametrize("scale", ["scalar", "column", "blocks"])
def test_e4m3fnuz_is_converted_exactly(tmp_path: Path, scale: str) -> None:
    arrays = fnuz(scale)
    config = {"blocks": tiny.compressed(tiny.group(tiny.IN_BLOCKS, None))}.get(
        scale, tiny.compressed(tiny.group(tiny.numbers("channel"), None))
    )
    formats, found = planned_as_published(tiny.write(tmp_path, arrays, config))
    for i, (name, shape) in enumerate(tiny.LINEARS.items()):
        values = arrays[f"{name}.weight"].astype(np.float32)
        stored = jnp.asarray(arrays[f"{name}.weight_scale"])
        if scale != "blocks":
            stored = jnp.broadcast_to(stored.reshape(-1), (shape[0],))
        expected = dequantize(jnp.asarray(values), stored)
        weight, scales = (found[f"{name}.{leaf}"] for leaf in ("weight", "weight_scale"))
        # Halving and doubling are exact, so that the float32 products have to agree in every bit.
        np.testing.assert_array_equal(
            dequantize(jnp.asarray(weight), jnp.asarray(scales)), expected
        )
        one_block = scale == "blocks" and shape[0] <= 128 and i % 4 == 2
        is_wide = i % 4 == 3 or one_block
        assert formats[name].dtype == ("bfloat16" if is_wide else "float8_e4m3fn")


def test_static_scales_of_e4m3fnuz_activations_stay(tmp_path: Path) -> None:
    """Half of one would clip what was calibrated to reach 240, 480 of the halved, at 448."""
    variant = VARIANTS["autofp8 static"]
    arrays = variant.arrays()
    arrays |= {
        name: array for name, array in fnuz("scalar").items() if name.endswith("_proj.weight")
    }
    _, found = planned_as_published(variant.write(tmp_path, arrays))
    assert same_bytes(found[f"{Q}.input_scale"], arrays[f"{Q}.input_scale"])


def test_nan_of_e4m3fnuz_is_refused(tmp_path: Path) -> None:
    arrays = fnuz("scalar")
    arrays[f"{Q}.weight"].view(np.uint8)[9, 1] = 0x80
    with pytest.raises(CheckpointError, match=rf"{Q}.weight has NaN in row 9"):
        planned_as_published(tiny.write(tmp_path, arrays, tiny.autofp8("dynamic")))


@pytest.mark.parametrize("activations", ["bf16", "dynamic"])
def test_bfloat16_codes_compute_what_their_products_do(tmp_path: Path, activations: Any) -> None:
    """A model with bfloat16 codes and scales against one with their products as weights."""
    arrays = fnuz("column")
    for name in tiny.LINEARS:
        arrays[f"{name}.weight"].view(np.uint8)[:, :2] = ODD, LARGEST
    config = tiny.compressed(tiny.group(tiny.numbers("channel"), tiny.TOKEN))
    convert(tiny.write(tmp_path / "s", arrays, config), tmp_path / "o", progress=False)
    plain = {name: array for name, array in arrays.items() if not name.endswith("scale")}
    for name in tiny.LINEARS:
        codes, scale = arrays[f"{name}.weight"], arrays[f"{name}.weight_scale"]
        plain[f"{name}.weight"] = codes.astype(np.float32) * scale
    convert(tiny.write(tmp_path / "p", plain), tmp_path / "q", progress=False)

    def logits(directory: Path) -> np.ndarray:
        spec = read_manifest(directory).spec("float32", activations)
        params = load_params(directory, spec)
        tokens = jnp.arange(24).reshape(2, 12)
        cache = init_cache(spec.config, 2, 12, "float32")
        return np.asarray(prefill(params, cache, tokens, jnp.full(2, 12), spec=spec)[0])

    ours, theirs = logits(tmp_path / "o"), logits(tmp_path / "q")
    if activations == "bf16":
        # Order of float32 sums, as between any two forwards.
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    else:
        # Rounding of activations to three bits, on one side only: far from equal, and as far from
        # unrelated.
        assert 1e-3 < np.abs(ours - theirs).max() / np.abs(theirs).max() < 0.5


def drop(name: str) -> Callable[[Arrays], Any]:
    return lambda arrays: arrays.pop(name)


def put(name: str, value: Any) -> Callable[[Arrays], Any]:
    return lambda arrays: arrays.update({name: np.asarray(value)})


def as_bf16(arrays: Arrays) -> None:
    del arrays[f"{Q}.weight_scale"]
    arrays[f"{Q}.weight"] = arrays[f"{Q}.weight"].astype(ml_dtypes.bfloat16)


ONE = np.ones((), np.float32)
K_SCALE = "model.layers.1.self_attn.k_scale"
CONTRADICTIONS: dict[str, tuple[str, Callable[[Arrays], Any], str]] = {
    "codes without scale": (
        "autofp8 dynamic", drop(f"{Q}.weight_scale"),
        rf"{Q}.weight_scale is missing: the float8_e4m3fn codes of {Q}.weight",
    ),
    "static without scale": (
        "autofp8 static", drop(f"{Q}.input_scale"), rf"{Q}.input_scale is missing.* static scale"
    ),
    "dynamic with scale": (
        "autofp8 dynamic", put(f"{Q}.input_scale", ONE), rf"{Q}.input_scale is stored, but"
    ),
    "declared FP8, stored plain": (
        "autofp8 dynamic", as_bf16, rf"{Q}.weight is bfloat16, but by .*ignored_layers {Q} is FP8"
    ),
    "declared plain, stored FP8": (
        "compressed-tensors dynamic", put("lm_head.weight", np.zeros((96, 64), E4M3)),
        r"lm_head.weight is float8_e4m3fn, but by .* lm_head is not quantised",
    ),
    "integers": (
        "compressed-tensors dynamic", put(f"{Q}.weight", np.zeros((64, 64), np.int8)),
        rf"{Q}.weight is int8, expected float8_e4m3fn",
    ),
    "e5m2": (
        "fbgemm", put(f"{Q}.weight", np.zeros((64, 64), ml_dtypes.float8_e5m2)),
        rf"{Q}.weight is float8_e5m2, expected",
    ),
    "embeddings in FP8": (
        "fbgemm", put("model.embed_tokens.weight", np.zeros((96, 64), E4M3)),
        r"model.embed_tokens.weight is float8_e4m3fn, expected",
    ),
    "two input scales": (
        "autofp8 static", put(f"{Q}.act_scale", ONE), rf"{Q}.act_scale .*has no place"
    ),
    "blocks of another size": (
        "finegrained", put(f"{Q}.weight_scale_inv", np.ones((2, 1), np.float32)),
        rf"{Q}.weight_scale_inv has shape \[2, 1\], the config makes it \[1, 1\]",
    ),
    "exponents that are none": (
        "finegrained", put(f"{Q}.weight_scale_inv", np.ones((1, 1), np.uint8)),
        rf"{Q}.weight_scale_inv is uint8, expected",
    ),
    "NaN as exponent": (
        "finegrained with exponents in bytes",
        put(f"{Q}.weight_scale_inv", np.full((1, 1), 255, np.uint8)),
        rf"{Q}.weight_scale_inv holds nan",
    ),
    "cache scale lost": (
        "autofp8 with cache scales", drop(K_SCALE), rf"{K_SCALE} is missing, but .*v_scale is there"
    ),
    "one cache scale undeclared": (
        "autofp8 static", put(K_SCALE, ONE), r"1.self_attn.v_scale is missing, but .* is there"
    ),
    "cache scales for heads that are not there": (
        "autofp8 with cache scales", put(K_SCALE, np.ones(3, np.float32)),
        rf"{K_SCALE} has shape \[3\], the config makes it .* or \[2\]",
    ),
    "cache scale 0": ("autofp8 with cache scales", put(K_SCALE, 0 * ONE), rf"{K_SCALE} is 0"),
    "another's cache scales": (
        "autofp8 with cache scales", put("model.layers.1.self_attn.kv_scale", ONE),
        r"1.self_attn.kv_scale .*has no place",
    ),
    "torchao's codes lost": (
        "torchao per row", drop(f"{Q}._weight_qdata"),
        rf"{Q}._weight_qdata is missing, but .* describes {Q}.weight as Float8Tensor",
    ),
    "torchao's codes beside a plain weight": (
        "torchao per row", put(f"{DOWN}._weight_qdata", np.zeros((64, 160), E4M3)),
        rf"{DOWN}._weight_qdata is stored, but .* as Tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_tensors_that_contradict_the_config(tmp_path: Path, case: str) -> None:
    name, spoil, match = CONTRADICTIONS[case]
    arrays = VARIANTS[name].arrays()
    spoil(arrays)
    with pytest.raises(CheckpointError, match=match):
        planned_as_published(VARIANTS[name].write(tmp_path, arrays))


def test_the_last_of_groups_with_one_target_counts(tmp_path: Path) -> None:
    """As in compressed-tensors and vLLM."""
    static = tiny.group(tiny.numbers("channel"), tiny.numbers("tensor"))
    dynamic = tiny.group(tiny.numbers("channel"), tiny.TOKEN)
    variant = Variant("compressed-tensors", tiny.compressed(static, dynamic), scale="column")
    formats, _ = planned_as_published(variant.write(tmp_path))
    assert not formats[Q].input_scale


def weights(**changes: Any) -> Any:
    return tiny.compressed(tiny.group(tiny.numbers("channel") | changes, tiny.TOKEN))


def inputs(**changes: Any) -> Any:
    return tiny.compressed(tiny.group(tiny.numbers("channel"), tiny.TOKEN | changes))


CT, W8, A8 = "compressed-tensors dynamic", r"group_0.weights", r"group_0.input_activations"
CACHE = tiny.numbers("tensor")
REFUSED: dict[str, tuple[str, Any, str]] = {
    "ct int8": (CT, weights(type="int"), rf"{W8}.type = 'int' is not .* --quantize row"),
    "ct int by default": (
        CT,
        tiny.compressed(tiny.group({"num_bits": 8, "strategy": "channel"}, None)),
        rf"{W8}.type = 'int'",
    ),
    "ct 4 bits": (CT, weights(num_bits=4), rf"{W8}.num_bits = 4 is not supported, only 8"),
    "ct asymmetric": (CT, weights(symmetric=False), rf"{W8}.symmetric = False"),
    "ct groups": (
        CT, weights(strategy="group", group_size=128), rf"{W8}.strategy = 'group' is not"
    ),
    "ct dynamic weights": (CT, weights(dynamic=True), rf"{W8}.dynamic = True"),
    "ct actorder": (CT, weights(actorder="weight"), rf"{W8}.actorder = 'weight'"),
    "ct block of 64": (
        CT,
        weights(strategy="block", block_structure=[64, 64]),
        rf"{W8}.block_structure = \[64, 64\] is not supported, only \[128, 128\]",
    ),
    "ct local inputs": (CT, inputs(dynamic="local"), rf"{A8}.dynamic = 'local'"),
    "ct static per channel": (
        CT, inputs(dynamic=False, strategy="channel"), rf"{A8}.strategy = 'channel' is not"
    ),
    "ct new field": (CT, weights(rotation="hadamard"), rf"{W8}.rotation = 'hadamard' is not known"),
    "ct nvfp4": (
        CT, tiny.compressed(format="nvfp4-pack-quantized"), r"format = 'nvfp4-pack-quantized'"
    ),
    "ct mxfp4 group": (
        CT,
        tiny.compressed(tiny.group(CACHE, None, format="mxfp4-pack-quantized")),
        r"group_0.format = 'mxfp4-pack-quantized'",
    ),
    "ct sparse": (
        CT,
        tiny.compressed(sparsity_config={"format": "sparse-24-bitmask"}),
        r"sparsity_config.format = 'sparse-24-bitmask'",
    ),
    "ct transforms": (
        CT, tiny.compressed(transform_config={"R1": {}}), r"transform_config = .* is not known"
    ),
    "ct outputs": (
        CT,
        tiny.compressed(tiny.group(CACHE, None, output_activations=CACHE)),
        r"group_0.output_activations = .* only null",
    ),
    "ct cache per channel": (
        CT,
        tiny.compressed(kv_cache_scheme=CACHE | {"strategy": "channel"}),
        r"kv_cache_scheme.strategy = 'channel' is not supported, only 'tensor' or 'attn_head'",
    ),
    "ct bad expression": (
        CT, tiny.compressed(ignore=["re:("]), r"'re:\(' is not a regular expression"
    ),
    "ct expression that takes for ever": (
        CT, tiny.compressed(ignore=[r"re:((\w|\w|\.)*)*!"]), r"\)\*\)\*!' repeats too much"
    ),
    "ct expression of many repeats": (
        CT, tiny.compressed(ignore=["re:" + ".*" * 30 + "!"]), "repeats too much"
    ),
    "ct group that is none": (
        CT, tiny.compressed(["Linear"]), r"config_groups: group_0 must be an object"
    ),
    "ct targets that are none": (
        CT, tiny.compressed(tiny.group(CACHE, None) | {"targets": "Linear"}),
        r"group_0.targets must be a list of names",
    ),
    "ct activations of integers alone": (
        CT, tiny.compressed(tiny.group(None, tiny.TOKEN | {"type": "int"})), rf"{A8}.type = 'int'"
    ),
    "ct without weights": (
        CT, tiny.compressed(tiny.group(None, tiny.TOKEN)), r"is float8_e4m3fn, but by .* not quant"
    ),
    "ct dense, but not": (
        CT, tiny.compressed(format="dense"), r"is float8_e4m3fn, but by .* is not quantised"
    ),
    "ct attention of integers": (
        "compressed-tensors attention alone",
        tiny.compressed(tiny.group(None, CACHE | {"type": "int"}, targets=("LlamaAttention",))),
        rf"{A8}.type = 'int'",
    ),
    "ct attention with weights": (
        "compressed-tensors attention alone",
        tiny.compressed(tiny.group(CACHE, CACHE, targets=("re:.*self_attn$",))),
        rf"{W8} = .* is not supported, only null",
    ),
    "ct dynamic cache": (
        CT,
        tiny.compressed(kv_cache_scheme=CACHE | {"dynamic": True}),
        r"kv_cache_scheme.dynamic = True is not supported",
    ),
    "ct mxfp8": (
        CT, tiny.compressed(format="mxfp8-quantized"), r"format = 'mxfp8-quantized' is not"
    ),
    "fbgemm bound": (
        "fbgemm", tiny.fbgemm(activation_scale_ub=-1), r"activation_scale_ub must be a positive"
    ),
    "fbgemm no bound": (
        "fbgemm", tiny.fbgemm(activation_scale_ub=None), r"activation_scale_ub must .* got None"
    ),
    "modelopt NVFP4": (
        "modelopt", tiny.modelopt("NVFP4"), r"quant_algo = 'NVFP4' is not supported, only 'FP8'"
    ),
    "modelopt silent": (
        "modelopt", {"quantization_config": {"quant_method": "modelopt"}}, r"quant_algo = None is"
    ),
    "modelopt mixed": (
        "modelopt",
        tiny.modelopt("MIXED_PRECISION", quantized_layers={Q: {"quant_algo": "W4A16_AWQ"}}),
        rf"quantized_layers.{Q}.quant_algo = 'W4A16_AWQ' is not supported, only 'FP8' or",
    ),
    "modelopt mixed, but not said how": (
        "modelopt", tiny.modelopt("MIXED_PRECISION"), r"is float8_e4m3fn, but by quantized_layers"
    ),
    "modelopt MXFP8": ("modelopt", tiny.modelopt("MXFP8"), r"quant_algo = 'MXFP8' is not"),
    "modelopt dynamic": (
        "modelopt",
        tiny.modelopt(config_groups={"group_0": {"input_activations": {"dynamic": True}}}),
        r"group_0.input_activations.dynamic = True",
    ),
    "modelopt NVFP4 cache": (
        "modelopt", tiny.modelopt(kv_cache_quant_algo="NVFP4"), r"kv_cache_quant_algo = 'NVFP4'"
    ),
    "modelopt cache and not": (
        "modelopt",
        tiny.modelopt(kv_cache_quant_algo=None, kv_cache_scheme=tiny.MODELOPT_CACHE),
        r"kv_cache_scheme makes the KV cache quantised, kv_cache_quant_algo does not",
    ),
    "blocks of 64": (
        "finegrained",
        tiny.finegrained(weight_block_size=[64, 128]),
        r"weight_block_size is \[64, 128\]; only \[128, 128\]",
    ),
    "blocks of unknown size": (
        "finegrained",
        {"quantization_config": {"quant_method": "fp8"}},
        r"weight_block_size is missing",
    ),
    "static blocks": (
        "finegrained",
        tiny.finegrained(activation_scheme="static"),
        r"activation_scale is missing, but by the config activations have a static scale",
    ),
    "finegrained embeddings": (
        "finegrained",
        tiny.finegrained(modules_to_convert=["model.embed_tokens"]),
        r"modules_to_convert = .* is not known",
    ),
    "autofp8 scheme": ("autofp8 static", tiny.autofp8("group"), r"activation_scheme = 'group'"),
    "autofp8 cache": (
        "autofp8 static", tiny.autofp8("static", kv_cache_scheme="dynamic"), r"'dynamic' is not"
    ),
    "autofp8 list": (
        "autofp8 static",
        tiny.autofp8("static", ignored_layers="lm_head"),
        r"ignored_layers must be a list of names, got 'lm_head'",
    ),
    "torchao int8": (
        "torchao per row",
        tiny.torchao("Int8WeightOnlyConfig"),
        r"quant_type.default._type = 'Int8WeightOnlyConfig' is not supported",
    ),
    "torchao embeddings": (
        "torchao per row",
        tiny.torchao(include_input_output_embeddings=True),
        r"include_input_output_embeddings = True is not",
    ),
    "torchao list": (
        "torchao per row",
        tiny.torchao(modules_to_not_convert=["self_attn.q_proj"]),
        r"q_proj._weight_qdata is stored, but .*modules_to_not_convert leaves",
    ),
    "GPTQ": (CT, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ is a layout"),
    "AWQ": (CT, {"quantization_config": {"quant_method": "awq"}}, "AWQ is .* --quantize row"),
    "bitsandbytes": (
        CT, {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes is a layout"
    ),
    "no config": (CT, {}, "no quantization_config; weights .*float8_e4m3fn"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_named(tmp_path: Path, case: str) -> None:
    name, config, match = REFUSED[case]
    with pytest.raises(CheckpointError, match=match):
        planned_as_published(replace(VARIANTS[name], config=config).write(tmp_path))


def described_as(**changes: Any) -> dict[str, str]:
    metadata = dict(VARIANTS["torchao per row"].metadata)
    description = json.loads(metadata[f"{Q}.weight"])
    description["_data"] |= changes
    return metadata | {f"{Q}.weight": json.dumps(description)}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ({f"{Q}.weight": '{"_type": "Int4Tensor"}'}, rf"{Q}.weight is a torchao Int4Tensor"),
        ({f"{Q}.weight": "[]"}, rf"metadata of {Q}.weight is not a JSON object"),
        ({f"{Q}.weight": "{"}, rf"metadata of {Q}.weight is not a JSON object"),
        (described_as(block_size=[1, 32]), rf"{Q}.weight.block_size = \[1, 32\] is not"),
        (described_as(zero=[1]), rf"{Q}.weight.zero = \[1\] is not known"),
        (described_as(act_quant_kwargs={"_data": {"hp_value_ub": 9}}), r"hp_value_ub = 9 is not"),
    ],
    ids=["type", "list", "no JSON", "blocks", "unknown", "bounded"],
)
def test_what_torchao_says_of_its_tensors_is_checked(
    tmp_path: Path, text: dict[str, str], match: str
) -> None:
    variant = VARIANTS["torchao per row"]
    with pytest.raises(CheckpointError, match=match):
        planned_as_published(variant.write(tmp_path, metadata=dict(variant.metadata) | text))


def test_metadata_that_is_no_text_is_refused(tmp_path: Path) -> None:
    directory = VARIANTS["torchao per row"].write(tmp_path, metadata={"a": 1})
    with pytest.raises(CheckpointError, match="__metadata__ in the header must map names to texts"):
        planned_as_published(directory)


@pytest.mark.parametrize(
    ("name", "files", "match"),
    [
        (
            "modelopt per channel",
            tiny.modelopt_file("NVFP4"),
            r"has quant_algo = 'FP8_PER_CHANNEL_PER_TOKEN', but .* 'NVFP4'",
        ),
        ("modelopt", tiny.modelopt_file(exclude_modules=[]), r"has ignore = \['lm_head'"),
        ("autofp8 static", tiny.modelopt_file(), r"has quant_method = 'fp8', but .* 'modelopt'"),
        (
            "modelopt",
            {"hf_quant_config.json": []},
            r"hf_quant_config.json: its JSON is \[\], expected object",
        ),
        (
            "modelopt",
            {"hf_quant_config.json": {"quantization": 8}},
            r"hf_quant_config.json: quantization must be an object, got 8",
        ),
    ],
    ids=["algorithm", "ignore", "method", "list", "number"],
)
def test_two_quantisation_configs_have_to_agree(
    tmp_path: Path, name: str, files: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        planned_as_published(VARIANTS[name].write(tmp_path, files=files))


def test_an_adapter_without_its_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is a LoRA adapter\. Mer"):
        read_source(tmp_path)


def test_gguf_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "llama-Q4_K_M.gguf").touch()
    for path in (tmp_path, tmp_path / "llama-Q4_K_M.gguf"):
        with pytest.raises(CheckpointError, match=r"llama-Q4_K_M.gguf: GGUF is not supported"):
            read_source(path)
