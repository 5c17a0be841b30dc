import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special
from rich.console import Console

from converters import quantization_report as reports
from converters.calibrate import calibrate, smooth
from converters.dialects.layout import LazyArray, Module, Plan, pieces
from converters.quantization_report import (
    check_report_path,
    measure,
    plot,
    tables,
    with_perplexity,
    write_report,
)
from converters.quantize import QuantizeOptions, quantize_plan
from llama_jax.abacus import vocabulary
from llama_jax.checkpoint.store import CheckpointError, read_manifest, verify
from llama_jax.cli import main
from llama_jax.model import fp8
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.spec import ModelSpec
from tests import float64_llama
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


def test_calibration_sees_what_a_float64_model_computes() -> None:
    """1e-5: sums in float32."""
    params, ids = lively_params(SPEC), tokens(4, 12)
    ranges = calibrate(plan_of(params, SPEC), SPEC, ids)
    _, seen = float64_llama.forward(params, SPEC.config, ids)
    absmax = {path: np.abs(x).max(axis=(0, 1)) for path, x in seen.items()}
    k, v = ([absmax.pop(f"layers_{i}/{name}") for i in (0, 1)] for name in "kv")
    assert ranges.inputs.keys() == absmax.keys() and "lm_head" in absmax
    for path, largest in absmax.items():
        np.testing.assert_allclose(ranges.inputs[path], largest, rtol=1e-5, err_msg=path)
        np.testing.assert_allclose(ranges.input_scale(path), largest.max() / 448, rtol=1e-5)
    np.testing.assert_allclose(ranges.k, k, rtol=1e-5)
    np.testing.assert_allclose(ranges.v, v, rtol=1e-5)
    expected = [(k[i].max() / 448, v[i].max() / 448) for i in (0, 1)]
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


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, pytest.param(np.float16, marks=pytest.mark.slow)]
)
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


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothing_factors_are_those_of_equation_4(alpha: float) -> None:
    """Within a factor of the square root of 2, as the nearest power of two is."""
    params = with_outliers(lively_params(SPEC), 1e3)
    plan, ids = plan_of(params, SPEC), tokens(2, 12)
    smoothed, _ = smooth(plan, SPEC.config, calibrate(plan, SPEC, ids), alpha)
    _, seen = float64_llama.forward(params, SPEC.config, ids)
    for takers in (LINEARS[:3], LINEARS[3:4], LINEARS[4:6], LINEARS[6:]):
        paths = [f"layers_1/{name}" for name in takers]
        x = np.abs(seen[paths[0]]).max(axis=(0, 1))
        w = np.max([np.abs(weight_of(plan, path)).max(axis=0) for path in paths], axis=0)
        if "o_proj" in paths[0]:  # the two heads of a group take the same channels of v
            x, w = (np.tile(y.reshape(2, 2, 16).max(axis=1)[:, None], (2, 1)) for y in (x, w))
        expected = (x**alpha / w ** (1 - alpha)).reshape(-1)
        before, after = (weight_of(each, paths[0]) for each in (plan, smoothed))
        factors = (after / before).mean(axis=0)  # rows of these are left alone
        np.testing.assert_array_equal(after, before * factors)
        assert np.abs(np.log2(factors / expected)).max() <= 0.5 + 1e-4
        assert len(np.unique(factors)) > 1


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
    logits, seen = float64_llama.forward(lively_params(SPEC), SPEC.config, ids)
    exact = calibrate(plan, SPEC, ids)
    narrow = replace(exact, inputs={path: x / 4 for path, x in exact.inputs.items()})
    clipped = {}
    for name, ranges in (("exact", exact), ("narrow", narrow)):
        fp8_plan = quantize_plan(plan, "row", lm_head=True, ranges=ranges)
        report = with_perplexity(
            measure(plan, fp8_plan), plan, fp8_plan, SPEC.config, "float32", ids
        )
        clipped[name] = {m.path: m.inputs_clipped for m in report.matrices}
        assert list(report.perplexity) == ["original", "bf16", "dynamic", "static"]
        assert report.scored_tokens == 4 * 15
        log_probs = scipy.special.log_softmax(logits[:, :-1], axis=-1)
        chosen = np.take_along_axis(log_probs, ids[:, 1:, None], axis=2)
        assert report.perplexity["original"] == pytest.approx(np.exp(-chosen.mean()), rel=1e-5)
        assert len(set(report.perplexity.values())) == 4
    # What enters the first layer depends on nothing that is quantised.
    q_proj = "layers_0/self_attn/q_proj"
    limit = 464 * narrow.input_scale(q_proj)
    assert clipped["exact"][q_proj] == 0
    assert clipped["narrow"][q_proj] == pytest.approx((np.abs(seen[q_proj]) > limit).mean())
    assert max(clipped["exact"].values()) < 1e-3 and min(clipped["narrow"].values()) > 0
    assert clipped["narrow"]["lm_head"] > 0.1


def small_report() -> reports.QuantizationReport:
    plan = plan_of(lively_params(SPEC), SPEC)
    return measure(plan, quantize_plan(plan, "row", lm_head=True))


