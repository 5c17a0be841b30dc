"""Enables XLA's persistent compilation cache and counts what is compiled.

Programs are kept in `$LLAMA_JAX_CACHE/xla` (by default `~/.cache/llama_jax/xla`), so a second start
fetches them instead of compiling. JAX's own settings take precedence: nothing is changed if
`JAX_COMPILATION_CACHE_DIR` or `jax_compilation_cache_dir` is set. An empty `LLAMA_JAX_CACHE` turns
the cache off.
"""

import contextlib
import functools
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from llama_jax.engine import allocator
from llama_jax.plural import counted

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileReport:
    """Counts of programs that became ready to run.

    compiled: programs that XLA compiled.
    from_cache: programs fetched from the persistent cache.
    seconds: wall-clock time of tracing, lowering, compiling and fetching.
    """

    compiled: int
    from_cache: int
    seconds: float

    def since(self, earlier: "CompileReport") -> "CompileReport":
        """Return what was counted after `earlier`."""
        return CompileReport(
            self.compiled - earlier.compiled,
            self.from_cache - earlier.from_cache,
            self.seconds - earlier.seconds,
        )

    def __str__(self) -> str:
        what = []
        if self.compiled:
            what.append(f"compiled {counted(self.compiled, 'program')}")
        if self.from_cache:
            what.append(f"fetched {counted(self.from_cache, 'program')} from the cache")
        return f"{' and '.join(what)} in {self.seconds:.1f} s" if what else "compiled nothing"


def enable(directory: str | Path | None = None) -> Path | None:
    """Keep compiled programs in `directory`, by default the one of the module's docstring.

    Returns the directory in use, or None if the cache is off or the directory is not writable,
    which is logged once as a warning. Further calls change nothing.
    """
    configured = jax.config.jax_compilation_cache_dir
    if not jax.config.jax_enable_compilation_cache or configured == "":
        return None
    if directory is None:
        if configured is not None:
            return Path(configured)
        home = os.environ.get("LLAMA_JAX_CACHE", "~/.cache/llama_jax")
        if not home:
            return None
        directory = Path(home) / "xla"
    directory = Path(directory).expanduser().absolute()
    if not _writable(directory):
        return None
    for name, value in (
        ("jax_compilation_cache_dir", str(directory)),
        ("jax_persistent_cache_min_compile_time_secs", 0),
        ("jax_persistent_cache_min_entry_size_bytes", -1),
    ):
        jax.config.update(name, value)
    return directory


def directory() -> Path | None:
    """Return the local directory in which compiled programs are kept, or None."""
    configured = jax.config.jax_compilation_cache_dir
    if not jax.config.jax_enable_compilation_cache or not configured or "://" in configured:
        return None
    return Path(configured)


def report() -> CompileReport:
    """Return what this process has compiled since this module was imported."""
    with _lock:
        seconds = sum(end - start for start, end in _spans)
        return CompileReport(_counts[_BACKEND] - _counts[_HIT], _counts[_HIT], seconds)


def seconds_between(start: float, end: float) -> float:
    """Return the part of `report().seconds` between two times of `time.time`."""
    with _lock:
        return sum(max(0.0, min(end, until) - max(start, since)) for since, until in _spans)


@contextlib.contextmanager
def forbid_compile() -> Iterator[None]:
    """Raise RuntimeError at the end of the context if any program was compiled or fetched in it.

    The error names the programs. All threads of the process count.
    """
    before = len(_compiled)
    yield
    if names := _compiled[before:]:
        raise RuntimeError(f"{len(names)} compiled while none should be: {', '.join(names)}")


@functools.cache
def _writable(directory: Path) -> bool:
    """Make the directory, accessible to its owner alone, because its contents are executed."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError as error:
        _log.warning(
            "compiled programs are not kept, so every start compiles again: %s. Set "
            "LLAMA_JAX_CACHE to a writable directory, or to an empty string.",
            error,
        )
        return False


_HIT = "/jax/compilation_cache/cache_hits"
_BACKEND = "/jax/core/compile/backend_compile_duration"  # wraps both compiling and fetching
_TIMED = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _BACKEND,
)
_LONG_SECONDS = 0.1  # of a program with layers, or more
_lock = threading.Lock()
_counts = {_HIT: 0, _BACKEND: 0}
_spans: list[tuple[float, float]] = []  # start and end, of `time.time`
_compiled: list[str] = []


def _on_event(event: str, **_: str | int) -> None:
    if event == _HIT:
        with _lock:
            _counts[_HIT] += 1


def _on_span(event: str, start_time: float, end_time: float, **details: str | int) -> None:
    """Record a span. Spans arrive as they end, and one may contain earlier ones: tracing a function
    includes tracing the functions that it calls."""
    if event not in _TIMED:
        return
    if event == _BACKEND and end_time - start_time > _LONG_SECONDS:
        allocator.give_back()  # the compiler leaves much free memory in small pieces
    with _lock:
        if event == _BACKEND:
            _counts[_BACKEND] += 1
            _compiled.append(str(details.get("fun_name")))
        while _spans and _spans[-1][1] > start_time:
            start_time = min(start_time, _spans.pop()[0])
        _spans.append((start_time, end_time))


jax.monitoring.register_event_listener(_on_event)
jax.monitoring.register_event_time_span_listener(_on_span)
