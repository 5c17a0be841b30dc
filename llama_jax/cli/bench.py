"""Implements `llama-jax bench`: measures prefill and decode on this machine."""

from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.filesize import decimal
from rich.table import Table

from converters.locate import locate
from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.cli import options
from llama_jax.cli.output import key_value_table, note, print_json, stderr, stdout

if TYPE_CHECKING:
    from llama_jax.bench import Measurement, Report, Workload
    from llama_jax.model.spec import ModelSpec, Params


def bench(
    model: options.Model = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Random FP8 weights in the shapes of a model, e.g. llama-3.2-1b."),
    ] = None,
    quantize_lm_head: Annotated[
        bool,
        typer.Option(
            "--quantize-lm-head",
            help="The preset's output matrix in FP8, too: lm_head, or the embedding if they are "
            "tied.",
        ),
    ] = False,
    batch: Annotated[str, typer.Option(help="Sequences at the same time.")] = "1,8",
    prompt_len: Annotated[str, typer.Option(help="Tokens per prompt.")] = "128,512",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 64,
    as_json: options.Json = False,
    dtype: options.DType = "bfloat16",
    activations: options.Activations = "auto",
    kv_dtype: options.KVDtype = "bf16",
    implementation: options.Implementation = None,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Also list a decode step's kernels by time (on a GPU)."),
    ] = False,
) -> None:
    """Measure prefill and decode, and how close decode comes to the memory's bandwidth.

    Each combination of --batch and --prompt-len runs once to compile, then three times with each of
    three output lengths: one token for the time to the first token, and two others whose difference
    is the time of decode steps. GB/s: the bytes that a step has to read (weights, keys and values)
    divided by its time. "of copy": that divided by the speed of a large copy on the device in the
    same run, bytes read plus written. On a GPU, two more runs under the profiler show how long the
    device computes in a step ("busy"), and the share of a step in which it waits ("idle").

    **Examples**

        llama-jax bench
        llama-jax bench ./llama-8b --batch 1,16,64 --prompt-len 1024 --kv-dtype fp8
        llama-jax bench --preset llama-3.1-8b --json > before.json
        llama-jax bench --preset llama-3.1-8b --batch 1 --kernels
    """
    if model is not None and preset is not None:
        raise typer.BadParameter("give a MODEL or --preset, not both")
    if preset is not None:
        options.check_preset(preset)
    elif quantize_lm_head:
        raise typer.BadParameter("--quantize-lm-head goes with --preset; a MODEL is as converted")
    batches, prompt_lens = _numbers("--batch", batch), _numbers("--prompt-len", prompt_len)
    path = None if preset else locate(SHIPPED_MODEL if model is None else model)
    from pallas_kernels.cpu import compiler

    compiler.begin()
    with stderr.status("starting JAX"):
        from llama_jax import bench as benchmark
        from llama_jax.engine import allocator, compile_cache
        from llama_jax.model.kv_cache import storage_dtype
    compile_cache.enable()
    allocator.keep_little()
    workloads = [benchmark.Workload(*sizes, new_tokens) for sizes in product(batches, prompt_lens)]
    directory, spec = _spec(path, preset, quantize_lm_head, workloads, dtype, activations)
    spec = replace(spec, implementation=implementation)
    spec.check_runs()
    cache_dtype = storage_dtype(kv_dtype, dtype)
    benchmark.plan(spec, workloads, cache_dtype).check()
    with stderr.status("measuring a copy"):
        copy = benchmark.copy_bandwidth()
    with stderr.status("loading"):
        params = _params(directory, spec)
    name = preset or options.model_name(model)
    with stderr.status("measuring") as status:
        done: list[Any] = []

        def on_finished(measurement: "Measurement") -> None:
            done.append(measurement)
            status.update(f"measuring, {len(done)} of {len(workloads)} done")

        report = benchmark.bench(
            params, spec, workloads, kv_dtype=cache_dtype, copy_bytes_per_second=copy,
            on_finished=on_finished,
        )  # fmt: skip
    if as_json:
        print_json(_to_dict(name, spec, kv_dtype, report))
    else:
        _render(name, spec, kv_dtype, report)
        if kernels:
            _render_kernels(report)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"expected numbers separated by commas, such as 1,8; got {text!r}", param_hint=option
        ) from None


def _spec(
    path: Path | None,
    preset: str | None,
    quantize_lm_head: bool,
    workloads: list["Workload"],
    dtype: Any,
    activations: Any,
) -> tuple[Path | None, "ModelSpec"]:
    """Return the spec to measure and the directory of its parameters.

    path: of a checkpoint; None for a preset, which has random parameters and no directory.
    """
    from llama_jax.checkpoint import store

    directory = None
    if path is not None:
        from converters.resolve import resolve

        directory = resolve(path)
        spec = store.read_manifest(directory).spec(dtype, activations)
    else:
        assert preset is not None
        spec = options.preset_spec(preset, dtype, activations, quantize_lm_head)
    limit = spec.config.max_position_embeddings
    for workload in workloads:
        if workload.prompt_len + workload.new_tokens > limit:
            raise ValueError(
                f"--prompt-len {workload.prompt_len} and --new-tokens {workload.new_tokens} are "
                f"more than the model's context of {limit} tokens"
            )
    return directory, spec


