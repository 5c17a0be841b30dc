"""Arguments of the compiled programs, as numpy arrays in shapes from short lists."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from llama_jax.engine.rows import Row
from llama_jax.engine.sampling import SamplingState, host_rows
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.model.kv_cache import PAGE_SIZE
from llama_jax.sampling_params import SamplingParams

# How many requests are admitted by one call.
_ADMITTED_PER_CALL = 8


@dataclass(frozen=True)
class Call:
    """A compiled program of `steps` and its arguments after the parameters and the state."""

    program: Any
    args: tuple[Any, ...]
    static: Mapping[str, Any]


@dataclass(frozen=True)
class Admission:
    """A row to start. copied: a page to copy for it, and where to. fresh: its settings, of
    `sampling.host_rows`."""

    row: Row
    copied: tuple[int, int] | None
    fresh: SamplingState

    @property
    def is_plain(self) -> bool:
        return not self.fresh.counts.size


def admitted_per_call(options: EngineOptions, plain: bool) -> int:
    """plain: see `sampling.is_plain`; other rows come one at a time."""
    return min(_ADMITTED_PER_CALL, options.max_batch_size) if plain else 1


def admission(
    admitted: Sequence[Admission],
    plain: bool,
    options: EngineOptions,
    vocab_size: int,
    uses_history: bool,
) -> tuple[Any, ...]:
    """Arguments of `steps.admit` for at most `admitted_per_call` rows."""
    size = admitted_per_call(options, plain)
    padding = size - len(admitted)
    fresh = [each.fresh for each in admitted]
    if padding:
        nobody = host_rows([SamplingParams(seed=0)], [()], [()], vocab_size, plain=plain)
        fresh += [nobody] * padding
    texts = np.zeros((size, options.pages_per_row * PAGE_SIZE if uses_history else 0), np.int32)
    for i, each in enumerate(admitted if uses_history else ()):
        tokens = each.row.request.all_tokens
        texts[i, : len(tokens)] = tokens
    copies = [each.copied or (0, options.pool_size) for each in admitted]
    sources, targets = zip(*copies, *[(0, options.pool_size)] * padding, strict=True)
    return (
        int32([each.row.number for each in admitted] + [options.max_batch_size] * padding),
        int32([each.row.stored for each in admitted] + [0] * padding),
        jax.tree.map(lambda *parts: np.concatenate(parts), *fresh),
        int32(sources),
        int32(targets),
        texts,
    )


def chunk(
    rows: Sequence[Row], shape: tuple[int, int], no_row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The next shape[1] tokens, at most, of each row; shape[0] rows with the padding.

    Returns tokens, lengths and rows as `steps.prefill_step` takes them, and the prompts' tokens
    after each of them, as `steps.score_step` does.
    """
    size, width = shape
    tokens, targets = np.zeros((2, size, width), np.int32)
    lengths, numbers = np.zeros(size, np.int32), np.full(size, no_row, np.int32)
    for i, row in enumerate(rows):
        part = row.tokens[row.stored : row.stored + width]
        after = row.request.prompt[row.stored + 1 : row.stored + 1 + len(part)]
        tokens[i, : len(part)] = part
        targets[i, : len(after)] = after
        lengths[i], numbers[i] = len(part), row.number
    return tokens, lengths, numbers, targets


def int32(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int32)
