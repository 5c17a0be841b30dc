"""Defines the options of quantisation. Imports no JAX, so that a mistake is reported at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_PLOTS = (".png", ".pdf", ".svg")
Layout = Literal["row", "tensor", "block"]


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of quantisation.

        QuantizeOptions("row", calibrate=Path("book.txt"), smooth=0.5)

    layout: a scale per output "row", per matrix ("tensor"), or per 128x128 "block".
    lm_head: whether to quantise the output matrix too, which is the embedding if they are tied.
    calibrate: a UTF-8 text to run the model on, for static scales of FP8 activations and scales of
        an FP8 key/value cache. Names of special tokens in it become those tokens, so it may contain
        chats.
    smooth: the strength alpha of SmoothQuant, 0 to 1 (see `converters.calibrate`); needs
        `calibrate`. None for no smoothing.
    report: whether to measure the errors, and the perplexity before and after, and store them
        beside the weights (`converters.quantization_report`).
    text: for the report's perplexity; None takes `calibrate`.
    tokens, sequence_length: the most tokens to read of the texts, and the tokens per sequence.

    Raises ValueError for settings that exclude each other.
    """

    layout: Layout = "row"
    lm_head: bool = False
    calibrate: Path | None = None
    smooth: float | None = None
    report: bool = False
    text: Path | None = None
    tokens: int = 16384
    sequence_length: int = 512

    def __post_init__(self) -> None:
        if self.layout not in ("row", "tensor", "block"):
            raise ValueError(f"layout must be 'row', 'tensor' or 'block', got {self.layout!r}")
        if self.smooth is not None and self.calibrate is None:
            raise ValueError("smooth needs a text to calibrate on (calibrate)")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise ValueError(f"smooth must be in [0, 1], got {self.smooth}")
        if self.text is not None and not self.report:
            raise ValueError("text is scored for the report: ask for one (report)")


def check_report_path(path: Path) -> None:
    """Raise ValueError unless `write_report` supports this kind of file."""
    if path.suffix not in (".json", *_PLOTS):
        raise ValueError(f"{path}: a report is a .json file, or a plot ({', '.join(_PLOTS)})")
    if path.suffix in _PLOTS:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{path}: plots need matplotlib. Install it (pip install 'llama-jax[notebooks]'), "
                "or write a .json file."
            ) from error
