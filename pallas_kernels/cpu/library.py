"""Loads this package's C++ libraries, which `compiler` makes at first use, for XLA.

A failure, such as a missing compiler, is never an error, but a reason why the kernels cannot run,
which `why_not` returns.
"""

import contextlib
import ctypes
import functools
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import jax

from pallas_kernels import device
from pallas_kernels.cpu import compiler
from pallas_kernels.cpu.compiler import Instructions as Instructions
from pallas_kernels.cpu.compiler import best as best

_log = logging.getLogger(__name__)
_loading = threading.Lock()

# XLA's names for what the kernels do.
MATMUL, LOGIT_STATS, ATTENTION = "fp8_matmul_cpu", "logit_stats_cpu", "paged_attention_cpu"
ROPE, NORM = "rope_and_cache_cpu", "rms_norm_cpu"
_TARGETS_OF = {
    "fp8_matmul": (MATMUL, LOGIT_STATS),
    "between_products": (ATTENTION, ROPE, NORM),
}
TARGETS = tuple(name for names in _TARGETS_OF.values() for name in names)


_is_trusting: ContextVar[bool] = ContextVar("_is_trusting", default=False)


@contextlib.contextmanager
def taken_for_granted() -> Iterator[None]:
    """Let `why_not` return None in this thread while another one compiles, so that programs can be
    traced meanwhile. Before they are compiled, `why_not` has to be asked again, outside."""
    token = _is_trusting.set(True)
    try:
        yield
    finally:
        _is_trusting.reset(token)


def why_not() -> str | None:
    """Return why there are no libraries here; None once they are loaded and XLA knows `TARGETS`.

    The first call compiles if needed, which takes seconds.
    """
    if _is_trusting.get() and _is_coming():
        return None
    with _loading:  # if threads call this together, one compiles
        return _loaded()


def not_here() -> str | None:
    """Return why the kernels cannot run on the target device; None if they can."""
    if device.platform() != "cpu":
        return f"JAX runs on {device.platform()}, not on a CPU"
    return why_not()


def slower_than_xla() -> str | None:
    """Return why XLA's code is faster with the instructions here; None if it is not."""
    return "without AVX2 or NEON XLA's code is faster" if best() == "portable" else None


def target(name: str, instructions: Instructions | None = None) -> str:
    """Return XLA's name of one of `TARGETS` with an instruction set, by default the best one, for
    which `why_not` must have returned None. Others, for tests, are compiled here."""
    if instructions is None:
        return name
    with _loading:
        _register(instructions, f"_{instructions}")
    return f"{name}_{instructions}"


def _is_coming() -> bool:
    """Return whether a compiler that is there is at work in another thread."""
    if not _begun().is_alive():
        return False
    try:
        compiler.check_platform()
        best()
    except RuntimeError:
        return False
    return True


@functools.cache
def _begun() -> threading.Thread:
    thread = threading.Thread(target=why_not, name="load")
    thread.start()
    return thread


@functools.cache
def _loaded() -> str | None:
    try:
        compiler.check_platform()
        compiler.directory()
    except RuntimeError as error:
        return str(error)
    try:
        _register(best())
    except (OSError, RuntimeError, AttributeError) as error:
        # After Ctrl-C the command ends, in which a thread that comes later can start no others.
        is_ending = not threading.main_thread().is_alive()
        if not is_ending and not isinstance(error, compiler.CompilerInterrupted):
            _log.warning(
                "FP8 weights and attention go through XLA, at about half the speed: %s", error
            )
        return str(error)
    return None


@functools.cache
def _register(instructions: Instructions, suffix: str = "") -> None:
    """Build and load the libraries of an instruction set, and give them to XLA as `TARGETS` with a
    suffix."""
    here = compiler.here()
    if instructions not in here:
        raise RuntimeError(f"this machine has no {instructions}, but {here[-1]}")
    directory = compiler.directory()
    with ThreadPoolExecutor() as pool:
        paths = pool.map(
            lambda kernel: compiler.build(directory, kernel, instructions), compiler.KERNELS
        )
        libraries = [ctypes.CDLL(str(path)) for path in paths]
    for kernel, loaded in zip(compiler.KERNELS, libraries, strict=True):
        for name in _TARGETS_OF[kernel]:
            capsule = jax.ffi.pycapsule(loaded[name])
            jax.ffi.register_ffi_target(f"{name}{suffix}", capsule, platform="cpu")
