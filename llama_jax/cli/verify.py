"""Implements `llama-jax verify`: checks a converted checkpoint against its checksums."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from llama_jax.checkpoint.converted import is_converted, not_converted
from llama_jax.cli import options
from llama_jax.cli.output import print_json, stderr, stdout


def verify(
    directory: Annotated[Path, typer.Argument(help="A converted checkpoint.")],
    as_json: options.Json = False,
) -> None:
    """Read every byte of a converted checkpoint and compare it with the checksums of its manifest.

    Lists each array or file that is damaged, missing or superfluous. Exits with 0 for a sound
    checkpoint, otherwise with 1.

    **Examples**

        llama-jax verify ./llama-8b
        llama-jax verify ./llama-8b --json | jq .problems
    """
    if not is_converted(directory):
        raise not_converted(directory)
    with stderr.status("starting JAX"):
        from converters.writing import byte_progress
        from llama_jax.checkpoint import store
    total = store.read_manifest(directory).total_bytes
    began = time.perf_counter()
    with byte_progress("verifying", total, not as_json) as advance:
        problems = store.verify(directory, advance)
    seconds = time.perf_counter() - began
    if as_json:
        print_json(
            {
                "directory": str(directory),
                "sound": not problems,
                "problems": problems,
                "total_bytes": total,
                "seconds": seconds,
            }
        )
    elif problems:
        table = Table("problem", "where")
        for path, damage in problems.items():
            table.add_row(damage, path)
        stdout.print(f"{directory} is not sound", soft_wrap=True)
        stdout.print(table)
        stdout.print("Convert the checkpoint again, or remove what is extra.")
    else:
        rate = decimal(int(total / seconds))
        stdout.print(f"{directory} is sound: {decimal(total)} read at {rate}/s")
    raise typer.Exit(1 if problems else 0)
