"""Implements `llama-jax export`: turns any checkpoint into a Hugging Face directory."""

import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.filesize import decimal

from converters.locate import locate
from converters.writing import check_export
from llama_jax.cli import options
from llama_jax.cli.output import key_value_table, print_json, stderr, stdout


def export(
    source: options.Source,
    target: Annotated[Path, typer.Argument(help="The Hugging Face directory to create.")],
    format: Annotated[
        Literal["bf16", "fp8"],
        typer.Option(
            help="fp8: codes and scales unchanged, in compressed-tensors' layout. bf16: code times "
            "scale, rounded once. Unquantised weights keep their dtype in both."
        ),
    ],
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Write a checkpoint as safetensors that transformers, vLLM and SGLang load.

    TARGET appears when it is complete, and replaces what was there only then. Memory use is small
    for any size. With fp8, activations are quantised with the checkpoint's input scales if it has
    some, and otherwise per token.

    **Examples**

        llama-jax export ./llama-8b-fp8 ./for-vllm --format fp8
        llama-jax export ./llama-8b-fp8 ./for-fine-tuning --format bf16
        llama-jax export ./Meta-Llama-3.1-8B-Instruct-fp8 ./for-vllm --format fp8   # unconverted
    """
    directory = locate(source)
    check_export(directory.resolve(), target.absolute(), overwrite)
    with stderr.status("starting JAX"):
        from converters.export import export as run
    began = time.perf_counter()
    exported = run(directory, target, format, overwrite=overwrite, progress=not as_json)
    seconds = time.perf_counter() - began
    if as_json:
        print_json({"target": str(target), "format": format, **vars(exported), "seconds": seconds})
        return
    rows = {
        "from": source,
        "size": f"{decimal(exported.total_bytes)} in {seconds:.1f} s, "
        f"{decimal(int(exported.total_bytes / seconds))}/s",
        "weights": ", ".join(exported.shards),
        "tokenizer": ", ".join(exported.tokenizer_files) or "none",
    }
    stdout.print(key_value_table(f"{target} ({format})", rows))
