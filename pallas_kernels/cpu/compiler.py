"""Compiles this package's C++ with the machine's own compiler, and keeps the result. Needs no JAX.

There is a library for each kernel and instruction set, and only those in use are compiled: by
default both kernels for the best set that the processor and the compiler have, at the same time.
`build` keeps a library under a hash of the sources, the instruction set, the compiler and jaxlib's
version, whose headers it includes; so machines may share the directory. `begin` builds in threads
while Python imports JAX.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import itertools
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from pallas_kernels import HAS_NVIDIA_DRIVER

# Numbered from 1 as in instructions.h.
Instructions = Literal[
    "portable", "avx2", "avx2_amd", "avx512", "avx512_bf16", "amx", "neon"
]  # fmt: skip
# By machine, from worst to best.
_ON_X86: tuple[Instructions, ...] = (
    "portable", "avx2", "avx2_amd", "avx512", "avx512_bf16", "amx",
)  # fmt: skip
_ON_ARM: tuple[Instructions, ...] = ("portable", "neon")
_MACHINES = {"x86_64": _ON_X86, "amd64": _ON_X86, "aarch64": _ON_ARM, "arm64": _ON_ARM}
# The macros that a compiler defines for a processor that has the instructions. Each set needs those
# of the sets before it, too.
_MACROS: dict[Instructions, tuple[str, ...]] = {
    "portable": (),
    "avx2": ("AVX2", "FMA", "F16C"),
    "avx2_amd": (),  # and an AMD processor, see `here`
    "avx512": ("AVX512F", "AVX512BW", "AVX512DQ", "AVX512VL"),
    "avx512_bf16": ("AVX512VBMI", "AVX512BF16"),
    "amx": ("AMX_TILE", "AMX_BF16", "GFNI"),  # and leave to use it, see `here`
    "neon": (),  # which all 64-bit ARM processors have
}
# What all AMD processors since Zen have, whose name for a compiler is znver1, znver2 and so on.
_AMD = "__znver"
# XLA's names in `--xla_cpu_max_isa` for all but the best.
_LIMITS: dict[str, Instructions] = {
    "SSE4_2": "portable", "AVX": "portable", "AVX2": "avx2_amd", "AVX512": "avx512",
    "AVX512_VNNI": "avx512", "AVX512_BF16": "avx512_bf16",
}  # fmt: skip
# Each is a file with this ending.
KERNELS = ("fp8_matmul", "between_products")
_ENDING = ".cpp"
_HEADERS = (
    "xla.h", "common.h", "instructions.h", "results.inc", "tiles.inc", "amx.inc", "attention.inc",
    "amx_attention.inc", "rows.inc",
)  # fmt: skip
# No contraction, so that all tiles round alike. No warnings, which are for those who change the
# code.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-w")
# With AVX-512 GCC's ivopts keeps addresses in vector registers, which the loops need for weights.
# Elsewhere it does not, and what it saves makes products up to a quarter faster.
_FLAGS_OF_AVX512 = ("-fno-ivopts",)
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_SECONDS = 300
# Why libraries could not be compiled, by path; this process does not try again.
_failures: dict[Path, RuntimeError] = {}


class CompilerInterrupted(RuntimeError):
    """The compiler was ended by Ctrl-C, which is sent to it as well as to this process."""


def directory() -> Path:
    """Return where libraries are kept: `$LLAMA_JAX_CACHE/cpu`, by default
    `~/.cache/llama_jax/cpu`. Raises RuntimeError if there is no such place."""
    home = os.environ.get("LLAMA_JAX_CACHE", "~/.cache/llama_jax")
    if not home:
        raise RuntimeError("LLAMA_JAX_CACHE is empty, so there is no directory for the library")
    return Path(home).expanduser().absolute() / "cpu"


def check_platform() -> None:
    """Raise RuntimeError if there is no code for this kind of processor."""
    if sys.platform == "win32" or not _known():
        raise RuntimeError(f"there is no code for {platform.machine()} that is faster than XLA's")


def here() -> tuple[Instructions, ...]:
    """Return the instruction sets that the processor has and the compiler knows, from worst to
    best.

    Raises RuntimeError without a compiler.
    """
    found = _predefined(_compiler())

    def is_here(instructions: Instructions) -> bool:
        return all(f"__{macro}__" in found for macro in _MACROS[instructions])

    is_amd = any(name.startswith(_AMD) for name in found)
    left_out = {"avx2_amd": not is_amd, "amx": "__AMX_TILE__" in found and not _may_use_tiles()}
    sets = itertools.takewhile(is_here, _known())
    return tuple(each for each in sets if not left_out.get(each))


def best() -> Instructions:
    """Return the best of them within `--xla_cpu_max_isa` of XLA_FLAGS."""
    found = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    limit = _LIMITS.get(found[-1].upper()) if found else None
    known = _known()
    allowed = known[: known.index(limit) + 1] if limit in known else known
    return [each for each in here() if each in allowed][-1]


def build(
    directory: Path, kernel: str, instructions: Instructions, extra_flags: Sequence[str] = ()
) -> Path:
    """Return the path of a kernel's library, and compile it unless it is there and intact.

    directory: where it is kept.
    kernel: one of `KERNELS`.

    Raises RuntimeError without a compiler or if it fails, and OSError if the directory cannot be
    written to.
    """
    compiler = _compiler()
    number = 1 + get_args(Instructions).index(instructions)
    of_set = _FLAGS_OF_AVX512 if instructions in ("avx512", "avx512_bf16", "amx") else ()
    flags = [*_FLAGS, *of_set, f"-DINSTRUCTIONS={number}", *extra_flags]
    sources = [Path(__file__).with_name(name) for name in (kernel + _ENDING, *_HEADERS)]
    about = _predefined(compiler).get("__VERSION__", "")
    parts = [compiler, about, version("jaxlib"), platform.machine(), *flags]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = directory / f"{kernel}-{digest.hexdigest()[:32]}.so"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _one_at_a_time(directory, kernel):
        if path in _failures:
            raise _failures[path]
        if not _is_whole(path):
            try:
                _compile([compiler, *flags, "-I", include_directory(), str(sources[0])], path)
            except RuntimeError as error:
                _failures[path] = error
                raise
    return path


def begin() -> None:
    """Build the best libraries in threads, unless JAX is going to run on a GPU. Whoever builds them
    later waits for them, and learns of errors."""

    def build_best(kernel: str) -> None:
        with contextlib.suppress(RuntimeError, OSError):
            check_platform()
            build(directory(), kernel, best())

    if os.environ.get("JAX_PLATFORMS", "" if HAS_NVIDIA_DRIVER else "cpu").startswith("cpu"):
        for kernel in KERNELS:
            threading.Thread(target=build_best, args=(kernel,), name="build").start()


def include_directory() -> str:
    """Return where jaxlib's headers are, as `jax.ffi.include_dir` does, which imports JAX."""
    found = importlib.util.find_spec("jaxlib")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("jaxlib is not installed, whose headers the library includes")
    return str(Path(found.submodule_search_locations[0]) / "include")


