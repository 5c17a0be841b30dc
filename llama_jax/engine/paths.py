"""Finds which kernel or XLA product each matmul and attention uses, by reading traced programs.

A kernel appears in a program's jaxpr by its name, and what XLA computes appears as products. Name
stacks hold the module and the `Choice` of each, and following the parameters shows which matrices
it reads. Nothing is compiled or run, and no device is needed: with
`jax.sharding.use_abstract_mesh(pallas_kernels.dev.sm90.H200)` around `programs` and `calls`, the
result is for an H200.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Var, jaxprs_in_params

from llama_jax.engine.draw_kinds import Kind
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.engine.steps import (
    DecodeState,
    decode_steps,
    draw_step,
    has_free_conditions,
    prefill_step,
    score_step,
    state_builder,
)
from llama_jax.model.kv_cache import KVDtype, storage_dtype
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec, Params
from pallas_kernels import device, e4m3
from pallas_kernels.choice import Choice, Kernel, choice_in

_KERNELS = ("mpmd_map", "pallas_call", "ffi_call")
# The rates of an H200's data sheet, without sparsity: FP8 1,979, bf16 989, float32 67 TFLOP/s.
_UNITS = {
    "f8_e4m3fn": "FP8 tensor cores",
    "bf16": "bf16 tensor cores, 1/2 of FP8's rate",
    "f16": "fp16 tensor cores, 1/2 of FP8's rate",
    "f32": "no tensor cores, 1/30 of FP8's rate",
}
_ITEMSIZE = {"bf16": 2, "f16": 2, "f32": 4}


@dataclass(frozen=True)
class Program:
    """A step to compile and the shapes of its arguments. Prefill and decode donate the second.

    name: for readers, with its sizes.
    """

    phase: Literal["prefill", "decode", "scoring"]
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class KernelCall:
    """A kernel's launch, or neighbouring products of one module that XLA computes.

    module: its place, such as "layers_0/self_attn"; "" outside the model's modules.
    matrices: module paths of those it reads: several in a fused launch, none in attention.
    path: the launch's name, or "xla".
    operands: of the launch or the first product, such as "bf16[8,4096]".
    choice: the model's choice; None if there was nothing to choose.
    cost: the units that multiply, and the form in which they get the matrices.
    """

    module: str
    matrices: tuple[str, ...]
    path: str
    operands: tuple[str, ...]
    choice: Choice[Kernel] | None
    cost: str = ""

    @property
    def why_not(self) -> str | None:
        """Return why XLA multiplies although there are kernels; None if there are none."""
        return self.choice.why_no_kernel if self.choice else None


def programs(
    spec: ModelSpec,
    options: EngineOptions,
    kv_dtype: KVDtype,
    prompts: int = 1,
    kind: Kind = "everything",
) -> tuple[Program, Program]:
    """Return the programs of prefill and decode for the target device.

    prompts: full chunks in the prefill program, each of which ends a prompt, so that `prefill_step`
        is followed by `draw_step`.
    kind: of the draws.
    """
    rows, chunk = options.max_batch_size, min(options.prefill_chunk, options.max_seq_len)
    params, state = _stored(spec), _state(spec, options, storage_dtype(kv_dtype, spec.dtype))
    table = _ints(rows, options.pages_per_slot)
    of_prompt, active = _ints(prompts), jax.ShapeDtypeStruct((rows,), jnp.bool_)
    # Unwrapped, because a program that `program_cache` has kept has no jaxpr to read.
    append, draw, steps = map(inspect.unwrap, (prefill_step, draw_step, decode_steps))

    def prefill(params: Params, state: DecodeState, table: Any, *appended: Any) -> Any:
        *chunk, remaining = appended
        state, (hidden, _) = append(params, state, table, *chunk, spec=spec)
        return draw(params, state, hidden, chunk[-1], remaining, spec=spec, kind=kind)

    decode = partial(
        steps, spec=spec, max_steps=options.max_steps, kind=kind, stops_early=has_free_conditions()
    )
    given = (params, state, table)
    appended = (_ints(prompts, chunk), of_prompt, of_prompt, of_prompt)
    return (
        Program("prefill", f"prefill of {prompts} x {chunk} tokens", prefill, given + appended),
        Program("decode", f"decode of {rows} rows", decode, (*given, active, _ints())),
    )


def scoring(spec: ModelSpec, options: EngineOptions) -> Program:
    """Return the program that computes logprobs of a chunk's tokens after prefill."""
    count = min(options.prefill_chunk, options.max_seq_len)
    hidden = jax.ShapeDtypeStruct((1, count, spec.config.hidden_size), spec.dtype)
    score = partial(inspect.unwrap(score_step), spec=spec)
    given = (_stored(spec), hidden, _ints(1, count), jax.ShapeDtypeStruct((), jnp.bool_))
    return Program("scoring", f"logprobs of {count} tokens", score, given)


