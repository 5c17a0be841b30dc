"""Measure configurations of the kernels, and keep the fastest: python -m pallas_kernels.tune.

Writes the table that `pallas_kernels.tuned` reads, tuned/<device>.json, after each problem, so that
a run may be stopped; problems that it holds are measured again with `--again` alone.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from pallas_kernels import bench, tuned
from pallas_kernels.case import Case
from pallas_kernels.device import kind, not_hopper

ROWS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def tune(case: Case, measure: Callable[..., Mapping[Any, float]] = bench.measure) -> dict[str, Any]:
    """The fastest of a case's configurations: its fields, its time and that of the slowest.

    Raises ValueError if a configuration gives wrong results.
    """
    inputs = bench.inputs_of(case)
    runs = {config: partial(case.run, config=config) for config in case.configs}
    for function in runs.values():
        bench.checked(case, case.error(jax.jit(function), inputs[0]))
    times = measure(runs, inputs)
    best = min(times, key=times.__getitem__)
    return {
        "config": vars(best),
        "microseconds": round(times[best] * 1e6, 2),
        "slowest_microseconds": round(max(times.values()) * 1e6, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = bench.parser("Find the fastest configuration of each kernel for each problem.")
    options.add_argument("--again", action="store_true", help="measure what the table holds, too")
    options.set_defaults(rows=ROWS)
    chosen = options.parse_args(arguments)
    if reason := not_hopper():
        options.error(f"needs a Hopper GPU to measure on: {reason}")
    device = kind()
    assert device is not None
    problems = {(case.kernel, case.problem): case for case in bench.cases(chosen.rows, chosen.only)}
    for case in problems.values():
        if chosen.again or not tuned.find(case.kernel, case.problem):
            found = tune(case)
            tuned.write(device, case.kernel, case.problem, found)
            print(f"{case.name}: {found}", flush=True)


if __name__ == "__main__":
    main()
