"""Implements `llama-jax score --ray`: actors of a Ray cluster score a file's lines, in order."""

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llama_jax.jsonl import json_line, parse_jsonl

# The largest piece for an actor: as many lines as are sorted together, a few seconds of work.
_MOST_LINES, _MOST_BYTES = 1024, 1 << 20
_PIECES_PER_ACTOR = 4


class LineScorer:
    """An actor that reads pieces of a JSONL file and scores them with a model of its own."""

    def __init__(
        self, input: str, model: str | None, asked: Mapping[str, Any], loading: Mapping[str, Any]
    ) -> None:
        from llama_jax.abacus import SHIPPED_MODEL
        from llama_jax.llm import LLM

        self._input, self._asked = input, asked
        self._llm = LLM.load(SHIPPED_MODEL if model is None else model, verbose=False, **loading)

    def __call__(self, piece: dict[str, Any]) -> dict[str, list[Any]]:
        """Score a piece of the file.

        piece: `begin` and `end` in bytes, and the `number` of its first line.
        Returns for each line its number, its JSON, and the number of tokens that were read for it.
        """
        from llama_jax.data_rows import score_rows

        ((begin,), (end,), (number,)) = piece["begin"], piece["end"], piece["number"]
        with open(self._input, "rb") as file:
            file.seek(begin)
            numbers, rows = zip(*parse_jsonl(file.read(end - begin), int(number)), strict=True)
        scored = list(score_rows(self._llm, rows, **self._asked))
        return {
            "number": list(numbers),
            "line": [json_line(row) for row, _ in scored],
            "num_tokens": [num_tokens for _, num_tokens in scored],
        }


def score_lines(
    address: str,
    actors: int | None,
    input: str,
    num_lines: int,
    model: str | None,
    asked: Mapping[str, Any],
    loading: Mapping[str, Any],
    done: int,
) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yield the lines after the first `done` in order: number, scored row and tokens read.

    A piece whose actor dies is scored again.

    asked: arguments of `score_rows`. loading: arguments of `LLM.load`.
    """
    if model is not None and os.path.exists(model):
        model = os.path.abspath(model)
    with _cluster(address) as ray:
        num_gpus, num_cpus = (int(ray.cluster_resources().get(name, 0)) for name in ("GPU", "CPU"))
        actors = actors or num_gpus or len(ray.nodes())
        if actors > (num_gpus or num_cpus):
            have = f"{num_gpus} GPUs" if num_gpus else f"{num_cpus} CPUs"
            raise ValueError(f"--actors {actors}: each needs one, and the cluster has {have}")
        share = {"num_gpus": 1} if num_gpus else {"num_cpus": num_cpus // actors}
        most_lines = min(_MOST_LINES, -(-(num_lines - done) // (actors * _PIECES_PER_ACTOR)))
        cut = list(pieces(input, done, most_lines))
        if not cut:
            return
        scored = ray.data.from_items(cut, override_num_blocks=len(cut)).map_batches(
            LineScorer,
            fn_constructor_args=(os.path.abspath(input), model, asked, loading),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            **share,
        )
        for batch in scored.iter_batches(batch_size=None):
            for number, line, num_tokens in zip(*batch.values(), strict=True):
                yield int(number), json.loads(line), int(num_tokens)


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Connect to a cluster and yield the module `ray`. Its errors become RuntimeError."""
    # By default Ray reports usage statistics, and warns of what Ray Data itself does.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f'--ray needs Ray ({error}): pip install "llama-jax[ray]"') from error
    _check_reachable(address)
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    try:
        yield ray
    except ray.exceptions.RayError as error:
        *_, cause = str(error).strip().splitlines()  # the other lines are a traceback
        raise RuntimeError(f"an actor failed: {cause}") from error
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise ConnectionError for a HOST:PORT without a server; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(
                f"--ray {address}: no cluster responds there ({error}). Start one with "
                f"`ray start --head --port {port}`, or give local."
            ) from error


def pieces(input: str, done: int, most_lines: int) -> Iterator[dict[str, int]]:
    """Yield pieces of a file after its first `done` lines; blank lines do not count."""
    begin = end = number = count = 0
    with open(input, "rb") as file:
        for i, line in enumerate(file, 1):
            start, end = end, end + len(line)
            if line.isspace():
                continue
            if done:
                done -= 1
                continue
            if not count:
                begin, number = start, i
            count += 1
            if count == most_lines or end - begin >= _MOST_BYTES:
                yield {"begin": begin, "end": end, "number": number}
                count = 0
    if count:
        yield {"begin": begin, "end": end, "number": number}
