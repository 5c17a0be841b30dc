"""Implements `llama-jax inspect --program`: prints the report of `engine.program_report`."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

from llama_jax.cli.output import key_value_table, print_json, stderr, stdout

if TYPE_CHECKING:
    from llama_jax.engine.program_report import Phase
    from llama_jax.engine.scheduling import EngineOptions
    from llama_jax.model.kv_cache import KVDtype
    from llama_jax.model.spec import ModelSpec


def show_program(
    title: str,
    spec: "ModelSpec",
    options: "EngineOptions",
    kv_dtype: "KVDtype",
    phase: "Phase",
    as_json: bool,
) -> None:
    """Compile a program for an H200 and print its launches and memory.

    Raises ValueError, which says what to install, if an H200 is no possible target here.
    """
    from llama_jax.engine.program_report import report
    from pallas_kernels.dev import sm90

    if reason := sm90.unavailable():
        raise ValueError(f"--program compiles for an H200: {reason}")
    with stderr.status(f"compiling {phase} with one layer and with two"):
        found = report(spec, options, kv_dtype, phase)
    if as_json:
        print_json({"model": title, "device": "NVIDIA H200", "program": phase, **asdict(found)})
        return
    rows = {
        "device": "NVIDIA H200",
        "sizes": f"{options.max_batch_size} sequences of {options.max_seq_len} tokens, cache in "
        f"{kv_dtype}, {options.prefill_chunk} tokens of a prompt at once",
        "host round trips": str(found.host_round_trips),
        "CUDA graphs": str(found.graphs),
        "temporaries": f"{found.temporary_bytes / 1e6:,.1f} MB",
        "state": "changed in place" if found.cache_aliased else "copied",
    }
    stdout.print(key_value_table(f"{title}, {phase}", rows))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("launches", "kernels", "fusions of XLA", "copies"):
        table.add_column(column, justify="left" if column == "launches" else "right")
    for name, launches in (("of a layer", found.layer), ("of the rest", found.outside)):
        table.add_row(name, *map(str, asdict(launches).values()))
    stdout.print(table)
