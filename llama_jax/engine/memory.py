"""Plans memory: computes the bytes that a model needs on each device before any is allocated."""

import bisect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from llama_jax.engine.scheduling import MAX_FORCED, MAX_TOKENS_PER_CALL, EngineOptions
from llama_jax.engine.speculation import NO_SPECULATION, Speculation
from llama_jax.model.config import PAGE_SIZE
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.params import abstract_params, param_shardings
from llama_jax.model.sharding import cache_shardings
from llama_jax.model.spec import ModelSpec
from pallas_kernels.fp8_matmul.logits import tokens_at_once
from pallas_kernels.fp8_matmul.xla import block_rows

# Bytes of workspace, fitted to XLA's memory analysis of the compiled steps (tests/test_memory.py
# compares them). _MLP: per token and intermediate feature, the arrays that are live at once, in
# float32 if weights are upcast block by block, else in bfloat16. _HEAD: per head and token, the
# queries and the scores of a block of keys. _SAMPLER: per slot and token of the vocabulary, the
# settings and the logits. _DRAFT: per draft token and token of the vocabulary, the logits. _SCORE:
# per scored token and token of the vocabulary, the logits, and with their tokens in order.
_MLP_WIDE, _MLP_NARROW = 36, 12
_HEAD_BYTES = 4 * 1024
_SAMPLER_BYTES = 40
_DRAFT_BYTES = 6
_SCORE_BYTES = 12


