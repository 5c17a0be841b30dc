"""Implements `llama-jax inspect`: describes a checkpoint and its memory without loading it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.filesize import decimal
from rich.table import Table

from converters.locate import locate
from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.cli import options
from llama_jax.cli.output import key_value_table, print_json, runs, stderr, stdout
from llama_jax.cli.paths import Device, show_paths
from llama_jax.cli.program import show_program
from llama_jax.plural import counted

if TYPE_CHECKING:
    from converters.dialects.layout import Module, Plan
    from converters.opened import Opened
    from llama_jax.engine.memory import Capacity, MemoryPlan
    from llama_jax.model.kv_cache import KVScales

Range = tuple[float, float]
_PATHS = "Programs: --paths or --program"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


@dataclass(frozen=True)
class _Kind:
    """The modules of one name and one format, such as all q_proj or those of a few layers.

    layers: the layers that have them; () for a module outside the layers.
    everywhere: whether all modules of this name have this format.
    shape: of the weight.
    bytes: of all of them, including scales.
    weight_scale, input_scale: the smallest and the largest; None without scales.
    """

    name: str
    format: str
    layers: tuple[int, ...]
    everywhere: bool
    count: int
    shape: tuple[int, ...]
    bytes: int
    weight_scale: Range | None
    input_scale: Range | None


def inspect(
    model: options.Model = None,
    as_json: options.Json = False,
    dtype: options.DType = "bfloat16",
    kv_dtype: options.KVDtype = "bf16",
    max_seq_len: options.MaxSeqLen = None,
    max_batch_size: options.MaxBatchSize = 8,
    prefill_chunk: Annotated[
        int,
        typer.Option(min=1, help="Most tokens of a prompt per call.", rich_help_panel="Loading"),
    ] = 512,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Plan for a device with this memory, such as 80GiB. JAX takes three quarters of a "
            "GPU's, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.",
            show_default="this device's",
            rich_help_panel="Loading",
        ),
    ] = None,
    paths: Annotated[
        bool,
        typer.Option(
            help="Show instead which kernel computes each matmul and attention, or XLA.",
            rich_help_panel=_PATHS,
        ),
    ] = False,
    program: Annotated[
        Literal["prefill", "decode"] | None,
        typer.Option(
            help="Show instead the launches, graphs and temporaries of this program, compiled for "
            "--device h200. Needs the extra aot, but no GPU.",
            rich_help_panel=_PATHS,
        ),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(
            help="The device to plan for; no GPU is needed.",
            show_default="this device",
            rich_help_panel=_PATHS,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="FP8 weights in the shapes of a model, e.g. llama-3.1-8b, instead of MODEL.",
            rich_help_panel=_PATHS,
        ),
    ] = None,
    activations: options.Activations = "auto",
) -> None:
    """Describe a checkpoint: its layout, config, formats and scales of the weights, tokenizer, and
    the memory that it needs, here or on another device.

    Nothing is converted or loaded.

    **Examples**

        llama-jax inspect
        llama-jax inspect ./Meta-Llama-3.1-8B-Instruct-fp8   # a hub id is downloaded first
        llama-jax inspect ./llama-8b --max-batch-size 32 --max-seq-len 4096 --kv-dtype fp8
        llama-jax inspect ./llama-70b --memory 105GB       # an H200, from a laptop
        llama-jax inspect ./llama-8b --json | jq .memory
        llama-jax inspect ./llama-8b --paths --device h200
        llama-jax inspect --preset llama-3.1-8b --device h200 --program decode --json
    """
    if (device or preset) and not (paths or program):
        raise typer.BadParameter("--device and --preset go with --paths or --program")
    if program and (paths or not device):
        raise typer.BadParameter("--program goes with --device h200, and without --paths")
    if preset and model:
        raise typer.BadParameter("give a MODEL or --preset, not both")
    limit = None if memory is None else _parse_size(memory)
    if preset:
        options.check_preset(preset)
    path = locate(SHIPPED_MODEL if model is None else model)
    with stderr.status("starting JAX"):
        from converters.opened import open_checkpoint
        from llama_jax.engine.memory import capacity, plan_memory
        from llama_jax.engine.scheduling import EngineOptions
        from llama_jax.loading import DEFAULT_MAX_SEQ_LEN
        from llama_jax.model.kv_cache import storage_dtype
    if preset:
        spec, title = options.preset_spec(preset, dtype, activations), preset
    else:
        checkpoint = open_checkpoint(path)
        spec, title = checkpoint.spec(dtype, activations), str(checkpoint.directory)
    context = spec.config.max_position_embeddings
    length = min(context, DEFAULT_MAX_SEQ_LEN) if max_seq_len is None else max_seq_len
    if length > context:
        raise ValueError(f"--max-seq-len {length}: the model's context is {context} tokens")
    sizes = EngineOptions(max_batch_size, length, prefill_chunk=prefill_chunk)
    if program:
        show_program(title, spec, sizes, kv_dtype, program, as_json)
        return
    if paths:
        show_paths(title, spec, sizes, kv_dtype, device, as_json)
        return
    with stderr.status("planning"):
        plan = plan_memory(
            spec, max_batch_size, length, storage_dtype(kv_dtype, dtype), prefill_chunk,
            limit=limit,
        )  # fmt: skip
        capacities = {
            cache: capacity(
                spec, max_batch_size, length, storage_dtype(cache, dtype), prefill_chunk,
                plan.limit,
            )
            for cache in ("bf16", "fp8")
        }  # fmt: skip
        facts = _facts(checkpoint, plan, capacities)
    if as_json:
        print_json(facts)
    else:
        _render(checkpoint, facts, plan)


def _parse_size(text: str) -> int:
    """Parse "80GiB", "141 GB", "24g" or a plain number as bytes."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"--memory {text}: expected a size such as 80GiB or 141GB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))


