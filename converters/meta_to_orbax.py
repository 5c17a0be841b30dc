"""Defines the command line for Meta's files: python -m converters.meta_to_orbax SOURCE TARGET."""

import typer

from converters.hf_to_orbax import main

HELP = """Convert a checkpoint of Llama as Meta distributes it into an Orbax directory.

SOURCE is a directory with params.json, all of `consolidated.*.pth`, tokenizer.model and, for an FP8
checkpoint, `fp8_scales_*.pt`. No code in the files is executed. TARGET appears when it is complete;
an interrupted conversion leaves nothing that could be mistaken for a checkpoint.

Examples:

    python -m converters.meta_to_orbax ~/.llama/checkpoints/Llama3.1-8B-Instruct ./llama-8b

    python -m converters.meta_to_orbax ./Llama-3.1-8B-Instruct/original ./llama-8b --quantize row
"""

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
    app.command(help=HELP)(main)
    app()
