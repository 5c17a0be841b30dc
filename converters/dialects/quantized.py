"""Plans checkpoints of the FP8 dialects: a config describes the matrices, and the tensors must
agree.

A dialect turns its `quantization_config` into a `Scheme` for each matrix; the rest is here. A
config that contradicts the tensors is an error, which names both.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from converters.dialects.fnuz import FNUZ, from_fnuz
from converters.dialects.layout import (
    LazyArray,
    Module,
    Plan,
    Shape,
    Tensors,
    bits_as_e4m3,
    constant,
    dense_module,
    is_linear,
    source_name,
    take,
)
from converters.dialects.scales import (
    activation_scales,
    check_products,
    row_scale,
    scale_values,
)
from converters.safetensors_reader import StoredTensor
from converters.source import Source
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.json_file import shown
from llama_jax.model.config import PARAM_DTYPES
from llama_jax.model.fp8 import ScaleLayout, WeightFormat, scale_shape
from llama_jax.model.kv_cache import KVScales, Scale

_log = logging.getLogger(__name__)
SCALE_DTYPES = (*PARAM_DTYPES, "float8_e8m0fnu")
# Names of the scales of a layer's cached keys and values, older tools' names last.
_CACHE_SCALES = {
    x: (f"{x}_scale", f"{x}_proj.{x}_scale", f"{x}_proj.output_scale", "kv_scale") for x in "kv"
}


@dataclass(frozen=True)
class Scheme:
    """The storage of a matrix by the config, and the names of its tensors within the module.

    layout: "row" for one scale per tensor or per output row, "block" for one per 128x128 block.
    static: whether a calibrated scale of the activations is stored.
    activation_scale_ub, activation_group: see `WeightFormat`.
    codes, scale_dtypes: the dtypes that the weight and its scales may have.
    """

    layout: ScaleLayout = "row"
    static: bool = False
    activation_scale_ub: float | None = None
    activation_group: int | None = None
    weight: str = "weight"
    weight_scale: str = "weight_scale"
    input_scales: tuple[str, ...] = ("input_scale", "act_scale")  # the latter until June 2024
    codes: tuple[str, ...] = ("float8_e4m3fn", FNUZ)
    scale_dtypes: tuple[str, ...] = SCALE_DTYPES


def quantized_plan(
    source: Source,
    weights: Mapping[str, Shape],
    scheme_of: Callable[[str], Scheme | None],
    decided_by: str,
    *,
    cache_scales_promised_by: str | None = None,
) -> Plan:
    """Plan a checkpoint with Hugging Face's names and some FP8 matrices.

    scheme_of: returns the scheme of a module's matrix (by Hugging Face's name), or None if it is
        unquantised.
    decided_by: the config's fields behind `scheme_of`, for messages.

    Raises `CheckpointError` if tensors and config contradict each other.
    """
    modules: dict[str, Module] = {}
    used: set[str] = set()
    for path, shape in weights.items():
        name = source_name(path)
        scheme = scheme_of(name) if is_linear(path) else None
        if path == "lm_head" and _is_plain(source.tensors.get(f"{name}.weight")):
            scheme = None  # tools do not quantise it, without a word in the config
        stored = source.tensors.get(f"{name}.{scheme.weight if scheme else 'weight'}")
        is_plain = _is_plain(stored)
        if stored is not None and is_linear(path) and is_plain != (scheme is None):
            says = "is not quantised" if scheme is None else "is FP8"
            raise CheckpointError(
                f"{stored.name} is {stored.dtype.name}, but by {decided_by} {name} {says}"
            )
        if scheme is None:
            modules[path] = dense_module(source.tensors, path, shape)
            used.add(f"{name}.weight")
        else:
            modules[path], names = _fp8_module(source.tensors, name, shape, scheme)
            used.update(names)
    cache_scales, names = _cache_scales(source, cache_scales_promised_by)
    return Plan(modules, frozenset(used.union(names)), cache_scales)


def check_fields(
    fields: Mapping[str, Any], where: str, allowed: Mapping[str, tuple[Any, ...] | None]
) -> None:
    """Refuse unknown fields and values that are not allowed (None allows any value).

    An unknown field that is empty or false is accepted, because it has no effect.
    """
    for key, value in fields.items():
        if key not in allowed and value:
            raise CheckpointError(
                f"{where}.{key} = {shown(value)} is not known; it may change what the weights mean"
            )
        values = allowed.get(key)
        if values is not None and value not in values:
            expected = " or ".join(repr(each) for each in values if each is not None)
            raise CheckpointError(
                f"{where}.{key} = {shown(value)} is not supported, only {expected or 'null'}. Take "
                "another FP8 checkpoint of the model, or the unquantised one with --quantize row."
            )


def name_list(fields: Mapping[str, Any], key: str, where: str = "quantization_config") -> list[str]:
    """Return a list of module names or patterns from a config, [] if it is null or absent."""
    names = fields.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}.{key} must be a list of names, got {shown(names)}")
    return names


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a list includes this module: by its name, that of a parent, the last parts of
    its name, or a pattern with `*`."""
    return any(
        f".{name}".endswith(f".{pattern}")
        or name.startswith(f"{pattern}.")
        or fnmatchcase(name, pattern)
        for pattern in patterns
    )


