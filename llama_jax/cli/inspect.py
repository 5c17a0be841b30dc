"""`llama-jax inspect`: what a checkpoint is, and whether it will fit, without loading it."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from llama_jax.cli import options
from llama_jax.cli.output import key_value_table, print_json, stderr, stdout

if TYPE_CHECKING:
    from llama_jax.config import LlamaConfig
    from llama_jax.fp8 import WeightFormat
    from llama_jax.memory import MemoryPlan


@dataclass(frozen=True)
class _Checkpoint:
    """What there is to know of a checkpoint without its weights. kv_scales as in `Manifest`."""

    path: Path
    container: str
    dialect: str
    config: "LlamaConfig"
    formats: Mapping[str, "WeightFormat"]
    kv_scales: tuple[tuple[float, float], ...] | None


@dataclass(frozen=True)
class _Kind:
    """The modules of one name, such as all q_proj: how most are stored, and which are not so.

    shape: of the weight. bytes: of all of them, scales included. exceptions: format to paths.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    format: str
    bytes: int
    exceptions: Mapping[str, list[str]]


def inspect(
    path: Annotated[
        Path | None,
        typer.Argument(
            help="A converted checkpoint or a Hugging Face directory.", show_default=options.SHIPPED
        ),
    ] = None,
    as_json: options.Json = False,
    dtype: options.DType = "bfloat16",
    kv_dtype: options.KVDtype = "bf16",
    max_seq_len: options.MaxSeqLen = None,
    max_batch_size: options.MaxBatchSize = 8,
) -> None:
    """Show what a checkpoint is: layout, config, formats of the weights, tokenizer, and the memory
    it would take. Nothing is converted or loaded.

    **Examples**

        llama-jax inspect
        llama-jax inspect ./Meta-Llama-3.1-8B-Instruct-fp8
        llama-jax inspect ./llama-8b --max-batch-size 32 --max-seq-len 4096 --kv-dtype fp8
        llama-jax inspect ./llama-8b --json | jq .memory
    """
    with stderr.status("starting JAX"):
        from llama_jax.kv_cache import storage_dtype
        from llama_jax.llm import DEFAULT_MAX_SEQ_LEN, SHIPPED_MODEL
        from llama_jax.memory import plan_memory
        from llama_jax.model import ModelSpec
        from llama_jax.tokenizer import load_tokenizer
    checkpoint = _read(SHIPPED_MODEL if path is None else path)
    limit = checkpoint.config.max_position_embeddings
    max_seq_len = min(limit, DEFAULT_MAX_SEQ_LEN) if max_seq_len is None else max_seq_len
    if max_seq_len > limit:
        raise ValueError(f"--max-seq-len {max_seq_len}: the model's context is {limit} tokens")
    spec = ModelSpec(checkpoint.config, checkpoint.formats, dtype)
    plan = plan_memory(spec, max_batch_size, max_seq_len, storage_dtype(kv_dtype, dtype), 512)
    kinds = _kinds(spec)
    tokenizer = load_tokenizer(checkpoint.path)
    tokenizer_facts = {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": len(tokenizer.special_tokens),
        "chat_template": tokenizer.chat_template is not None,
    }
    if as_json:
        print_json(_to_dict(checkpoint, kinds, tokenizer_facts, plan))
    else:
        _render(checkpoint, kinds, tokenizer_facts, plan)


def _read(path: Path) -> _Checkpoint:
    from converters.dialects import make_plan
    from converters.source import read_source
    from llama_jax.checkpoint import MANIFEST, CheckpointError, read_manifest

    if (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        return _Checkpoint(
            path, "converted checkpoint (Orbax)", manifest.dialect, manifest.config,
            manifest.formats, manifest.kv_scales,
        )  # fmt: skip
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} is not a checkpoint: neither {MANIFEST} (converted) nor config.json (Hugging "
            "Face) is there"
        )
    source = read_source(path)
    plan, dialect = make_plan(source)
    formats = {name: module.format for name, module in plan.modules.items()}
    return _Checkpoint(
        path, "Hugging Face checkpoint", dialect, source.config, formats, plan.kv_scales
    )


