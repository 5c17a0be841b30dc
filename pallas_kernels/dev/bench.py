"""Times the kernels by the GPU's own clock, and compares them with the hardware's limits.

    python -m pallas_kernels.dev.bench                     the 8B model on one GPU
    python -m pallas_kernels.dev.bench --only "70B TP4"    cases by their names
    python -m pallas_kernels.dev.bench --baselines m=2048  also XLA, for cases of that name
    python -m pallas_kernels.dev.bench --check             results only, no times
    python -m pallas_kernels.dev.bench --simulate          results of tiny shapes, on any machine

All programs are compiled first, in threads. Then each case's result is compared with a float32
reference, and its calls run under the profiler, with inputs that together exceed the L2 cache
several times. The time of a call is the sum of the medians of its kernels and copies in the
device's record (`device_trace`). The floor is the time of the problem's operations at the tensor
cores' published peak, or of its bytes at the bandwidth of a copy in this run, whichever is longer.
The baselines are XLA, which uses cuBLASLt's FP8 matmul if it applies, and cuDNN's attention for
whole prompts. "x xla" compares all launches of a baseline with all of ours, "x kernel" the longest
kernel of each.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import device_trace
from pallas_kernels.dev.case import Case
from pallas_kernels.device import not_hopper

# Each module has `cases(rows)` and `tiny_cases()`.
FAMILIES = (
    "pallas_kernels.fp8_matmul.cases",
    "pallas_kernels.fp8_matmul.weight_only_cases",
    "pallas_kernels.paged_attention.cases",
    "pallas_kernels.rope_and_cache.cases",
    "pallas_kernels.rope_and_attention.cases",
    "pallas_kernels.row_fusions.cases",
)
BASELINES = ("xla", "cudnn")

ROWS = (1, 16, 64, 512, 2048, 8192)
L2_BYTES = 50 * 2**20
# Calls take turns with inputs that exceed the L2 cache four times, but not the memory.
MAX_INPUTS, MAX_INPUT_BYTES = 24, 16 * 2**30
# A program is recorded for about this long.
RECORDED_SECONDS = 0.03


@dataclass(frozen=True)
class LaunchTiming:
    """A kernel or copy in a call.

    count: launches per call. seconds: of all of these together.
    """

    name: str
    count: float
    seconds: float


@dataclass(frozen=True)
class Timing:
    """The time of a call of a program.

    seconds: of all its launches.
    launches: longest first; empty if the device keeps no record, and the time is the host's.
    """

    seconds: float
    launches: tuple[LaunchTiming, ...] = ()

    @property
    def kernel_seconds(self) -> float:
        """Return the seconds of the longest kernel alone."""
        return self.launches[0].seconds if self.launches else self.seconds


@dataclass(frozen=True)
class Result:
    """The measurements of a case. floor_seconds: of one call. error: as in `Case`."""

    name: str
    timing: Timing
    baselines: Mapping[str, Timing]
    floor_seconds: float
    operations: int
    bytes: int
    error: float

    def __str__(self) -> str:
        seconds = self.timing.seconds
        ratios = ""
        for name in BASELINES:
            baseline = self.baselines.get(name)
            kernel = baseline and baseline.kernel_seconds / self.timing.kernel_seconds
            ratios += (
                f"{baseline.seconds / seconds:>8.2f}{kernel:>9.2f}" if baseline else f"{'':>17}"
            )
        return (
            f"{self.name:<64}{seconds * 1e6:>9.1f}"
            f"{self.operations / seconds / 1e12:>9.0f}{self.bytes / seconds / 1e9:>8.0f}"
            f"{self.floor_seconds / seconds:>8.0%}{ratios}{self.error:>10.1e}"
        )


HEADER = (
    f"{'':<64}{'us':>9}{'TFLOP/s':>9}{'GB/s':>8}{'floor':>8}"
    + "".join(f"{'x ' + name:>8}{'x kernel':>9}" for name in BASELINES)
    + f"{'error':>10}"
)


def cases(rows: Sequence[int] = ROWS, only: str = "") -> Iterator[Case]:
    """Yield the cases of all families whose names match the regular expression `only`."""
    for family in FAMILIES:
        for case in import_module(family).cases(rows):
            if re.search(only, case.name):
                yield case


def tiny_cases(only: str = "") -> Iterator[Case]:
    """Yield some cases of each family that are small enough for the simulator."""
    for family in FAMILIES:
        for case in import_module(family).tiny_cases():
            if re.search(only, case.name):
                yield case


def measure(
    functions: Mapping[Any, Callable[..., Any]], inputs: Sequence[tuple[Array, ...]]
) -> dict[Any, float]:
    """Return the seconds of a call of each function.

    The functions are compiled in threads before any is timed.
    """

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(function).lower(*inputs[0]).compile()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = dict(zip(functions, pool.map(compiled, functions.values()), strict=True))
    return {key: timed(program, inputs).seconds for key, program in programs.items()}


def timed(program: Callable[..., Any], inputs: Sequence[tuple[Array, ...]]) -> Timing:
    """Time a compiled program. inputs: the arguments of one call after another."""

    def calls(rounds: int) -> Any:
        for _ in range(rounds):
            for arguments in inputs:
                outputs = program(*arguments)
        return outputs

    jax.block_until_ready(calls(1))
    start = time.perf_counter()
    jax.block_until_ready(calls(1))
    seconds = time.perf_counter() - start
    rounds = 1 + int(RECORDED_SECONDS / seconds)
    if not device_trace.is_kept():
        return Timing(seconds / len(inputs))
    events = device_trace.record(partial(calls, rounds))
    count = rounds * len(inputs)
    launches = [
        LaunchTiming(each.name, each.count / count, each.median * each.count / count)
        for each in device_trace.by_name(events)
    ]
    launches.sort(key=lambda launch: -launch.seconds)
    return Timing(sum(launch.seconds for launch in launches), tuple(launches))


def num_inputs(case: Case) -> int:
    """Return the number of inputs with which no call finds its arguments in the L2 cache."""
    least = 1 + 4 * L2_BYTES // case.bytes
    return max(1, min(least, MAX_INPUTS, MAX_INPUT_BYTES // case.bytes))


def inputs_of(case: Case, make: Callable[..., Any] | None = None) -> list[tuple[Array, ...]]:
    """Make arguments for `num_inputs` calls. make: `case.arguments`, compiled."""
    keys = jax.random.split(jax.random.key(0), num_inputs(case))
    return [(make or jax.jit(case.arguments))(key) for key in keys]


def copy_bandwidth(size: int = 2**30) -> float:
    """Return the bytes that a copy of `size` bytes reads and writes per second."""
    inputs = [(jnp.full(size // 4, i, jnp.int32),) for i in range(2)]
    (seconds,) = measure({"copy": lambda x: x + 1}, inputs).values()
    return 2 * inputs[0][0].nbytes / seconds


def checked(case: Case, error: float) -> float:
    """Return the error. Raises ValueError if it is above the tolerance, or not a number."""
    if not error <= case.tolerance:
        raise ValueError(
            f"{case.kernel} is wrong for {case.name}: its error is {error:.1e} of the result, "
            f"allowed is {case.tolerance:.1e}"
        )
    return error


@dataclass(frozen=True)
class Prepared:
    """A case's compiled programs. baselines: those that compile here."""

    case: Case
    arguments: Callable[..., Any]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    baselines: Mapping[str, Callable[..., Any]]


