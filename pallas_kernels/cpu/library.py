"""The library of this package's C++: compiled at first use, kept, loaded, made known to XLA.

The machine's own compiler makes it, once: it lies in `$LLAMA_JAX_CACHE/cpu` (`~/.cache/llama_jax/
cpu`) under a hash of the sources, the compiler and jax's version, whose headers it includes. It
holds every instruction set and takes the best when it runs, so that machines may share the
directory. What stands in the way, a machine without a compiler say, is a reason why the kernels
cannot run, never an error: `why_not` tells it.
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

_log = logging.getLogger(__name__)
_loading = threading.Lock()

# From the least to the best, numbered from 1 as in fp8_matmul.cpp.
Instructions = Literal["portable", "avx2", "avx512", "avx512_bf16"]
# XLA's names, in `--xla_cpu_max_isa`, of what is less than the best.
_LIMITS: dict[str, Instructions] = {
    "SSE4_2": "portable", "AVX": "portable", "AVX2": "avx2", "AVX512": "avx512",
    "AVX512_VNNI": "avx512",
}  # fmt: skip
TARGET = "fp8_matmul_cpu"
_SOURCES = ("fp8_matmul.cpp", "tiles.inc")
# No sum may be contracted in one tile and not in another. With ivopts, GCC keeps addresses in
# registers that the loops need for weights. Warnings are for those who change it.
_FLAGS = ("-std=c++17", "-O2", "-fno-ivopts", "-ffp-contract=off", "-fPIC", "-shared", "-w")
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_SECONDS = 300


def why_not() -> str | None:
    """Return why there is no library here; None once it is loaded and XLA knows `TARGET`.

    The first call compiles, if need be, which takes seconds.
    """
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def number(instructions: Instructions | None) -> int:
    """Return what the library calls an instruction set; None is the best."""
    return 0 if instructions is None else 1 + get_args(Instructions).index(instructions)


def best() -> Instructions:
    """The best instruction set of this machine, and within `--xla_cpu_max_isa` of XLA_FLAGS.

    Raises RuntimeError if there is no library.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return _within_limit(loaded)


def build(directory: Path, extra_flags: Sequence[str] = ()) -> Path:
    """The library in `directory`, compiled unless it lies there already, whole.

    Raises RuntimeError if there is no compiler or it fails, OSError where nothing can be written.
    """
    compiler = _compiler()
    flags = [*_FLAGS, *extra_flags]
    sources = [Path(__file__).with_name(name) for name in _SOURCES]
    parts = [_version_of(compiler), jax.__version__, platform.machine(), *flags]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = directory / f"{TARGET}-{digest.hexdigest()[:32]}.so"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _one_at_a_time(directory):
        if not _is_whole(path):
            _compile([compiler, *flags, "-I", jax.ffi.include_dir(), str(sources[0])], path)
    return path


def _load() -> ctypes.CDLL | str:
    """The library, or why there is none. Of threads that ask together, one compiles."""
    with _loading:
        return _loaded()


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    if sys.platform == "win32" or platform.machine().lower() not in ("x86_64", "amd64"):
        return f"there is no code for {platform.machine()} that is faster than XLA's"
    home = os.environ.get("LLAMA_JAX_CACHE", "~/.cache/llama_jax")
    if not home:
        return "LLAMA_JAX_CACHE is empty, so there is no place for the library"
    try:
        library = ctypes.CDLL(str(build(Path(home).expanduser().absolute() / "cpu")))
        library.llama_jax_instructions.argtypes = [ctypes.c_int64]
        library.llama_jax_instructions.restype = ctypes.c_int64
        handler = jax.ffi.pycapsule(library.llama_jax_fp8_matmul)
    except (OSError, RuntimeError, AttributeError) as error:
        _log.warning(
            "FP8 weights go through XLA, at about half the speed: %s", reason := str(error)
        )
        return reason
    jax.ffi.register_ffi_target(TARGET, handler, platform="cpu")
    _within_limit(library)
    return library


def _within_limit(library: ctypes.CDLL) -> Instructions:
    """Keep the library within what XLA may use; the best that it has then."""
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
    """Into `path`, whole or not at all, and its checksum beside it."""
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
    """Of several processes that begin at the same time, one compiles and the others wait."""
    import fcntl  # not on Windows

    with open(directory / "lock", "w") as lock:
        with contextlib.suppress(OSError):  # file systems without locks: each compiles for itself
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
