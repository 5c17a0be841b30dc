"""Reads FriendliAI's FP8 checkpoints, written by Friendli Model Optimizer or friendli-client.

Each matrix of a decoder layer is an int8 `weight` whose bytes are float8_e4m3fn bit patterns (they
are not integers) with a `weight_scale`. Two kinds exist:

- static: one `weight_scale` and one calibrated `in_scale` per matrix, both float32 scalars. The
  config has `use_fp8_e4m3`, and since optimizer 0.5 also `quantization_config` with
  `activation_scheme: static`.
- dynamic: a bfloat16 `weight_scale` per output row, `zeros` that are all zero, no `in_scale`. The
  config has only `quantization_config` with `activation_scheme: dynamic`.

Source: fmo-core 0.3 to 0.10; `FP8Quantizer` in friendli-client 1.4.2.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from converters.dialects.layout import Dialect, Plan, Shape, source_name, take
from converters.dialects.quantized import Scheme, quantized_plan
from converters.dialects.scales import check_zeros
from converters.source import Source
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.json_file import shown

_CODES = ("int8", "float8_e4m3fn")


def applies(source: Source) -> bool:
    quantization = source.quantization
    if quantization.get("quant_method", "fp8") != "fp8" or "weight_block_size" in quantization:
        return False
    if source.hf_config.get("use_fp8_e4m3") or any(
        name.endswith(".in_scale") for name in source.tensors
    ):
        return True
    return "quant_method" in quantization and any(
        name.endswith("_proj.weight") and tensor.dtype == np.int8
        for name, tensor in source.tensors.items()
    )


def plan(source: Source, weights: Mapping[str, Shape]) -> Plan:
    scheme = source.quantization.get("activation_scheme", "static")
    if scheme not in ("static", "dynamic"):
        raise CheckpointError(
            f"quantization_config.activation_scheme is {shown(scheme)}, expected 'static' or "
            "'dynamic'"
        )
    fp8 = Scheme(static=scheme == "static", input_scales=("in_scale",), codes=_CODES)

    def scheme_of(name: str) -> Scheme | None:
        weight = source.tensors.get(f"{name}.weight")
        return fp8 if weight is not None and weight.dtype.name in _CODES else None

    found = quantized_plan(source, weights, scheme_of, "the dtype")
    zeros = [f"{name}.zeros" for name in map(source_name, weights)]
    zeros = [name for name in zeros if name in source.tensors]
    for name in zeros:
        rows = source.tensors[f"{name.removesuffix('.zeros')}.weight"].shape[0]
        check_zeros(take(source.tensors, name, ((rows, 1),), _CODES))
    return replace(found, used=found.used.union(zeros))


FRIENDLI = Dialect(
    name="friendli",
    description="FriendliAI FP8: int8 float8_e4m3fn bits, weight_scale, in_scale (or dynamic)",
    applies=applies,
    plan=plan,
)