class DoesNotFitError(MemoryError):
    """Raised if a model and its cache need more memory than the device has."""


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes needed on the fullest device, including those of a draft model.

    weights, kv_cache: exact.
    workspace: an estimate of the temporaries of prefill or decode (the larger), logits and sampling
        state.
    limit: the device's memory.
    """

    weights: int
    kv_cache: int
    workspace: int
    limit: int
    max_batch_size: int
    max_seq_len: int
    prefill_chunk: int
    devices: int = 1
    num_pages: int | None = None

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.workspace

    def check(self) -> None:
        """Raise `DoesNotFitError` if total > limit. It names the sizes and settings to lower."""
        if self.total <= self.limit:
            return
        each = " on each device" if self.devices > 1 else ""
        advice = []
        if self.kv_cache > 0.1 * self.total:
            least = -(-self.max_seq_len // PAGE_SIZE)  # which hold a single sequence
            lower = (
                f"num_pages ({self.num_pages})"
                if self.num_pages is not None and self.num_pages > least
                else f"max_batch_size ({self.max_batch_size}) or max_seq_len ({self.max_seq_len})"
            )
            advice.append(f"lower {lower}, or use an FP8 cache")
        if self.workspace > 0.1 * self.total:
            advice.append(
                f"lower prefill_chunk ({self.prefill_chunk}) or max_batch_size "
                f"({self.max_batch_size})"
            )
        if self.weights > 0.5 * self.limit:
            advice.append("use FP8 weights (quantize), a smaller model, or shard over more devices")
        raise DoesNotFitError(
            f"{decimal(self.total)} needed{each}, {decimal(self.limit)} available: weights "
            f"{decimal(self.weights)}, KV cache {decimal(self.kv_cache)}, workspace "
            f"{decimal(self.workspace)}. To make it fit: {'; '.join(advice)}."
        )

    def __rich__(self) -> Table:
        title = "Memory" + (f" on each of {self.devices} devices" if self.devices > 1 else "")
        table = Table(title=title)
        table.add_column("what")
        table.add_column("size", justify="right")
        table.add_column("of the device", justify="right")
        parts = {
            "weights": self.weights,
            f"KV cache, {self._cache_size}": self.kv_cache,
            "workspace (estimate)": self.workspace,
            "total": self.total,
            "device": self.limit,
        }
        for name, size in parts.items():
            table.add_row(name, decimal(size), f"{size / self.limit:.0%}")
        return table

    @property
    def _cache_size(self) -> str:
        if self.num_pages is None:
            return f"{self.max_batch_size} x {self.max_seq_len} tokens"
        return f"{self.num_pages:,} pages of {PAGE_SIZE} tokens"

    def print(self) -> None:
        """Print the plan as a table on stderr."""
        Console(stderr=True).print(self)


@dataclass(frozen=True)
class Capacity:
    """The sequences that fit in memory with one kind of cache; 0 if none do.

    longest_alone: tokens of context for a single sequence.
    longest: tokens of context for the given number of sequences.
    most: sequences of the given length.
    """

    longest_alone: int
    longest: int
    most: int


def plan_memory(
    spec: ModelSpec,
    max_batch_size: int,
    max_seq_len: int,
    kv_dtype: jnp.dtype,
    prefill_chunk: int,
    limit: int | None = None,
    num_pages: int | None = None,
    speculation: Speculation = NO_SPECULATION,
) -> MemoryPlan:
    """Plan the memory of a model with a cache of max_batch_size slots of max_seq_len tokens.

    kv_dtype: of the cache, as in `kv_cache.init_cache`.
    prefill_chunk: tokens that go through the model in one prefill call, of all prompts together.
    limit: bytes on each device; by default what the devices report.
    num_pages: the size of the cache, if it is not max_batch_size full slots.
    speculation: its draft model has a cache of the same pages, and draft tokens have logits, as
        have tokens that a grammar forces.
    """
    mesh = spec.mesh
    if limit is None:
        limit = device_memory_bytes(mesh.devices.flat[0] if mesh else None)

    def kv_cache(spec: ModelSpec) -> int:
        dtype = jnp.dtype(kv_dtype)
        cache = jax.eval_shape(
            lambda: init_cache(spec.config, max_batch_size, max_seq_len, dtype, num_pages=num_pages)
        )
        return _bytes_per_device(cache, cache_shardings(spec.config, mesh))

    specs = [spec, speculation.draft] if speculation.draft else [spec]
    num_drafts = max_batch_size * (speculation.num_speculative_tokens or MAX_FORCED)
    return MemoryPlan(
        weights=sum(map(_weights, specs)),
        kv_cache=sum(map(kv_cache, specs)),
        workspace=_workspace(spec, max_batch_size, min(prefill_chunk, max_seq_len), num_drafts),
        limit=limit,
        max_batch_size=max_batch_size,
        max_seq_len=max_seq_len,
        prefill_chunk=prefill_chunk,
        devices=mesh.size if mesh else 1,
        num_pages=num_pages,
    )


@lru_cache(maxsize=8)  # plans of one model are made for many cache sizes
def _weights(spec: ModelSpec) -> int:
    """Return the bytes of the parameters on each device."""
    return _bytes_per_device(abstract_params(spec), param_shardings(spec))


def fitting_pages(plan: Callable[[int], MemoryPlan], least: int, most: int) -> int:
    """Return the number of pages for a cache: `most` if they fit, else as many as fit in 95 % of
    the limit, but at least `least`.

    plan: returns the plan for a number of pages.
    """
    first = plan(least)
    if plan(most).total <= first.limit:
        return most
    more = _most(lambda n: plan(least + n).total, int(0.95 * first.limit), most - least)
    return least + max(0, more)


def fitted(
    spec: ModelSpec, options: EngineOptions, kv_dtype: jnp.dtype, speculation: Speculation
) -> tuple[EngineOptions, MemoryPlan]:
    """Return the options with a number of pages that fits, if they have none, and the plan."""
    limit = device_memory_bytes(spec.mesh.devices.flat[0] if spec.mesh else None)

    def plan(num_pages: int) -> MemoryPlan:
        return plan_memory(
            spec, options.max_batch_size, options.max_seq_len, kv_dtype, options.prefill_chunk,
            limit, num_pages, speculation,
        )  # fmt: skip

    if options.num_pages is None:
        num_pages = fitting_pages(plan, options.pages_per_slot, options.pool_size)
        options = replace(options, num_pages=num_pages)
    return options, plan(options.pool_size)


def capacity(
    spec: ModelSpec,
    max_batch_size: int,
    max_seq_len: int,
    kv_dtype: jnp.dtype,
    prefill_chunk: int,
    limit: int,
) -> Capacity:
    """Compute what fits into `limit` bytes on one device. Arguments are those of `plan_memory`.

    Contexts are whole pages, between `prefill_chunk` tokens and the model's context.
    """
    context = spec.config.max_position_embeddings
    shortest = min(-(-prefill_chunk // PAGE_SIZE) * PAGE_SIZE, context)

    def total(rows: int, tokens: int) -> int:
        return plan_memory(spec, rows, tokens, kv_dtype, prefill_chunk, limit=limit).total

    def longest(rows: int) -> int:
        pages = _most(lambda n: total(rows, shortest + n * PAGE_SIZE), limit, context // PAGE_SIZE)
        return 0 if pages < 0 else min(shortest + pages * PAGE_SIZE, context)

    most = _most(lambda n: total(1 + n, max_seq_len), limit, 1 << 20) + 1
    return Capacity(longest(1), longest(max_batch_size), most)


def _most(size: Callable[[int], int], limit: int, most: int) -> int:
    """Return the largest n in [0, most] with size(n) <= limit, or -1. `size` must be monotonic."""
    return bisect.bisect_right(range(most + 1), limit, key=size) - 1


def device_memory_bytes(device: jax.Device | None = None) -> int:
    """Return the bytes that this process may use on a device, by default JAX's default device.

    An accelerator reports the limit of its allocator. CPU devices share the memory that the machine
    or the container has available now.
    """
    device = device or jax.devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return _available_ram() // len(jax.local_devices(backend=device.platform))


def _available_ram() -> int:
    """Return the bytes available on the machine, or in this process's container if less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        available = int(kibibytes) * 1024
    except (OSError, StopIteration):  # not Linux: all memory, for want of a better figure
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([available, *_room_in_cgroups()])


