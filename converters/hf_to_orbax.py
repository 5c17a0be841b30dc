"""Defines the converter's command line: python -m converters.hf_to_orbax SOURCE TARGET."""

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.filesize import decimal

from converters.dialects import DIALECTS
from converters.locate import locate
from converters.pipeline import convert
from llama_jax.checkpoint.store import Manifest

HELP = f"""Convert a Hugging Face checkpoint of Llama into an Orbax directory.

SOURCE is a directory with config.json, safetensors and tokenizer files. TARGET appears when it is
complete; an interrupted conversion leaves nothing that could be mistaken for a checkpoint.

Supported layouts:

{chr(10).join(f"- {dialect.name}: {dialect.description}" for dialect in DIALECTS)}

Examples:

    python -m converters.hf_to_orbax ./Meta-Llama-3.1-8B-Instruct-fp8 ./llama-8b-fp8

    python -m converters.hf_to_orbax ./Llama-3.1-8B-Instruct ./llama-8b-fp8 --quantize row
"""


def main(
    source: Annotated[str, typer.Argument(help="Directory to read, or a hub id.")],
    target: Annotated[Path, typer.Argument(help="Directory to make.")],
    quantize: Annotated[
        Literal["row", "tensor", "block"] | None,
        typer.Option(
            help="Quantise bf16/fp16 matrices to FP8: a scale per row, matrix or 128x128 block."
        ),
    ] = None,
    quantize_lm_head: Annotated[
        bool,
        typer.Option(
            "--quantize-lm-head",
            help="Quantise the output matrix too: lm_head, or the embedding if they are tied.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace a converted TARGET once the new one is complete."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the manifest as JSON, and no progress bar.")
    ] = False,
) -> None:
    try:
        manifest = convert(
            locate(source),
            target,
            quantize=quantize,
            quantize_lm_head=quantize_lm_head,
            overwrite=overwrite,
            progress=not as_json,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(manifest.to_json() if as_json else summary(manifest, target))


def summary(manifest: Manifest, target: Path) -> str:
    """Describe a finished conversion in a few lines."""
    stored = Counter(
        f"{form.dtype} with a scale per {form.scale}" if form.scale else form.dtype
        for form in manifest.formats.values()
    )
    return (
        f"{target}: {decimal(manifest.total_bytes)}, from {manifest.dialect} layout\n"
        f"weights: {', '.join(f'{count} x {form}' for form, count in stored.items())}\n"
        f"tokenizer: {', '.join(manifest.tokenizer_files) or 'none'}"
    )


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=HELP)(main)
    app()
