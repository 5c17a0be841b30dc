"""Measures configurations of the kernels and keeps the fastest: python -m pallas_kernels.dev.tune.

It writes the table of `pallas_kernels.tuned`, tuned/<device>.json, after each problem, so that a
run may be stopped. Problems that are in the table are measured again only with `--again`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax

from pallas_kernels import tuned
from pallas_kernels.dev import bench
from pallas_kernels.dev.case import Case
from pallas_kernels.device import kind, not_hopper

ROWS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def tune(case: Case, measure: Callable[..., Mapping[Any, float]] = bench.measure) -> dict[str, Any]:
    """Find the fastest of a case's configurations.

    Returns its fields, its time, and the time of the slowest.
    Raises ValueError if a configuration gives wrong results.
    """
    inputs = bench.inputs_of(case)
    times = measure(checked_runs(case, inputs[0]), inputs)
    best = min(times, key=times.__getitem__)
    return {
        "config": vars(best),
        "microseconds": round(times[best] * 1e6, 2),
        "slowest_microseconds": round(max(times.values()) * 1e6, 2),
    }


def checked_runs(case: Case, arguments: tuple[Any, ...]) -> Mapping[Any, Callable[..., Any]]:
    """Return a case's kernel by configuration. Raises ValueError if one gives wrong results."""
    runs = {config: partial(case.run, config=config) for config in case.configs}
    for function in runs.values():
        bench.checked(case, case.error(jax.jit(function), arguments))
    return runs


def check_configs(case: Case) -> str:
    runs = checked_runs(case, case.arguments(jax.random.key(0)))
    return f"{case.name}: {len(runs)} configurations are right"


def tune_and_write(case: Case) -> str:
    device, found = kind(), tune(case)
    assert device is not None
    tuned.write(device, case.kernel, case.problem, found)
    return f"{case.name}: {found}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = bench.parser("Find the fastest configuration of each kernel for each problem.")
    options.add_argument(
        "--again", action="store_true", help="also measure problems that are in the table"
    )
    options.set_defaults(rows=ROWS)
    chosen = options.parse_args(arguments)
    if chosen.simulate:
        tiny = map(bench.on_simulator, bench.tiny_cases(chosen.only))
        _, failures = bench.each(tiny, check_configs)
    elif reason := not_hopper():
        options.error(f"needs a Hopper GPU to measure on: {reason}")
    else:
        cases = {(c.kernel, c.problem): c for c in bench.cases(chosen.rows, chosen.only)}
        if not chosen.again:
            cases = {key: c for key, c in cases.items() if not tuned.find(*key)}
        _, failures = bench.each(bench.in_time(cases.values(), chosen.seconds), tune_and_write)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
