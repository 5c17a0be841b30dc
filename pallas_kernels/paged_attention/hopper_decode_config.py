"""Chooses how decode attention on Hopper divides its work: splits, blocks of keys, and stages."""

from dataclasses import dataclass, replace

from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels import e4m3, tuned
from pallas_kernels.device import num_sms
from pallas_kernels.hopper import BOX_ROWS, SHARED_MEMORY_BYTES
from pallas_kernels.paged_attention.hopper_loop import BARRIERS_BYTES, PAGE_SIZE

NAME = "paged_attention_decode"
MAX_ROWS = 48  # of queries in one thread block; 64 would spill registers
FEW_ROWS = 8  # up to this, blocks of two pages leave registers for two blocks per SM
MAX_SPLITS = 32
MAX_CLUSTER = 8  # thread blocks, of any GPU (CUDA C++ programming guide, "Thread block clusters")
WORTHWHILE_FP8_SPLITS = 16  # more cost the second launch as much as they save in the first
INVARIANT_KEYS_PER_SPLIT = 1024
BLOCKS_PER_SM = 2
MAX_STAGES = 6
SHARED_BYTES_EACH = 233_472 // BLOCKS_PER_SM - 1024  # 1 KiB is reserved by the system


@dataclass(frozen=True)
class DecodeConfig:
    """The division of the work.

    splits: thread blocks that divide the keys of a sequence and head.
    keys_per_split: a multiple of `keys`; None to divide the keys of each sequence evenly.
    stages: blocks of keys in flight.
    keys: per block, 64 or 128.
    in_fp8: whether FP8 keys are multiplied by queries in two float8 terms, instead of upcast.
    in_cluster: whether the splits are a cluster of thread blocks, one of which adds their parts,
        instead of a second launch.
    """

    splits: int
    keys_per_split: int | None
    stages: int
    keys: int = PAGE_SIZE
    in_fp8: bool = False
    in_cluster: bool = False


def configure(q: Array, k_pages: Array, capacity: int, is_batch_invariant: bool) -> DecodeConfig:
    """Return the tuned configuration of the GPU in use, or else the heuristic's.

    capacity: keys that a sequence has room for.
    is_batch_invariant: take the heuristic's, because tuned ones may depend on the batch.
    """
    found = None if is_batch_invariant else tuned.find(NAME, tuned_as(q, k_pages, capacity))
    if found:
        return DecodeConfig(**found)
    return heuristic(q, k_pages, capacity, is_batch_invariant)


def tuned_as(q: Array, k_pages: Array, capacity: int) -> str:
    """Name the problems that share a tuned configuration.

    Batch and capacity are rounded up to powers of two.
    """
    batch, tokens, num_heads, head_dim = q.shape
    rows, capacity = (1 << (each - 1).bit_length() for each in (batch, capacity))
    heads = f"{num_heads}/{k_pages.shape[2]}x{head_dim}"
    return f"heads={heads} {k_pages.dtype} tokens={tokens} batch<={rows} capacity<={capacity}"


def heuristic(q: Array, k_pages: Array, capacity: int, is_batch_invariant: bool) -> DecodeConfig:
    """Return an untuned configuration; arguments as in `configure`.

    It has the most stages with which two thread blocks can share an SM, and the fewest splits whose
    estimated time is within 10 % of the least; the estimate takes the time of a wave of thread
    blocks as proportional to the keys of a split. If batch-invariant, the size of the splits does
    not depend on the batch.
    """
    batch, tokens, num_heads, _ = q.shape
    rows = tiling(tokens * num_heads // k_pages.shape[2])[1]
    is_fp8 = k_pages.dtype == e4m3.DTYPE
    keys = 2 * PAGE_SIZE if is_fp8 and rows <= FEW_ROWS else PAGE_SIZE
    shape = DecodeConfig(1, None, 0, keys, is_fp8)
    free = SHARED_BYTES_EACH - _fixed_bytes(shape, k_pages, rows)
    stages = min(MAX_STAGES, free // _stage_bytes(shape, k_pages))
    if is_batch_invariant:
        share = max(INVARIANT_KEYS_PER_SPLIT, pl.cdiv(pl.cdiv(capacity, MAX_SPLITS), keys) * keys)
        return replace(
            shape, splits=pl.cdiv(capacity, share), keys_per_split=share, stages=stages
        )  # fmt: skip
    most = min(WORTHWHILE_FP8_SPLITS if is_fp8 else MAX_SPLITS, pl.cdiv(capacity, keys))
    at_once = BLOCKS_PER_SM * num_sms()
    streams = batch * k_pages.shape[2]
    times = [pl.cdiv(streams * n, at_once) / n for n in range(1, most + 1)]
    splits = next(n for n, time in enumerate(times, 1) if time <= 1.1 * min(times))
    return replace(shape, splits=splits, stages=stages)


def unfit(config: DecodeConfig, k_pages: Array, capacity: int) -> str | None:
    """Return why a configuration cannot work; None if it can."""
    keys, share = config.keys, config.keys_per_split
    if keys not in (PAGE_SIZE, 2 * PAGE_SIZE):
        return f"keys must be {PAGE_SIZE} or {2 * PAGE_SIZE}, got {keys}"
    if config.in_fp8 and k_pages.dtype != e4m3.DTYPE:
        return f"keys in {k_pages.dtype} cannot be multiplied in FP8"
    if not 1 <= config.splits <= MAX_SPLITS:
        return f"splits must be 1 to {MAX_SPLITS}, got {config.splits}"
    if config.in_cluster and not 1 < config.splits <= MAX_CLUSTER:
        return f"a cluster must have 2 to {MAX_CLUSTER} splits, got {config.splits}"
    if share is not None and (share < 1 or share % keys):
        return f"keys_per_split must be a multiple of {keys}, got {share}"
    if share is not None and config.splits * share < capacity:
        return f"{config.splits} splits of {share} keys do not hold {capacity}"
    if config.stages < 2:
        return f"at least 2 stages are needed, got {config.stages}"
    fixed = _fixed_bytes(config, k_pages, MAX_ROWS)
    if (needed := config.stages * _stage_bytes(config, k_pages) + fixed) > SHARED_MEMORY_BYTES:
        return f"{needed} bytes of shared memory, of {SHARED_MEMORY_BYTES}"
    return None


def _stage_bytes(config: DecodeConfig, k_pages: Array) -> int:
    """Return the shared memory of a stage's keys and values."""
    return 2 * config.keys * k_pages.shape[3] * k_pages.dtype.itemsize


def _fixed_bytes(config: DecodeConfig, k_pages: Array, rows: int) -> int:
    """Return the shared memory that does not grow with the stages.

    It holds upcast blocks, `rows` of queries, weights and results, and barriers.
    """
    head_dim, upcast_blocks = k_pages.shape[3], 0
    if k_pages.dtype == e4m3.DTYPE:
        upcast_blocks = 1 if config.in_fp8 else 2
    queries = rows * head_dim * (2 + 2 * config.in_fp8)
    blocks = upcast_blocks * config.keys * head_dim * 2
    return blocks + queries + rows * config.keys * 2 + BARRIERS_BYTES


def tiling(rows: int) -> tuple[int, int]:
    """Return the number of tiles for these rows of queries, and the rows of each."""
    tiles = pl.cdiv(rows, MAX_ROWS)
    return tiles, pl.cdiv(pl.cdiv(rows, tiles), BOX_ROWS) * BOX_ROWS