def _kinds(spec: Any) -> list[_Kind]:
    from flax import traverse_util

    from llama_jax.model import abstract_params

    modules: dict[str, dict[str, Any]] = {}
    for path, leaf in traverse_util.flatten_dict(abstract_params(spec)).items():
        modules.setdefault("/".join(path[:-1]), {})[path[-1]] = leaf
    groups: dict[str, list[str]] = {}
    for path in modules:
        groups.setdefault(path.rpartition("/")[2], []).append(path)
    kinds = []
    for name, paths in groups.items():
        formats = {path: _words(spec.format_of(tuple(path.split("/")))) for path in paths}
        usual, _ = Counter(formats.values()).most_common(1)[0]
        exceptions: dict[str, list[str]] = {}
        for path, stored in formats.items():
            if stored != usual:
                exceptions.setdefault(stored, []).append(path)
        size = sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize
            for path in paths
            for leaf in modules[path].values()
        )
        shape = modules[paths[0]]["weight"].shape
        kinds.append(_Kind(name, len(paths), shape, usual, size, exceptions))
    return sorted(kinds, key=lambda kind: -kind.bytes)


def _words(stored: "WeightFormat") -> str:
    if stored.scale is None:
        return stored.dtype
    scales = f"scale per {'128x128 block' if stored.scale == 'block' else 'row'}"
    return f"{stored.dtype}, {scales}" + (", input scale" if stored.input_scale else "")


def _to_dict(
    checkpoint: _Checkpoint, kinds: list[_Kind], tokenizer: dict[str, Any], plan: "MemoryPlan"
) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "container": checkpoint.container,
        "dialect": checkpoint.dialect,
        "config": checkpoint.config.to_dict(),
        "total_bytes": sum(kind.bytes for kind in kinds),
        "modules": [vars(kind) for kind in kinds],
        "kv_scales": checkpoint.kv_scales,
        "tokenizer": tokenizer,
        "memory": {**vars(plan), "total": plan.total, "fits": plan.total <= plan.limit},
    }


def _render(
    checkpoint: _Checkpoint, kinds: list[_Kind], tokenizer: dict[str, Any], plan: "MemoryPlan"
) -> None:
    c = checkpoint.config
    rope = f"theta {c.rope_theta:g}"
    if c.rope_scaling is not None:
        rope += (
            f", stretched {c.rope_scaling.factor:g} times as in Llama 3.1 beyond "
            f"{c.rope_scaling.original_max_position_embeddings} positions"
        )
    scales = checkpoint.kv_scales
    template = "with" if tokenizer["chat_template"] else "without"
    rows = {
        "what": f"{checkpoint.container}, {checkpoint.dialect} layout",
        "size": decimal(sum(kind.bytes for kind in kinds)),
        "layers": f"{c.num_layers}, hidden size {c.hidden_size}, MLP {c.intermediate_size}",
        "attention": f"{c.num_heads} heads, {c.num_kv_heads} kv heads, head_dim {c.head_dim}",
        "context": f"{c.max_position_embeddings} tokens",
        "rope": rope,
        "tokenizer": f"{tokenizer['kind']}, {tokenizer['vocab_size']} tokens, "
        f"{tokenizer['special_tokens']} of them special, {template} chat template",
        "KV scales": "none" if scales is None else f"k and v of {len(scales)} layers",
    }
    stdout.print(key_value_table(str(checkpoint.path), rows))
    table = Table(title="Weights", title_justify="left")
    table.add_column("module", no_wrap=True)
    for column in ("count", "shape"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("stored as")
    table.add_column("size", justify="right", no_wrap=True)
    for kind in kinds:
        shape = " x ".join(map(str, kind.shape))
        table.add_row(kind.name, str(kind.count), shape, kind.format, decimal(kind.bytes))
        for stored, paths in kind.exceptions.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            table.add_row("", f"of them {len(paths)}", "", f"{stored}: {paths[0]}{more}", "")
    stdout.print(table)
    stdout.print(plan)
    verdict = (
        "[green]It fits.[/green]" if plan.total <= plan.limit else "[red]It does not fit.[/red]"
    )
    stdout.print(verdict)
