"""Reads torchao's float8 weights in safetensors: `quant_method: "torchao"`.

A quantised weight is a flattened tensor subclass: `_weight_qdata`, float8_e4m3fn, and
`_weight_scale`, one per output row ([out, 1], `PerRow`), a single one ([1, 1], `PerTensor`), or one
per 128x128 block (`PerBlock`). The header's metadata describes it under the weight's name, and
decides what is quantised, even if the config has an entry for each module (`FqnToConfig`).
Activations are unquantised or dynamic: per token or, for blocks, per 128 features.

Source: torchao 0.18, `prototype/safetensors`; transformers' `TorchAoConfig`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from converters.dialects.layout import Dialect, Plan, Shape, source_name
from converters.dialects.quantized import (
    Scheme,
    check_fields,
    is_named,
    name_list,
    quantized_plan,
)
from converters.safetensors_reader import read_metadata
from converters.source import Source, as_object
from llama_jax.checkpoint.store import CheckpointError
from pallas_kernels.fp8_matmul.reference import BLOCK

_WHERE = "quantization_config"
_CONFIGS = (
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8WeightOnlyConfig",
    "FqnToConfig",
    "ModuleFqnToConfig",
)
_PLAIN, _FLOAT8 = "Tensor", "Float8Tensor"
# Attributes of a Float8Tensor about its computation, not its value.
_IRRELEVANT = ("act_quant_kwargs", "dtype", "mm_config", "kernel_preference")
_BOUNDS = ("hp_value_lb", "hp_value_ub")  # bounds of the activations
_BLOCKS, _IN_GROUPS = [BLOCK, BLOCK], {"block_size": [1, BLOCK]}
_SCHEME = Scheme(weight="_weight_qdata", weight_scale="_weight_scale")


def applies(source: Source) -> bool:
    return source.quantization.get("quant_method") == "torchao"


def plan(source: Source, weights: Mapping[str, Shape]) -> Plan:
    check_fields(
        source.quantization,
        _WHERE,
        {
            "quant_method": None,
            "quant_type": None,
            "modules_to_not_convert": None,
            "include_input_output_embeddings": (False, None),
            "untie_embedding_weights": (False, None),
        },
    )
    quant_type = as_object(source.quantization, "quant_type", _WHERE)
    default = as_object(quant_type, "default", f"{_WHERE}.quant_type")
    check_fields(
        {"_type": None, **default},
        f"{_WHERE}.quant_type.default",
        {"_type": _CONFIGS, "_version": None, "_data": None},
    )
    shapes = {source_name(path): shape for path, shape in weights.items()}
    metadata = _metadata(source)
    plain = name_list(source.quantization, "modules_to_not_convert")

    def scheme_of(name: str) -> Scheme | None:
        kind, description = _description(metadata, f"{name}.weight")
        if (kind == _FLOAT8) != (f"{name}.{_SCHEME.weight}" in source.tensors):
            raise CheckpointError(
                f"{name}.{_SCHEME.weight} is {'missing' if kind == _FLOAT8 else 'stored'}, but the "
                f"safetensors metadata describes {name}.weight as {kind}"
            )
        if kind == _PLAIN:
            return None
        if is_named(name, plain):
            raise CheckpointError(
                f"{name}.{_SCHEME.weight} is stored, but {_WHERE}.modules_to_not_convert leaves "
                f"{name} out"
            )
        return _described(description, f"metadata of {name}.weight", shapes[name])

    return quantized_plan(source, weights, scheme_of, "the safetensors metadata")


def _metadata(source: Source) -> Mapping[str, str]:
    """Return the metadata of all shards together."""
    files = {tensor.path for tensor in source.tensors.values()}
    return {key: text for file in sorted(files) for key, text in read_metadata(file).items()}


def _description(metadata: Mapping[str, str], name: str) -> tuple[str, Mapping[str, Any]]:
    """Return a tensor's type and attributes from the metadata."""
    try:
        description = json.loads(metadata.get(name, "{}"))
        kind = description.get("_type", _PLAIN)
    except (json.JSONDecodeError, AttributeError) as error:
        raise CheckpointError(f"the safetensors metadata of {name} is not a JSON object") from error
    if kind not in (_PLAIN, _FLOAT8):
        raise CheckpointError(f"{name} is a torchao {kind}; only {_FLOAT8} is supported")
    return kind, description


def _described(description: Mapping[str, Any], where: str, shape: Shape) -> Scheme:
    """Return the scheme of a Float8Tensor of this shape from its attributes."""
    rows, columns = shape
    attributes = as_object(description, "_data", where)
    check_fields(
        {"block_size": None, **attributes},
        where,
        {"block_size": ([1, columns], [rows, columns], _BLOCKS), **dict.fromkeys(_IRRELEVANT)},
    )
    activations = as_object(attributes, "act_quant_kwargs", where)
    bounds = as_object(activations, "_data", f"{where}.act_quant_kwargs")
    check_fields(
        {key: bounds.get(key) for key in _BOUNDS},
        f"{where}.act_quant_kwargs",
        dict.fromkeys(_BOUNDS, (None,)),
    )
    in_blocks = attributes["block_size"] == _BLOCKS
    granularity = as_object(bounds, "granularity", f"{where}.act_quant_kwargs")
    in_groups = granularity.get("_data") == _IN_GROUPS
    return replace(
        _SCHEME,
        layout="block" if in_blocks else "row",
        activation_group=BLOCK if in_groups else None,
    )


TORCHAO = Dialect(
    name="torchao",
    description="torchao float8 weights in safetensors, per row, per tensor or per 128x128 block",
    applies=applies,
    plan=plan,
)
