"""Chooses between the two kernels of `paged_attention` on Hopper, or refuses the operands."""

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic import gpu as mosaic_gpu

from pallas_kernels import e4m3
from pallas_kernels.paged_attention import hopper_decode, hopper_prefill
from pallas_kernels.paged_attention.hopper_loop import PAGE_SIZE

HEAD_DIMS = (64, 128)
# With up to this many new tokens per sequence, reading the cache takes longer than multiplying.
MAX_DECODE_TOKENS = 8
# ptxas of CUDA 12.8.0 to 12.9.0 miscompiles causal attention; 12.9.1 has V12.9.86.
MISCOMPILES_FROM, MISCOMPILES_BEFORE = (12, 8, 0), (12, 9, 86)


def paged_attention(
    q: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    cached_lens: Array,
    kv_lens: Array,
    k_scale: Array | float,
    v_scale: Array | float,
    *,
    is_batch_invariant: bool = False,
    interpret: Any = None,
) -> Array:
    """Compute `pallas_kernels.paged_attention.paged_attention` for operands that `refusal` accepts:
    bfloat16 q of head_dim 64 or 128, and pages of 64 tokens in bfloat16 or float8_e4m3fn.

    Attention weights are rounded to bfloat16, or with FP8 pages to float16; then elements of q
    beyond 2^20 count as 2^20.

    interpret: plgpu.InterpretGPUParams, to run in the simulator.
    """
    arrays = (q, k_pages, v_pages, page_table, cached_lens, kv_lens, k_scale, v_scale)
    if q.shape[1] > MAX_DECODE_TOKENS:
        return hopper_prefill.paged_attention(*arrays, interpret=interpret)
    return hopper_decode.paged_attention(
        *arrays, is_batch_invariant=is_batch_invariant, interpret=interpret
    )


def refusal(q: Array, k_pages: Array) -> str | None:
    """Return why neither kernel can take these arrays, or be compiled; None if one can."""
    if q.dtype != jnp.bfloat16:
        return f"q must be bfloat16, got {q.dtype}"
    if k_pages.dtype not in (jnp.bfloat16, e4m3.DTYPE):
        return f"pages must be bfloat16 or float8_e4m3fn, got {k_pages.dtype}"
    if q.shape[3] not in HEAD_DIMS:
        return f"head_dim must be 64 or 128, got {q.shape[3]}"
    if k_pages.shape[1] != PAGE_SIZE:
        return f"pages must hold {PAGE_SIZE} tokens, got {k_pages.shape[1]}"
    if (version := _ptxas_version()) and MISCOMPILES_FROM <= version < MISCOMPILES_BEFORE:
        return f"ptxas {'.'.join(map(str, version))} miscompiles it: update CUDA to 12.9.1 or later"
    return None


@cache
def _ptxas_version() -> tuple[int, ...] | None:
    """Return the version of the ptxas that Mosaic GPU runs; None if there is none."""
    ptxas = Path(mosaic_gpu.core.cuda_root) / "bin" / "ptxas"
    if not ptxas.exists():
        return None
    text = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, version.groups())) if version else None
