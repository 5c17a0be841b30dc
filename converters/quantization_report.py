"""Measures the effect of quantisation: each matrix's error, and the perplexity before and after."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.table import Table

from converters.dialects.layout import LazyArray, Module, Plan, piece_rows
from converters.layerwise import final_hidden, log_likelihoods
from converters.on_host import on_host
from converters.quantize_options import check_report_path
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.model import fp8
from llama_jax.model.cached_attention import LayerCache
from llama_jax.model.config import LlamaConfig
from llama_jax.model.spec import Activations, ModelSpec, Params
from pallas_kernels.fp8_matmul.reference import BLOCK, expand_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT = "quantization_report.json"
# Values up to this one round to the largest code, 448; larger ones are clipped.
_LARGEST_ROUNDED = 464.0
_WORST_ROWS = 3
# In the order of their use in the model.
_KINDS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "lm_head", "embed_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class MatrixError:
    """The error of a quantised matrix.

    path: such as "layers_0/mlp/up_proj".
    relative_error: |quantised - original| / |original|, with Frobenius norms.
    clipped: the share of weights beyond the largest code.
    worst_rows: the three rows with the largest relative errors, as (row, error).
    inputs_clipped: the share of its inputs beyond the largest code with its static scale; None
        without such a scale, or without a text.
    """

    path: str
    relative_error: float
    clipped: float
    worst_rows: tuple[tuple[int, float], ...]
    inputs_clipped: float | None = None

    @property
    def kind(self) -> str:
        """Return the matrix's name without its layer, such as "up_proj"."""
        return self.path.rpartition("/")[2]

    @property
    def layer(self) -> int | None:
        """Return the matrix's layer, or None for the output matrix."""
        layer, _, inside = self.path.partition("/")
        return int(layer.removeprefix("layers_")) if inside else None

    @property
    def snr(self) -> float:
        """Return the signal-to-noise ratio in dB."""
        return -20 * math.log10(self.relative_error) if self.relative_error else math.inf


@dataclass(frozen=True)
class QuantizationReport:
    """The errors of all matrices, and perplexities.

    matrices: in the order of the model.
    perplexity: of `scored_tokens` tokens of a text, by model: "original", or for FP8 weights the
        format of activations, "bf16", "dynamic" and, if there are scales, "static". Empty without a
        text.
    """

    matrices: tuple[MatrixError, ...]
    perplexity: Mapping[str, float]
    scored_tokens: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def measure(original: Plan, quantized: Plan) -> QuantizationReport:
    """Measure the errors of all matrices that are FP8 in `quantized` but not in `original`.

    Weights are read piece by piece. With smoothing, `original` must be the smoothed plan.
    """
    matrices = [
        _matrix_error(path, original.modules[path].arrays["weight"], module)
        for path, module in quantized.modules.items()
        if module.format.scale and not original.modules[path].format.scale
    ]
    matrices.sort(key=lambda m: (m.layer is None, m.layer, _KINDS.index(m.kind)))
    return QuantizationReport(tuple(matrices), {}, 0)


def with_perplexity(
    report: QuantizationReport,
    original: Plan,
    quantized: Plan,
    config: LlamaConfig,
    dtype: str,
    tokens: np.ndarray,
    advance: Callable[[int], object] = lambda count: None,
) -> QuantizationReport:
    """Run the models, and add perplexities and shares of clipped inputs to a report.

    tokens: int [sequences, length], from `layerwise.read_sequences`.
    dtype: the dtype of activations that are not FP8.
    advance: as in `layerwise.final_hidden`, for each run.
    """
    formats = {path: module.format for path, module in quantized.modules.items()}
    before = {path: module.format for path, module in original.modules.items()}
    perplexity = {
        "original": _perplexity(original, ModelSpec(config, before, dtype), tokens, advance)[0]
    }
    clipped: Mapping[str, float] = {}
    for activations in activations_of(quantized):
        spec = ModelSpec(config, formats, dtype, activations)
        perplexity[activations], found = _perplexity(quantized, spec, tokens, advance)
        clipped = found if activations == "static" else clipped
    matrices = tuple(replace(m, inputs_clipped=clipped.get(m.path)) for m in report.matrices)
    return QuantizationReport(matrices, perplexity, tokens[:, 1:].size)


