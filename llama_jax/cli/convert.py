"""Implements `llama-jax convert`: turns a published checkpoint into an Orbax directory."""

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.filesize import decimal

from converters.locate import locate
from converters.quantize_options import QuantizeOptions, check_report_path
from converters.writing import check_conversion
from llama_jax.cli import options
from llama_jax.cli.output import check_output, key_value_table, print_json, stderr, stdout

_QUANTISING, _REPORTING, _READING = "Quantising", "Report", "Texts"


def convert(
    source: options.Source,
    target: Annotated[Path, typer.Argument(help="The directory to create.")],
    quantize: Annotated[
        Literal["row", "tensor", "block"] | None,
        typer.Option(
            help="Quantise bf16/fp16 matrices to FP8: a scale per row, matrix or 128x128 block.",
            show_default="keep weights as they are",
            rich_help_panel=_QUANTISING,
        ),
    ] = None,
    quantize_lm_head: Annotated[
        bool,
        typer.Option(
            "--quantize-lm-head",
            help="Quantise the output matrix too: lm_head, or the embedding if they are tied.",
            rich_help_panel=_QUANTISING,
        ),
    ] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="A text to run the model on, for static scales of activations and of an FP8 "
            "cache. It may contain chats: names of special tokens become those tokens.",
            rich_help_panel=_QUANTISING,
        ),
    ] = None,
    smooth: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Move outliers of activations into weights (SmoothQuant's alpha, often 0.5).",
            show_default="do not",
            rich_help_panel=_QUANTISING,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Measure errors, print tables, and write a .json file or plot (.png, .pdf, .svg).",
            rich_help_panel=_REPORTING,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="A text for the perplexity before and after.",
            show_default="that of --calibrate",
            rich_help_panel=_REPORTING,
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, help="Most tokens to read of each text.", rich_help_panel=_READING)
    ] = 16384,
    sequence_length: Annotated[
        int,
        typer.Option(
            min=2,
            help="Tokens per sequence, each without earlier context.",
            rich_help_panel=_READING,
        ),
    ] = 512,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Convert a checkpoint once, so that it loads fast on any number of devices.

    SOURCE needs config.json, safetensors and the tokenizer's files, or Meta's params.json,
    consolidated.*.pth and tokenizer.model. TARGET appears when it is complete, and replaces what
    was there only then. Memory use is small for any size, because calibration and scoring go layer
    by layer.

    **Examples**

        llama-jax convert ./Meta-Llama-3.1-8B-Instruct-fp8 ./llama-8b
        llama-jax convert meta-llama/Llama-3.1-8B-Instruct ./llama-8b --quantize row
        llama-jax convert ./Llama-3.1-8B-Instruct ./llama-8b --quantize row \\
            --calibrate chats.txt --smooth 0.5 --report report.png --text book.txt
        llama-jax inspect ./llama-8b && llama-jax chat ./llama-8b
    """
    if report is not None:
        check_report_path(report)
        check_output(str(report), overwrite)
    quantization = None
    if quantize is not None:
        quantization = QuantizeOptions(
            quantize, quantize_lm_head, calibrate, smooth, report is not None, text, tokens,
            sequence_length,
        )  # fmt: skip
    elif quantize_lm_head or calibrate or smooth is not None or report or text:
        raise typer.BadParameter("these options go with --quantize row, tensor or block")
    options.check_file("--calibrate", calibrate)
    options.check_file("--text", text)
    directory = locate(source)
    check_conversion(directory.resolve(), target.absolute(), overwrite)
    with stderr.status("starting JAX"):
        from converters.pipeline import convert as run
        from converters.quantization_report import (
            read_report,
            tables,
            write_report,
        )
        from llama_jax.engine import compile_cache
    compile_cache.enable()
    began = time.perf_counter()
    manifest = run(
        directory, target, quantize=quantization, overwrite=overwrite, progress=not as_json
    )
    seconds = time.perf_counter() - began
    stored = Counter(
        f"{form.dtype}, a scale per {form.scale}" if form.scale else form.dtype
        for form in manifest.formats.values()
    )
    measured = read_report(target) if report else None
    if measured and report:
        write_report(measured, report)
    if as_json:
        print_json(
            {
                "target": str(target),
                "source": manifest.source,
                "dialect": manifest.dialect,
                "total_bytes": manifest.total_bytes,
                "modules": dict(stored),
                "tokenizer_files": manifest.tokenizer_files,
                "perplexity": measured and dict(measured.perplexity),
                "seconds": seconds,
            }
        )
        return
    rows = {
        "from": f"{source} ({manifest.dialect})",
        "size": f"{decimal(manifest.total_bytes)} in {seconds:.1f} s",
        "modules": ", ".join(f"{count} x {form}" for form, count in stored.items()),
        "tokenizer": ", ".join(manifest.tokenizer_files) or "none",
    }
    stdout.print(key_value_table(str(target), rows))
    if measured:
        stdout.print(*tables(measured))
