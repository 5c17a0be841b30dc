"""Times XLA's passes between the kernels, and compares them with the bytes that they have to move.

    python benchmarks/elementwise.py --json FILE       on a GPU
    python benchmarks/elementwise.py --tiny            any machine, shapes too small to matter

The passes are RMSNorm with quantisation of its result, and rotary embedding with the write into the
cache. If XLA is far from the floor there, kernels of our own would pay off.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from llama_jax.model.config import PRESETS
from llama_jax.model.fp8 import quantize_per_token
from llama_jax.model.kv_cache import PAGE_SIZE
from llama_jax.model.rope import rope_frequencies
from pallas_kernels import e4m3
from pallas_kernels.dev.bench import L2_BYTES, MAX_INPUTS, copy_bandwidth, measure
from pallas_kernels.rope_and_cache.xla import apply_rope, write_pages

CONFIG = PRESETS["llama-3.1-8b"]
TOKENS = (1, 16, 64, 2048, 8192)


@dataclass(frozen=True)
class Pass:
    """A pass. arguments: makes random arguments from a key. bytes: read and written."""

    name: str
    run: Callable[..., Any]
    arguments: Callable[[Array], tuple[Array, ...]]
    bytes: int


def norm_and_quantize(tokens: int) -> Pass:
    """Return a pass that normalises bfloat16 and quantises to codes with a scale per token."""
    hidden = CONFIG.hidden_size

    def run(x: Array, weight: Array) -> tuple[Array, Array]:
        wide = x.astype(jnp.float32)
        size = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * lax.rsqrt(size + CONFIG.rms_norm_eps)
        return quantize_per_token(normed.astype(x.dtype) * weight)

    def arguments(key: Array) -> tuple[Array, ...]:
        return jax.random.normal(key, (tokens, hidden), jnp.bfloat16), jnp.ones(hidden, "bfloat16")

    return Pass(f"RMSNorm and quantisation, {tokens} tokens", run, arguments, 3 * tokens * hidden)


def rotary_and_write(tokens: int, dtype: Any) -> Pass:
    """Return a pass that rotates bfloat16 q and k, and writes k and v into the cache."""
    heads, kv_heads, head_dim = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim
    frequencies = rope_frequencies(CONFIG)
    pages = -(-tokens // PAGE_SIZE)

    def run(q: Array, k: Array, v: Array, k_pages: Array, v_pages: Array) -> Any:
        cached_lens, kv_lens = jnp.zeros(1, jnp.int32), jnp.full(1, tokens, jnp.int32)
        where = jnp.arange(pages)[None], cached_lens, kv_lens, jnp.float32(1)
        positions = jnp.arange(tokens)[None]
        q, k = (apply_rope(each, positions, frequencies) for each in (q, k))
        return q, write_pages(k_pages, k, *where), write_pages(v_pages, v, *where)

    def arguments(key: Array) -> tuple[Array, ...]:
        def new(count: int) -> Array:
            return jax.random.normal(key, (1, tokens, count, head_dim), jnp.bfloat16)

        pool = jnp.zeros((pages, PAGE_SIZE, kv_heads, head_dim), dtype)
        return new(heads), new(kv_heads), new(kv_heads), pool, pool

    moved = tokens * head_dim * (4 * heads + 2 * kv_heads * (2 + jnp.dtype(dtype).itemsize))
    name = f"rotary and write to a {jnp.dtype(dtype)} cache, {tokens} tokens"
    return Pass(name, run, arguments, moved)


def passes(counts: tuple[int, ...]) -> Iterator[Pass]:
    for tokens in counts:
        yield norm_and_quantize(tokens)
        yield rotary_and_write(tokens, jnp.bfloat16)
        yield rotary_and_write(tokens, e4m3.DTYPE)


def main() -> None:
    options = argparse.ArgumentParser(description="Time the passes between the kernels.")
    options.add_argument("--json", type=Path, help="also write the results to this file")
    options.add_argument("--tiny", action="store_true", help="small, and only two runs")
    chosen = options.parse_args()
    bandwidth = copy_bandwidth(2**20 if chosen.tiny else 2**30)
    results = []
    print(f"{'':<56}{'us':>9}{'GB/s':>8}{'floor':>8}")
    for each in passes((1, 65) if chosen.tiny else TOKENS):
        count = 2 if chosen.tiny else min(MAX_INPUTS, 8 + 4 * L2_BYTES // each.bytes)
        inputs = [each.arguments(key) for key in jax.random.split(jax.random.key(0), count)]
        (seconds,) = measure({"xla": each.run}, inputs).values()
        floor = each.bytes / bandwidth
        results.append({"name": each.name, "seconds": seconds, "floor_seconds": floor})
        row = f"{seconds * 1e6:>9.1f}{each.bytes / seconds / 1e9:>8.0f}{floor / seconds:>8.0%}"
        print(f"{each.name:<56}{row}", flush=True)
    if chosen.json:
        device = jax.devices()[0].device_kind
        document = {"device": device, "jax": jax.__version__, "results": results}
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