def activations_of(plan: Plan) -> tuple[Activations, ...]:
    """Return the formats of activations with which an FP8 checkpoint can run."""
    stored = [module.format for module in plan.modules.values() if module.format.scale]
    static = all(form.input_scale for form in stored)
    return ("bf16", "dynamic", "static") if static else ("bf16", "dynamic")


def read_report(directory: Path) -> QuantizationReport:
    """Read the report beside a checkpoint's weights. Raises `CheckpointError` if there is none."""
    path = directory / REPORT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        matrices = tuple(
            MatrixError(**{**each, "worst_rows": tuple(map(tuple, each["worst_rows"]))})
            for each in values["matrices"]
        )
        return QuantizationReport(matrices, values["perplexity"], values["scored_tokens"])
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} has no {REPORT}: convert with a report (--report)"
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def tables(report: QuantizationReport, worst: int = 8) -> list[Table]:
    """Make tables for a terminal: by kind of matrix, by layer, of the `worst` rows,
    perplexities."""
    kinds = _summary("kind", report.matrices, lambda m: m.kind)
    layers = _summary(
        "layer", report.matrices, lambda m: m.kind if m.layer is None else str(m.layer)
    )
    ranked = Table(title="Rows with the largest errors", title_justify="left")
    for column in ("matrix", "row", "relative error"):
        ranked.add_column(column, justify="left" if column == "matrix" else "right")
    rows = [(error, m.path, row) for m in report.matrices for row, error in m.worst_rows]
    for error, path, row in sorted(rows, key=lambda each: -each[0])[:worst]:
        ranked.add_row(path, str(row), f"{error:.4f}")
    if not report.perplexity:
        return [kinds, layers, ranked]
    scored = Table(title=f"Perplexity of {report.scored_tokens} tokens", title_justify="left")
    for column in ("weights", "activations", "perplexity", "change"):
        scored.add_column(column, justify="right" if column in ("perplexity", "change") else "left")
    original = report.perplexity["original"]
    for name, value in report.perplexity.items():
        weights, activations = ("original", "") if name == "original" else ("FP8", name)
        change = "" if name == "original" else f"{value / original - 1:+.2%}"
        scored.add_row(weights, activations, f"{value:.5g}", change)
    return [kinds, layers, ranked, scored]


def _summary(
    name: str, matrices: Sequence[MatrixError], group: Callable[[MatrixError], str]
) -> Table:
    """Make a table with a line per group: means over its matrices, and the largest error."""
    table = Table(title=f"Errors of the weights by {name}", title_justify="left")
    columns = ("matrices", "relative error", "largest", "SNR", "clipped", "inputs clipped")
    for column in (name, *columns):
        table.add_column(column, justify="left" if column == name else "right")
    for value in dict.fromkeys(map(group, matrices)):
        found = [m for m in matrices if group(m) == value]
        errors = [m.relative_error for m in found]
        inputs = [m.inputs_clipped for m in found if m.inputs_clipped is not None]
        table.add_row(
            value, str(len(found)), f"{np.mean(errors):.4f}", f"{max(errors):.4f}",
            f"{np.mean([m.snr for m in found]):.1f} dB",
            f"{np.mean([m.clipped for m in found]):.4%}",
            f"{np.mean(inputs):.4%}" if inputs else "-",
        )  # fmt: skip
    return table


def write_report(report: QuantizationReport, path: Path) -> None:
    """Write a report as a .json file, or as a plot of the errors (.png, .pdf or .svg)."""
    check_report_path(path)
    if path.suffix == ".json":
        path.write_text(report.to_json(), encoding="utf-8")
    else:
        plot(report).savefig(path, dpi=150)


