"""Scales of every layout: which are read, and what is said of those that make no number."""

from pathlib import Path

import numpy as np
import pytest

from converters.dialects import make_plan
from converters.source import read_source
from llama_jax.checkpoint.store import CheckpointError
from tests import tiny_checkpoints as tiny
from tests.plans import planned_as_published
from tests.test_dialects import E4M3, same_bytes
from tests.tiny_checkpoints import VARIANTS, Q

CANNOT = {
    "zero": (0.0, r"holds 0 for codes of {weight} that are not all 0, from row 0"),
    "negative": (-0.5, r"holds -0.5: a scale must be finite and positive"),
    "NaN": (np.nan, r"holds nan: a scale must be"),
    "infinity": (np.inf, r"holds inf: a scale must be"),
    "overflow": (2.0**125, r"holds 4.2.*e\+37 for codes of {weight} that overflow with it"),
}
EXPONENTS = {"NaN": 255, "overflow": 127 + 125}  # which have no zero, sign or infinity
WEIGHT_SCALES = [
    (name, kind)
    for name, variant in VARIANTS.items()
    for kind in (EXPONENTS if "exponents" in name else CANNOT)
    if set(variant.plain) != set(tiny.LINEARS)
]


@pytest.mark.parametrize(("name", "kind"), WEIGHT_SCALES)
def test_weight_scales_that_make_no_number_are_refused(
    tmp_path: Path, name: str, kind: str
) -> None:
    variant, (value, match) = VARIANTS[name], CANNOT[kind]
    module = next(each for each in tiny.LINEARS if each not in variant.plain)
    arrays = variant.arrays()
    scale = arrays[f"{module}.{variant.weight_scale}"]
    if "exponents" in name:
        scale.view(np.uint8).flat[0] = EXPONENTS[kind]
    else:
        scale.flat[0] = value
    weight = f"{module}.{variant.weight}"
    with pytest.raises(CheckpointError, match=match.format(weight=weight)) as raised:
        make_plan(read_source(variant.write(tmp_path, arrays)))
    assert str(raised.value).startswith(f"{module}.{variant.weight_scale} ")


@pytest.mark.parametrize("name", ["friendli static", "friendli dynamic"])
@pytest.mark.parametrize("kind", CANNOT)
def test_weight_scales_of_friendli_are_checked_too(tmp_path: Path, name: str, kind: str) -> None:
    is_dynamic = name.endswith("dynamic")
    arrays, (value, match) = tiny.friendli(is_dynamic), CANNOT[kind]
    scale = arrays[f"{Q}.weight_scale"].copy()
    scale.flat[0] = value
    arrays[f"{Q}.weight_scale"] = scale
    config = tiny.FRIENDLI_DYNAMIC if is_dynamic else tiny.FRIENDLI_03
    with pytest.raises(CheckpointError, match=match.format(weight=f"{Q}.weight")):
        make_plan(read_source(tiny.write(tmp_path, arrays, config)))


SCALARS = {
    f"{name}: {leaf}": (name, f"model.layers.1.self_attn.{leaf}")
    for name, variant in VARIANTS.items()
    for leaf in (
        *variant.cache_scales,
        *(
            [f"q_proj.{variant.input_scale}"]
            if variant.input_scale and Q not in variant.plain
            else []
        ),
    )
}


@pytest.mark.parametrize("case", SCALARS)
def test_scales_of_activations_that_make_no_number_are_refused(tmp_path: Path, case: str) -> None:
    name, tensor = SCALARS[case]
    for kind, (value, _) in CANNOT.items():
        arrays = VARIANTS[name].arrays()
        arrays[tensor] = np.full_like(arrays[tensor], value)
        match = {"zero": "is 0: activations cannot", "overflow": "overflows"}.get(kind, "holds")
        with pytest.raises(CheckpointError, match=rf"^{tensor} .*{match}"):
            make_plan(read_source(VARIANTS[name].write(tmp_path / kind, arrays)))


