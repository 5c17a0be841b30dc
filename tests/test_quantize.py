import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from rich.console import Console

from converters import quantization_report as reports
from converters.calibrate import calibrate, smooth
from converters.dialects.layout import LazyArray, Module, Plan, pieces
from converters.quantization_report import (
    check_report_path,
    measure,
    tables,
    with_perplexity,
    write_report,
)
from converters.quantize import QuantizeOptions, quantize_plan
from llama_jax import fp8
from llama_jax.checkpoint import CheckpointError
from llama_jax.fp8 import WeightFormat
from llama_jax.model import (
    Linear,
    Llama,
    ModelSpec,
    apply_rope,
    rope_frequencies,
)
from tests.test_layerwise import lively_params, plan_of, run
from tests.tiny import LINEARS, config, tokens

SPEC = ModelSpec(config(), dtype="float32")
E4M3 = ml_dtypes.float8_e4m3fn


def whole(array: LazyArray) -> np.ndarray:
    return np.concatenate([np.atleast_1d(part) for part in pieces(array)]).reshape(array.shape)


def weight_of(plan: Plan, path: str) -> np.ndarray:
    return whole(plan.modules[path].arrays["weight"])


def one_matrix(weight: np.ndarray, path: str = "layers_0/mlp/up_proj") -> Plan:
    array = LazyArray(weight.dtype, weight.shape, lambda start, stop: weight[start:stop])
    return Plan({path: Module(WeightFormat(weight.dtype.name), {"weight": array})}, frozenset())


def quantized(weight: np.ndarray, layout: Any) -> tuple[np.ndarray, np.ndarray]:
    (module,) = quantize_plan(one_matrix(weight), layout).modules.values()
    return whole(module.arrays["weight"]), whole(module.arrays["weight_scale"])


def spec_of(plan: Plan, activations: Any = "bf16") -> ModelSpec:
    formats = {path: module.format for path, module in plan.modules.items()}
    return ModelSpec(SPEC.config, formats, "float32", activations)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("layout", ["row", "tensor", "block"])
def test_codes_are_the_nearest_for_scales_from_absmax(layout: str, dtype: Any) -> None:
    weight = np.random.default_rng(0).normal(0, 0.1, (200, 300)).astype(dtype)
    codes, scale = quantized(weight, layout)
    wide = weight.astype(np.float32)
    absmax = {
        "row": np.abs(wide).max(axis=1),
        "tensor": np.full(200, np.abs(wide).max()),
        "block": [[np.abs(wide[i : i + 128, j : j + 128]).max() for j in (0, 128, 256)]
                  for i in (0, 128)],
    }[layout]  # fmt: skip
    np.testing.assert_allclose(scale, np.array(absmax) / 448, rtol=3e-7)
    assert codes.dtype == E4M3 and scale.dtype == np.float32
    expanded = scale[:, None]
    if layout == "block":
        expanded = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:200, :300]
    # An ulp of the quotient decides values that lie between two codes: these may be either.
    below, above = ((wide / expanded * (1 + ulp)).astype(E4M3) for ulp in (-3e-7, 3e-7))
    assert ((codes == below) | (codes == above)).all()


