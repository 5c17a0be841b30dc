"""Times decode steps of 8B with ten launches a layer, and with the fewer that its kernels can take.

    python benchmarks/launches.py --json h200_launches.json    on a Hopper GPU
    python benchmarks/launches.py --tiny                       the same calls with the shipped model

`in_one`: rotary embedding, the cache's write and attention are one launch (`rope_and_attention`).
`in_cluster`: a cluster of thread blocks adds the parts of split keys, instead of a second launch.
The fastest goes into the table of `pallas_kernels.tuned`, for each number of sequences. A step is
that of `llama-jax bench`, each time in a new process.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import device, tuned
from pallas_kernels.dev.shapes import heads
from pallas_kernels.paged_attention import hopper_decode_config as decode
from pallas_kernels.paged_attention.cases import KV_DTYPES
from pallas_kernels.paged_attention.hopper_loop import PAGE_SIZE
from pallas_kernels.rope_and_attention import hopper

BATCHES, PROMPT, NEW_TOKENS = (1, 64), 1024, 129
WORKLOAD = ("--preset", "llama-3.1-8b", "--kv-dtype", "fp8", "--prompt-len", str(PROMPT))
TINY = ("--prompt-len", "16")
CLUSTER = 8
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


@dataclass(frozen=True)
class Way:
    """The launches of a layer's attention."""

    in_one: bool
    in_cluster: bool


def take(way: Way, batch: int) -> None:
    """Write a way into the table of the GPU in use, for this workload with so many sequences."""
    (shape,) = (each for each in heads() if (each.model, each.tensor_parallel) == ("8B", 1))
    q: Any = jax.ShapeDtypeStruct((batch, 1, shape.num_heads, shape.head_dim), jnp.bfloat16)
    pool: Any = jax.ShapeDtypeStruct(
        (1, PAGE_SIZE, shape.num_kv_heads, shape.head_dim), KV_DTYPES["fp8"]
    )
    capacity = PROMPT + NEW_TOKENS
    config = decode.heuristic(q, pool, capacity, False)
    if way.in_cluster:
        config = replace(config, splits=CLUSTER, in_cluster=True)
    kind, problem = device.kind(), decode.tuned_as(q, pool, capacity)
    assert kind is not None
    tuned.write(kind, decode.NAME, problem, {"config": asdict(config)})
    tuned.write(kind, hopper.NAME, problem, {"config": asdict(hopper.Config(way.in_one))})


def step_seconds(batch: int, workload: tuple[str, ...], new_tokens: int) -> float:
    """Return the seconds of a decode step, as `llama-jax bench` measures them."""
    sizes = "--batch", str(batch), "--new-tokens", str(new_tokens)
    command = [sys.executable, "-m", "llama_jax.cli", "bench", *workload, *sizes, "--json"]
    environment = {name: value for name, value in os.environ.items() if name != PREALLOCATE}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    (measured,) = json.loads(done.stdout)["measurements"]
    return float(measured["decode_step_seconds"])


def main() -> None:
    options = argparse.ArgumentParser(description="Time decode steps with more and fewer launches.")
    options.add_argument("--tiny", action="store_true", help="the shipped model, on any machine")
    options.add_argument("--json", type=Path, help="also write the times to this file")
    chosen = options.parse_args()
    os.environ[PREALLOCATE] = "false"  # the GPU's memory is for the measured process
    if not chosen.tiny and (reason := device.not_hopper()):
        options.error(f"needs a Hopper GPU: {reason}. --tiny runs on any machine.")
    found = []
    for batch in BATCHES[:1] if chosen.tiny else BATCHES:
        seconds: dict[Way, float] = {}
        for way in (Way(*each) for each in product((False, True), repeat=2)):
            # With many sequences, keys are hardly split.
            if chosen.tiny or not (way.in_cluster and batch > 1):
                if not chosen.tiny:
                    take(way, batch)
                workload = (TINY, 4) if chosen.tiny else (WORKLOAD, NEW_TOKENS)
                seconds[way] = step_seconds(batch, *workload)
                print(f"{batch} sequences, {way}: {seconds[way] * 1e3:.3f} ms a step", flush=True)
                found.append({"batch": batch, **asdict(way), "step_seconds": seconds[way]})
        if not chosen.tiny:
            take(min(seconds, key=seconds.__getitem__), batch)
    if chosen.json:
        document = {"device": device.kind(), "prompt": PROMPT, "results": found}
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
