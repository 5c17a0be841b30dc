"""FP8 matmul formulations on a CPU: python benchmarks/cpu_fp8_matmul.py [--json]

Times (m, 4096) x (14336, 4096) with the weight widened as a whole, as XLA does it by itself, and by
blocks of rows as `pallas_kernels.fp8_matmul` does. Medians of interleaved runs; random data; each
result is checked against the float32 reference first.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console
from rich.table import Table

from pallas_kernels import e4m3
from pallas_kernels.fp8_matmul import fp8_matmul

OUT, IN = 14336, 4096


def widened(x, weight, scale):
    w = weight.astype(jnp.float32)
    y = lax.dot_general(x.astype(jnp.float32), w, (((1,), (1,)), ((), ())))
    return y * scale


def measure(rows: int, repeats: int) -> dict[str, float]:
    """Milliseconds per formulation for `rows` activation rows."""
    rng = np.random.default_rng(0)
    codes = e4m3.cast(jnp.asarray(rng.standard_normal((OUT, IN), np.float32) * 50))
    scale = jnp.asarray(rng.uniform(0.5, 2, OUT).astype(np.float32))
    x = jnp.asarray(rng.standard_normal((rows, IN), np.float32))
    bits = e4m3.as_bits(codes)
    by_blocks = jax.jit(fp8_matmul)
    calls = {
        "widened": (jax.jit(widened), (x, codes, scale)),
        "row blocks, float32": (by_blocks, (x, bits, scale)),
        "row blocks, bfloat16": (by_blocks, (x.astype(jnp.bfloat16), bits, scale)),
    }
    expected = fp8_matmul(x, bits, scale, implementation="reference")
    for name, (call, arguments) in calls.items():
        error = float(jnp.abs(call(*arguments) - expected).max() / jnp.abs(expected).max())
        assert error < (1e-2 if "bfloat16" in name else 1e-5), (name, error)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, (call, arguments) in calls.items():
            began = time.perf_counter()
            call(*arguments).block_until_ready()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    results = {rows: measure(rows, options.repeats) for rows in (1, 8, 64, 256)}
    if options.json:
        print(json.dumps({"shape": [OUT, IN], "milliseconds": results}))
        return
    table = Table("rows", *next(iter(results.values())), title=f"({OUT}, {IN}) weight, ms")
    for rows, row in results.items():
        table.add_row(str(rows), *(f"{value:.1f}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