def _facts(
    checkpoint: "Opened", plan: "MemoryPlan", capacities: Mapping[str, "Capacity"]
) -> dict[str, Any]:
    from llama_jax.checkpoint.converted import is_converted

    container = "converted" if is_converted(checkpoint.directory) else "published"
    kinds = _kinds(checkpoint.plan)
    files = (path for path in checkpoint.directory.rglob("*") if path.is_file())
    return {
        "path": str(checkpoint.directory),
        "container": f"{container} checkpoint",
        "dialect": checkpoint.dialect,
        "config": checkpoint.config.to_dict(),
        "total_bytes": sum(kind.bytes for kind in kinds),
        "disk_bytes": sum(path.stat().st_size for path in files),
        "modules": [asdict(kind) for kind in kinds],
        "quantized": _quantized(checkpoint.plan),
        "kv_scales": checkpoint.plan.kv_scales,
        "tokenizer": _tokenizer(checkpoint),
        "memory": {
            **vars(plan),
            "total": plan.total,
            "fits": plan.total <= plan.limit,
            "capacity": {cache: asdict(found) for cache, found in capacities.items()},
        },
    }


def _kinds(plan: "Plan") -> list[_Kind]:
    """Group the modules by name and format, the largest first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for path, module in plan.modules.items():
        groups.setdefault((path.rpartition("/")[2], _words(module)), []).append(path)
    names = Counter(name for name, _ in groups)
    kinds = []
    for (name, stored), paths in groups.items():
        modules = [plan.modules[path] for path in paths]
        kinds.append(
            _Kind(
                name,
                stored,
                tuple(layer for path in paths if (layer := _layer(path)) is not None),
                names[name] == 1,
                len(paths),
                modules[0].arrays["weight"].shape,
                sum(array.nbytes for module in modules for array in module.arrays.values()),
                _scale_range(modules, "weight_scale"),
                _scale_range(modules, "input_scale"),
            )
        )
    return sorted(kinds, key=lambda kind: -kind.bytes)


def _layer(path: str) -> int | None:
    """Return the number of a module's layer, or None outside the layers."""
    layer, _, rest = path.partition("/")
    return int(layer.removeprefix("layers_")) if rest else None


