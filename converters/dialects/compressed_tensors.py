"""Reads compressed-tensors, as written by llm-compressor: `quant_method: "compressed-tensors"`.

`config_groups` has the targeted modules and format of each group, `ignore` the modules that are not
quantised. The FP8 formats are supported: float8_e4m3fn `weight`, `weight_scale` per tensor [1], per
output row [out, 1] or per 128x128 block, `input_scale` [1] for static activations, and scales of
the KV cache (`kv_cache_scheme`): `self_attn.k_scale` and `v_scale` [1], or [heads, 1, 1] (strategy
"attn_head"), or in older ones `k_proj.output_scale` and `v_proj.output_scale`.

A group without `weights` does not quantise weights. If it targets attention, it quantises keys and
values, and queries by `self_attn.q_scale`. If it targets matrices, it quantises their activations,
which is ignored here, as in vLLM. A checkpoint without other groups has the format "dense".

Source: compressed-tensors 0.20, `QuantizationConfig`, `QuantizationArgs` and `match_targets`;
examples/quantization_attention in llm-compressor.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.dialects.layout import Dialect, Plan, Shape
from converters.dialects.quantized import (
    Scheme,
    check_fields,
    name_list,
    quantized_plan,
)
from converters.dialects.scales import check_zeros
from converters.source import Source, as_object
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.json_file import shown
from llama_jax.model.fp8 import ScaleLayout
from pallas_kernels.fp8_matmul.reference import BLOCK

_log = logging.getLogger(__name__)
_WHERE = "quantization_config"
_GROUPS = f"{_WHERE}.config_groups"
_FORMATS = ("float-quantized", "naive-quantized", "dense")
_LAYOUTS: Mapping[str, ScaleLayout] = {"tensor": "row", "channel": "row", "block": "block"}
_BLOCKS = ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}")
# Defaults of missing fields of a number format, and fields that no reader needs.
_DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
_IRRELEVANT = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
_OF_CACHE = ("tensor", "attn_head")
_CLASS, _NO_MATCH = "Linear", 3
# A few repeats match short names quickly, but nested repeats could take for ever.
_MAX_REPEATS = 6
_REPEATS = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")
# Targets that mean attention modules: "LlamaAttention", "re:.*self_attn$".
_ATTENTION = re.compile(r".*(Attention|self_attn)\$?")


def applies(source: Source) -> bool:
    quantization = source.quantization
    return quantization.get("quant_method", "compressed-tensors") == "compressed-tensors" and (
        "config_groups" in quantization
    )


def plan(source: Source, weights: Mapping[str, Shape]) -> Plan:
    quantization = source.quantization
    groups = as_object(quantization, "config_groups", _WHERE)
    check_fields(
        quantization,
        _WHERE,
        {
            "quant_method": None,
            "config_groups": None,
            "format": (*_FORMATS, "mixed-precision", None),
            "ignore": None,
            "kv_cache_scheme": None,
            "quantization_status": None,
            "global_compression_ratio": None,
            "sparsity_config": None,
            "version": None,
            "run_compressed": None,  # an option of loading with transformers
        },
    )
    sparsity = as_object(quantization, "sparsity_config", _WHERE)
    check_fields(
        {"format": sparsity.get("format")}, f"{_WHERE}.sparsity_config", {"format": ("dense", None)}
    )
    cache_scheme = as_object(quantization, "kv_cache_scheme", _WHERE)
    if cache_scheme:
        _check_numbers(cache_scheme, f"{_WHERE}.kv_cache_scheme", _OF_CACHE, (False,))
    ignored = name_list(quantization, "ignore")
    promised_by = f"{_WHERE}.kv_cache_scheme" if cache_scheme else None
    schemes: dict[str, Scheme | None] = {}
    for group in groups:
        fields, where = as_object(groups, group, _GROUPS), f"{_GROUPS}.{group}"
        targets = name_list(fields, "targets", where)
        scheme = None
        if any(map(_ATTENTION.fullmatch, targets)):
            _check_attention(fields, where)
            promised_by = promised_by or where
        else:
            scheme = _scheme(fields, where)
        schemes |= dict.fromkeys(targets, scheme)

    def scheme_of(name: str) -> Scheme | None:
        if any(_rank(name, pattern) < _NO_MATCH for pattern in ignored):
            return None
        best = min(sorted(schemes), key=lambda target: _rank(name, target), default="")
        return schemes[best] if _rank(name, best) < _NO_MATCH else None

    found = quantized_plan(
        source,
        weights,
        scheme_of,
        f"{_WHERE}'s config_groups and ignore",
        cache_scales_promised_by=promised_by,
    )
    # Written beside scales of attention although numbers are symmetric.
    zeros = [name for name in source.tensors if name.endswith("_zero_point")]
    for name in zeros:
        check_zeros(source.tensors[name])
    return replace(found, used=found.used.union(zeros))


def _rank(name: str, pattern: str) -> int:
    """Rank how a target matches a module: 0 by name, 1 by `re:`, 2 by class, 3 not at all."""
    if pattern.startswith("re:"):
        if len(_REPEATS.findall(pattern)) > _MAX_REPEATS or _REPEATED_GROUP.search(pattern):
            raise CheckpointError(
                f"{_WHERE}: {shown(pattern)} repeats too much: trying it could take for ever"
            )
        try:
            return 1 if re.match(pattern.removeprefix("re:"), name) else _NO_MATCH
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{_WHERE}: {shown(pattern)} is not a regular expression: {error}"
            ) from error
    return 0 if pattern == name else 2 if pattern == _CLASS else _NO_MATCH


def _scheme(group: Mapping[str, Any], where: str) -> Scheme | None:
    """Return the scheme of a group's matrices, or None if they are unquantised."""
    _check_group(group, where)
    weights, inputs = (as_object(group, key, where) for key in ("weights", "input_activations"))
    is_dynamic = inputs.get("dynamic", False)
    grain = None
    if inputs:
        strategies = ("token", "tensor", "group") if is_dynamic else ("tensor",)
        grain = _check_numbers(inputs, f"{where}.input_activations", strategies, (True, False))
    if not weights:
        if inputs:
            _log.warning(
                "%s quantises activations alone: with weights that are not quantised they are used "
                "as they are",
                where,
            )
        return None
    strategy = _check_numbers(weights, f"{where}.weights", tuple(_LAYOUTS), (False,))
    return Scheme(
        _LAYOUTS[strategy],
        static=bool(inputs) and not is_dynamic,
        activation_group=BLOCK if grain == "group" else None,
    )