def _params(directory: Path | None, spec: "ModelSpec") -> "Params":
    import jax

    from llama_jax.bench import random_params
    from llama_jax.checkpoint.store import load_params

    if directory is None:
        return random_params(spec)
    return load_params(directory, spec, bits=jax.default_backend() == "cpu")


def _to_dict(name: str, spec: "ModelSpec", kv_dtype: str, report: "Report") -> dict[str, Any]:
    measurements = [
        {
            **asdict(m.workload),
            "prefill_seconds": m.prefill_seconds,
            "prefill_tokens_per_second": m.prefill_tokens_per_second,
            "first_token_seconds": m.first_token_seconds,
            "decode_step_seconds": m.decode_step_seconds,
            "decode_tokens_per_second": m.decode_tokens_per_second,
            "decode_weight_bytes": m.weight_bytes,
            "decode_kv_bytes": m.kv_bytes,
            "decode_bytes_per_second": m.decode_bytes_per_second,
            "fraction_of_copy": report.fraction_of_copy(m),
            "device": None if m.device is None else asdict(m.device),
            "idle_share": m.idle_share,
        }
        for m in report.measurements
    ]
    return {
        "model": name,
        "dtype": spec.dtype,
        "activations": spec.activations,
        "fp8_lm_head": _has_fp8_lm_head(spec),
        "implementation": spec.implementation,
        "kv_dtype": kv_dtype,
        "environment": asdict(report.environment),
        "measurements": measurements,
        "copy_bytes_per_second": report.copy_bytes_per_second,
        "compile": asdict(report.compile),
        "peak_memory": asdict(report.peak_memory),
    }


def _render(name: str, spec: "ModelSpec", kv_dtype: str, report: "Report") -> None:
    title = f"{name} on {report.environment.device}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    has_record = any(m.device for m in report.measurements)
    for column in (
        "batch", "prompt", "prefill\ntok/s", "first\ntoken, ms", "decode\ntok/s", "step\nms",
        "read per\nstep", "GB/s", "of\ncopy",
        *(("busy\nms", "idle") if has_record else ()),
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for m in report.measurements:
        table.add_row(
            str(m.workload.batch_size),
            str(m.workload.prompt_len),
            f"{m.prefill_tokens_per_second:,.0f}",
            f"{m.first_token_seconds * 1e3:,.1f}",
            f"{m.decode_tokens_per_second:,.1f}",
            f"{m.decode_step_seconds * 1e3:,.2f}",
            decimal(m.weight_bytes + m.kv_bytes),
            f"{m.decode_bytes_per_second / 1e9:,.2f}",
            f"{report.fraction_of_copy(m):.0%}",
            *((f"{m.device.busy_seconds * 1e3:,.2f}", f"{m.idle_share:.0%}") if m.device else ()),
        )
    kind = "on the device" if report.peak_memory.kind == "device" else "resident set of the process"
    e = report.environment
    rows = {
        "copy": f"{report.copy_bytes_per_second / 1e9:,.1f} GB/s, read and written",
        "compile": str(report.compile),
        "peak memory": f"{decimal(report.peak_memory.bytes)} {kind}",
        "settings": f"{spec.dtype}, activations {spec.activations}, KV cache {kv_dtype}"
        + (", lm_head in FP8" if _has_fp8_lm_head(spec) else ""),
        "versions": f"jax {e.jax}, jaxlib {e.jaxlib}, Python {e.python}; {e.platform}, "
        f"{e.cpu_count} CPU cores",
    }
    stdout.print(table)
    stdout.print(key_value_table("", rows))


def _has_fp8_lm_head(spec: "ModelSpec") -> bool:
    """Return whether the output matrix (lm_head or a tied embedding) is in FP8."""
    return any(
        stored.scale and not path.startswith("layers_") for path, stored in spec.formats.items()
    )


def _render_kernels(report: "Report") -> None:
    """Print a table for each workload with the kernels of a decode step, slowest first."""
    for m in report.measurements:
        title = f"a decode step, batch {m.workload.batch_size}, prompt {m.workload.prompt_len}"
        if m.device is None:
            note(f"{title}: this device keeps no record of its kernels")
            continue
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("us", "share", "launches"):
            table.add_column(column, justify="right")
        table.add_column("kernel", overflow="fold")
        for kernel in m.device.kernels:
            share = kernel.seconds / m.device.busy_seconds
            cells = (f"{kernel.seconds * 1e6:,.1f}", f"{share:.1%}", f"{kernel.count:,.1f}")
            table.add_row(*cells, kernel.name)
        stdout.print(table)