def _is_plain(stored: StoredTensor | None) -> bool:
    return stored is not None and stored.dtype.name in PARAM_DTYPES


def _fp8_module(
    tensors: Tensors, name: str, shape: Shape, scheme: Scheme
) -> tuple[Module, list[str]]:
    """Return a quantised matrix, and the names of its tensors."""
    weight = take(tensors, f"{name}.{scheme.weight}", (shape,), scheme.codes)
    names = [weight.name, f"{name}.{scheme.weight_scale}"]
    if names[1] not in tensors:
        raise CheckpointError(
            f"{names[1]} is missing: the {weight.dtype.name} codes of {weight.name} need it"
        )
    if scheme.layout == "row":
        scale = row_scale(tensors, names[1], shape[0], scheme.scale_dtypes)
    else:
        blocks = scale_shape((shape[0], shape[1]), "block")
        is_spread = len(tensors[names[1]].shape) == 4  # modelopt's layout
        expected = (blocks[0], 1, blocks[1], 1) if is_spread else blocks
        stored = take(tensors, names[1], (expected,), scheme.scale_dtypes)
        scale = scale_values(stored).reshape(blocks)
    if weight.dtype.name == FNUZ:
        codes, scale = from_fnuz(weight, scale, scheme.layout)
    else:
        codes = bits_as_e4m3(weight)
    check_products(codes, scale, scheme.layout, *names)
    arrays: dict[str, LazyArray] = {"weight": codes, "weight_scale": constant(scale)}

    names_of_input = [f"{name}.{leaf}" for leaf in scheme.input_scales]
    found = [each for each in names_of_input if each in tensors]
    if found and not scheme.static:
        raise CheckpointError(f"{found[0]} is stored, but by the config activations have no scale")
    if scheme.static:
        if not found:
            raise CheckpointError(
                f"{names_of_input[0]} is missing, but by the config activations have a static scale"
            )
        scale = activation_scales(tensors, found[0], ((), (1,), (1, 1)))
        arrays["input_scale"] = constant(scale.reshape(()))
        names.append(found[0])
    stored_as = WeightFormat(
        codes.dtype.name, scheme.layout, scheme.static, scheme.activation_scale_ub,
        activation_group=scheme.activation_group,
    )  # fmt: skip
    return Module(stored_as, arrays), names


def _cache_scales(source: Source, promised_by: str | None) -> tuple[KVScales | None, list[str]]:
    """Return the scales (k, v) of each layer, or None if there are none, and their tensors' names.

    A layer without scales gets 1.0, as in vLLM. Scales of queries are for attention in FP8, which
    this project does not have: they are checked and ignored.
    """
    tensors, used = source.tensors, []
    heads = source.config.num_kv_heads
    pairs: list[tuple[Scale, Scale]] = []
    lacking: list[int] = []
    for layer in range(source.config.num_layers):
        prefix = f"model.layers.{layer}.self_attn"
        k, v = (
            next((name for leaf in leaves if (name := f"{prefix}.{leaf}") in tensors), None)
            for leaves in _CACHE_SCALES.values()
        )
        if (k is None) != (v is None):
            raise CheckpointError(
                f"{prefix}.{'v' if k else 'k'}_scale is missing, but {k or v} is there"
            )
        if k and v:
            pairs.append((_cache_scale(tensors, k, heads), _cache_scale(tensors, v, heads)))
            used += [k, v]
        else:
            pairs.append((1.0, 1.0))
            lacking.append(layer)
        if (query := f"{prefix}.q_scale") in tensors:
            _cache_scale(tensors, query, source.config.num_heads)
            used.append(query)
    if lacking and (promised_by or len(lacking) < len(pairs)):
        _log.warning(
            "%s the KV cache, but layers %s have none: in an FP8 cache theirs are 1.0",
            f"{promised_by} promises scales of" if promised_by else "there are scales of",
            ", ".join(map(str, lacking)),
        )
    if len(lacking) == len(pairs):
        return None, used
    if any(isinstance(scale, tuple) for pair in pairs for scale in pair):
        pairs = [(_of_heads(k, heads), _of_heads(v, heads)) for k, v in pairs]
    return tuple(pairs), used


def _cache_scale(tensors: Tensors, name: str, heads: int) -> Scale:
    """Return a layer's scale, or one for each of its heads: stored as [heads, 1, 1] or [heads]."""
    scales = activation_scales(tensors, name, ((), (1,), (1, 1), (heads, 1, 1), (heads,)))
    return float(scales[0]) if scales.size == 1 else tuple(map(float, scales))


def _of_heads(scale: Scale, heads: int) -> Scale:
    return scale if isinstance(scale, tuple) else (scale,) * heads
