"""Implements `llama-jax inspect --paths`: prints the calls that `engine.paths` finds."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from llama_jax.cli.output import key_value_table, print_json, runs, stderr, stdout

if TYPE_CHECKING:
    from llama_jax.engine.paths import KernelCall, Program
    from llama_jax.engine.scheduling import EngineOptions
    from llama_jax.model.kv_cache import KVDtype
    from llama_jax.model.spec import ModelSpec

Device = Literal["h200"]


def show_paths(
    title: str,
    spec: "ModelSpec",
    options: "EngineOptions",
    kv_dtype: "KVDtype",
    device: Device | None,
    as_json: bool,
) -> None:
    """Trace the programs for `device` (None for this one) and print their calls."""
    import jax

    from llama_jax.engine import paths
    from pallas_kernels import device as target

    mesh: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if device == "h200":
        from pallas_kernels.dev import sm90

        mesh = jax.sharding.use_abstract_mesh(sm90.H200)
    with stderr.status("tracing prefill, decode and scoring"), mesh:
        name = target.kind() or target.platform()
        programs = (*paths.programs(spec, options, kv_dtype), paths.scoring(spec, options))
        found = [(each, paths.calls(each)) for each in programs]
    if as_json:
        listed = [
            {"phase": each.phase, "name": each.name, "calls": [_as_json(call) for call in calls]}
            for each, calls in found
        ]
        print_json({"model": title, "device": name, "programs": listed})
        return
    sizes = f"{options.max_seq_len} tokens per sequence, cache in {kv_dtype}"
    stdout.print(key_value_table(title, {"device": name, "sizes": sizes}))
    for program, calls in found:
        _print(program, calls)


def _as_json(call: "KernelCall") -> dict[str, Any]:
    choice = call.choice
    return {
        "module": call.module,
        "matrices": call.matrices,
        "path": call.path,
        "operands": call.operands,
        "why_not": call.why_not,
        "cost": call.cost,
        "kernel": choice.kernel.name if choice else None,
        "fuses": choice.kernel.fuses if choice else (),
        "refusals": dict(choice.refusals) if choice else {},
    }


def _print(program: "Program", calls: Sequence["KernelCall"]) -> None:
    """Print a table of calls, with a line for those that differ only in the layer, and the reasons
    below it."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for call in calls:
        operands = ", ".join(call.operands[:2])
        key = (_words(call), call.path, call.cost, operands, _reasons(call))
        groups.setdefault(key, []).extend(_layers(call))
    reasons = list(dict.fromkeys(why for *_, why in groups if why))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("what", "layers", "path", "cost", "first operands"):
        table.add_column(column, overflow="fold")
    for (words, path, cost, operands, why), layers in groups.items():
        note = f" ({reasons.index(why) + 1})" if why else ""
        table.add_row(words, runs(sorted(set(layers))), path + note, cost, operands)
    stdout.print(f"\n[bold]{program.name}[/bold]", highlight=False)
    stdout.print(table)
    for number, reason in enumerate(reasons, 1):
        stdout.print(f"({number}) {reason}", style="dim", highlight=False, markup=False)
    fused: dict[str, dict[str, None]] = {}  # products with and without scales name kernels alike
    for call in calls:
        if call.choice and call.choice.kernel.fuses:
            fused.setdefault(call.choice.kernel.name, {}).update(
                dict.fromkeys(call.choice.kernel.fuses)
            )
    for name, each in fused.items():
        stdout.print(f"{name} can fuse {', '.join(each)}", style="dim", highlight=False)
    if any(map(_layers, calls)):
        stdout.print(_launches(calls), highlight=False)


def _reasons(call: "KernelCall") -> str:
    """Explain why XLA multiplies, or why kernels of higher priority did not take the call."""
    if call.why_not or not call.choice:
        return call.why_not or ""
    names: dict[str, list[str]] = {}
    for name, reason in call.choice.refusals:
        names.setdefault(reason, []).append(name)
    return "; ".join(f"not {', '.join(each)}: {reason}" for reason, each in names.items())


def _words(call: "KernelCall") -> str:
    """Name the matrices that the call reads, or else its module."""
    names = [path.rpartition("/")[2] for path in call.matrices or (call.module,)]
    return ", ".join(names) or "outside of the layers"


def _layers(call: "KernelCall") -> list[int]:
    layer = call.module.partition("/")[0]
    return [int(layer.removeprefix("layers_"))] if layer.startswith("layers_") else []


def _launches(calls: Sequence["KernelCall"]) -> str:
    layers = {layer for call in calls for layer in _layers(call)}
    counts = Counter(layer for call in calls if call.path != "xla" for layer in _layers(call))
    each = sorted({counts[layer] for layer in layers})
    return f"Kernel launches in a layer: {' to '.join(map(str, {each[0]: 0, each[-1]: 0}))}."
