"""Defines dialects and their result: a canonical tree of arrays that are read lazily."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from converters.finite import has_nonfinite
from converters.safetensors_reader import StoredTensor, read_rows
from converters.source import Source
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.model.config import PARAM_DTYPES
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.kv_cache import KVScales

PIECE_BYTES = 8 * 1024 * 1024
# Pieces end at multiples of this, so that no block of scales is split.
_ROW_MULTIPLE = 128

Shape = tuple[int, ...]
Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class LazyArray:
    """A canonical array that is read lazily.

    rows: rows(start, stop) reads this range of axis 0; a scalar has one row.
    """

    dtype: np.dtype
    shape: Shape
    rows: Callable[[int, int], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        return self.rows(0, (self.shape or (1,))[0])


def piece_rows(shape: Shape, itemsize: int) -> int:
    """Return the number of rows to read at a time, for about `PIECE_BYTES`: all rows of a small
    array, else a multiple of 128."""
    if not shape:
        return 1
    rows = PIECE_BYTES // max(1, math.prod(shape[1:]) * itemsize)
    return min(max(rows // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE, shape[0])


def pieces(array: LazyArray) -> Iterator[np.ndarray]:
    """Yield the array from its first row to its last, `piece_rows` at a time."""
    rows = (array.shape or (1,))[0]
    step = piece_rows(array.shape, array.dtype.itemsize)
    for start in range(0, rows, step):
        yield array.rows(start, min(start + step, rows))


@dataclass(frozen=True)
class Module:
    """A module's arrays by leaf name (weight, weight_scale, input_scale), and their format."""

    format: WeightFormat
    arrays: Mapping[str, LazyArray]


@dataclass(frozen=True)
class Plan:
    """A checkpoint in canonical form.

    modules: by module path ("layers_0/mlp/up_proj").
    used: names of the source's tensors that they use.
    kv_scales: scales for an FP8 cache, or None.
    """

    modules: Mapping[str, Module]
    used: frozenset[str]
    kv_scales: KVScales | None = None

    @property
    def output(self) -> str:
        """Return the path of the output matrix, which is the embedding if embeddings are tied."""
        return "lm_head" if "lm_head" in self.modules else "embed_tokens"


@dataclass(frozen=True)
class Dialect:
    """One tool's layout.

    applies: applies(source) returns whether a checkpoint has this layout, from its configs and
        tensors alone.
    plan: plan(source, weights) returns the checkpoint in canonical form; weights has the shape of
        each module's weight, by module path.
    """

    name: str
    description: str
    applies: Callable[[Source], bool]
    plan: Callable[[Source, Mapping[str, Shape]], Plan]


def source_name(path: str) -> str:
    """Return Hugging Face's name of a module.

    source_name("layers_0/mlp/up_proj")    # "model.layers.0.mlp.up_proj"
    """
    name = path.replace("layers_", "layers.").replace("/", ".")
    return name if name == "lm_head" else f"model.{name}"


def take(tensors: Tensors, name: str, shapes: tuple[Shape, ...], dtypes: tuple[str, ...]
         ) -> StoredTensor:  # fmt: skip
    """Return the tensor `name`, which must have one of these shapes and (numpy) dtypes."""
    if name not in tensors:
        raise CheckpointError(f"{name} is missing from the checkpoint")
    tensor = tensors[name]
    if tensor.shape not in shapes:
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}, the config makes it "
            f"{' or '.join(str(list(shape)) for shape in shapes)}"
        )
    if tensor.dtype.name not in dtypes:
        raise CheckpointError(f"{name} is {tensor.dtype.name}, expected {' or '.join(dtypes)}")
    return tensor


def as_stored(tensor: StoredTensor) -> LazyArray:
    """Return the tensor unchanged."""
    return LazyArray(
        tensor.dtype, tensor.shape, lambda start, stop: finite_rows(tensor, start, stop)
    )


def finite_rows(
    tensor: StoredTensor, start: int, stop: int, dtype: np.dtype | None = None
) -> np.ndarray:
    """Call `read_rows` and view the result as `dtype`.

    Raises `CheckpointError` for NaN and infinity.
    """
    rows = read_rows(tensor, start, stop)
    rows = rows if dtype is None else rows.view(dtype)
    if has_nonfinite(rows):
        row = start + next(i for i, row in enumerate(rows) if has_nonfinite(row))
        raise CheckpointError(
            f"{tensor.name} has NaN or infinity in row {row}: the checkpoint is damaged"
        )
    return rows


def dense_module(tensors: Tensors, path: str, shape: Shape) -> Module:
    """Return a module with an unquantised weight in its own dtype."""
    tensor = take(tensors, f"{source_name(path)}.weight", (shape,), PARAM_DTYPES)
    return Module(WeightFormat(tensor.dtype.name), {"weight": as_stored(tensor)})


def is_linear(path: str) -> bool:
    """Return whether the module at this path is a matrix that tools quantise."""
    return path == "lm_head" or path.endswith("_proj")


def bits_as_e4m3(tensor: StoredTensor) -> LazyArray:
    """Return float8_e4m3fn codes that are stored as such, or as bytes of another 8-bit dtype."""
    dtype = np.dtype(ml_dtypes.float8_e4m3fn)
    return LazyArray(
        dtype, tensor.shape, lambda start, stop: finite_rows(tensor, start, stop, dtype)
    )


def constant(values: np.ndarray) -> LazyArray:
    """Return an array that is already in memory."""
    return LazyArray(
        values.dtype,
        values.shape,
        lambda start, stop: values[start:stop] if values.ndim else values,
    )
