"""Reads the tensors that a state dict's pickle describes, without unpickling it.

A pickle is a program that may import and call anything. This interpreter has the few instructions
that `torch.save` uses for state dicts. It imports and calls nothing: it compares the names in the
program with a list, and records what they would build.

Source: the instructions in pickletools; `torch._utils._rebuild_tensor_v2`, `_rebuild_tensor_v3`
and `persistent_id` in torch/serialization.py.
"""

import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.store import CheckpointError

# The pickles of Llama 3.1 405B are a quarter of a megabyte.
MAX_PROGRAM = 4 * 1024 * 1024

_STORAGES: Mapping[str, np.dtype] = MappingProxyType(
    {
        f"torch.{name}Storage": np.dtype(dtype)
        for name, dtype in {
            "Double": np.float64, "Float": np.float32, "Half": np.float16,
            "BFloat16": ml_dtypes.bfloat16, "Long": np.int64, "Int": np.int32, "Short": np.int16,
            "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
        }.items()
    }
)  # fmt: skip
_UNTYPED = "torch.storage.UntypedStorage"
# Dtypes without storage classes: their tensors are views of untyped storages.
_DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        f"torch.{name}": np.dtype(getattr(ml_dtypes, name))
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu")
    }
)
_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_TENSOR_OF_DTYPE = "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"
_NAMES = {*_STORAGES, _UNTYPED, *_DTYPES, _DICT, _TENSOR, _TENSOR_OF_DTYPE, _PARAMETER}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
}  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """A storage: bytes beside the pickle.

    key: its name. length: in elements of dtype, or in bytes if dtype is None.
    """

    key: str
    dtype: np.dtype | None
    length: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, unchecked. offset, strides: in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """Stands for the class or function of that name."""

    dotted: str


def described_tensors(program: bytes) -> dict[str, Tensor]:
    """Return the tensors of a pickled state dict, by name.

    Raises `CheckpointError`, which names the offending object, unless the program describes a flat
    dictionary of plain tensors.
    """
    if len(program) > MAX_PROGRAM:
        raise CheckpointError(f"a pickle of {len(program)} bytes is no state dict")
    try:
        found = _interpret(program)
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the pickle is damaged ({error!r}). Download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"holds {_kind(found)}, a dictionary of tensors is expected")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{name!r} is {_kind(value)}, a tensor is expected")
    return found


def _interpret(program: bytes) -> Any:
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each open mark
    memo: dict[int, Any] = {}
    argument: Any
    for instruction, argument, _ in pickletools.genops(program):
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                break
            case name if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case name if name in _LITERALS:
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            case name if name in _TUPLES:
                stack.append(tuple(_pop(stack, _TUPLES[name])))
            case "APPENDS" | "SETITEMS":
                items, stack = stack, below.pop()
                _extend(stack[-1], items)
            case "APPEND":
                [item] = _pop(stack, 1)
                _extend(stack[-1], [item])
            case "SETITEM":
                items = _pop(stack, 2)
                _extend(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_name(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*_pop(stack, 2)))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                function, arguments = _pop(stack, 2)
                stack.append(_reduce(function, arguments))
            case "BUILD":
                stack.pop()  # attributes, such as a state dict's _metadata
                if not isinstance(stack[-1], dict):
                    raise CheckpointError(f"sets attributes of {_kind(stack[-1])}")
            case name:
                raise CheckpointError(f"uses {name}, of which no state dict consists")
    [result] = stack
    return result


def _pop(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError("the stack is empty")
    popped = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return popped


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
        return
    if not isinstance(target, dict):
        raise TypeError(f"adds items to {_kind(target)}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise TypeError(f"{_kind(key)} as a key")
        if key in target:
            raise CheckpointError(f"{key!r} appears twice")
        target[key] = value


def _name(module: Any, name: Any) -> _Name:
    dotted = f"{module}.{name}"
    if dotted not in _NAMES:
        raise CheckpointError(
            f"asks for {dotted}, which is not run. Only plain tensors are read: no classes of "
            "tensors, such as torchao's, no modules, no code. Save the model as safetensors, in a "
            "layout that is supported."
        )
    return _Name(dotted)


def _storage(identifier: Any) -> Storage:
    match identifier:
        case ("storage", _Name(dotted), str(key), _, int(length)) if (
            dotted in _STORAGES or dotted == _UNTYPED
        ):
            return Storage(key, _STORAGES.get(dotted), length)
    raise CheckpointError("refers to something outside itself that is not a storage")


def _reduce(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Name(dotted), () if dotted == _DICT:
            return {}
        case _Name(dotted), (Tensor() as tensor, _, _) if dotted == _PARAMETER:
            return tensor
        case _Name(dotted), (
            Storage(dtype=np.dtype() as dtype) as storage,
            int(offset), tuple(shape), tuple(strides), _, _,
        ) if dotted == _TENSOR:  # fmt: skip
            return Tensor(storage, dtype, offset, shape, strides)
        case _Name(dotted), (
            Storage(dtype=None) as storage,
            int(offset), tuple(shape), tuple(strides), _, _, _Name(dtype_name),
        ) if dotted == _TENSOR_OF_DTYPE:  # fmt: skip
            return Tensor(storage, _DTYPES[dtype_name], offset, shape, strides)
    called = function.dotted if isinstance(function, _Name) else _kind(function)
    raise CheckpointError(f"calls {called} with arguments that are not supported")


def _kind(value: Any) -> str:
    return f"an object of type {type(value).__name__}"