def _check_attention(group: Mapping[str, Any], where: str) -> None:
    """Refuse a group of attention with a number format that is not static."""
    _check_group(group, where, weights=(None,))
    inputs = as_object(group, "input_activations", where)
    _check_numbers(inputs, f"{where}.input_activations", _OF_CACHE, (False,))


def _check_group(
    group: Mapping[str, Any], where: str, weights: tuple[Any, ...] | None = None
) -> None:
    check_fields(
        group,
        where,
        {
            "targets": None,
            "weights": weights,
            "input_activations": None,
            "output_activations": (None,),
            "format": (*_FORMATS, None),
        },
    )


def _check_numbers(
    fields: Mapping[str, Any], where: str, strategies: tuple[str, ...], dynamic: tuple[bool, ...]
) -> str:
    """Refuse numbers that are not symmetric 8-bit floats. Returns the strategy of the scales."""
    strategy = fields.get("strategy") or ("channel" if fields.get("group_size") == -1 else "tensor")
    check_fields(
        {**_DEFAULTS, **fields, "strategy": strategy},
        where,
        {
            "num_bits": (8,),
            "type": ("float",),
            "symmetric": (True,),
            "dynamic": dynamic,
            "strategy": strategies,
            "group_size": (BLOCK,) if strategy == "group" else (None, -1),
            "block_structure": _BLOCKS if strategy == "block" else (None,),
            "actorder": (None, False),
            **dict.fromkeys(_IRRELEVANT),
        },
    )
    return str(strategy)


COMPRESSED_TENSORS = Dialect(
    name="compressed-tensors",
    description="compressed-tensors FP8 (llm-compressor): per tensor, channel or 128x128 block",
    applies=applies,
    plan=plan,
)