def prepare(case: Case, with_baselines: bool) -> Prepared:
    """Compile all programs of a case.

    A baseline that does not compile is only reported, because cuDNN may be missing or too old.
    """
    key = jax.random.key(0)
    structs = jax.eval_shape(case.arguments, key)
    baselines = {}
    for name, baseline in case.baselines.items() if with_baselines else ():
        try:
            baselines[name] = jax.jit(baseline).lower(*structs).compile()
        except Exception as error:
            print(f"{name} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
    return Prepared(
        case,
        jax.jit(case.arguments).lower(key).compile(),
        jax.jit(case.run).lower(*structs).compile(),
        jax.jit(case.expected).lower(*structs).compile(),
        baselines,
    )


def run(prepared: Prepared, bytes_per_second: float) -> Result:
    """Check and time one case on the GPU in use. Raises ValueError if its result is wrong."""
    case, inputs = prepared.case, inputs_of(prepared.case, prepared.arguments)
    error = checked(case, case.error(prepared.run, inputs[0], prepared.reference))
    timing = timed(prepared.run, inputs)
    baselines = {name: timed(baseline, inputs) for name, baseline in prepared.baselines.items()}
    floor = case.floor(bytes_per_second)
    return Result(case.name, timing, baselines, floor, case.operations, case.bytes, error)


def on_simulator(case: Case) -> Case:
    """Return the case with its kernel in JAX's GPU simulator."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(inline_mgpu="ignore")  # a fence
    return replace(case, run=partial(case.run, interpret=interpret))


def check(case: Case) -> str:
    """Check a case. Returns a row of the table of errors. Raises ValueError for a wrong result."""
    error = checked(case, case.error(jax.jit(case.run), case.arguments(jax.random.key(0))))
    return f"{case.kernel:<24}{case.name:<64}{error:>10.1e}"


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that choose cases."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--only", default="8B TP1|^tiny", help="a regular expression for their names")
    made.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of activations")
    made.add_argument(
        "--seconds", type=float, default=math.inf, help="start no case after this time"
    )
    made.add_argument("--simulate", action="store_true", help="check tiny shapes without a GPU")
    return made


def in_time(cases: Iterable[Case], seconds: float, start: float | None = None) -> Iterator[Case]:
    """Yield the cases that start within `seconds` from `start`, by default now.

    Prints a line if some are left out.
    """
    start = time.monotonic() if start is None else start
    for case in cases:
        if time.monotonic() - start > seconds:
            print(f"{seconds:.0f} seconds are over: skipping cases from {case.name} on")
            return
        yield case


def each(cases: Iterable[Case], do: Callable[[Case], Any]) -> tuple[list[Any], list[str]]:
    """Print what `do` returns for each case; a failure does not stop the others.

    Returns the results and the failures.
    """
    done, failures = [], []
    for case in cases:
        try:
            done.append(do(case))
            print(done[-1], flush=True)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            failures.append(f"{case.name}: {error}")
            print("FAILED", failures[-1], flush=True)
    return done, failures


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("Time the kernels against XLA's path and the hardware's floor.")
    options.add_argument("--check", action="store_true", help="results only, no times")
    options.add_argument(
        "--baselines",
        "--rivals",
        nargs="?",
        const="",
        metavar="REGEX",
        help="also time XLA (in cases of this name); --rivals is the old spelling",
    )
    options.add_argument("--json", type=Path, help="also write the results to this file")
    chosen = options.parse_args(arguments)
    if chosen.simulate:
        _, failures = each(map(on_simulator, tiny_cases(chosen.only)), check)
    elif reason := not_hopper():
        options.error(f"needs a Hopper GPU: {reason}. --simulate checks results without one.")
    else:
        found = cases(chosen.rows, chosen.only)
        if chosen.check:
            found = in_time(found, chosen.seconds)
            _, failures = each(itertools.chain(tiny_cases(), found), check)
        else:
            failures = measure_all(list(found), chosen.baselines, chosen.seconds, chosen.json)
    if failures:
        sys.exit(1)


def measure_all(
    cases: Sequence[Case], baselines: str | None, seconds: float, json_path: Path | None
) -> list[str]:
    """Print results and, if there is a path, write them after each case. Returns the failures.

    baselines: a regular expression for the names of cases whose baselines are timed too; None for
        no case.
    """
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        prepared: dict[str, Future[Prepared]] = {}
        for case in cases:
            with_baselines = baselines is not None and bool(re.search(baselines, case.name))
            prepared[case.name] = pool.submit(prepare, case, with_baselines)
    bandwidth = copy_bandwidth()
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, a copy reads and writes {bandwidth / 1e9:.0f} GB/s")
    print(f"{len(cases)} cases compiled in {time.monotonic() - start:.0f} s")
    print(HEADER)

    results: list[Result] = []

    def write(failures: Sequence[str] = ()) -> None:
        document = {
            "device": device,
            "jax": jax.__version__,
            "copy_bytes_per_second": bandwidth,
            "results": [asdict(result) for result in results],
            "failures": failures,
        }
        if json_path:
            json_path.write_text(json.dumps(document, indent=1) + "\n")

    def measured(case: Case) -> Result:
        # Popped, so that a case's programs and their memory are freed afterwards.
        results.append(run(prepared.pop(case.name).result(), bandwidth))
        write()
        return results[-1]

    _, failures = each(in_time(cases, seconds, start), measured)
    write(failures)
    return failures


if __name__ == "__main__":
    main()
