"""Parameters of a test by several factors: any two values together by default, all of them slow."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def every_pair(*factors: Iterable[Any]) -> list[Any]:
    """Return every combination of a value from each of `factors`, for `pytest.mark.parametrize`.

    By default a few combinations run, chosen greedily so that each pair of values of two factors
    is in one of them. The others are slow.
    """
    cases = list(product(*map(tuple, factors)))
    # A value is identified by its index: not all values can be hashed.
    indices = list(product(*(range(len(tuple(each))) for each in factors)))
    pairs = [set(combinations(enumerate(each), 2)) for each in indices]
    missing = set().union(*pairs)
    chosen = set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [
        pytest.param(*case, marks=() if i in chosen else pytest.mark.slow)
        for i, case in enumerate(cases)
    ]
