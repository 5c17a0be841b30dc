"""Defines the export's command line: python -m converters.orbax_to_hf SOURCE TARGET."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from converters.export import ExportFormat, export
from converters.locate import locate

HELP = """Write a checkpoint as a Hugging Face directory that transformers and vLLM load.

SOURCE is a converted checkpoint, or a published one in any layout that llama-jax reads. TARGET
appears when it is complete.

Examples:

    python -m converters.orbax_to_hf ./llama-8b-fp8 ./for-vllm --format fp8

    python -m converters.orbax_to_hf ./llama-8b-fp8 ./for-fine-tuning --format bf16
"""


def main(
    source: Annotated[str, typer.Argument(help="Checkpoint to read, or a hub id.")],
    target: Annotated[Path, typer.Argument(help="Directory to make.")],
    format: Annotated[
        ExportFormat,
        typer.Option(help="fp8: codes and scales, as compressed-tensors. bf16: their products."),
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export once done.")
    ] = False,
) -> None:
    try:
        exported = export(locate(source), target, format, overwrite=overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(f"{target}: {decimal(exported.total_bytes)} in {', '.join(exported.shards)}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=HELP)(main)
    app()