@pytest.mark.parametrize("name", ["compressed-tensors dynamic", "finegrained", "autofp8 dynamic"])
def test_a_scale_of_zero_is_read_where_all_its_codes_are(tmp_path: Path, name: str) -> None:
    variant, arrays = VARIANTS[name], VARIANTS[name].arrays()
    codes = arrays[f"{Q}.{variant.weight}"].copy()
    scale = arrays[f"{Q}.{variant.weight_scale}"].copy()
    part = slice(5, 6) if variant.scale == "column" else slice(None)
    scale[part] = 0
    codes[part] = -0.0
    arrays |= {f"{Q}.{variant.weight}": codes, f"{Q}.{variant.weight_scale}": scale}
    _, found = planned_as_published(variant.write(tmp_path, arrays))
    assert same_bytes(found[f"{Q}.weight"], codes)
    assert (found[f"{Q}.weight_scale"][part] == 0).all()


def test_large_scales_are_read_where_no_product_overflows(tmp_path: Path) -> None:
    """bfloat16 reaches 3.39e38: 2^125 times a code of 7 does not exceed it, times 8 it does."""
    variant, arrays = VARIANTS["autofp8 dynamic"], VARIANTS["autofp8 dynamic"].arrays()
    arrays[f"{Q}.weight_scale"] = np.full(1, 2.0**125, np.float32)
    arrays[f"{Q}.weight"] = np.full((64, 64), 7.0, E4M3)
    _, found = planned_as_published(variant.write(tmp_path / "read", arrays))
    assert found[f"{Q}.weight_scale"][0] == 2.0**125
    arrays[f"{Q}.weight"][40, 3] = -8.0
    with pytest.raises(CheckpointError, match=rf"codes of {Q}.weight that overflow .*from row 40"):
        planned_as_published(variant.write(tmp_path / "refused", arrays))


def test_zero_points_of_attention_have_to_be_zero(tmp_path: Path) -> None:
    """compressed-tensors writes them beside the scales of symmetric numbers."""
    variant = VARIANTS["compressed-tensors attention alone"]
    zeros = {f"model.layers.1.self_attn.{x}_zero_point": np.zeros(1, E4M3) for x in "qkv"}
    arrays = variant.arrays() | zeros
    plan, _ = make_plan(read_source(variant.write(tmp_path / "zero", arrays)))
    assert plan.used == arrays.keys()
    arrays["model.layers.1.self_attn.k_zero_point"] = np.ones(1, E4M3)
    with pytest.raises(CheckpointError, match=r"1.self_attn.k_zero_point is not all zero"):
        make_plan(read_source(variant.write(tmp_path / "one", arrays)))


def test_one_layer_without_cache_scales_has_one_for_each_head(tmp_path: Path) -> None:
    variant = VARIANTS["compressed-tensors with cache scales per head"]
    arrays = variant.arrays()
    for leaf in variant.cache_scales:
        del arrays[f"model.layers.0.self_attn.{leaf}"]
    plan, _ = make_plan(read_source(variant.write(tmp_path, arrays)))
    assert plan.kv_scales is not None and plan.kv_scales[0] == ((1.0, 1.0), (1.0, 1.0))
    assert np.array(plan.kv_scales).shape == (2, 2, 2)


@pytest.mark.parametrize("name", ["autofp8 with cache scales", "modelopt with cache scales"])
def test_cache_scales_that_are_promised_and_lack_are_one(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    variant, arrays = VARIANTS[name], VARIANTS[name].arrays()
    for leaf in variant.cache_scales:
        del arrays[f"model.layers.1.self_attn.{leaf}"]
    plan, _ = make_plan(read_source(variant.write(tmp_path / "some", arrays)))
    assert plan.kv_scales is not None and plan.kv_scales[1] == (1.0, 1.0) != plan.kv_scales[0]
    assert "promises scales of the KV cache, but layers 1 have none" in caplog.text
    for leaf in variant.cache_scales:
        del arrays[f"model.layers.0.self_attn.{leaf}"]
    plan, _ = make_plan(read_source(variant.write(tmp_path / "none", arrays)))
    assert plan.kv_scales is None
    assert "but layers 0, 1 have none: in an FP8 cache theirs are 1.0" in caplog.text
