"""Keeps the StableHLO of programs on disk, so that a second start need not trace them.

XLA's compilation cache saves compiling, but JAX has to trace and lower a program before it can look
there, and that takes longer than fetching it. `kept_jit` is a `jax.jit` that reads a function's
StableHLO from a file if there is one for everything that tracing depends on (`_key`), and otherwise
traces it and writes the file (`jax.export`). The rest remains `jax.jit`'s work: static and donated
arguments, dispatch, and the lookup in XLA's cache, whose key includes the compiler, its flags and
the processor.

A file is StableHLO with a checksum: it is compiled, never unpickled. Every change of the code makes
new files, so the least recently used ones are removed when all together exceed `MAX_BYTES`.

So far this works only if JAX has a single device and that is a CPU; elsewhere programs are traced.
"""

import contextlib
import functools
import hashlib
import inspect
import logging
import os
import platform
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import export

from llama_jax.engine import compile_cache
from pallas_kernels.cpu import library
from pallas_kernels.fp8_matmul import cpu

# One start of a model needs one or two megabytes.
MAX_BYTES = 64 * 2**20

_log = logging.getLogger(__name__)
_DIRECTORY = "traced"
_DIGEST_BYTES = hashlib.sha256().digest_size
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")
# Settings of jax.config about where programs are kept and what is logged.
_IRRELEVANT = (
    "jax_compilation_cache", "jax_debug_log", "jax_dump_ir", "jax_enable_compilation_cache",
    "jax_explain_cache", "jax_log", "jax_persistent_cache", "jax_raise_persistent_cache",
)  # fmt: skip


def kept_jit(
    function: Callable[..., Any], *, static_argnames: str | Sequence[str] = (), **settings: Any
) -> Any:
    """Return `jax.jit(function, static_argnames=..., **settings)`, and keep its traces on disk.

    Static arguments need a complete `repr`. Classes of `flax.struct` in the result must be declared
    by `returns`. `inspect.unwrap` gives the function back.
    """
    names = (static_argnames,) if isinstance(static_argnames, str) else tuple(static_argnames)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        directory = _directory()
        if directory is None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        static = {name: bound.arguments.pop(name) for name in names}
        leaves, tree = jax.tree.flatten(bound.arguments)
        with library.taken_for_granted():
            exported = _exported(directory, function, static, leaves, tree)
        # XLA needs the kernels now. If the C++ compiler fails, there is another program.
        if _calls_kernels(exported) and library.why_not():
            exported = _exported(directory, function, static, leaves, tree)
        return exported.call(*leaves)

    return jax.jit(traced, static_argnames=names, **settings)


def _exported(
    directory: Path, function: Callable[..., Any], static: Mapping[str, Any], leaves: Any, tree: Any
) -> export.Exported:
    """Read a function's StableHLO, or trace it and write the file."""
    avals = [jax.typeof(leaf) for leaf in leaves]
    path = directory / f"{function.__name__}-{_key(function, static, avals, tree)}"
    if exported := _read(path):
        return exported

    def flat(*leaves: Any) -> Any:
        return function(**jax.tree.unflatten(tree, leaves), **static)

    flat.__name__ = function.__name__
    # The key includes whether the CPU's kernels run, so their custom calls are safe here.
    allowed = [export.DisabledSafetyCheck.custom_call(each) for each in library.TARGETS]
    allowed.append(export.DisabledSafetyCheck.platform())  # see `_deserialized`; it is in the key
    blob = export.export(jax.jit(flat), disabled_checks=allowed)(*avals).serialize()
    _write(path, blob)
    # What tracing has made would live as long as the program does.
    return _deserialized(blob)


def _deserialized(blob: bytearray) -> export.Exported:
    """Deserialize a program. Unless it needs LAPACK, it has no platforms: before a call of one for
    "cpu" JAX initialises LAPACK by importing scipy.linalg, which takes a fifth of a second."""
    exported = export.deserialize(blob)
    if b"lapack" in exported.mlir_module_serialized:
        return exported
    return replace(exported, platforms=())


def _calls_kernels(exported: export.Exported) -> bool:
    """Return whether a program calls one of the CPU's kernels."""
    return any(name.encode() in exported.mlir_module_serialized for name in library.TARGETS)