def _words(module: "Module") -> str:
    """Describe the storage format of a weight. A single scale is stored for each row."""
    stored = module.format
    if stored.scale is None:
        return stored.dtype
    scale = module.arrays["weight_scale"].whole()
    if stored.scale == "block":
        each = "128x128 block"
    elif stored.column_groups > 1:
        each = f"row of {stored.column_groups} column groups"
    else:
        each = "tensor" if (scale == scale[0]).all() else "row"
    words = f"{stored.dtype}, scale per {each}" + (", input scale" if stored.input_scale else "")
    if stored.activation_group is not None:
        words += f", activations by {stored.activation_group}"
    if stored.activation_scale_ub is not None:
        words += f", activations up to {stored.activation_scale_ub:g}"
    return words


def _scale_range(modules: Iterable["Module"], leaf: str) -> Range | None:
    scales = [module.arrays[leaf].whole() for module in modules if leaf in module.arrays]
    if not scales:
        return None
    return float(min(each.min() for each in scales)), float(max(each.max() for each in scales))


def _quantized(plan: "Plan") -> dict[str, list[str]]:
    """Return the paths of quantised matrices, of those with input scales, and of the others that
    tools quantise."""
    from converters.dialects.layout import is_linear

    formats = {
        path: module.format
        for path, module in plan.modules.items()
        if module.format.scale or is_linear(path)
    }
    return {
        "matrices": [path for path, stored in formats.items() if stored.scale],
        "with_input_scale": [path for path, stored in formats.items() if stored.input_scale],
        "not_quantized": [path for path, stored in formats.items() if not stored.scale],
    }


def _tokenizer(checkpoint: "Opened") -> dict[str, Any]:
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        return {"error": f"{checkpoint.directory}: no tokenizer.json and no tokenizer.model"}
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": len(tokenizer.special_tokens),
        "chat_template": tokenizer.chat_template is not None,
    }


def _render(checkpoint: "Opened", facts: Mapping[str, Any], plan: "MemoryPlan") -> None:
    c = checkpoint.config
    rope = f"theta {c.rope_theta:g}"
    if c.rope_scaling is not None:
        rope += (
            f", stretched {c.rope_scaling.factor:g} times as in Llama 3.1 beyond "
            f"{c.rope_scaling.original_max_position_embeddings} positions"
        )
    elif c.rope_linear_factor != 1:
        rope += f", all wavelengths stretched {c.rope_linear_factor:g} times"
    rows = {
        "what": f"{facts['container']}, {checkpoint.dialect} layout",
        "size": f"{decimal(facts['total_bytes'])} in memory, "
        f"{decimal(facts['disk_bytes'])} on disk",
        "layers": f"{c.num_layers}, hidden size {c.hidden_size}, MLP {c.intermediate_size}",
        "attention": f"{counted(c.num_heads, 'head')}, {counted(c.num_kv_heads, 'kv head')}, "
        f"head_dim {c.head_dim}",
        "context": f"{c.max_position_embeddings} tokens",
        "rope": rope,
        **_quantization_rows(facts["quantized"]),
        "KV scales": _kv_words(checkpoint.plan.kv_scales),
        "tokenizer": _tokenizer_words(facts["tokenizer"]),
    }
    stdout.print(key_value_table(facts["path"], rows))
    for title, table in _weights_tables(facts["modules"]):
        stdout.print(f"\n[bold]{title}[/bold]", highlight=False)
        stdout.print(table)
    stdout.print()
    stdout.print(plan)
    stdout.print(_capacity_table(facts["memory"]["capacity"], plan))
    verdict = (
        "[green]It fits.[/green]" if facts["memory"]["fits"] else "[red]It does not fit.[/red]"
    )
    stdout.print(verdict)


