"""Times FP8 matmuls on a CPU: python benchmarks/cpu_fp8_matmul.py [--json] [--instructions avx2]

The product is (m, 2048) x (8192, 2048), gate_proj of Llama 3.2 1B, by XLA and by the kernel of
`pallas_kernels.cpu`, with bfloat16 and float32 activations, in turns; the fastest run counts. Each
run goes through several weights, which together exceed the caches. The time of reading the same
memory alone, the floor for few rows, is printed beside them. Results are first checked against
float64. The last columns are for scoring: what is known of logits, if all weights are one output
matrix, by the kernel or with the logits of some tokens at a time.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from llama_jax.bench import environment
from llama_jax.checkpoint.huge_pages import Room
from pallas_kernels import e4m3
from pallas_kernels.cpu import library
from pallas_kernels.fp8_matmul import cpu, fp8_matmul
from pallas_kernels.fp8_matmul.logits import LogitStats, in_blocks, stats_of

OUT, IN, WEIGHTS = 8192, 2048, 12


def by_kernel(
    x: jax.Array, weight: jax.Array, scale: jax.Array, instructions: library.Instructions | None
) -> jax.Array:
    return cpu.fp8_matmuls(x, (weight,), (scale,), instructions=instructions)[0]


def stats_in_blocks(
    x: jax.Array, weight: jax.Array, scale: jax.Array, targets: jax.Array
) -> LogitStats:
    """Compute `logit_stats` as it is without the kernel, but for the products."""
    return in_blocks(lambda x, targets: stats_of(fp8_matmul(x, weight, scale), targets), x, targets)


def weights(seed: int) -> np.ndarray:
    """Make int8 bits [WEIGHTS, OUT, IN] of normally distributed values, whose largest is near the
    largest code's, in huge pages."""
    values = np.random.default_rng(seed).standard_normal((OUT, IN), np.float32) * 100
    codes = values.clip(-448, 448).astype(e4m3.DTYPE).view(np.int8)
    found = Room([WEIGHTS * OUT * IN]).empty((WEIGHTS, OUT, IN), np.dtype(np.int8))
    found[:] = codes
    return found


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def cores() -> int:
    """Return how many this process may use; on macOS all."""
    may_use = getattr(os, "sched_getaffinity", None)
    return len(may_use(0)) if may_use else os.cpu_count() or 1


def read(memory: np.ndarray, threads: int) -> Callable[[], Any]:
    """Return a function that reads all of the memory once."""
    parts = np.array_split(memory.reshape(-1).view(np.int64), 8 * threads)
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.bitwise_or.reduce, parts))


def measure(rows: int, repeats: int, instructions: library.Instructions | None) -> dict[str, float]:
    """Return the milliseconds for one weight, by name of the implementation."""
    memory, rng = weights(0), np.random.default_rng(1)
    stored = [jax.device_put(each, may_alias=True) for each in memory]
    scale = jnp.asarray(rng.uniform(0.5, 2, OUT).astype(np.float32))
    x = rng.standard_normal((rows, IN), np.float32)
    dequantized = memory[0].view(e4m3.DTYPE).astype(np.float64) * np.asarray(scale)[:, None]
    runs: dict[str, Callable[[], Any]] = {"read": read(memory, cores())}
    for dtype in ("bfloat16", "float32"):
        a = jnp.asarray(x, dtype)
        expected = np.asarray(a, np.float64) @ dequantized.T
        for name, function in (
            ("XLA", partial(fp8_matmul, implementation="xla")),
            ("kernel", partial(by_kernel, instructions=instructions)),
        ):
            call = jax.jit(function)
            error = np.abs(call(a, stored[0], scale) - expected).max() / np.abs(expected).max()
            assert error < 1e-5, (name, dtype, error)

            def run(call: Any = call, a: jax.Array = a) -> None:
                jax.block_until_ready([call(a, weight, scale) for weight in stored])

            runs[f"{name}, {dtype}"] = run
    whole = jax.device_put(memory.reshape(-1, IN), may_alias=True), jnp.tile(scale, WEIGHTS)
    targets, found = jnp.arange(rows, dtype=jnp.int32), []
    by_stats = partial(cpu.logit_stats, logits_dtype=jnp.float32, instructions=instructions)
    for name, function in (("stats, in blocks", stats_in_blocks), ("stats, kernel", by_stats)):
        runs[name] = partial(
            lambda call, a: jax.block_until_ready(call(a, *whole, targets)),
            jax.jit(function),
            jnp.asarray(x, jnp.bfloat16),
        )
        found.append(runs[name]())
    for in_pieces, at_once in zip(*found, strict=True):
        # Errors are those of sums, which may be far larger than what is left of them.
        np.testing.assert_allclose(in_pieces, at_once, atol=1e-5 * np.abs(at_once).max(), rtol=0)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run))
    return {name: 1e3 * value / WEIGHTS for name, value in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--instructions", help="of the kernel; by default the best of this CPU")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512])
    options = parser.parse_args()
    best = library.best()  # loads the library, too
    used = options.instructions or best
    results = {rows: measure(rows, options.repeats, used) for rows in options.rows}
    about = {"shape": [OUT, IN], "instructions": used, "device": environment().device}
    if options.json:
        print(json.dumps(about | {"milliseconds": results}))
        return
    title = f"({OUT}, {IN}) weight, ms; kernel with {used}; {about['device']}"
    table = Table("rows", *next(iter(results.values())), title=title)
    for rows, row in results.items():
        table.add_row(str(rows), *(f"{value:.2f}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
