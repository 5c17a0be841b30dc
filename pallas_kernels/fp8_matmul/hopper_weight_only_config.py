"""Configures the weight-only FP8 matmul on Hopper: splits of K, stages, clusters."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from jax.experimental import pallas as pl

from pallas_kernels import tuned
from pallas_kernels.device import num_sms
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.fp8_matmul.terms import MIN_ROWS_TO_SHARE, padded_rows
from pallas_kernels.hopper import BOX_ROWS, SHARED_MEMORY_BYTES

NAME = "fp8_matmul_weight_only"
COMPUTE_WARPGROUPS = 2
WARPGROUP_ROWS = 64
# The tile of a weight per thread block and step: a block of scales.
TILE_N = TILE_K = BLOCK
TYPICAL_ROWS = 16
MAX_STAGES = 12
BARRIERS_BYTES = 2048


@dataclass(frozen=True)
class WeightOnlyConfig:
    """The division of the work.

    splits: thread blocks that divide K among them.
    stages: tiles of the weight, 128x128, in flight.
    cluster: 1, or 2 for pairs of blocks that share the loads of x.
    in_fp8: whether bfloat16 x is converted to two float8 terms, instead of the weight to bfloat16.
    """

    splits: int
    stages: int
    cluster: int = 1
    in_fp8: bool = False


def configure(
    m: int,
    ns: Sequence[int],
    k: int,
    is_batch_invariant: bool = False,
    *,
    in_terms: bool = False,
) -> WeightOnlyConfig:
    """Return a configuration with the tuned splits of the GPU in use, or else the heuristic's.

    ns: rows of each weight.
    is_batch_invariant: whether to use the same splits for any m, so that a row's result does not
        depend on the number of rows.
    in_terms: whether x is given in terms. Otherwise bfloat16 x is converted to terms where that was
        measured to be faster.
    """
    typical = TYPICAL_ROWS if is_batch_invariant else typical_rows(m)
    found = tuned.find(NAME, tuned_as(ns, k, typical, in_terms=in_terms))
    # Older tables have the same names for x in terms and bfloat16 x.
    found = found or tuned.find(NAME, tuned_as(ns, k, typical))
    found = found or {"splits": heuristic_splits(ns, k, typical)}
    cluster = 2 if m >= MIN_ROWS_TO_SHARE else 1
    rows = rows_in_boxes(m, cluster)
    free = SHARED_MEMORY_BYTES - BARRIERS_BYTES - _staged_bytes(rows)
    stages = min(MAX_STAGES, free // _stage_bytes(rows))
    return WeightOnlyConfig(found["splits"], stages, cluster, found.get("in_fp8", False))


def typical_rows(m: int) -> int:
    """Return the number of rows for which splits for m rows are chosen: a power of two, at least
    8."""
    return max(BOX_ROWS, pl.next_power_of_2(m))


def tuned_as(ns: Sequence[int], k: int, rows: int, *, in_terms: bool = False) -> str:
    """Name the problems that share tuned splits. rows: see `typical_rows`."""
    return f"n={'+'.join(map(str, ns))} k={k} m<={rows}" + (" terms" if in_terms else "")


def heuristic_splits(ns: Sequence[int], k: int, rows: int) -> int:
    """Return the splits with the least estimated cost.

    On an H200 they are the fastest of those tried, or within 3 % (benchmarks/results/h200.md).
    """
    return min(range(1, k // TILE_K + 1), key=functools.partial(heuristic_cost, ns, k, rows))


def heuristic_cost(ns: Sequence[int], k: int, rows: int, splits: int) -> float:
    """Estimate the cost of splits, in bytes.

    Thread blocks count as reading as much as the busiest one, starting a tile costs a quarter of a
    step, and partial sums are written and read.
    """
    tiles, blocks = sum(pl.cdiv(n, TILE_N) for n in ns), num_sms()
    busiest = pl.cdiv(tiles * splits, blocks) * (pl.cdiv(k // TILE_K, splits) + 0.25)
    return busiest * blocks * TILE_N * TILE_K + splits * sum(ns) * rows * 2 * 4


def unfit(config: WeightOnlyConfig, m: int, k: int) -> str | None:
    """Say why no kernel can be made of a configuration; None if one can."""
    steps, rows = k // TILE_K, rows_in_boxes(m, config.cluster)
    needed = config.stages * _stage_bytes(rows) + _staged_bytes(rows) + BARRIERS_BYTES
    if not 1 <= config.splits <= steps:
        return f"splits must be 1 to {steps}, got {config.splits}"
    if config.cluster not in (1, 2):
        return f"cluster must be 1 or 2, got {config.cluster}"
    if config.in_fp8 and rows_in_boxes(m, config.cluster) > padded_rows(m):
        return f"cluster {config.cluster} needs more rows of x than {m} in terms"
    if config.stages < 2:
        return f"at least 2 stages are needed, got {config.stages}"
    if needed > SHARED_MEMORY_BYTES:
        return f"{needed} bytes of shared memory, of {SHARED_MEMORY_BYTES}"
    return None


def rows_in_boxes(m: int, cluster: int) -> int:
    """Return the rows of x that are multiplied: each block loads its share, a multiple of 8 for
    TMA."""
    return pl.cdiv(m, BOX_ROWS * cluster) * BOX_ROWS * cluster


def _stage_bytes(rows: int) -> int:
    """Return the bytes of a tile of the weight, and of x in bfloat16 or in two terms."""
    return TILE_K * (TILE_N + 2 * rows)


def _staged_bytes(rows: int) -> int:
    return COMPUTE_WARPGROUPS * rows * WARPGROUP_ROWS * 4
