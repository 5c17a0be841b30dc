"""Reads Meta's own checkpoints: params.json and consolidated.*.pth, a file per shard of the model.

All files have tensors of the same names. A matrix is divided evenly along its rows or its columns,
and norms are in every file. Meta rotates the pairs (2j, 2j + 1) of a head where the canonical tree
rotates (j, j + head_dim / 2), so the rows of wq and wk are reordered.

Llama 3.1 405B was also published with FP8 codes in its feed-forward matrices, except in the first
and the last layer. The scales of a file's shards, one per row, are in its fp8_scales_*.pt. The
shards of w2 are columns, so each of its rows has a scale per shard (`WeightFormat.column_groups`).

Source: meta-llama/llama-models (`models/llama3/model.py`, `models/checkpoint.py`,
`models/llama3/quantization/loader.py`); transformers' `convert_llama_weights_to_hf.py`.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from converters.dialects.layout import (
    Dialect,
    LazyArray,
    Module,
    Plan,
    Shape,
    Tensors,
    as_stored,
    constant,
    take,
)
from converters.dialects.scales import check_products, scale_values
from converters.safetensors_reader import StoredTensor
from converters.source import Source, same_bytes
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.model.config import PARAM_DTYPES
from llama_jax.model.fp8 import WeightFormat

_CODES = "float8_e4m3fn"
# The bound of `convert_to_fp8_quantized_model` in Meta's loader.
_UPPER_BOUND = 1200.0
# Meta's names, and the axes along which a module may be split: none for a norm, either for the
# embeddings, whose rows are split in Llama 3 and columns in Llama 2.
_MODULES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "embed_tokens": ("tok_embeddings", (0, 1)),
    "self_attn/q_proj": ("attention.wq", (0,)),
    "self_attn/k_proj": ("attention.wk", (0,)),
    "self_attn/v_proj": ("attention.wv", (0,)),
    "self_attn/o_proj": ("attention.wo", (1,)),
    "mlp/gate_proj": ("feed_forward.w1", (0,)),
    "mlp/up_proj": ("feed_forward.w3", (0,)),
    "mlp/down_proj": ("feed_forward.w2", (1,)),
    "input_layernorm": ("attention_norm", ()),
    "post_attention_layernorm": ("ffn_norm", ()),
    "norm": ("norm", ()),
    "lm_head": ("output", (0,)),
}


def applies(source: Source) -> bool:
    return any(name.startswith("consolidated.") for name in source.tensors)


def plan(source: Source, weights: Mapping[str, Shape]) -> Plan:
    config, tensors = source.config, source.tensors
    names = [name for name in tensors if name.startswith("consolidated.")]
    files = list(dict.fromkeys(name.partition("/")[0] for name in names))
    _check_count(source, files)
    modules: dict[str, Module] = {}
    # Old versions stored these constants.
    used = {name for name in names if name.endswith("rope.freqs")}
    if config.tie_word_embeddings:
        used.update(f"{file}/output.weight" for file in files)
    for path, shape in weights.items():
        layer, _, rest = path.rpartition("layers_")[2].partition("/")
        meta, axes = _MODULES[rest or path]
        name = f"layers.{layer}.{meta}" if rest else meta
        parts, axis = _parts(tensors, files, name, shape, axes)
        used.update(f"{file}/{name}.weight" for file in files)
        weight = _joined([as_stored(part) for part in parts], shape, axis)
        if meta in ("attention.wq", "attention.wk"):
            weight = _half_split(weight, config.head_dim)
        if weight.dtype.name != _CODES:
            modules[path] = Module(WeightFormat(weight.dtype.name), {"weight": weight})
            continue
        scales = _scales(tensors, parts, f"{layer}_{meta}")
        used.update(scale.name for scale in scales)
        scale = _joined_scales(scales, axis)
        check_products(weight, scale, "row", parts[0].name, scales[0].name)
        groups = scale.shape[1] if scale.ndim == 2 else 1
        stored = WeightFormat(_CODES, "row", False, _UPPER_BOUND, groups)
        modules[path] = Module(stored, {"weight": weight, "weight_scale": constant(scale)})
    return Plan(modules, frozenset(used))


def _check_count(source: Source, files: Sequence[str]) -> None:
    """Refuse a directory with fewer or more files than the model was split into."""
    width = source.config.hidden_size
    first = source.tensors.get(f"{files[0]}/layers.0.attention.wq.weight")
    if first is None or first.shape[1:] != (width,) or not first.shape[0]:
        return  # `take` will report it
    parts, rest = divmod(width, first.shape[0])
    if parts != len(files) and not rest:
        raise CheckpointError(
            f"{source.directory} has {len(files)} of the files consolidated.*.pth, but "
            f"{first.name} has 1/{parts} of the rows that params.json promises: the model has "
            f"{parts} files. Download the rest of the checkpoint, or take out what is not of it."
        )


def _parts(
    tensors: Tensors, files: Sequence[str], name: str, shape: Shape, axes: tuple[int, ...]
) -> tuple[list[StoredTensor], int]:
    """Return a weight's part in each file, and the axis along which to join them.

    A norm is the same in all files and counts as one part.
    """
    part_shapes = {_part_shape(name, shape, axis, len(files)): axis for axis in axes}
    quantized = (_CODES,) if ".feed_forward." in name else ()
    first = take(
        tensors, f"{files[0]}/{name}.weight", tuple(part_shapes) or (shape,),
        (*PARAM_DTYPES, *quantized),
    )  # fmt: skip
    others = [
        take(tensors, f"{file}/{name}.weight", (first.shape,), (first.dtype.name,))
        for file in files[1:]
    ]
    if axes:
        return [first, *others], part_shapes[first.shape]
    for other in others:
        if not same_bytes(first, other):
            raise CheckpointError(
                f"{other.name} differs from {first.name}: the files are not of one checkpoint"
            )
    return [first], 0


def _part_shape(name: str, shape: Shape, axis: int, parts: int) -> Shape:
    if shape[axis] % parts:
        raise CheckpointError(
            f"{name} has {shape[axis]} {('rows', 'columns')[axis]} by params.json, which cannot be "
            f"split over {parts} files"
        )
    return (*shape[:axis], shape[axis] // parts, *shape[axis + 1 :])


def _joined(parts: Sequence[LazyArray], shape: Shape, axis: int) -> LazyArray:
    """Return the joined matrix, of which rows are read lazily."""
    if len(parts) == 1:
        return parts[0]
    height = parts[0].shape[0]

    def side_by_side(start: int, stop: int) -> np.ndarray:
        return np.concatenate([part.rows(start, stop) for part in parts], axis=1)

    def one_above_the_other(start: int, stop: int) -> np.ndarray:
        return np.concatenate(
            [
                part.rows(max(start - above, 0), min(stop - above, height))
                for above, part in zip(range(0, shape[0], height), parts, strict=True)
                if start < above + height and above < stop
            ]
        )

    return LazyArray(parts[0].dtype, shape, side_by_side if axis else one_above_the_other)


def _half_split(weight: LazyArray, head_dim: int) -> LazyArray:
    """Reorder each head's rows: first the even ones, then the odd ones."""
    order = np.arange(head_dim).reshape(-1, 2).T.reshape(-1)

    def rows(start: int, stop: int) -> np.ndarray:
        above = start % head_dim
        heads = weight.rows(start - above, stop + -stop % head_dim)
        numbers = np.arange(above, above + stop - start)
        return heads[numbers - numbers % head_dim + order[numbers % head_dim]]

    return LazyArray(weight.dtype, weight.shape, rows)


def _scales(tensors: Tensors, parts: Sequence[StoredTensor], name: str) -> list[StoredTensor]:
    """Return the scales of each file's part of a matrix. name: such as "3_feed_forward.w1"."""
    found = []
    for rank, part in enumerate(parts):
        key = f"fp8_scales_{rank}/{name}_{rank}"
        if key not in tensors:
            raise CheckpointError(
                f"{key.partition('/')[2]} is missing from fp8_scales_{rank}.pt, or the file is: "
                f"the {_CODES} codes of {part.name} need it"
            )
        rows = part.shape[0]
        found.append(take(tensors, key, ((rows,), (rows, 1)), PARAM_DTYPES))
    return found


def _joined_scales(scales: Sequence[StoredTensor], axis: int) -> np.ndarray:
    """Join scales: float32 [out] if the parts are rows, [out, parts] if they are columns."""
    values = [scale_values(scale).reshape(-1) for scale in scales]
    if axis == 0 or len(values) == 1:
        return np.concatenate(values)
    return np.stack(values, axis=1)


META = Dialect(
    name="meta",
    description="Meta's consolidated.*.pth and params.json, bfloat16 or with FP8 feed-forwards",
    applies=applies,
    plan=plan,
)