def _quantization_rows(quantized: Mapping[str, list[str]]) -> dict[str, str]:
    matrices, static = quantized["matrices"], quantized["with_input_scale"]
    if not matrices:
        return {"quantised": "nothing"}
    rest = quantized["not_quantized"]
    share = f"{len(matrices)} of {len(matrices) + len(rest)} matrices"
    if static == matrices:
        activations = "static: an input scale for each quantised matrix"
    elif static:
        activations = f"static for {len(static)} matrices, dynamic for the others"
    else:
        activations = "dynamic: no input scales"
    return {
        "quantised": f"{share}; not {_where(rest)}" if rest else share,
        "activations": activations,
    }


def _where(paths: Sequence[str]) -> str:
    """Abbreviate module paths: "q_proj in layers 0, 31; lm_head"."""
    layers: dict[str, list[int]] = {}
    for path in paths:
        found = layers.setdefault(path.rpartition("/")[2], [])
        layer = _layer(path)
        if layer is not None:
            found.append(layer)
    by_layers: dict[str, list[str]] = {}
    for name, numbers in layers.items():
        by_layers.setdefault(_in_layers(numbers), []).append(name)
    return "; ".join(", ".join(names) + found for found, names in by_layers.items())


def _in_layers(numbers: Sequence[int]) -> str:
    """Return " in layers 0, 2-30", or "" for no layer."""
    if not numbers:
        return ""
    return f" in layer{'s' if len(numbers) > 1 else ''} {runs(numbers)}"


def _kv_words(scales: "KVScales | None") -> str:
    if scales is None:
        return "none"
    k, v = (
        [x for each in scale for x in (each if isinstance(each, tuple) else (each,))]
        for scale in zip(*scales, strict=True)
    )
    each = " for each head" if len(k) > len(scales) else ""
    spans = f"k {_span((min(k), max(k)))}, v {_span((min(v), max(v)))}"
    return f"{spans}{each} in {counted(len(scales), 'layer')}"


def _span(found: Range) -> str:
    low, high = (f"{each:.2g}" for each in found)
    return low if low == high else f"{low} to {high}"


def _tokenizer_words(facts: Mapping[str, Any]) -> str:
    if "error" in facts:
        return f"none: {facts['error']}"
    template = "with" if facts["chat_template"] else "without"
    return (
        f"{facts['kind']}, {facts['vocab_size']} tokens, "
        f"{facts['special_tokens']} of them special, {template} chat template"
    )


def _weights_tables(kinds: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Table]]:
    """Make a table for each format, with what its weights have in common in the title."""
    by_format: dict[str, list[Mapping[str, Any]]] = {}
    for kind in kinds:
        by_format.setdefault(kind["format"], []).append(kind)
    for stored, group in by_format.items():
        size = decimal(sum(kind["bytes"] for kind in group))
        title = f"{sum(kind['count'] for kind in group)} x {stored}: {size}"
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("module")
        for column in ("count", "shape", "size"):
            table.add_column(column, justify="right", no_wrap=True)
        scales = [name for name in ("weight_scale", "input_scale") if group[0][name]]
        for name in scales:
            table.add_column(f"{name.replace('_', ' ')}s")
        for kind in group:
            table.add_row(
                kind["name"] + ("" if kind["everywhere"] else _in_layers(kind["layers"])),
                str(kind["count"]),
                " x ".join(map(str, kind["shape"])),
                decimal(kind["bytes"]),
                *(_span(kind[name]) for name in scales),
            )
        yield title, table


def _capacity_table(capacities: Mapping[str, Mapping[str, int]], plan: "MemoryPlan") -> Table:
    table = Table(title="What fits", title_justify="left")
    table.add_column("cache")
    for column in (
        "longest context, alone",
        f"longest context, {plan.max_batch_size} at a time",
        f"most sequences of {plan.max_seq_len} tokens",
    ):
        table.add_column(column, justify="right")
    for cache, found in capacities.items():
        counts = (found[name] for name in ("longest_alone", "longest", "most"))
        table.add_row(cache, *(str(count) if count else "none" for count in counts))
    return table
