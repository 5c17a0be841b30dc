"""Compiles this package's C++ library at first use, keeps it, loads it and registers it with XLA.

The machine's own compiler builds it once, in `$LLAMA_JAX_CACHE/cpu` (by default
`~/.cache/llama_jax/cpu`), under a hash of the sources, the compiler and jax's version, whose
headers it includes. It has code for every instruction set and selects the best at run time, so
machines may share the directory. A failure, such as a missing compiler, is never an error, but a
reason why the kernels cannot run, which `why_not` returns.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import jax

from pallas_kernels import device

_log = logging.getLogger(__name__)
_loading = threading.Lock()

# From worst to best, numbered from 1 as in instructions.h.
Instructions = Literal["portable", "avx2", "avx512", "avx512_bf16"]
# XLA's names in `--xla_cpu_max_isa` for all but the best.
_LIMITS: dict[str, Instructions] = {
    "SSE4_2": "portable", "AVX": "portable", "AVX2": "avx2", "AVX512": "avx512",
    "AVX512_VNNI": "avx512",
}  # fmt: skip
# XLA's names for what the library has.
MATMUL, ATTENTION = "fp8_matmul_cpu", "paged_attention_cpu"
TARGETS = (MATMUL, ATTENTION)
_SOURCES = (
    "kernels.cpp", "common.h", "instructions.h", "tiles.inc", "attention.inc", "fp8_matmul.h",
    "paged_attention.h",
)  # fmt: skip
# No contraction, so that all tiles round alike. No ivopts, with which GCC keeps addresses in
# registers that the loops need for weights. No warnings, which are for those who change the code.
_FLAGS = ("-std=c++17", "-O3", "-fno-ivopts", "-ffp-contract=off", "-fPIC", "-shared", "-w")
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_SECONDS = 300


def why_not() -> str | None:
    """Return why there is no library here; None once it is loaded and XLA knows `TARGETS`.

    The first call compiles if needed, which takes seconds.
    """
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def not_here() -> str | None:
    """Return why the kernels cannot run on the target device; None if they can."""
    if device.platform() != "cpu":
        return f"JAX runs on {device.platform()}, not on a CPU"
    return why_not()


def slower_than_xla() -> str | None:
    """Return why XLA's code is faster with the instructions here; None if it is not."""
    return "without AVX2 XLA's code is faster" if best() == "portable" else None


def number(instructions: Instructions | None) -> int:
    """Return the library's number of an instruction set, or of the best for None."""
    return 0 if instructions is None else 1 + get_args(Instructions).index(instructions)


def best() -> Instructions:
    """Return the best instruction set of this machine within `--xla_cpu_max_isa` of XLA_FLAGS.

    Raises RuntimeError if there is no library.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return _within_limit(loaded)


def build(directory: Path, extra_flags: Sequence[str] = ()) -> Path:
    """Return the library's path in `directory`, and compile it unless it is there and intact.

    Raises RuntimeError without a compiler or if it fails, and OSError if the directory cannot be
    written to.
    """
    compiler = _compiler()
    flags = [*_FLAGS, *extra_flags]
    sources = [Path(__file__).with_name(name) for name in _SOURCES]
    parts = [_version_of(compiler), jax.__version__, platform.machine(), *flags]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = directory / f"kernels-{digest.hexdigest()[:32]}.so"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _one_at_a_time(directory):
        if not _is_whole(path):
            _compile([compiler, *flags, "-I", jax.ffi.include_dir(), str(sources[0])], path)
    return path


def _load() -> ctypes.CDLL | str:
    """Return the library, or why there is none. If threads call this together, one compiles."""
    with _loading:
        return _loaded()


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    if sys.platform == "win32" or platform.machine().lower() not in ("x86_64", "amd64"):
        return f"there is no code for {platform.machine()} that is faster than XLA's"
    home = os.environ.get("LLAMA_JAX_CACHE", "~/.cache/llama_jax")
    if not home:
        return "LLAMA_JAX_CACHE is empty, so there is no directory for the library"
    try:
        library = ctypes.CDLL(str(build(Path(home).expanduser().absolute() / "cpu")))
        library.llama_jax_instructions.argtypes = [ctypes.c_int64]
        library.llama_jax_instructions.restype = ctypes.c_int64
        handlers = {
            MATMUL: jax.ffi.pycapsule(library.llama_jax_fp8_matmul),
            ATTENTION: jax.ffi.pycapsule(library.llama_jax_paged_attention),
        }
    except (OSError, RuntimeError, AttributeError) as error:
        _log.warning(
            "FP8 weights and attention go through XLA, at about half the speed: %s",
            reason := str(error),
        )
        return reason
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    _within_limit(library)
    return library


def _within_limit(library: ctypes.CDLL) -> Instructions:
    """Limit the library to instructions that XLA may use. Returns the best that remains."""
    found = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    most = _LIMITS.get(found[-1].upper() if found else "", get_args(Instructions)[-1])
    which: Instructions = get_args(Instructions)[library.llama_jax_instructions(number(most)) - 1]
    return which


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    for name in names:
        if found := shutil.which(name):
            return found
    raise RuntimeError(f"there is no C++ compiler ({', '.join(names)})")


def _version_of(compiler: str) -> str:
    return compiler + _run([compiler, "--version"])


def _compile(command: Sequence[str], path: Path) -> None:
    """Compile to `path` atomically, with a checksum beside it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        _run([*command, "-o", str(made)])
        checksum = made.with_suffix(".sha256")
        checksum.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(checksum, path.with_suffix(".sha256"))
        os.replace(made, path)


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"the C++ compiler could not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [
            f"exit status {done.returncode}"
        ]
        raise RuntimeError(f"the C++ compiler {command[0]} failed: {lines[0]}")
    return done.stdout


def _is_whole(path: Path) -> bool:
    try:
        expected = path.with_suffix(".sha256").read_text()
        return hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except OSError:
        return False


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Lock the directory, so that one of several processes compiles and the others wait."""
    import fcntl  # not on Windows

    with open(directory / "lock", "w") as lock:
        with contextlib.suppress(OSError):  # without file locks, each process compiles for itself
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
