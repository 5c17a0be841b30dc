"""Which path each matmul and each attention takes, read from the traced programs.

A kernel stands in a program's jaxpr by its name, and what is left to XLA stands there as products.
Name stacks hold the module that they belong to and the `Choice` that was made for them; the flow of
the parameters says which matrices they read. Nothing is compiled or run, and no device is needed:
`jax.sharding.use_abstract_mesh(pallas_kernels.dev.sm90.H200)` around `programs` and `calls` asks
what an H200 would run.
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
    state_builder,
)
from llama_jax.model.kv_cache import KVDtype, storage_dtype
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec, Params
from pallas_kernels import device, e4m3
from pallas_kernels.choice import Choice, Kernel, choice_in

_KERNELS = ("mpmd_map", "pallas_call", "ffi_call")
# Rates as in an H200's data sheet, without sparsity: FP8 1,979, bf16 989, float32 67 TFLOP/s.
_UNITS = {
    "f8_e4m3fn": "FP8 tensor cores",
    "bf16": "bf16 tensor cores, 1/2 of FP8's rate",
    "f16": "fp16 tensor cores, 1/2 of FP8's rate",
    "f32": "no tensor cores, 1/30 of FP8's rate",
}
_ITEMSIZE = {"bf16": 2, "f16": 2, "f32": 4}


@dataclass(frozen=True)
class Program:
    """A compiled step and the shapes of its arguments, the second of which it is to donate.

    name: with its sizes, for readers.
    """

    phase: Literal["prefill", "decode"]
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class KernelCall:
    """A kernel's launch, or neighbouring products of one module that are left to XLA.

    module: where it stands, "layers_0/self_attn"; "" outside of the model's modules.
    matrices: those it reads, by module path: several in a fused launch, none in attention.
    path: the launch's name, or "xla". operands: of the launch or the first product, such as
    "bf16[8,4096]". choice: the object by which the model called it; None where nothing was to
    choose. cost: what multiplies, and in which form it takes the matrices.
    """

    module: str
    matrices: tuple[str, ...]
    path: str
    operands: tuple[str, ...]
    choice: Choice[Kernel] | None
    cost: str = ""

    @property
    def why_not(self) -> str | None:
        """Return why XLA multiplies where there are kernels; None where there are none."""
        return self.choice.why_no_kernel if self.choice else None


def programs(
    spec: ModelSpec,
    options: EngineOptions,
    kv_dtype: KVDtype,
    prompts: int = 1,
    kind: Kind = "everything",
) -> tuple[Program, Program]:
    """Return what is done with `prompts` whole chunks that end prompts, `prefill_step` and
    `draw_step` one after the other, and `decode_steps`, on the device that is lowered for. kind: of
    the draws."""
    rows, chunk = options.max_batch_size, min(options.prefill_chunk, options.max_seq_len)
    params, state = _stored(spec), _state(spec, options, storage_dtype(kv_dtype, spec.dtype))
    table = _ints(rows, options.pages_per_row)
    of_prompt, active = _ints(prompts), jax.ShapeDtypeStruct((rows,), jnp.bool_)
    # The functions themselves: of a program that was kept (`program_cache`) nothing can be read.
    append, draw, steps = map(inspect.unwrap, (prefill_step, draw_step, decode_steps))

    def prefill(params: Params, state: DecodeState, table: Any, *appended: Any) -> Any:
        *chunk, remaining = appended
        state, hidden = append(params, state, table, *chunk, spec=spec)
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


def calls(program: Program) -> list[KernelCall]:
    """In the order of the program; a loop's body counts once, and both branches of a condition."""
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
    """stored: the dtypes of the matrices."""
    if call.choice and call.path in call.choice.kernel.launches:
        return call.choice.kernel.launches[call.path]
    operand = call.operands[0].partition("[")[0]
    unit = _UNITS.get(operand, operand) if device.platform() == "gpu" else operand
    of_matrices = {jnp.dtype(stored[name]).itemsize for name in call.matrices}
    is_widened = of_matrices and min(of_matrices) < _ITEMSIZE.get(operand, 0)
    return f"{unit}; weight widened in pieces" if is_widened else unit


def _walk(
    jaxpr: Jaxpr,
    reads: dict[Var, frozenset[str]],
    scopes: tuple[str, ...],
    platform: str,
    modules: set[str],
) -> Iterator[KernelCall]:
    """reads: variables that hold matrices, or parts of them in any form, and whose."""

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
            # A loop's and a condition's own operands come before those of their bodies.
            for body in bodies:
                known = dict(zip(reversed(body.invars), map(of, reversed(eqn.invars))))  # noqa: B905
                yield from _walk(body, known, inner, platform, modules)
                for out, left in zip(reversed(eqn.outvars), reversed(body.outvars)):  # noqa: B905
                    reads[out] = known.get(left, frozenset()) if isinstance(left, Var) else of(left)
        elif primitive == "optimization_barrier":
            reads.update(zip(eqn.outvars, map(of, eqn.invars), strict=True))
        elif primitive != "gather":  # which looks embeddings up: activations
            reads.update(dict.fromkeys(eqn.outvars, frozenset().union(*map(of, eqn.invars))))


def _bodies(eqn: JaxprEqn, platform: str) -> Iterable[Jaxpr]:
    """The jaxprs inside, of several for platforms only the one that will be lowered."""
    if eqn.primitive.name == "while":
        return (eqn.params["body_jaxpr"].jaxpr,)
    if platforms := eqn.params.get("branches_platforms"):
        chosen = next(i for i, each in enumerate(platforms) if each is None or platform in each)
        return (eqn.params["branches"][chosen].jaxpr,)
    return jaxprs_in_params(eqn.params)


def _module(scopes: tuple[str, ...], modules: set[str]) -> str:
    """The innermost module whose path the scopes spell."""
    path = ""
    for part in (part for scope in scopes for part in scope.split("/")):
        if (longer := f"{path}/{part}".lstrip("/")) in modules:
            path = longer
    return path


def _merged(found: Iterable[KernelCall]) -> Iterator[KernelCall]:
    """Without XLA's further products of the same module and matrices."""
    previous = None
    for call in found:
        key = (call.module, call.matrices, call.path, call.choice)
        if call.path != "xla" or key != previous:
            yield call
        previous = key


def _platform() -> str:
    """As `lax.platform_dependent` names it."""
    return "cuda" if device.platform() == "gpu" else device.platform()


def _is_matrix(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> bool:
    return path[0].idx == 0 and path[-1].key == "weight" and len(leaf.shape) == 2


def _stored(spec: ModelSpec) -> Params:
    """The parameters as they lie on the device."""
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