def calls(program: Program) -> list[KernelCall]:
    """Return the calls in program order. A loop's body counts once, a condition's branches each."""
    traced = jax.jit(program.function).trace(*program.arguments)
    leaves = jax.tree_util.tree_leaves_with_path(program.arguments)
    names = [
        frozenset({"/".join(key.key for key in path[1:-1])} if _is_matrix(path, leaf) else ())
        for path, leaf in leaves
    ]
    stored = {
        name: leaf.dtype for each, (_, leaf) in zip(names, leaves, strict=True) for name in each
    }
    jaxpr = traced.jaxpr.jaxpr
    modules = {
        "/".join(name.split("/")[:depth]) for each in names for name in each for depth in (1, 2, 3)
    }
    found = _walk(jaxpr, dict(zip(jaxpr.invars, names, strict=True)), (), _platform(), modules)
    return [replace(call, cost=_cost(call, stored)) for call in _merged(found)]


def _cost(call: KernelCall, stored: Mapping[str, jnp.dtype]) -> str:
    """Describe what multiplies. stored: the dtypes of the matrices."""
    if call.choice and call.path in call.choice.kernel.launches:
        return call.choice.kernel.launches[call.path]
    operand = call.operands[0].partition("[")[0]
    unit = _UNITS.get(operand, operand) if device.platform() == "gpu" else operand
    of_matrices = {jnp.dtype(stored[name]).itemsize for name in call.matrices}
    is_upcast = of_matrices and min(of_matrices) < _ITEMSIZE.get(operand, 0)
    return f"{unit}; weight upcast in pieces" if is_upcast else unit


def _walk(
    jaxpr: Jaxpr,
    reads: dict[Var, frozenset[str]],
    scopes: tuple[str, ...],
    platform: str,
    modules: set[str],
) -> Iterator[KernelCall]:
    """Yield the calls of a jaxpr. reads: variables that hold matrices or parts of them."""

    def of(atom: Any) -> frozenset[str]:
        return reads.get(atom, frozenset()) if isinstance(atom, Var) else frozenset()

    for eqn in jaxpr.eqns:
        inner = (*scopes, *(scope.name for scope in eqn.source_info.name_stack.stack))
        primitive = eqn.primitive.name
        if primitive in _KERNELS or primitive == "dot_general":
            is_kernel = primitive in _KERNELS
            yield KernelCall(
                _module(inner, modules),
                tuple(dict.fromkeys(name for atom in eqn.invars for name in sorted(of(atom)))),
                str(eqn.params.get("name") or eqn.params["target_name"]) if is_kernel else "xla",
                tuple(atom.aval.str_short(short_dtypes=True) for atom in eqn.invars),
                choice_in(inner),
            )
        elif bodies := list(_bodies(eqn, platform)):
            # The operands of a loop or condition itself come before those of its bodies.
            for body in bodies:
                known = dict(zip(reversed(body.invars), map(of, reversed(eqn.invars))))  # noqa: B905
                yield from _walk(body, known, inner, platform, modules)
                for out, left in zip(reversed(eqn.outvars), reversed(body.outvars)):  # noqa: B905
                    reads[out] = known.get(left, frozenset()) if isinstance(left, Var) else of(left)
        elif primitive == "optimization_barrier":
            reads.update(zip(eqn.outvars, map(of, eqn.invars), strict=True))
        elif primitive != "gather":  # an embedding lookup: its result is activations
            reads.update(dict.fromkeys(eqn.outvars, frozenset().union(*map(of, eqn.invars))))


def _bodies(eqn: JaxprEqn, platform: str) -> Iterable[Jaxpr]:
    """Return the jaxprs inside an equation; of several for platforms, the target's alone."""
    if eqn.primitive.name == "while":
        return (eqn.params["body_jaxpr"].jaxpr,)
    if platforms := eqn.params.get("branches_platforms"):
        chosen = next(i for i, each in enumerate(platforms) if each is None or platform in each)
        return (eqn.params["branches"][chosen].jaxpr,)
    return jaxprs_in_params(eqn.params)


def _module(scopes: tuple[str, ...], modules: set[str]) -> str:
    """Return the innermost module whose path is among the scopes."""
    path = ""
    for part in (part for scope in scopes for part in scope.split("/")):
        if (longer := f"{path}/{part}".lstrip("/")) in modules:
            path = longer
    return path


def _merged(found: Iterable[KernelCall]) -> Iterator[KernelCall]:
    """Merge neighbouring XLA products of the same module and matrices into the first."""
    previous = None
    for call in found:
        key = (call.module, call.matrices, call.path, call.choice)
        if call.path != "xla" or key != previous:
            yield call
        previous = key


def _platform() -> str:
    """Return the target platform by its name in `lax.platform_dependent`."""
    return "cuda" if device.platform() == "gpu" else device.platform()


def _is_matrix(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> bool:
    return path[0].idx == 0 and path[-1].key == "weight" and len(leaf.shape) == 2


def _stored(spec: ModelSpec) -> Params:
    """Return the parameters as they are stored on the device."""
    fp8 = jnp.dtype(jnp.int8) if device.platform() == "cpu" else e4m3.DTYPE
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, fp8) if leaf.dtype == e4m3.DTYPE else leaf,
        abstract_params(spec),
    )


def _state(spec: ModelSpec, options: EngineOptions, cache_dtype: jnp.dtype) -> DecodeState:
    sizes = options.max_batch_size, options.max_seq_len, cache_dtype
    placed = jax.eval_shape(state_builder(spec, *sizes, num_pages=options.pool_size))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), placed)


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
