"""Configures the FP8 x FP8 matmul on Hopper: tiles, stages, clusters."""

from collections.abc import Sequence
from dataclasses import dataclass

from jax.experimental import pallas as pl

from pallas_kernels import tuned
from pallas_kernels.device import num_sms
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.hopper import SHARED_MEMORY_BYTES

TILE_K = 128
WARPGROUP_ROWS = 64
MAX_STAGES = 8
# Shared memory of a block besides its ring of tiles: staged results, scales, barriers.
MAX_STAGING_BYTES = 35 * 1024


@dataclass(frozen=True)
class Config:
    """The tiles of a matmul and the way they are loaded.

    tile_m: rows of x per block: 128, or 64, in which case the two warpgroups divide tile_n.
    tile_n: rows of the weight per block, of each weight in `swiglu`: 64, 128 or 256.
    stages: tiles, 128 of K wide, in flight.
    cluster: blocks that share the loads of the weight: 1 or 2.
    band: tiles of x (or pairs of them) that neighbouring blocks take at the same time.
    promote: whether sums of 128 products are added in float32 registers.
    """

    tile_m: int
    tile_n: int
    stages: int
    cluster: int = 1
    band: int = 8
    promote: bool = False

    @property
    def columns(self) -> int:
        """Return the columns of the result per warpgroup."""
        return self.tile_n * self.tile_m // (2 * WARPGROUP_ROWS)


def configure(m: int, ns: Sequence[int], k: int, *, promote: bool, weights: int = 1) -> Config:
    """Return the tuned configuration of the GPU in use, or else the heuristic's.

    ns: of each product of the launch. weights: of each product.
    """
    kernel = "fp8_matmul" if weights == 1 else "fp8_swiglu"
    found = tuned.find(kernel, tuned_as(m, ns, k, promote=promote))
    return heuristic(m, ns, promote=promote, weights=weights) if found is None else Config(**found)


def tuned_as(m: int, ns: Sequence[int], k: int, *, promote: bool) -> str:
    """Name the problems that share a tuned configuration: m is rounded up to a power of two."""
    rows = max(WARPGROUP_ROWS, 1 << (m - 1).bit_length())
    return f"m<={rows} n={'+'.join(map(str, ns))} k={k}" + (" promote" if promote else "")


def heuristic(m: int, ns: Sequence[int], *, promote: bool, weights: int = 1) -> Config:
    """Return an untuned configuration.

    Its width is that with the fewest estimated cycles, if an SM does 4096 products and gets 32
    bytes of L2 per cycle. Pairs of blocks share the weight if there are two tiles of rows. The ring
    is as long as fits, with a power of two of slots, so that a mask finds one without a division.
    """
    tile_m = 64 if m <= 64 and weights == 1 else 128
    cluster = 2 if m > tile_m else 1
    groups = num_sms() // cluster

    def cycles(tile_n: int) -> int:
        tiles = pl.cdiv(m, tile_m * cluster) * sum(pl.cdiv(n, tile_n) for n in ns)
        rounds = pl.cdiv(tiles, groups)
        loaded = (tile_m + tile_n // cluster) * TILE_K
        return rounds * max(tile_m * tile_n * TILE_K // 4096, loaded // 32)

    widest = 128 if promote and tile_m == 128 else 256
    widths = (BLOCK,) if weights == 2 else [each for each in (256, 128, 64) if each <= widest]
    tile_n = min(widths, key=cycles)
    stages = most_stages(tile_m, tile_n, weights)
    return Config(tile_m, tile_n, 1 << stages.bit_length() - 1, cluster)


def most_stages(tile_m: int, tile_n: int, weights: int) -> int:
    """Return the most stages that fit in shared memory."""
    tiles = ring_bytes(Config(tile_m, tile_n, stages=1), weights)
    return min(MAX_STAGES, (SHARED_MEMORY_BYTES - MAX_STAGING_BYTES) // tiles)


def ring_bytes(config: Config, weights: int = 1, *, x_grouped: bool = False) -> int:
    """Return the shared memory of the tiles in flight, in bytes.

    x_grouped: whether x has scales that change along K, which are loaded with its tiles.
    """
    scales = 4 * config.tile_m if x_grouped else 0
    return config.stages * ((config.tile_m + weights * config.tile_n) * TILE_K + scales)


def unfit(config: Config, *, promote: bool, weights: int = 1) -> str | None:
    """Return why a configuration cannot work; None if it can.

    promote: whether sums are added in registers, by choice or because scales change along K.
    """
    ring = ring_bytes(config, weights)
    if config.tile_m not in (64, 128):
        return f"tile_m must be 64 or 128, got {config.tile_m}"
    if config.tile_n not in (64, 128, 256):
        return f"tile_n must be 64, 128 or 256, got {config.tile_n}"
    if config.cluster not in (1, 2):
        return f"cluster must be 1 or 2, got {config.cluster}"
    if config.stages < 2:
        return f"at least 2 stages are needed, got {config.stages}"
    if ring + MAX_STAGING_BYTES > SHARED_MEMORY_BYTES:
        return f"{ring} + {MAX_STAGING_BYTES} bytes of shared memory, of {SHARED_MEMORY_BYTES}"
    if weights == 2 and config.columns != BLOCK:
        return f"swiglu needs {BLOCK} columns for each of two warpgroups, got {config.columns}"
    if promote and config.columns > BLOCK:
        return f"promoted sums fit {BLOCK} columns for a warpgroup, not {config.columns}"
    return None
