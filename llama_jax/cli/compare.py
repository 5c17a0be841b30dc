"""Implements `llama-jax compare`: how much two checkpoints' predictions differ on a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from converters.locate import locate
from llama_jax.cli import options
from llama_jax.cli.output import key_value_table, print_json, stderr, stdout

if TYPE_CHECKING:
    from converters.compare import Comparison
    from llama_jax.text.tokenizer import Tokenizer

_DType = Literal["bfloat16", "float32"]
_Activations = Literal["bf16", "dynamic", "static"]
_KVDtype = Literal["bf16", "fp8"]
_READING, _A, _B = "Text", "How A runs", "How B runs"
# Tokens of context shown before one of the worst, and the most characters of them.
_CONTEXT, _SHOWN = 24, 40


def compare(
    a: Annotated[str, typer.Argument(help="The reference: a checkpoint of any kind.")],
    b: Annotated[str, typer.Argument(help="The checkpoint to judge, with the same vocabulary.")],
    text: Annotated[
        Path, typer.Option(help="A UTF-8 text to run both over.", rich_help_panel=_READING)
    ],
    tokens: Annotated[
        int, typer.Option(min=2, help="Most tokens to read.", rich_help_panel=_READING)
    ] = 4096,
    sequence_length: Annotated[
        int,
        typer.Option(
            min=2,
            help="Tokens per sequence, each without earlier context.",
            rich_help_panel=_READING,
        ),
    ] = 512,
    dtype_a: Annotated[
        _DType, typer.Option(help="Dtype of activations, cache and logits.", rich_help_panel=_A)
    ] = "bfloat16",
    activations_a: Annotated[
        _Activations,
        typer.Option(help="Format of activations for FP8 weights.", rich_help_panel=_A),
    ] = "bf16",
    kv_dtype_a: Annotated[
        _KVDtype, typer.Option(help="Format of the key/value cache.", rich_help_panel=_A)
    ] = "bf16",
    dtype_b: Annotated[
        _DType, typer.Option(help="Dtype of activations, cache and logits.", rich_help_panel=_B)
    ] = "bfloat16",
    activations_b: Annotated[
        _Activations,
        typer.Option(help="Format of activations for FP8 weights.", rich_help_panel=_B),
    ] = "bf16",
    kv_dtype_b: Annotated[
        _KVDtype, typer.Option(help="Format of the key/value cache.", rich_help_panel=_B)
    ] = "bf16",
    worst: Annotated[int, typer.Option(min=0, help="Number of the worst tokens to show.")] = 5,
    as_json: options.Json = False,
) -> None:
    """Compare the predictions of two checkpoints token by token.

    A and B are converted checkpoints, published ones (Hugging Face, Meta) or hub ids. They run one
    after the other and layer by layer, so neither has to fit in memory. KL is KL(A || B) in nats: 0
    where B predicts the same as A. Names of special tokens in the text become those tokens, so the
    text may contain chats.

    **Examples**

        llama-jax compare ./Llama-3.1-8B-Instruct ./llama-8b-fp8 --text book.txt
        llama-jax compare ./llama-8b-fp8 ./llama-8b-fp8 --activations-b dynamic --text book.txt
        llama-jax compare ./llama-8b-fp8 ./llama-8b-fp8 --dtype-a float32 --text book.txt
        llama-jax compare ./llama-8b-bf16 ./llama-8b-fp8 --text book.txt --json | jq .kl_mean
    """
    options.check_file("--text", text)
    directories = locate(a), locate(b)
    with stderr.status("starting JAX"):
        from converters.compare import Setting
        from converters.compare import compare as run
        from converters.layerwise import read_sequences, token_progress
        from converters.opened import open_checkpoint
        from llama_jax.engine import compile_cache
        from llama_jax.text.tokenizer import load_tokenizer
    compile_cache.enable()
    opened = tuple(map(open_checkpoint, directories))
    tokenizers = [load_tokenizer(each.directory, each.config) for each in opened]
    ids, other = (
        read_sequences(text, tokenizer, each.config, tokens, sequence_length)
        for tokenizer, each in zip(tokenizers, opened, strict=True)
    )
    if ids.shape != other.shape or (ids != other).any():
        raise ValueError(f"the tokenizers of {a} and {b} split {text} into different tokens")
    settings = (
        Setting(opened[0], dtype_a, activations_a, kv_dtype_a),
        Setting(opened[1], dtype_b, activations_b, kv_dtype_b),
    )
    layers = sum(each.config.num_layers for each in opened)
    with token_progress("comparing", ids.size, layers, stderr.is_terminal) as advance:
        result = run(*settings, ids, advance)
    places = [_place(tokenizers[0], ids, result, *where) for where in result.worst(worst)]
    if as_json:
        print_json({"a": a, "b": b, "text": str(text), **result.to_dict(), "worst": places})
    else:
        _render(a, b, result.to_dict(), places)


def _place(
    tokenizer: "Tokenizer", ids: Any, result: "Comparison", sequence: int, index: int
) -> dict[str, Any]:
    before = ids[sequence, max(0, index - _CONTEXT) : index].tolist()
    return {
        "sequence": sequence,
        "index": index,
        "kl": float(result.kl[sequence, index - 1]),
        "token": tokenizer.decode([int(ids[sequence, index])], skip_special=False),
        "after": tokenizer.decode(before, skip_special=False),
    }


def _render(a: str, b: str, summary: dict[str, Any], places: list[dict[str, Any]]) -> None:
    rows = {
        "tokens": summary["tokens"],
        "KL per token": f"mean {summary['kl_mean']:.3g}, median {summary['kl_median']:.3g}, "
        f"99 % below {summary['kl_p99']:.3g}, largest {summary['kl_max']:.3g} nats",
        "likeliest token": f"the same at {summary['top_1_agreement']:.2%}",
        "five likeliest": f"{summary['top_5_agreement']:.2%} of them shared",
        "perplexity": f"{summary['perplexity_a']:.4f} and {summary['perplexity_b']:.4f}, "
        f"{summary['perplexity_ratio'] - 1:+.3%}",
    }
    stdout.print(key_value_table(f"{a} and {b}", rows))
    if not places:
        return
    table = Table(title="Where they differ most", title_justify="left")
    for column in ("KL", "sequence", "token"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("text")
    for place in places:
        marked = f"{place['after'][-_SHOWN:]!r} -> {place['token']!r}"
        table.add_row(
            f"{place['kl']:.3g}", str(place["sequence"]), str(place["index"]), Text(marked)
        )
    stdout.print(table)
