"""Writes FP8 weights in compressed-tensors' format `float-quantized`.

Source: `QuantizationConfig`, `QuantizationScheme` and `QuantizationArgs` in compressed-tensors, and
checkpoints of llm-compressor.
"""

import logging
from typing import Any

import numpy as np

from converters.dialects.layout import LazyArray, Module, Plan, constant, is_linear, source_name
from llama_jax.checkpoint.store import CheckpointError
from pallas_kernels.fp8_matmul.reference import BLOCK

_log = logging.getLogger(__name__)


def compressed_tensors(plan: Plan) -> tuple[dict[str, LazyArray], dict[str, Any]]:
    """Return the tensors by Hugging Face's names, and the quantization_config for them.

    Modules with the same kind of scales are one group. Weight scales are float32 [1] (strategy
    "tensor") if each matrix of the group has a single one, else [out, 1] ("channel"), or one per
    128x128 block ("block"). input_scale, k_scale and v_scale are float32 [1], the latter two
    [heads, 1, 1] if they are per head.

    Raises `CheckpointError` for a plan without FP8 weights, or with the name of the first module
    that compressed-tensors cannot represent.
    """
    groups: dict[tuple[str, bool], dict[str, Module]] = {}
    for path, module in plan.modules.items():
        if module.format.scale:
            _check_expressible(path, module)
            kind = (module.format.scale, module.format.input_scale)
            groups.setdefault(kind, {})[path] = module
    if not groups:
        raise CheckpointError(
            "this checkpoint has no FP8 weights. Export it as bf16 (--format bf16), which keeps "
            "the dtypes it has, or quantise it first (llama-jax convert --quantize row)."
        )
    if any(module.format.activation_scale_ub for module in plan.modules.values()):
        _log.warning(
            "this checkpoint bounds activations (activation_scale_ub), which compressed-tensors "
            "cannot express: programs that load the export will not bound them"
        )
    tensors = {
        f"{source_name(path)}.weight": module.arrays["weight"]
        for path, module in plan.modules.items()
    }
    config_groups: dict[str, Any] = {}
    for number, ((layout, is_static), modules) in enumerate(groups.items()):
        names = [source_name(path) for path in modules]
        strategy, scales = _weight_scales(layout, modules)
        for name, scale in zip(names, scales, strict=True):
            tensors[f"{name}.weight_scale"] = constant(scale)
        if is_static:
            for name, module in zip(names, modules.values(), strict=True):
                scale = module.arrays["input_scale"].whole()
                tensors[f"{name}.input_scale"] = constant(scale.reshape(1))
            inputs = _arguments("tensor", dynamic=False)
        else:
            inputs = _arguments("group" if layout == "block" else "token", dynamic=True)
        config_groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(groups) == 1 else names,
            "weights": _arguments(strategy, dynamic=False),
            "input_activations": inputs,
            "output_activations": None,
        }
    per = "tensor"
    for layer, pair in enumerate(plan.kv_scales or ()):
        for letter, value in zip("kv", pair, strict=True):
            name = f"model.layers.{layer}.self_attn.{letter}_scale"
            scale = np.array(value, np.float32)
            per = "attn_head" if scale.ndim else "tensor"
            tensors[name] = constant(scale.reshape((-1, 1, 1) if scale.ndim else 1))
    return tensors, {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": _unquantized(plan),
        "kv_cache_scheme": plan.kv_scales and _arguments(per, dynamic=False),
    }


def _check_expressible(path: str, module: Module) -> None:
    if module.format.dtype != "float8_e4m3fn":
        reason = f"codes in {module.format.dtype}"
    elif module.format.column_groups > 1:
        reason = f"scales for each of {module.format.column_groups} groups of columns"
    else:
        return
    raise CheckpointError(
        f"{path} has {reason}, which compressed-tensors cannot hold. Export it as bf16 (--format "
        "bf16)."
    )


def _weight_scales(layout: str, modules: dict[str, Module]) -> tuple[str, list[np.ndarray]]:
    """Return the strategy of a group, and each matrix's scales in the shape that it needs."""
    scales = [module.arrays["weight_scale"].whole() for module in modules.values()]
    if layout == "block":
        return "block", scales
    if all((each == each[0]).all() for each in scales):
        return "tensor", [each[:1] for each in scales]
    return "channel", [each[:, None] for each in scales]


def _unquantized(plan: Plan) -> list[str]:
    """Return the names of the `Linear` modules that are not quantised.

    lm_head is one, even if it is tied.
    """
    linears = [path for path in plan.modules if is_linear(path) and path != "lm_head"]
    formats = {path: module.format for path, module in plan.modules.items()}
    return [
        source_name(path)
        for path in [*linears, "lm_head"]
        if path not in formats or formats[path].scale is None
    ]


def _arguments(strategy: str, *, dynamic: bool) -> dict[str, Any]:
    """Return compressed-tensors' `QuantizationArgs`."""
    return {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": dynamic,
        "strategy": strategy,
        "group_size": BLOCK if strategy == "group" else None,
        "block_structure": [BLOCK, BLOCK] if strategy == "block" else None,
    }
