"""How fast the kernels are, against the hardware's floor and against XLA's own path, in one run.

    python -m pallas_kernels.bench                     the 8B model on one GPU
    python -m pallas_kernels.bench --only "70B TP4"    cases by their names
    python -m pallas_kernels.bench --check             results alone, no times
    python -m pallas_kernels.bench --simulate          the same of tiny shapes, on any machine

A result is compared with a float32 reference before anything is timed. Times are medians of runs
that take turns (kernel, XLA, kernel, XLA); each run goes over inputs that together exceed the L2
cache several times. The floor is what a problem's operations take at the tensor cores' published
peak, or its bytes at the bandwidth of a copy in this run, whichever is longer. XLA's own path is
cuBLASLt's FP8 matmul where that applies; attention over whole prompts is also put beside cuDNN's.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.case import Case
from pallas_kernels.device import not_hopper

# Each module has `cases(rows)` and `tiny_cases()`.
FAMILIES = (
    "pallas_kernels.fp8_matmul.cases",
    "pallas_kernels.fp8_matmul.weight_only_cases",
    "pallas_kernels.paged_attention.cases",
)
RIVALS = ("xla", "cudnn")

ROWS = (1, 16, 64, 512, 2048, 8192)
L2_BYTES = 50 * 2**20
MIN_INPUTS, MAX_INPUTS = 8, 64
# Of calls that take long, and of inputs that fill memory, there are fewer.
MIN_SECONDS, MAX_INPUT_BYTES = 4e-3, 40 * 2**30
REPEATS = 7
SECONDS_PER_REPEAT = 0.02


@dataclass(frozen=True)
class Result:
    """seconds, rival_seconds, floor_seconds: of one call. error: as in `Case`."""

    name: str
    seconds: float
    rival_seconds: Mapping[str, float]
    floor_seconds: float
    operations: int
    bytes: int
    error: float

    def __str__(self) -> str:
        ratios = {name: each / self.seconds for name, each in self.rival_seconds.items()}
        return (
            f"{self.name:<64}{self.seconds * 1e6:>9.1f}"
            f"{self.operations / self.seconds / 1e12:>9.0f}{self.bytes / self.seconds / 1e9:>8.0f}"
            f"{self.floor_seconds / self.seconds:>8.0%}"
            + "".join(f"{ratios[n]:>8.2f}" if n in ratios else f"{'':>8}" for n in RIVALS)
            + f"{self.error:>10.1e}"
        )


HEADER = (
    f"{'':<64}{'us':>9}{'TFLOP/s':>9}{'GB/s':>8}{'floor':>8}"
    + "".join(f"{'x ' + name:>8}" for name in RIVALS)
    + f"{'error':>10}"
)


def cases(rows: Sequence[int] = ROWS, only: str = "") -> Iterator[Case]:
    """The cases of all families in whose name the regular expression `only` is found."""
    for family in FAMILIES:
        for case in import_module(family).cases(rows):
            if re.search(only, case.name):
                yield case


def tiny_cases(only: str = "") -> Iterator[Case]:
    """As `cases`, some of each family that are small enough for the simulator."""
    for family in FAMILIES:
        for case in import_module(family).tiny_cases():
            if re.search(only, case.name):
                yield case


def measure(
    functions: Mapping[Any, Callable[..., Any]], inputs: Sequence[tuple[Array, ...]]
) -> dict[Any, float]:
    """Seconds of a call of each function: medians of runs that take turns.

    inputs: the arguments of one call after another. A program makes all these calls, and a run is
    as many of that as take `SECONDS_PER_REPEAT`, so that the host's part is hidden.
    """

    def program_of(function: Callable[..., Any]) -> Callable[..., Any]:
        once = jax.jit(function)  # traced once, not for each call
        return jax.jit(lambda inputs: [once(*arguments) for arguments in inputs])

    def seconds(program: Callable[..., Any], runs: int) -> float:
        start = time.perf_counter()
        for _ in range(runs):
            outputs = program(inputs)
        jax.block_until_ready(outputs)
        return (time.perf_counter() - start) / runs

    programs = {key: program_of(function) for key, function in functions.items()}
    for program in programs.values():
        jax.block_until_ready(program(inputs))
    runs = {
        key: 1 + int(SECONDS_PER_REPEAT / seconds(program, 1)) for key, program in programs.items()
    }
    times: dict[Any, list[float]] = {key: [] for key in programs}
    for _ in range(REPEATS):
        for key, program in programs.items():
            times[key].append(seconds(program, runs[key]))
    return {key: statistics.median(each) / len(inputs) for key, each in times.items()}


def inputs_of(case: Case) -> list[tuple[Array, ...]]:
    """Arguments for enough calls that none finds its own in the L2 cache."""
    least = min(MIN_INPUTS, 1 + int(MIN_SECONDS * case.peak / case.operations))
    count = min(MAX_INPUTS, max(least, -(-4 * L2_BYTES // case.bytes)))
    count = min(count, max(1, MAX_INPUT_BYTES // case.bytes))
    make = jax.jit(case.arguments)
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes read and written per second by a copy of so many."""
    inputs = [(jnp.full(size // 4, i, jnp.int32),) for i in range(2)]
    (seconds,) = measure({"copy": lambda x: x + 1}, inputs).values()
    return 2 * inputs[0][0].nbytes / seconds


def checked(case: Case, error: float) -> float:
    """The error. Raises ValueError if it is above the tolerance, or not a number."""
    if not error <= case.tolerance:
        raise ValueError(
            f"{case.kernel} is wrong for {case.name}: its error is {error:.1e} of the result, "
            f"{case.tolerance:.1e} are allowed"
        )
    return error


def run(case: Case, bytes_per_second: float) -> Result:
    """Check and time one case on the GPU in use. Rivals that cannot run there are left out."""
    inputs = inputs_of(case)
    error = checked(case, case.error(jax.jit(case.run), inputs[0]))
    rivals = {name: each for name, each in case.rivals.items() if _works(name, each, inputs[0])}
    seconds = measure({"kernel": case.run, **rivals}, inputs)
    kernel, floor = seconds.pop("kernel"), case.floor(bytes_per_second)
    return Result(case.name, kernel, seconds, floor, case.operations, case.bytes, error)


def _works(name: str, rival: Callable[..., Any], arguments: tuple[Array, ...]) -> bool:
    """cuDNN may be missing, or too old; XLA's path may take more memory than there is."""
    try:
        jax.block_until_ready(jax.jit(rival)(*arguments))
    except Exception as error:
        print(f"{name} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def on_simulator(case: Case) -> Case:
    """The case with its kernel in JAX's GPU simulator."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return replace(case, run=partial(case.run, interpret=plgpu.InterpretGPUParams()))


def check(case: Case) -> str:
    """A row of the table of errors. Raises ValueError if the result is wrong."""
    error = checked(case, case.error(jax.jit(case.run), case.arguments(jax.random.key(0))))
    return f"{case.kernel:<24}{case.name:<64}{error:>10.1e}"


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that choose cases."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument(
        "--only", default="8B TP1|^tiny", help="a regular expression, found in their names"
    )
    made.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of activations")
    made.add_argument("--seconds", type=float, default=math.inf, help="begin no case after these")
    made.add_argument("--simulate", action="store_true", help="check tiny shapes without a GPU")
    return made


def in_time(cases: Iterable[Case], seconds: float) -> Iterator[Case]:
    """Those whose turn comes within so many seconds; what is left out is said."""
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start > seconds:
            print(f"{seconds:.0f} seconds are over: nothing from {case.name} on")
            return
        yield case


def each(cases: Iterable[Case], do: Callable[[Case], Any]) -> tuple[list[Any], list[str]]:
    """Print what `do` gives for each case. Returns that, and what went wrong, without stopping."""
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
    options.add_argument("--check", action="store_true", help="results alone, no times")
    options.add_argument("--json", type=Path, help="also write the results to this file")
    chosen = options.parse_args(arguments)
    if chosen.simulate:
        _, failures = each(map(on_simulator, tiny_cases(chosen.only)), check)
    elif reason := not_hopper():
        options.error(f"needs a Hopper GPU: {reason}. --simulate checks results without one.")
    else:
        found = in_time(cases(chosen.rows, chosen.only), chosen.seconds)
        if chosen.check:
            _, failures = each(itertools.chain(tiny_cases(), found), check)
        else:
            failures = measure_all(found, chosen.json)
    if failures:
        sys.exit(1)


def measure_all(cases: Iterable[Case], json_path: Path | None) -> list[str]:
    """Print and, if there is a path, write results. Returns what went wrong."""
    bandwidth = copy_bandwidth()
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, a copy reads and writes {bandwidth / 1e9:.0f} GB/s")
    print(HEADER)
    results, failures = each(cases, partial(run, bytes_per_second=bandwidth))
    if json_path:
        document = {
            "device": device,
            "jax": jax.__version__,
            "copy_bytes_per_second": bandwidth,
            "results": [asdict(result) for result in results],
            "failures": failures,
        }
        json_path.write_text(json.dumps(document, indent=1) + "\n")
    return failures


if __name__ == "__main__":
    main()
