"""Defines actors for Ray Data (extra `ray`), each with a model of its own.

    dataset.map_batches(
        Scorer, fn_constructor_args=["meta-llama/Llama-3.1-8B-Instruct"],
        batch_format="pyarrow", batch_size=1024, num_gpus=1,
        compute=ray.data.ActorPoolStrategy(size=8),
    )

A batch keeps its columns and gets all columns named below, with nulls for rows without a value; a
column of the same name is replaced. A row that fails gets an "error", and the others go on. Ray
restarts an actor that dies and gives it the batch again.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.data_rows import run_rows, score_rows
from llama_jax.jobs import Job
from llama_jax.llm import LLM
from llama_jax.results import Generation, generation_fields
from llama_jax.sampling_params import SamplingParams
from llama_jax.text.windows import window_and_stride

_SCORE = {
    "logprob": pa.float64(), "num_tokens": pa.int64(), "is_greedy": pa.bool_(),
    "perplexity": pa.float64(),
}  # fmt: skip
_TOKENS = {"token_ids": pa.list_(pa.int64()), "logprobs": pa.list_(pa.float64())}
_GENERATED = {
    "text": pa.string(), "finish_reason": pa.string(), "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(), "error": pa.string(),
}  # fmt: skip


class Scorer:
    """Scores rows with "prompt" and "completion", "prompt" and "choices", or "text".

    Adds the columns of `llama-jax score`: logprob, num_tokens, is_greedy, perplexity,
    byte_perplexity, word_perplexity, best, probabilities, scores and error.

    tokens: add token_ids and logprobs, too.
    window, stride: as in `LLM.perplexity`.
    settings: as in `LLM.load`.
    """

    def __init__(
        self,
        model: str | Path = SHIPPED_MODEL,
        *,
        tokens: bool = False,
        window: int | None = None,
        stride: int | None = None,
        **settings: Any,
    ) -> None:
        self.llm = LLM.load(model, verbose=False, **settings)
        window, stride = window_and_stride(window, stride, self.llm.max_seq_len)
        self._options: dict[str, Any] = {"tokens": tokens, "window": window, "stride": stride}
        score = _SCORE | _TOKENS if tokens else _SCORE
        self._columns = score | {
            "byte_perplexity": pa.float64(), "word_perplexity": pa.float64(), "best": pa.int64(),
            "probabilities": pa.list_(pa.float64()), "scores": pa.list_(pa.struct(score)),
            "error": pa.string(),
        }  # fmt: skip

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _with_columns(
            batch, lambda rows: score_rows(self.llm, rows, **self._options), self._columns
        )


class Generator:
    """Continues rows with "prompt", a text, or replies to rows with "messages", a chat.

    Adds text, finish_reason, prompt_tokens, completion_tokens and error.

    sampling: by default the checkpoint's own.
    settings: as in `LLM.load`.
    """

    def __init__(
        self,
        model: str | Path = SHIPPED_MODEL,
        *,
        sampling: SamplingParams | None = None,
        **settings: Any,
    ) -> None:
        if sampling is not None and sampling.n > 1:
            raise ValueError(f"a row has one continuation, n is {sampling.n}: repeat the rows")
        self.llm = LLM.load(model, verbose=False, **settings)
        self._sampling = sampling

    def __call__(self, batch: pa.Table) -> pa.Table:
        return _with_columns(
            batch,
            lambda rows: run_rows(self.llm.engine, rows, self._job, generation_fields),
            _GENERATED,
        )

    def _job(self, row: dict[str, Any]) -> Job[Generation]:
        prompt, messages = row.get("prompt"), row.get("messages")
        if isinstance(messages, list) and prompt is None:
            return self.llm.chat_job(messages, self._sampling)
        if isinstance(prompt, str) and messages is None:
            return self.llm.generate_job(prompt, self._sampling)
        raise ValueError(
            'expected "prompt", a text, or "messages", a list, got '
            + (", ".join(f"{name}: {type(row[name]).__name__}" for name in row) or "no field")
        )


def _with_columns(
    batch: pa.Table,
    run: Callable[[list[dict[str, Any]]], Iterable[tuple[dict[str, Any], int]]],
    columns: Mapping[str, pa.DataType],
) -> pa.Table:
    """Return `batch` with the results of `run` as columns of these types.

    A null in a row counts as a missing field.
    """
    if not isinstance(batch, pa.Table):
        raise TypeError(
            'expected a pyarrow.Table: pass batch_format="pyarrow" to map_batches, '
            f"got {type(batch).__name__}"
        )
    table = batch.drop_columns([name for name in batch.column_names if name in columns])
    rows = [row for row, _ in run([_present(row) for row in table.to_pylist()])]
    for name, dtype in columns.items():
        table = table.append_column(name, pa.array([row.get(name) for row in rows], dtype))
    return table


def _present(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value
