"""`llama-jax convert`: a Hugging Face checkpoint becomes an Orbax directory."""

import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.filesize import decimal

from llama_jax.cli import options
from llama_jax.cli.output import key_value_table, print_json, stderr, stdout


def convert(
    source: Annotated[Path, typer.Argument(help="A Hugging Face directory.")],
    target: Annotated[Path, typer.Argument(help="The directory to make.")],
    quantize: Annotated[
        Literal["row", "block"] | None,
        typer.Option(
            help="Quantise bf16/fp16 matrices to FP8, a scale per row or per 128x128 block.",
            show_default="keep weights as they are",
        ),
    ] = None,
    quantize_lm_head: Annotated[
        bool, typer.Option("--quantize-lm-head", help="Quantise the output matrix too.")
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Convert a checkpoint once, so that it loads fast and onto any number of devices.

    SOURCE needs config.json, safetensors and the tokenizer's files. TARGET appears when it is
    whole, and what was there stays until then. Memory use stays small whatever the size.

    **Examples**

        llama-jax convert ./Meta-Llama-3.1-8B-Instruct-fp8 ./llama-8b
        llama-jax convert ./Llama-3.1-8B-Instruct ./llama-8b --quantize row
        llama-jax inspect ./llama-8b && llama-jax chat ./llama-8b
    """
    with stderr.status("starting JAX"):
        from converters.pipeline import convert as run
    began = time.perf_counter()
    manifest = run(
        source, target, quantize=quantize, quantize_lm_head=quantize_lm_head, overwrite=overwrite,
        progress=not as_json,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    stored = Counter(
        f"{form.dtype}, a scale per {form.scale}" if form.scale else form.dtype
        for form in manifest.formats.values()
    )
    if as_json:
        print_json(
            {
                "target": str(target),
                "source": manifest.source,
                "dialect": manifest.dialect,
                "total_bytes": manifest.total_bytes,
                "modules": dict(stored),
                "tokenizer_files": manifest.tokenizer_files,
                "seconds": seconds,
            }
        )
        return
    rows = {
        "from": f"{source} ({manifest.dialect})",
        "size": f"{decimal(manifest.total_bytes)} in {seconds:.1f} s, "
        f"{decimal(int(manifest.total_bytes / seconds))}/s",
        "modules": ", ".join(f"{count} x {form}" for form, count in stored.items()),
        "tokenizer": ", ".join(manifest.tokenizer_files) or "none",
    }
    stdout.print(key_value_table(str(target), rows))
