"""Reads a GPU's own record of the kernels and copies that ran during a function, with times.

JAX's profiler writes a trace, from which `record` reads the device's streams. While a profiler
runs, XLA keeps parts of a program out of CUDA graphs. So use this for the parts of a step, and
measure the time of a whole step without a profiler.

    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(step())
        for kernel in by_name(read_events(directory)):
            print(kernel)
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
from jax.profiler import ProfileData


@dataclass(frozen=True)
class Event:
    """A kernel or copy on the device.

    start: seconds since an arbitrary time that is the same for all events of a trace.
    duration: seconds.
    """

    name: str
    start: float
    duration: float


@dataclass(frozen=True)
class KernelTime:
    """All events of one name.

    count: their number. total, median: seconds.
    """

    name: str
    count: int
    total: float
    median: float

    def __str__(self) -> str:
        times = f"{self.total * 1e3:>10.3f} ms{self.count:>7} x{self.median * 1e6:>10.2f} us"
        return f"{times}  {self.name}"


def is_kept() -> bool:
    """Return whether the default device keeps a record: a GPU does, a CPU does not."""
    return jax.default_backend() == "gpu"


def record(function: Callable[[], Any]) -> list[Event]:
    """Run a function, wait for its result, and read what the device did meanwhile.

    Returns the events in the order of their starts, none if the device keeps no record.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(function())
        return read_events(directory)


def read_events(directory: str | Path) -> list[Event]:
    """Read the events of all GPUs' streams from the newest trace below a directory."""
    paths = sorted(Path(directory).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return events_of(ProfileData.from_file(str(paths[-1]))) if paths else []


def events_of(profile: ProfileData) -> list[Event]:
    """Return the events of all GPUs' streams in a profile, in the order of their starts.

    A GPU's plane is called "/device:GPU:0" and has a line for each stream, whose events are kernels
    and copies; its other lines repeat them, summed up by operation and by module.
    """
    events = [
        Event(event.name, event.start_ns * 1e-9, event.duration_ns * 1e-9)
        for plane in profile.planes
        if plane.name.startswith("/device:GPU:")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    return sorted(events, key=lambda event: event.start)


def busy_seconds(events: Sequence[Event]) -> float:
    """Return the seconds during which at least one event ran.

    events: in the order of their starts.
    """
    busy, until = 0.0, float("-inf")
    for event in events:
        end = event.start + event.duration
        busy += max(0.0, end - max(event.start, until))
        until = max(until, end)
    return busy


def by_name(events: Iterable[Event]) -> list[KernelTime]:
    """Sum up events by name, longest first."""
    durations = defaultdict(list)
    for event in events:
        durations[event.name].append(event.duration)
    kernels = [
        KernelTime(name, len(each), sum(each), median(each)) for name, each in durations.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.total)