def _known() -> tuple[Instructions, ...]:
    """Return the instruction sets that there is code for on machines like this one."""
    return _MACHINES.get(platform.machine().lower(), ())


@functools.cache
def _may_use_tiles() -> bool:
    """Ask Linux for AMX's registers, for all threads of this process, and return whether it agrees
    (the kernel's Documentation/arch/x86/xstate). They are 8 KB of each thread that uses them."""
    if not sys.platform.startswith("linux") or _known() != _ON_X86:
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return not ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data)


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else _COMPILERS
    for name in names:
        if found := shutil.which(name):
            return found
    raise RuntimeError(f"there is no C++ compiler ({', '.join(names)})")


@functools.cache
def _predefined(compiler: str) -> dict[str, str]:
    """Return the macros that a compiler predefines for this processor."""
    # On ARM nothing depends on them, and not every compiler knows the option.
    native = () if _known() == _ON_ARM else ("-march=native",)
    listed = _run([compiler, "-dM", "-E", *native, "-x", "c++", os.devnull])
    defined = (line.split(maxsplit=2)[1:] for line in listed.splitlines())
    return {name: "".join(value) for name, *value in defined}


def _compile(command: Sequence[str], path: Path) -> None:
    """Compile to `path` atomically, with a checksum beside it."""
    with tempfile.TemporaryDirectory(prefix=_unfinished(path.name), dir=path.parent) as scratch:
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
    if done.returncode == -signal.SIGINT:
        raise CompilerInterrupted(f"the C++ compiler {command[0]} was interrupted")
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
def _one_at_a_time(directory: Path, kernel: str) -> Iterator[None]:
    """Lock a kernel, so that one of several processes or threads compiles it, and the others wait.
    Removes what one that was killed has left."""
    import fcntl  # not on Windows

    with open(directory / f"{kernel}.lock", "w") as lock:
        with contextlib.suppress(OSError):  # without file locks, each process compiles for itself
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in directory.glob(f"{_unfinished(kernel)}*"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _unfinished(library: str) -> str:
    """Return how the names of scratch directories for a kernel's libraries begin."""
    return f"unfinished-{library.partition('-')[0]}-"