def _room_in_cgroups(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Yield the bytes left in each control group (version 1 or 2) of this process.

    A group's limit also holds for the groups inside it, so parents count too. Cached files that are
    not in use can be reclaimed.

    Source: admin-guide/cgroup-v2 and cgroup-v1/memory in the Linux kernel's documentation.
    """
    room = []
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(top):
                free = _room_in_cgroup(directory, *names)
                room += [] if free is None else [free]
    return room


def _room_in_cgroup(directory: Path, limit: str, usage: str, cached: str) -> int | None:
    """Return the bytes left in one group, or None without a limit. The strings are names of its
    files and figures."""
    try:
        most, used = (directory / limit).read_text().strip(), (directory / usage).read_text()
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except OSError:  # the root has no limit, and a container cannot see its parents
        return None
    if most == "max":
        return None
    return max(0, int(most) - int(used) + int(stat.get(cached, 0)))


def _bytes_per_device(arrays: object, shardings: object) -> int:
    def size(array: jax.ShapeDtypeStruct, sharding: Sharding) -> int:
        return math.prod(sharding.shard_shape(array.shape)) * int(array.dtype.itemsize)

    sizes: list[int] = jax.tree.leaves(jax.tree.map(size, arrays, shardings))
    return sum(sizes)


def _workspace(spec: ModelSpec, batch_size: int, chunk: int, num_drafts: int) -> int:
    config = spec.config
    is_fp8 = any(stored.scale for stored in spec.formats.values())
    wide = is_fp8 or spec.dtype == "float32"
    per_token = max(
        (_MLP_WIDE if wide else _MLP_NARROW) * config.intermediate_size,
        _HEAD_BYTES * config.num_heads,
    )
    upcast_block = 6 * max(
        block_rows(columns) * columns for columns in (config.intermediate_size, config.hidden_size)
    )
    logits = config.vocab_size * (
        _SAMPLER_BYTES * batch_size + _DRAFT_BYTES * num_drafts + _SCORE_BYTES * tokens_at_once()
    )
    tokens = min(batch_size * chunk, max(chunk, MAX_TOKENS_PER_CALL))
    tokens //= spec.mesh.shape["model"] if spec.mesh else 1
    return per_token * tokens + upcast_block + logits
