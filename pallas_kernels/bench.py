"""How fast the kernels are, against the hardware's floor and against XLA's own path, in one run.

    python -m pallas_kernels.bench                     the 8B model on one GPU
    python -m pallas_kernels.bench --only "70B TP4"    what has this in its name
    python -m pallas_kernels.bench --simulate          results alone, of tiny shapes, on any machine

A result is compared with a float32 reference before anything is timed. Times are medians of runs
that take turns (kernel, XLA, kernel, XLA); each run goes over inputs that together exceed the L2
cache several times. The floor is what a problem's operations take at the published FP8 peak, or its
bytes at the bandwidth of a copy in this run, whichever is longer.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.case import Case
from pallas_kernels.device import not_hopper

# Each module has `cases(rows)` and `tiny_cases()`.
FAMILIES = ("pallas_kernels.fp8_matmul.cases", "pallas_kernels.fp8_matmul.weight_only_cases")

ROWS = (1, 16, 64, 512, 2048, 8192)
L2_BYTES = 50 * 2**20
MIN_INPUTS, MAX_INPUTS = 8, 64
REPEATS = 7
SECONDS_PER_REPEAT = 0.02


@dataclass(frozen=True)
class Result:
    """seconds, xla_seconds, floor_seconds: of one call."""

    name: str
    seconds: float
    xla_seconds: float
    floor_seconds: float
    operations: int
    bytes: int
    error: float

    def __str__(self) -> str:
        seconds = self.seconds
        return (
            f"{self.name:<48}{seconds * 1e6:>9.1f}{self.operations / seconds / 1e12:>9.0f}"
            f"{self.bytes / seconds / 1e9:>8.0f}{self.floor_seconds / seconds:>8.0%}"
            f"{self.xla_seconds / seconds:>8.2f}{self.error:>10.1e}"
        )


HEADER = f"{'':<48}{'us':>9}{'TFLOP/s':>9}{'GB/s':>8}{'floor':>8}{'x XLA':>8}{'error':>10}"


def cases(rows: Sequence[int] = ROWS, only: str = "") -> Iterator[Case]:
    """The cases of all families whose name contains `only`."""
    for family in FAMILIES:
        yield from (case for case in import_module(family).cases(rows) if only in case.name)


def tiny_cases() -> Iterator[Case]:
    """Some cases of each family, small enough for the simulator."""
    for family in FAMILIES:
        yield from import_module(family).tiny_cases()


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
    count = min(MAX_INPUTS, max(MIN_INPUTS, -(-4 * L2_BYTES // case.bytes)))
    make = jax.jit(case.arguments)
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    inputs = [(jnp.full(2**28, i, jnp.int32),) for i in range(2)]
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
    """Check and time one case on the GPU in use."""
    inputs = inputs_of(case)
    error = checked(case, case.error(jax.jit(case.run), inputs[0]))
    times = measure({"kernel": case.run, "xla": case.xla}, inputs)
    floor = case.floor(bytes_per_second)
    return Result(
        case.name, times["kernel"], times["xla"], floor, case.operations, case.bytes, error
    )


def simulate() -> None:
    """Check tiny cases in the simulator."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams()
    for case in tiny_cases():
        arguments = case.arguments(jax.random.key(0))

        def simulated(*arguments: Array, case: Case = case) -> Any:
            return case.run(*arguments, interpret=interpret)

        error = checked(case, case.error(simulated, arguments))
        print(f"{case.kernel:<24}{case.name:<48}{error:>10.1e}", flush=True)


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that choose cases."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--only", default="8B TP1", help="cases with this in their name")
    made.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of activations")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("Time the kernels against XLA's path and the hardware's floor.")
    options.add_argument("--simulate", action="store_true", help="check tiny shapes without a GPU")
    options.add_argument("--json", type=Path, help="also write the results to this file")
    chosen = options.parse_args(arguments)
    if chosen.simulate:
        simulate()
        return
    if reason := not_hopper():
        options.error(f"needs a Hopper GPU: {reason}. --simulate checks results without one.")
    bandwidth = copy_bandwidth()
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, a copy reads and writes {bandwidth / 1e9:.0f} GB/s")
    print(HEADER)
    results = []
    for case in cases(chosen.rows, chosen.only):
        results.append(run(case, bandwidth))
        print(results[-1], flush=True)
    if chosen.json:
        header = {"device": device, "jax": jax.__version__, "copy_bytes_per_second": bandwidth}
        document = header | {"results": [asdict(result) for result in results]}
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
