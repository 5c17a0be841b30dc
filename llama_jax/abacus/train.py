"""Trains Abacus from random weights on generated questions, then writes its two checkpoints.

    python -m llama_jax.abacus.train --scratch DIR

The run is seeded and resumes from ``DIR`` when it was stopped; every batch depends only on the
seed and the number of its step. Progress lines show the loss and the accuracy on held-out
questions. Needs the ``train`` extra (optax).

The shipped model took 4200 steps, 25.8 million tokens, in 85 minutes on two shared CPU cores (5000
tokens a second on average, 7800 with the cores to itself).
"""

import argparse
import random
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import tiktoken
from jax import Array

from llama_jax.abacus import data, vocabulary
from llama_jax.abacus.export import PACKAGE, export
from llama_jax.model.config import LlamaConfig, RopeScaling
from llama_jax.model.llama import Llama
from llama_jax.model.params import init_params
from llama_jax.model.spec import ModelSpec, Params

CONFIG = LlamaConfig(
    vocab_size=vocabulary.NUM_RANKS + vocabulary.NUM_SPECIAL_TOKENS,
    hidden_size=256,
    intermediate_size=384,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    dtype="bfloat16",
    bos_token_id=vocabulary.NUM_RANKS,
    eos_token_ids=tuple(vocabulary.NUM_RANKS + i for i in (1, 8, 9)),
)
"""Llama 3.1's architecture at 2.98 million parameters; the dtype is that of the checkpoint."""

SPEC = ModelSpec(replace(CONFIG, dtype="float32"), dtype="float32")
"""What is trained: float32 parameters and arithmetic."""