def begin_to_compile(
    jobs: Sequence[tuple[Any, tuple[Any, ...], Mapping[str, Any]]],
) -> dict[Any, list[Future[None]]]:
    """Begin to compile programs of `jax.jit` in threads, and return when all are traced.

    jobs: programs with their arguments and static arguments. The arguments are not needed any more
        afterwards, so they may be donated.
    Returns for each program what ends when it is compiled. An error is that of the program, which
    fails in the same way when it is called.
    """
    pool = ThreadPoolExecutor(2 * len(jobs))
    traced: list[Future[Any]] = []
    compiled: dict[Any, list[Future[None]]] = {}
    is_given_up = threading.Event()

    def compile_(traced: Future[Any]) -> None:
        lowered = traced.result()
        if not is_given_up.is_set():
            lowered.compile()

    for program, args, static in jobs:
        traced.append(pool.submit(program.lower, *args, **static))
        compiled.setdefault(program, []).append(pool.submit(compile_, traced[-1]))
    pool.shutdown(wait=False)
    try:
        wait(traced)
    except BaseException:  # an interrupt
        is_given_up.set()
        raise
    return compiled


def returns(*classes: type) -> None:
    """Declare classes of `flax.struct`, without static fields, that kept functions return."""
    for each in classes:
        export.register_pytree_node_serialization(
            each,
            serialized_name=f"{each.__module__}.{each.__qualname__}",
            serialize_auxdata=lambda _: b"",
            deserialize_auxdata=lambda _: (),
            from_children=functools.partial(_rebuilt, each),
        )


def _rebuilt(cls: type, _: Any, children: Sequence[Any]) -> Any:
    return cls(*children)


def _directory() -> Path | None:
    """Return the directory of traces, or None if none are kept (see the module's docstring)."""
    directory, mesh = compile_cache.directory(), jax.sharding.get_abstract_mesh()
    is_plain = (
        jax.default_backend() == "cpu"
        and jax.device_count() == 1
        and mesh.empty
        and mesh.abstract_device is None
        and not jax.config.jax_disable_jit
    )
    return directory / _DIRECTORY if directory and is_plain else None


def _key(
    function: Callable[..., Any], static: Mapping[str, Any], avals: Sequence[Any], tree: Any
) -> str:
    """Hash everything that the StableHLO depends on: code and libraries, JAX's settings, the
    device, whether the CPU's kernel runs, static arguments, and shapes and dtypes of the others."""
    settings = {
        name: getattr(jax.config, name, value)
        for name, value in jax.config.values.items()
        if not name.startswith(_IRRELEVANT)
    }
    parts = (
        _software(), sorted(settings.items()),
        jax.devices()[0].device_kind, cpu.instructions_here(),
        function.__module__, function.__qualname__, sorted(static.items()), str(tree),
        [(each.shape, str(each.dtype), each.weak_type) for each in avals],
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _software() -> tuple[str, ...]:
    """Return the versions of Python and the libraries, and a digest of this project's code."""
    import pallas_kernels

    digest = hashlib.sha256()
    for package in (Path(__file__).parents[1], Path(pallas_kernels.__file__).parent):
        for path in sorted([*package.rglob("*.py"), *package.glob("tuned/*.json")]):
            digest.update(f"{path.relative_to(package.parent)}\n".encode())
            digest.update(path.read_bytes())
    return (platform.python_version(), *map(version, _LIBRARIES), digest.hexdigest())


def _read(path: Path) -> export.Exported | None:
    """Read a file of `_write` and mark it as used; None if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a read-only directory
        os.utime(path)
    digest, blob = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(blob).digest() != digest:
        _log.info("%s is damaged: its program is traced again", path)
        return None
    return _deserialized(bytearray(blob))


def _write(path: Path, blob: bytearray) -> None:
    """Write a program atomically if the directory is writable, and make room for it."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(blob).digest() + blob)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
        _trim(path.parent)
    except OSError as error:
        _log.info("%s is not kept: %s", path, error)


def _trim(directory: Path) -> None:
    """Remove the least recently used files until the rest fit in `MAX_BYTES`.

    Other processes may do the same at the same time; one that misses a file traces its program.
    """
    files = []
    for entry in os.scandir(directory):
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat()
            files.append((status.st_mtime_ns, status.st_size, entry.path))
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > MAX_BYTES:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