def plot(report: QuantizationReport) -> "Figure":
    """Plot SNR, relative errors and clipped shares by layer, with a line per kind of matrix."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    (snr, errors), (weights, inputs) = figure.subplots(2, 2, sharex=True)
    lines: tuple[tuple[Axes, str, str, Callable[[MatrixError], float]], ...] = (
        (snr, "-", "SNR of the weights, dB", lambda m: m.snr),
        (errors, "-", "", lambda m: m.relative_error),
        (errors, ":", "relative error; dotted: the worst row's", lambda m: m.worst_rows[0][1]),
        (weights, "-", "clipped weights, %", lambda m: 100 * m.clipped),
        (inputs, "-", "clipped inputs, %",
         lambda m: math.nan if m.inputs_clipped is None else 100 * m.inputs_clipped),
    )  # fmt: skip
    for axes, style, label, value in lines:
        for kind in dict.fromkeys(m.kind for m in report.matrices):
            found = [m for m in report.matrices if m.kind == kind]
            points = [(m.layer, value(m)) for m in found if m.layer is not None]
            color = f"C{_KINDS.index(kind)}"
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker=".", linestyle=style, color=color, label=kind)
            else:
                axes.axhline(value(found[0]), linestyle=style, color=color, label=kind)
        axes.set(ylabel=label)
        axes.grid(alpha=0.3)
    for axes in (weights, inputs):
        axes.set(xlabel="layer", ylim=(0, max(axes.get_ylim()[1], 0.001)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if all(m.inputs_clipped is None for m in report.matrices):
        inputs.text(0.5, 0.5, "needs static scales", ha="center", transform=inputs.transAxes)
    figure.legend(*snr.get_legend_handles_labels(), loc="outside upper center", ncols=8)
    return figure


def _matrix_error(path: str, original: LazyArray, module: Module) -> MatrixError:
    codes, scales = module.arrays["weight"], module.arrays["weight_scale"]
    scale = scales.rows(0, scales.shape[0])
    height = BLOCK if module.format.scale == "block" else 1  # rows that share scales
    step = piece_rows(original.shape, original.dtype.itemsize)
    parts = []
    for start in range(0, original.shape[0], step):
        stop = min(start + step, original.shape[0])
        part = scale[start // height : -(-stop // height)]
        parts.append(_errors(original.rows(start, stop), codes.rows(start, stop), part))
    noise, signal, clipped = np.concatenate(parts, axis=1, dtype=np.float64)
    relative = np.sqrt(noise / np.where(signal > 0, signal, 1))
    worst = np.argsort(-relative, kind="stable")[:_WORST_ROWS]
    return MatrixError(
        path,
        float(np.sqrt(noise.sum() / signal.sum())) if signal.any() else 0.0,
        float(clipped.sum() / math.prod(original.shape)),
        tuple((int(row), float(relative[row])) for row in worst),
    )


@on_host
def _errors(original: Array, codes: Array, scale: Array) -> Array:
    """Return each row's squared error, squared norm, and number of clipped values."""
    wide = original.astype(jnp.float32)
    limit = expand_scale(scale, (codes.shape[0], codes.shape[1])) * _LARGEST_ROUNDED
    return jnp.stack(
        [
            jnp.sum(jnp.square(fp8.dequantize(codes, scale) - wide), axis=1),
            jnp.sum(jnp.square(wide), axis=1),
            jnp.sum(jnp.abs(wide) > limit, axis=1, dtype=jnp.float32),
        ]
    )


def _perplexity(
    plan: Plan, spec: ModelSpec, tokens: np.ndarray, advance: Callable[[int], object]
) -> tuple[float, Mapping[str, float]]:
    """Return the perplexity, and the share of clipped inputs of matrices with an input scale."""
    hidden, observed = final_hidden(plan, spec, tokens, observe=_clipped, advance=advance)
    perplexity = float(np.exp(-log_likelihoods(plan, spec, tokens, hidden).mean(dtype=np.float64)))
    shares: dict[str, float] = {}
    for layer, seen in enumerate(observed):
        means = jax.tree.map(lambda *parts: float(np.mean(parts)), *seen)
        shares |= {f"layers_{layer}/{name}": share for name, share in means.items()}
    output = plan.modules[plan.output]
    if output.format.input_scale:
        scale = output.arrays["input_scale"].whole()
        shares[plan.output] = float(np.mean([_clipped_share(x, scale) for x in hidden]))
    return perplexity, shares


def _clipped(inputs: Mapping[str, Array], pages: LayerCache, params: Params) -> dict[str, Array]:
    """Count a layer's clipped inputs; an `Observe`."""
    shares = {}
    for name, x in inputs.items():
        block, matrix = name.split("/")
        scale = params[block][matrix].get("input_scale")
        if scale is not None:
            shares[name] = _clipped_share(x, scale)
    return shares


@jax.jit
def _clipped_share(x: Array, scale: Array) -> Array:
    return jnp.mean(jnp.abs(x.astype(jnp.float32)) > scale * _LARGEST_ROUNDED, dtype=jnp.float32)
