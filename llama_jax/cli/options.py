"""Defines arguments and options that several commands share, and loads models for them."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from converters.locate import locate
from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.cli.output import note, stderr

if TYPE_CHECKING:
    from llama_jax.llm import LLM
    from llama_jax.model.spec import ModelSpec

_LOADING, _SAMPLING = "Loading", "Sampling (default: the checkpoint's generation_config)"
SHIPPED = "abacus, the small model that ships with llama-jax"

Model = Annotated[
    str | None,
    typer.Argument(
        help="A converted checkpoint, a Hugging Face or Meta directory, or a hub id.",
        show_default=SHIPPED,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A converted checkpoint, a Hugging Face or Meta directory, or a hub id.",
        show_default=SHIPPED,
    ),
]
Source = Annotated[
    str,
    typer.Argument(help="A converted checkpoint, a Hugging Face or Meta directory, or a hub id."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for other programs.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]

DType = Annotated[
    Literal["bfloat16", "float32"],
    typer.Option(help="Dtype of activations, cache and logits.", rich_help_panel=_LOADING),
]
Activations = Annotated[
    Literal["auto", "bf16", "dynamic", "static"],
    typer.Option(
        help="Format of activations for FP8 weights: bf16 (in --dtype), dynamic (FP8 with a scale "
        "per token) or static (FP8 with the checkpoint's scales). auto: dynamic for prompts on a "
        "GPU that computes in FP8, otherwise bf16.",
        rich_help_panel=_LOADING,
    ),
]
Implementation = Annotated[
    Literal["reference", "xla", "cpu", "hopper"] | None,
    typer.Option(
        help="Implementation of attention and FP8 matmuls: XLA, kernels for a CPU or a Hopper GPU "
        "(an error if they cannot run), or reference, their definition in plain JAX.",
        show_default="the best that runs here",
        rich_help_panel=_LOADING,
    ),
]
KVDtype = Annotated[
    Literal["bf16", "fp8"],
    typer.Option(
        help="Format of the key/value cache: bf16 (--dtype) or fp8.", rich_help_panel=_LOADING
    ),
]
MaxSeqLen = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Most tokens of a prompt and its output together.",
        show_default="the model's context, at most 8192",
        rich_help_panel=_LOADING,
    ),
]
MaxBatchSize = Annotated[
    int, typer.Option(min=1, help="Most sequences at the same time.", rich_help_panel=_LOADING)
]

NumSpeculativeTokens = Annotated[
    int | None,
    typer.Option(
        "--num-speculative-tokens",
        "--lookahead",
        min=0,
        help="Draft tokens for the model to check together, looked up in the text so far or drawn "
        "by --draft. Saves time if they are right; the output stays the same. --lookahead is the "
        "old spelling.",
        show_default="0, or 4 with --draft",
        rich_help_panel=_LOADING,
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="A smaller model with the same vocabulary that proposes draft tokens.",
        rich_help_panel=_LOADING,
    ),
]

MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Most tokens to generate.", show_default="256", rich_help_panel=_SAMPLING),
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING)]
TopK = Annotated[
    int | None,
    typer.Option(help="Draw from the k likeliest tokens; 0 for all.", rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="Draw from the likeliest tokens with this total probability.",
        rich_help_panel=_SAMPLING,
    ),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Least probability relative to the likeliest token.", rich_help_panel=_SAMPLING
    ),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Values above 1 reduce repetition.", rich_help_panel=_SAMPLING)
]
Seed = Annotated[
    int | None,
    typer.Option(help="Makes sampling repeatable.", rich_help_panel=_SAMPLING),
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples", "-n", min=1, help="Continuations of each prompt.", rich_help_panel=_SAMPLING
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Text that ends the output; may be repeated.", rich_help_panel=_SAMPLING),
]


def model_name(model: str | None) -> str:
    """Return a model's name for messages."""
    return "abacus" if model is None else Path(model).name or model


def check_preset(preset: str) -> None:
    from llama_jax.model.config import PRESETS

    if preset not in PRESETS:
        raise typer.BadParameter(
            f"expected one of {', '.join(PRESETS)}; got {preset!r}", param_hint="--preset"
        )


def preset_spec(
    preset: str, dtype: Any, activations: Any, quantize_lm_head: bool = False
) -> "ModelSpec":
    """Return the spec of a preset (see `check_preset`) with FP8 matrices."""
    from llama_jax import bench
    from llama_jax.model.config import PRESETS
    from llama_jax.model.spec import ModelSpec

    formats = bench.preset_spec(PRESETS[preset], quantize_lm_head=quantize_lm_head)
    return ModelSpec(formats.config, formats.formats, dtype, activations)


def directory(model: str | None) -> Path:
    """Find a model's converted checkpoint, or convert it, with progress on stderr."""
    path = locate(SHIPPED_MODEL if model is None else model)
    with stderr.status("starting JAX"), _importing():
        from converters.resolve import resolve
    return resolve(path)


def check_file(option: str, path: Path | None) -> None:
    """Raise an error that names the option if its file is given but cannot be opened."""
    if path is None:
        return
    if path.is_fifo() or path.is_char_device():
        raise ValueError(f"{option}: {path} is a FIFO or a device, expected a file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, f"{option}: {path}") from error


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Import without garbage collections, which find next to nothing in modules, and take up to a
    tenth of the time. What has been imported is not looked at again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def load(model: str | None, *, show_plan: bool, **settings: Any) -> "LLM":
    """Load an `LLM` from `directory` with the settings that are not None, showing the memory plan
    or a spinner on stderr."""
    name = model_name(model)
    if settings.get("draft") is not None:
        locate(settings["draft"])  # before the model is converted
    path = locate(SHIPPED_MODEL if model is None else model)
    from pallas_kernels.cpu import compiler

    compiler.begin()
    directory(str(path))
    with _importing():
        from llama_jax.engine.allocator import keep_little
        from llama_jax.llm import LLM

    keep_little()
    settings = {name: value for name, value in settings.items() if value is not None}
    if "draft" in settings:
        settings["draft"] = directory(settings["draft"])
    if show_plan:  # a spinner would draw over the table
        note(f"loading {name}")
        return LLM.load(path, verbose=True, **settings)
    with stderr.status(f"loading {name}"):
        return LLM.load(path, verbose=False, **settings)


def sampling_settings(**given: Any) -> dict[str, Any]:
    """Return the settings that are not None, which replace a checkpoint's own.

    Raises ValueError for one that is out of range, before a model is read.
    """
    from llama_jax.sampling_params import SamplingParams

    settings = {name: value for name, value in given.items() if value is not None}
    SamplingParams(**settings)
    return settings
