"""Parameters of a test by several factors: any two values together by default, all of them slow."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def every_pair(*factors: Iterable[Any]) -> list[Any]:
    """Return every combination of a value from each of `factors`, for `pytest.mark.parametrize`.

    By default run as few of them as hold any two values of two factors together, which greedy
    choice finds about. The others are slow.
    """
    cases = list(product(*map(tuple, factors)))
    # A value is told by its place: not all of them can be hashed.
    indices = list(product(*(range(len(tuple(each))) for each in factors)))
    pairs = [set(combinations(enumerate(each), 2)) for each in indices]
    left = set().union(*pairs)
    chosen = set()
    while left:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & left))
        chosen.add(best)
        left -= pairs[best]
    return [
        pytest.param(*case, marks=() if i in chosen else pytest.mark.slow)
        for i, case in enumerate(cases)
    ]