def test_matrices_come_in_the_order_of_the_model() -> None:
    weight = np.ones((2, 2), np.float32)
    names = [f"layers_{i}/{name}" for i in range(11) for name in LINEARS] + ["lm_head"]
    plans = [one_matrix(weight, path) for path in sorted(names)]
    plan = Plan({path: m for each in plans for path, m in each.modules.items()}, frozenset())
    report = measure(plan, quantize_plan(plan, "row", lm_head=True))
    assert [m.path for m in report.matrices] == names
    assert [m.layer for m in report.matrices[-8:]] == [10] * 7 + [None]


def test_tables_name_kinds_layers_and_worst_rows() -> None:
    report = replace(small_report(), perplexity={"original": 8.0, "bf16": 8.2}, scored_tokens=1000)
    kinds, layers, rows, perplexity = tables(report, worst=2)
    assert [column.header for column in kinds.columns] == [
        "kind", "matrices", "relative error", "largest", "SNR", "clipped", "inputs clipped"
    ]  # fmt: skip
    assert list(kinds.columns[0].cells) == [*(name.split("/")[1] for name in LINEARS), "lm_head"]
    assert list(layers.columns[0].cells) == ["0", "1", "lm_head"]
    assert list(layers.columns[1].cells) == ["7", "7", "1"]
    first = report.matrices[:7]
    assert next(layers.columns[3].cells) == f"{max(m.relative_error for m in first):.4f}"
    assert next(layers.columns[4].cells) == f"{np.mean([m.snr for m in first]):.1f} dB"
    worst = max(report.matrices, key=lambda m: m.worst_rows[0][1])
    assert rows.row_count == 2 and next(rows.columns[0].cells) == worst.path
    assert next(rows.columns[1].cells) == str(worst.worst_rows[0][0])
    console = Console(width=120)
    with console.capture() as capture:
        console.print(perplexity)
    assert "+2.50%" in capture.get() and "Perplexity of 1000 tokens" in capture.get()


def test_the_plot_shows_each_number() -> None:
    report = small_report()
    clipped = [replace(m, inputs_clipped=0.01 * (m.layer or 0)) for m in report.matrices]
    snr, errors, weights, inputs = plot(replace(report, matrices=tuple(clipped))).axes
    up = [m for m in report.matrices if m.kind == "up_proj"]

    def lines(axes: Any) -> list[list[float]]:
        return [list(line.get_ydata()) for line in axes.lines if line.get_label() == "up_proj"]

    assert lines(snr) == [[m.snr for m in up]]
    assert lines(errors) == [[m.relative_error for m in up], [m.worst_rows[0][1] for m in up]]
    assert lines(weights) == [[0, 0]] and lines(inputs) == [[0, 1]]
    assert not inputs.texts and plot(report).axes[3].texts


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


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("<|start_header_id|>user<|end_header_id|>\n\nWhat is 47 + 85?<|eot_id|>" * 20)
    return path


def convert_abacus(target: Path, *arguments: object) -> object:
    """The exit code."""
    source = Path(vocabulary.__file__).parent / "checkpoint_bf16"
    with pytest.raises(SystemExit) as done:
        main(["convert", str(source), str(target), *map(str, arguments)])
    return done.value.code


@pytest.mark.slow
def test_command(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target, plot = tmp_path / "o", tmp_path / "report.png"
    code = convert_abacus(
        target, "--quantize", "tensor", "--quantize-lm-head", "--calibrate", text, "--smooth", 0.5,
        "--report", plot, "--tokens", 128, "--sequence-length", 64,
    )  # fmt: skip
    out = capfd.readouterr().out
    assert code == 0 and plot.read_bytes().startswith(b"\x89PNG")
    assert "36 x float8_e4m3fn" in out and "Errors of the weights by layer" in out
    manifest, report = read_manifest(target), reports.read_report(target)
    assert len(manifest.kv_scales or ()) == 5 and manifest.formats["lm_head"].input_scale
    assert verify(target) == {}
    assert report.scored_tokens == 2 * 63 and len(report.matrices) == 36
    original = report.perplexity["original"]
    for activations in ("bf16", "dynamic", "static"):
        assert report.perplexity[activations] == pytest.approx(original, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--smooth 0.5", "these options go with --quantize"),
        ("--quantize row --smooth 0.5", "smooth needs a text to calibrate on"),
        ("--quantize row --text TEXT", "text is scored for the report"),
        ("--quantize row --report r.csv", "a report is a .json file, or a plot"),
        ("--quantize row --report no/r.png", "directory does not exist"),
        ("--quantize row --calibrate missing", "missing"),
        ("--quantize row --calibrate EMPTY", "holds 0 tokens"),
        ("--quantize row --report r.json --text EMPTY", "holds 0 tokens"),
        ("--quantize row --calibrate TEXT --tokens 64", "512: a sequence needs"),
        (
            "--quantize row --calibrate TEXT --tokens 200000 --sequence-length 200000",
            "longer than the model's context of 131072 tokens",
        ),
    ],
)
def test_command_mistakes(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], arguments: str, message: str,
) -> None:  # fmt: skip
    """All are found before anything is written."""
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty"
    empty.touch()
    files = {"TEXT": text, "EMPTY": empty}
    words = [files.get(word, word) for word in arguments.split()]
    assert convert_abacus(tmp_path / "o", *words) == 2
    assert message in " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "text"]