@pytest.mark.parametrize("layout", ["row", "tensor", "block"])
def test_rows_come_out_the_same_in_any_order_and_any_pieces(
    layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = np.random.default_rng(1).normal(0, 1, (300, 64)).astype(ml_dtypes.bfloat16)
    expected = quantized(weight, layout)
    monkeypatch.setattr("converters.dialects.layout.PIECE_BYTES", 128 * 64)
    (module,) = quantize_plan(one_matrix(weight), layout).modules.values()
    scale, codes = module.arrays["weight_scale"], module.arrays["weight"]
    assert whole(scale).tobytes() == expected[1].tobytes()
    for start, stop in ((256, 300), (0, 128), (128, 256), (0, 128)):
        assert codes.rows(start, stop).tobytes() == expected[0][start:stop].tobytes()


def test_zeros() -> None:
    weight = np.zeros((256, 128), np.float32)
    weight[3, 5] = 0.001
    for layout in ("row", "tensor", "block"):
        codes, scale = quantized(weight, layout)
        values = np.asarray(fp8.dequantize(jnp.asarray(codes), jnp.asarray(scale)))
        np.testing.assert_allclose(values, weight, rtol=1e-6)
    assert (quantized(weight * 0, "tensor")[1] == 1).all()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layout": "column"}, "layout must be 'row', 'tensor' or 'block', got 'column'"),
        ({"smooth": 0.5}, "smooth needs a text to calibrate on"),
        ({"calibrate": Path("t"), "smooth": 1.5}, r"smooth must be in \[0, 1\], got 1.5"),
        ({"text": Path("t")}, "text is scored for the report"),
    ],
)
def test_options_that_do_not_go_together(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        QuantizeOptions(**settings)


def test_what_cannot_be_quantised_is_named() -> None:
    plan = quantize_plan(one_matrix(np.ones((4, 4), np.float32)), "row")
    with pytest.raises(CheckpointError, match=r"layers_0/mlp/up_proj and 0 more .* FP8 already"):
        quantize_plan(plan, "row")
    with pytest.raises(CheckpointError, match="has no lm_head of its own"):
        quantize_plan(one_matrix(np.ones((4, 4), np.float32)), "row", lm_head=True)


def test_calibration_sees_what_enters_each_matrix_and_the_cache() -> None:
    params, ids = lively_params(SPEC), tokens(4, 12)
    ranges = calibrate(plan_of(params, SPEC), SPEC, ids)
    inputs: dict[str, np.ndarray] = {}
    keys, values = [], []
    positions = np.broadcast_to(np.arange(12), (4, 12))

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result = call(*args, **kwargs)
        path = "/".join(context.module.path)
        if isinstance(context.module, Linear):
            inputs[path] = np.abs(args[0]).max(axis=(0, 1))
        heads = (4, 12, SPEC.config.num_kv_heads, SPEC.config.head_dim)
        if path.endswith("k_proj"):
            rotated = apply_rope(result.reshape(heads), positions, rope_frequencies(SPEC.config))
            keys.append(np.abs(rotated).max(axis=(0, 1)))
        if path.endswith("v_proj"):
            values.append(np.abs(result.reshape(heads)).max(axis=(0, 1)))
        return result

    with nn.intercept_methods(watch):
        Llama(SPEC).apply({"params": params}, ids)
    assert ranges.inputs.keys() == inputs.keys() and "lm_head" in inputs
    for path, absmax in inputs.items():
        np.testing.assert_allclose(ranges.inputs[path], absmax, rtol=1e-5, err_msg=path)
        np.testing.assert_allclose(ranges.input_scale(path), absmax.max() / 448, rtol=1e-5)
    np.testing.assert_allclose(ranges.k, keys, rtol=1e-5)
    np.testing.assert_allclose(ranges.v, values, rtol=1e-5)
    expected = [(k.max() / 448, v.max() / 448) for k, v in zip(keys, values, strict=True)]
    np.testing.assert_allclose(ranges.kv_scales(), expected, rtol=1e-5)


def test_calibration_gives_static_scales_that_a_model_runs_with() -> None:
    plan, ids = plan_of(lively_params(SPEC), SPEC), tokens(2, 16)
    ranges = calibrate(plan, SPEC, ids)
    static = quantize_plan(plan, "row", lm_head=True, ranges=ranges)
    assert static.kv_scales == ranges.kv_scales()
    formats = {static.modules[f"layers_1/{name}"].format for name in LINEARS}
    assert formats == {WeightFormat("float8_e4m3fn", "row", True)}
    scale = {
        p: m.arrays["input_scale"].rows(0, 1) for p, m in static.modules.items() if m.format.scale
    }
    q, k, v, o, gate, up, down = (scale[f"layers_0/{name}"] for name in LINEARS)
    assert q == k == v and gate == up and len({float(s) for s in (q, o, gate, down)}) == 4
    expected = run(plan, SPEC, ids)
    for kv_dtype in ("bf16", "fp8"):
        found = run(static, spec_of(static, "static"), ids, kv_dtype=kv_dtype)
        # Three bits of mantissa in weights and activations; twelve random matrices in a row here.
        assert 0.01 < np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.2


def with_outliers(params: Any, factor: float) -> Any:
    """Channels of the norms' outputs, of v and of the MLP that are so much larger than the others,
    which the matrices behind them scale down again."""
    large = np.where(np.arange(64) % 16 == 3, factor, 1.0).astype(np.float32)
    wide = np.where(np.arange(160) % 40 == 7, factor, 1.0).astype(np.float32)
    head = np.tile(np.where(np.arange(16) == 5, factor, 1.0).astype(np.float32), 2)
    layers = {}
    for name in ("layers_0", "layers_1"):
        layer = jax.tree.map(np.asarray, params[name])
        attention, mlp = layer["self_attn"], layer["mlp"]
        o_columns = np.repeat(head.reshape(2, 1, 16), 2, axis=1).reshape(-1)
        layers[name] = {
            "input_layernorm": {"weight": layer["input_layernorm"]["weight"] * large},
            "post_attention_layernorm": {
                "weight": layer["post_attention_layernorm"]["weight"] * large
            },
            "self_attn": {
                "q_proj": {"weight": attention["q_proj"]["weight"] / large},
                "k_proj": {"weight": attention["k_proj"]["weight"] / large},
                "v_proj": {"weight": attention["v_proj"]["weight"] / large * head[:, None]},
                "o_proj": {"weight": attention["o_proj"]["weight"] / o_columns},
            },
            "mlp": {
                "gate_proj": {"weight": mlp["gate_proj"]["weight"] / large},
                "up_proj": {"weight": mlp["up_proj"]["weight"] / large * wide[:, None]},
                "down_proj": {"weight": mlp["down_proj"]["weight"] / wide},
            },
        }
    return {**params, **layers}


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_smoothing_alone_changes_no_logit(dtype: Any) -> None:
    """1e-5, the order of sums; all factors are powers of two."""
    spec = ModelSpec(replace(SPEC.config, dtype=np.dtype(dtype).name), dtype="float32")
    params = jax.tree.map(
        lambda x: np.asarray(x).astype(dtype), with_outliers(lively_params(SPEC), 1e3)
    )
    plan, ids = plan_of(params, spec), tokens(2, 12)
    smoothed, ranges = smooth(plan, spec.config, calibrate(plan, spec, ids), 0.5)
    stored = {module.format.dtype for path, module in smoothed.modules.items() if "lay" in path}
    assert stored == {"float32" if dtype == np.float16 else np.dtype(dtype).name}
    after = ModelSpec(
        spec.config, {path: module.format for path, module in smoothed.modules.items()}, "float32"
    )
    np.testing.assert_allclose(
        run(smoothed, after, ids), run(plan, spec, ids), rtol=1e-5, atol=1e-5
    )
    for name in ("self_attn/q_proj", "self_attn/o_proj", "mlp/up_proj", "mlp/down_proj"):
        before, now = (
            weight_of(p, f"layers_0/{name}").astype(np.float32) for p in (plan, smoothed)
        )
        factor = (now / np.where(before == 0, 1, before))[before != 0]
        assert len(np.unique(factor)) > 1 and (np.frexp(factor)[0] == 0.5).all()
    again = calibrate(smoothed, after, ids)
    for path, absmax in ranges.inputs.items():
        np.testing.assert_allclose(again.inputs[path], absmax, rtol=1e-5, err_msg=path)
    np.testing.assert_allclose(again.v, ranges.v, rtol=1e-5)


def test_smoothing_repairs_static_activations_where_channels_are_outliers() -> None:
    plan, ids = plan_of(with_outliers(lively_params(SPEC), 1e5), SPEC), tokens(4, 16)
    ranges = calibrate(plan, SPEC, ids)
    expected = run(plan, SPEC, ids)

    def error(plan: Plan, ranges: Any) -> float:
        static = quantize_plan(plan, "row", ranges=ranges)
        return float(np.abs(run(static, spec_of(static, "static"), ids) - expected).mean())

    plain, smoothed = error(plan, ranges), error(*smooth(plan, SPEC.config, ranges, 0.5))
    assert smoothed < 0.7 * plain


def test_the_report_measures_errors() -> None:
    rng = np.random.default_rng(0)
    original = rng.normal(0, 1, (300, 40)).astype(np.float32)
    codes, scale = (np.array(x) for x in quantized(original, "row"))
    codes[7] = 0
    scale[9] /= 2  # its largest value, at code 448, would be 896 now
    values = codes.astype(np.float32) * scale[:, None]
    arrays = {
        "weight": LazyArray(codes.dtype, codes.shape, lambda a, b: codes[a:b]),
        "weight_scale": LazyArray(scale.dtype, scale.shape, lambda a, b: scale[a:b]),
    }
    path = "layers_3/mlp/up_proj"
    bad = Plan({path: Module(WeightFormat("float8_e4m3fn", "row"), arrays)}, frozenset())
    (found,) = measure(one_matrix(original, path), bad).matrices
    error = values - original
    assert (found.path, found.kind, found.inputs_clipped) == (path, "up_proj", None)
    relative = np.linalg.norm(error) / np.linalg.norm(original)
    assert found.relative_error == pytest.approx(relative, rel=1e-5)
    assert found.snr == pytest.approx(-20 * np.log10(relative), rel=1e-5)
    rows = np.linalg.norm(error, axis=1) / np.linalg.norm(original, axis=1)
    assert [row for row, _ in found.worst_rows] == np.argsort(-rows)[:3].tolist()
    assert found.worst_rows[0] == (7, pytest.approx(1.0)) and found.worst_rows[1][0] == 9
    clipped = (np.abs(original) > 464 * scale[:, None]).mean()
    assert clipped > 0 and found.clipped == pytest.approx(clipped)


@pytest.mark.parametrize("layout", ["row", "tensor", "block"])
def test_nothing_is_clipped_by_scales_from_absmax(
    layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("converters.dialects.layout.PIECE_BYTES", 128 * 512)
    plan = one_matrix(np.random.default_rng(0).normal(0, 1, (700, 200)).astype(np.float32))
    (found,) = measure(plan, quantize_plan(plan, layout)).matrices
    assert found.clipped == 0
    # Uniformly spread mantissas round with a relative error of 2^-4 / sqrt(3) times 0.72.
    assert 0.02 < found.relative_error < 0.03


def test_perplexities_and_clipped_inputs() -> None:
    plan, ids = plan_of(lively_params(SPEC), SPEC), tokens(4, 16)
    narrow = calibrate(plan, SPEC, ids)
    narrow = replace(narrow, inputs={path: x / 4 for path, x in narrow.inputs.items()})
    for ranges, clips in ((calibrate(plan, SPEC, ids), False), (narrow, True)):
        fp8_plan = quantize_plan(plan, "row", ranges=ranges)
        report = with_perplexity(
            measure(plan, fp8_plan), plan, fp8_plan, SPEC.config, "float32", ids
        )
        assert all((m.inputs_clipped > 0) == clips for m in report.matrices)
        assert list(report.perplexity) == ["original", "bf16", "dynamic", "static"]
        assert report.scored_tokens == 4 * 15
        log_probs = jax.nn.log_softmax(run(plan, SPEC, ids))
        chosen = np.take_along_axis(np.asarray(log_probs), ids[:, 1:, None], axis=2)
        assert report.perplexity["original"] == pytest.approx(np.exp(-chosen.mean()), rel=1e-5)
        assert len(set(report.perplexity.values())) == 4


def small_report() -> reports.QuantizationReport:
    plan = plan_of(lively_params(SPEC), SPEC)
    return measure(plan, quantize_plan(plan, "row", lm_head=True))


def test_tables_name_kinds_and_worst_matrices() -> None:
    report = replace(small_report(), perplexity={"original": 8.0, "bf16": 8.2}, scored_tokens=1000)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(*tables(report, worst=2))
    text = capture.get()
    worst = max(report.matrices, key=lambda m: m.relative_error)
    assert worst.path in text and f"{worst.snr:.1f} dB" in text
    assert "lm_head" in text and "+2.50%" in text and "Perplexity of 1000 tokens" in text


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ".json"])
def test_reports_are_written(tmp_path: Path, suffix: str) -> None:
    report = small_report()
    write_report(report, tmp_path / f"report{suffix}")
    content = (tmp_path / f"report{suffix}").read_bytes()
    start = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml", ".json": b"{"}[suffix]
    assert content.startswith(start)
    if suffix == ".json":
        (tmp_path / reports.REPORT).write_bytes(content)
        assert reports.read_report(tmp_path) == report


def test_report_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"a report is a .json file, or a plot"):
        check_report_path(Path("report.txt"))
    with pytest.raises(CheckpointError, match=r"has no quantization_report.json"):
        reports.read_report(tmp_path)
    (tmp_path / reports.REPORT).write_text('{"matrices": 3}')
    with pytest.raises(CheckpointError, match=r"quantization_report.json is damaged"):
        reports.read_report(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="plots need matplotlib"):
        check_report_path(Path("report.png"))
