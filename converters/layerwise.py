"""Runs a model over texts layer by layer, directly from a checkpoint on disk.

So a model larger than memory can be calibrated, scored and compared: only one layer's weights and
the hidden states of all tokens are in memory. Each layer runs as a one-layer model by the model's
own code (`llama_jax.model.llama.Llama`) with a cache, so layers with the same formats share one
compiled program.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from converters.dialects.layout import Plan, pieces
from llama_jax.model.cached_attention import LayerCache
from llama_jax.model.config import LlamaConfig
from llama_jax.model.kv_cache import KVDtype, init_cache, storage_dtype
from llama_jax.model.linear import INPUTS, inputs_of
from llama_jax.model.llama import Llama
from llama_jax.model.spec import ModelSpec, Params
from llama_jax.text.tokenizer import Tokenizer
from pallas_kernels import e4m3

# Tokens per call of a layer, and tokens whose logits exist at once.
_BATCH_TOKENS = 2048
_LOGIT_TOKENS = 256
# An upper bound of the mean characters per token in texts for calibration.
_CHARS_PER_TOKEN = 16

# A function that is called inside the compiled layer with the inputs of its matrices by name
# ("mlp/up_proj"), each [b, t, in]; its updated part of the cache; and its parameters.
Observe = Callable[[Mapping[str, Array], LayerCache, Params], Any]


def read_sequences(
    path: Path, tokenizer: Tokenizer, config: LlamaConfig, tokens: int, length: int
) -> np.ndarray:
    """Read the first `tokens` tokens of a text.

    An incomplete last sequence is dropped, but a text shorter than one sequence is kept.

    Returns int32 [sequences, length]; each sequence begins with BOS.
    Raises ValueError for a text without two tokens, or one that is not UTF-8, and for a length
    beyond the model's context.
    """
    if length > config.max_position_embeddings:
        raise ValueError(
            f"sequences of {length} tokens are longer than the model's context of "
            f"{config.max_position_embeddings} tokens (max_position_embeddings)"
        )
    if length < 2 or tokens < length:
        raise ValueError(
            f"{tokens} tokens in sequences of {length}: a sequence needs at least 2 tokens, and "
            "there must be one; take more tokens or a smaller sequence length"
        )
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(tokens * _CHARS_PER_TOKEN)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error
    bos = list(tokenizer.prefix_ids)
    ids = np.array(tokenizer.encode(text, parse_special=True), np.int32)
    step = min(length - len(bos), len(ids))
    if step + len(bos) < 2:
        raise ValueError(f"{path} holds {len(ids)} tokens: too few to predict any from another")
    count = min(len(ids) // step, tokens // length)
    rows = ids[: count * step].reshape(count, step)
    return np.concatenate([np.tile(np.array(bos, np.int32), (count, 1)), rows], axis=1)


def final_hidden(
    plan: Plan,
    spec: ModelSpec,
    tokens: np.ndarray,
    *,
    kv_dtype: KVDtype = "bf16",
    observe: Observe | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> tuple[list[Array], list[list[Any]]]:
    """Run all layers over tokens, int [sequences, length], each sequence from its beginning.

    plan: the parameters, in the formats of `spec`.
    kv_dtype: of the cache, with the plan's scales.
    observe: an `Observe`, which must be a function at module level.
    advance: called with the tokens that a layer has processed, in total num_layers * tokens.size.
    Returns the final hidden states, after the last norm, as batches [b, length, d] of `spec.dtype`
    in order, and the observations, [layer][batch].
    """
    batch = _batch_size(*tokens.shape)
    embedding = read_module(plan, "embed_tokens")
    hidden = [
        _embed({"embed_tokens": embedding}, tokens[i : i + batch], spec=spec)
        for i in range(0, len(tokens), batch)
    ]
    del embedding
    observed = []
    for layer in range(spec.config.num_layers):
        params = {"layers_0": read_layer(plan, layer)}
        scales = np.array([plan.kv_scales[layer] if plan.kv_scales else (1.0, 1.0)], np.float32)
        run = partial(
            _layer, params, scales, spec=layer_spec(spec, layer), kv_dtype=kv_dtype, observe=observe
        )
        seen = []
        for i, x in enumerate(hidden):
            hidden[i], found = jax.block_until_ready(run(x))
            seen.append(found)
            advance(x.shape[0] * x.shape[1])
        observed.append(seen)
    norm = {"norm": read_module(plan, "norm")}
    return [_norm(norm, x, spec=spec) for x in hidden], observed


def logits(plan: Plan, spec: ModelSpec, hidden: list[Array]) -> Iterator[Array]:
    """Yield logits, float32 [tokens, vocab], up to 256 tokens at a time.

    The last token of each sequence is left out, since nothing follows that it could predict.

    hidden: the states of `final_hidden`.
    """
    params = {plan.output: read_module(plan, plan.output)}
    rows = jnp.concatenate([x[:, :-1].reshape(-1, x.shape[-1]) for x in hidden])
    for start in range(0, len(rows), _LOGIT_TOKENS):
        part = rows[start : start + _LOGIT_TOKENS]
        padded = jnp.pad(part, ((0, _LOGIT_TOKENS - len(part)), (0, 0)))
        yield _unembed(params, padded, spec=spec)[: len(part)]


def log_likelihoods(
    plan: Plan, spec: ModelSpec, tokens: np.ndarray, hidden: list[Array]
) -> np.ndarray:
    """Return the natural log of each token's probability given those before it.

    tokens: int [sequences, length], from which `hidden` was made.
    Returns float32 [sequences, length - 1].
    """
    targets = tokens[:, 1:].reshape(-1)
    found, start = [], 0
    for part in logits(plan, spec, hidden):
        found.append(_log_likelihood(part, targets[start : start + len(part)]))
        start += len(part)
    return np.concatenate(found).reshape(len(tokens), -1)


class _Tokens(ProgressColumn):
    """Shows the tokens done and their rate. A task counts each token once per layer."""

    def render(self, task: Task) -> Text:
        layers = task.fields["layers"]
        done, total = task.completed // layers, (task.total or 0) // layers
        rate = (task.finished_speed or task.speed or 0) / layers
        return Text(f"{done:,.0f}/{total:,.0f} tokens {rate:,.0f}/s", style="progress.data.speed")


@contextmanager
def token_progress(
    description: str, tokens: int, layers: int, shown: bool
) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, and yield an `advance` for the functions above.

    tokens, layers: the numbers of tokens and of layers that they go through.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), _Tokens(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        yield partial(bar.advance, bar.add_task(description, total=tokens * layers, layers=layers))


def layer_spec(spec: ModelSpec, layer: int) -> ModelSpec:
    """Return the spec of a model with this layer alone, as its layer 0."""
    prefix = f"layers_{layer}/"
    formats = {
        "layers_0/" + path.removeprefix(prefix): stored
        for path, stored in spec.formats.items()
        if path.startswith(prefix)
    }
    return replace(spec, config=replace(spec.config, num_layers=1), formats=formats)


def read_layer(plan: Plan, layer: int) -> Params:
    """Read the parameters of a layer, nested by module name; see `read_module`."""
    prefix = f"layers_{layer}/"
    tree = {
        path.removeprefix(prefix): read_module(plan, path)
        for path in plan.modules
        if path.startswith(prefix)
    }
    return traverse_util.unflatten_dict(tree, sep="/")


def read_module(plan: Plan, path: str) -> dict[str, np.ndarray]:
    """Read the arrays of a module. On a CPU, FP8 codes are int8 bits, as in `load_params`."""
    on_cpu = jax.default_backend() == "cpu"
    arrays = {}
    for name, lazy in plan.modules[path].arrays.items():
        parts = list(pieces(lazy))
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        arrays[name] = array.view(np.int8) if on_cpu and array.dtype == e4m3.DTYPE else array
    return arrays


def _batch_size(sequences: int, length: int) -> int:
    """Return the most sequences within `_BATCH_TOKENS` that divide all of them evenly."""
    limit = max(1, _BATCH_TOKENS // length)
    return max(size for size in range(1, limit + 1) if sequences % size == 0)


@partial(jax.jit, static_argnames="spec")
def _embed(params: Params, tokens: Array, *, spec: ModelSpec) -> Any:
    return Llama(spec).apply(
        {"params": params}, tokens, method=lambda model, x: model.embed_tokens.lookup(x)
    )


@partial(jax.jit, static_argnames=("spec", "kv_dtype", "observe"))
def _layer(
    params: Params,
    kv_scales: Array,
    x: Array,
    *,
    spec: ModelSpec,
    kv_dtype: KVDtype,
    observe: Observe | None,
) -> tuple[Array, Any]:
    batch, length = x.shape[:2]
    stored = storage_dtype(kv_dtype, spec.dtype)
    cache = init_cache(spec.config, batch, length, stored, kv_scales)
    cached_lens, kv_lens = cache.cached_lens, jnp.full(batch, length)
    pages = LayerCache(
        cache.k[0], cache.v[0], cache.k_scale[0], cache.v_scale[0],
        cache.page_table, cached_lens, kv_lens,
    )  # fmt: skip
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    (y, pages), recorded = Llama(spec).apply(
        {"params": params}, x, positions, pages,
        method=lambda model, *args: model.layers[0](*args), mutable=INPUTS,
    )  # fmt: skip
    if observe is None:
        return y, None
    inputs = {path.removeprefix("layers_0/"): x for path, x in inputs_of(recorded).items()}
    return y, observe(inputs, pages, params["layers_0"])


@partial(jax.jit, static_argnames="spec")
def _norm(params: Params, x: Array, *, spec: ModelSpec) -> Any:
    return Llama(spec).apply({"params": params}, x, method=lambda model, x: model.norm(x))


@partial(jax.jit, static_argnames="spec")
def _unembed(params: Params, hidden: Array, *, spec: ModelSpec) -> Any:
    return Llama(spec).apply({"params": params}, hidden, method="unembed")


@jax.jit
def _log_likelihood(logits: Array, targets: Array) -> Array:
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)