@dataclass(frozen=True)
class Segment:
    """A segment of the schedule: from step ``start`` on, learning rates change linearly from
    ``first`` to ``last`` times their peak within ``duration`` steps, or until the next segment."""

    start: int
    first: float
    last: float
    duration: int


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run.

    Every ``long_every``-th step of ``batch_tokens`` tokens has chats of 384 tokens, most of which
    offer the calculator; other steps have chats of 128 tokens.

    ``stages``: the steps at which the second and later stages of `tasks.KINDS` begin.
    """

    steps: int = 4200
    stages: tuple[int, ...] = (1000, 1600, 2200)
    seed: int = 0
    batch_tokens: int = 6144
    long_every: int = 8
    muon_learning_rate: float = 5e-3
    adam_learning_rate: float = 3e-3
    weight_decay: float = 0.05
    segments: tuple[Segment, ...] = (
        Segment(0, 0.0, 1.0, 100),
        Segment(100, 1.0, 1.0, 1),
        Segment(1100, 1.0, 0.0, 1100),
        Segment(1600, 1 - 500 / 1100, 0.0, 1200),
        Segment(2200, 0.4, 0.0, 2000),
    )


def draw_batch(
    recipe: Recipe, encoding: tiktoken.Encoding, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw tokens int32 [batch, length + 1] and mask float32 [batch, length] of one step."""
    rng = random.Random(f"{recipe.seed} {step}")
    length, tool_share = (384, 0.7) if step % recipe.long_every == 0 else (128, 0.0)
    return data.draw_batch(
        rng,
        encoding,
        recipe.batch_tokens // length,
        length,
        tool_share=tool_share,
        stage=bisect_right(recipe.stages, step),
    )


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Make the optimizer: Muon for matrices of the layers, Adam for all other parameters.

    Source: K. Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024), with the
    update's RMS set to 0.2 as in "Muon is scalable for LLM training" (arXiv:2502.16982).
    """

    def schedule(peak: float) -> optax.Schedule:
        pieces = [
            optax.linear_schedule(peak * piece.first, peak * piece.last, piece.duration)
            for piece in recipe.segments
        ]
        return optax.join_schedules(pieces, [piece.start for piece in recipe.segments[1:]])

    def dimensions(params: Any) -> Any:
        def of(path: Any, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
            hidden = leaf.ndim == 2 and path[0].key.startswith("layers_")
            return optax.contrib.MuonDimensionNumbers(1, 0) if hidden else None

        return jax.tree_util.tree_map_with_path(of, params)

    muon = optax.contrib.muon(
        schedule(recipe.muon_learning_rate),
        weight_decay=recipe.weight_decay,
        consistent_rms=0.2,
        adam_learning_rate=schedule(recipe.adam_learning_rate),
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def nll(params: Params, tokens: Array, mask: Array) -> tuple[Array, Array]:
    """Compute the mean negative log-likelihood (nats) of the masked targets, and float32 logits.

    tokens: int32 [batch, length + 1]; mask: float32 [batch, length].
    """
    logits: Array = Llama(SPEC).apply({"params": params}, tokens[:, :-1])  # type: ignore[assignment]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * mask) / jnp.sum(mask), logits


@partial(jax.jit, static_argnames="recipe", donate_argnums=(0, 1))
def update(
    params: Params, state: optax.OptState, tokens: Array, mask: Array, *, recipe: Recipe
) -> tuple[Params, optax.OptState, Array]:
    (loss, _), gradients = jax.value_and_grad(nll, has_aux=True)(params, tokens, mask)
    updates, state = make_optimizer(recipe).update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


@jax.jit
def answered(params: Params, tokens: Array, mask: Array) -> tuple[Array, Array]:
    """Return whether greedy decoding gives exactly the masked targets, bool [batch], and their mean
    NLL.

    Greedy decoding writes the right answer if and only if, given the right answer so far, the
    likeliest next token is right at every place: one forward pass tells.
    """
    loss, logits = nll(params, tokens, mask)
    right = (jnp.argmax(logits, -1) == tokens[:, 1:]) | (mask == 0)
    return jnp.all(right, axis=-1), loss


def answer_arrays(
    encoding: tiktoken.Encoding, chats: Sequence[data.HeldOutChat]
) -> tuple[np.ndarray, np.ndarray]:
    """Encode chats with their answers: tokens int32 [n, length + 1], mask float32 [n, length]."""
    rows = []
    for chat in chats:
        prompt = data.prompt_tokens(
            encoding, data.segments(chat.messages, date=chat.date, tools=chat.tools)
        )
        answer = [*encoding.encode_ordinary(chat.answer), CONFIG.eos_token_ids[-1]]
        rows.append((prompt, answer))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = np.zeros((len(rows), -(-longest // 64) * 64 + 1), np.int32)
    mask = np.zeros((len(rows), tokens.shape[1] - 1), np.float32)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, : len(prompt) + len(answer)] = prompt + answer
        mask[i, len(prompt) - 1 : len(prompt) + len(answer) - 1] = 1.0
    return tokens, mask


def accuracy(
    params: Params, encoding: tiktoken.Encoding, chats: Sequence[data.HeldOutChat]
) -> dict[str, float]:
    """Return the share of exactly right answers by kind, in the float32 arithmetic of training."""
    verdicts = defaultdict(list)
    for with_tools in (False, True):
        group = [chat for chat in chats if bool(chat.tools) == with_tools]
        right, _ = answered(params, *answer_arrays(encoding, group))
        for chat, verdict in zip(group, np.asarray(right), strict=True):
            verdicts[chat.kind].append(bool(verdict))
    return {kind: float(np.mean(values)) for kind, values in verdicts.items()}


def save_state(path: Path, step: int, tree: Any) -> None:
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    temporary = path.with_name("partial.npz")
    np.savez(temporary, *leaves, step=step)
    temporary.replace(path)


def restore_state(path: Path, tree: Any) -> tuple[int, Any]:
    with np.load(path) as stored:
        leaves = [jnp.asarray(stored[f"arr_{i}"]) for i in range(len(jax.tree.leaves(tree)))]
        return int(stored["step"]), jax.tree.unflatten(jax.tree.structure(tree), leaves)


def train(recipe: Recipe, scratch: Path, *, report_every: int = 200) -> Params:
    """Run the recipe to its end and return the float32 parameters."""
    tokens = vocabulary.build()
    encoding = vocabulary.encoding(tokens)
    chats = data.held_out_chats(seed=recipe.seed + 1, per_kind=24)
    params = init_params(SPEC, recipe.seed)
    state = make_optimizer(recipe).init(params)
    first = 0
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "state.npz"
    if path.exists():
        first, (params, state) = restore_state(path, (params, state))
        print(f"resumed at step {first}", flush=True)

    losses: list[Array] = []
    start = time.monotonic()
    for step in range(first, recipe.steps):
        batch = draw_batch(recipe, encoding, step)
        params, state, loss = update(params, state, *batch, recipe=recipe)
        losses.append(loss)
        done = step + 1
        if done % report_every == 0 or done == recipe.steps:
            mean = float(np.mean(jax.device_get(losses)))
            seconds = time.monotonic() - start
            by_kind = accuracy(params, encoding, chats)
            listed = " ".join(f"{kind} {100 * share:.0f}" for kind, share in by_kind.items())
            print(
                f"step {done}/{recipe.steps} loss {mean:.4f} "
                f"{len(losses) * recipe.batch_tokens / seconds:.0f} tokens/s "
                f"held-out {100 * np.mean(list(by_kind.values())):.1f} %: {listed}",
                flush=True,
            )
            save_state(path, done, (params, state))
            losses, start = [], time.monotonic()
    return params


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.abacus.train",
        description="Train Abacus and write its checkpoints.",
    )
    parser.add_argument(
        "--scratch", type=Path, required=True, help="where a stopped run resumes from"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and questions (0)")
    parser.add_argument(
        "--output", type=Path, default=PACKAGE, help="where the checkpoints go (this package)"
    )
    options = parser.parse_args(arguments)
    params = train(Recipe(seed=options.seed), options.scratch)
    export(params, SPEC, CONFIG, options.output)


if __name__ == "__main__":
    main()
