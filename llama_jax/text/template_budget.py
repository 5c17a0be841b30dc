"""Limits the resources of one rendering of a chat template: steps, processor time, text and lists.

A template is code of whoever published the checkpoint, and a few lines of it could use all memory
or run for ever. Python cannot interrupt one long operation, so each has to be short: no value may
be large, and the clock is read between operations. Sizes are in bytes.
"""

import sys
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter, thread_time
from typing import Any

MAX_STEPS = 1_000_000  # loop turns, calls, filters, attributes, outputs; a message takes ~100
MAX_SECONDS = 0.6  # of this thread's processor time; 1,000 messages take 0.1
MAX_VALUE = 8 << 20  # a text, or a list or object with all its contents
MAX_HELD = 96 << 20  # long texts alive at one time, plus all short ones and lists ever made
MAX_WRITTEN = 64 << 20  # by the template, its macros and its blocks together
MAX_DEPTH = 200  # of nested lists and objects
MAX_BITS = 64  # of an integer
# Multiples of the input's size that are added to these limits, since a template may write all of it
# again with every message.
_VALUE_PER_GIVEN, _HELD_PER_GIVEN, _WRITTEN_PER_GIVEN = 8, 64, 256

_ELEMENT = 16  # of a list, without its contents
_CONTAINER = 256  # an empty list, and its entry in `_known`
_SMALL = 64  # a number, a text of one character
_LONG = 1 << 10  # a text of this size returns its bytes when it is freed
_CLOCK_EVERY = 0.02  # seconds between two looks at the thread's clock
_CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)


class OverBudgetError(Exception):
    """Raised if a rendering exceeds its budget. Not a ValueError, because jinja2 swallows some."""


class _LongText(str):
    """A text that returns its size to the budget when it is freed."""

    __slots__ = ("_budget",)
    _budget: "Budget"

    def __str__(self) -> str:
        return self  # str() would make an uncounted copy

    def __del__(self) -> None:
        self._budget.create(-sys.getsizeof(self))


class Budget:
    """Tracks what remains of one rendering's budget. given: the size of its variables."""

    def __init__(self, given: int = 0) -> None:
        self.largest = MAX_VALUE + _VALUE_PER_GIVEN * given
        self._steps_left = MAX_STEPS
        self._held_left = MAX_HELD + _HELD_PER_GIVEN * given
        self._written_left = MAX_WRITTEN + _WRITTEN_PER_GIVEN * given
        self._started = thread_time()
        self._look_at = perf_counter() + _CLOCK_EVERY
        # id of a container -> (itself, so that the id is not reused, size, depth).
        self._known: dict[int, tuple[Any, int, int]] = {}

    def spend(self, steps: int = 1) -> None:
        """Count steps, and check the clock."""
        self._steps_left -= steps
        if self._steps_left < 0:
            raise OverBudgetError(f"it takes more than {MAX_STEPS:,} steps")
        now = perf_counter()
        if now > self._look_at:
            self._look_at = now + _CLOCK_EVERY
            if thread_time() - self._started > MAX_SECONDS:
                raise OverBudgetError(f"it takes longer than {MAX_SECONDS:g} seconds")

    def room(self, size: int) -> None:
        """Check that a value of this size may be made."""
        if size > self.largest:
            raise OverBudgetError(f"a text or list needs more than {self.largest >> 20} MiB")

    def create(self, size: int) -> None:
        """Count a value of this size that was made."""
        self._held_left -= size
        if self._held_left < 0 < size:
            raise OverBudgetError("its texts and lists need too much memory together")

    def write(self, size: int) -> None:
        """Count what is written to the output, or to the text of a macro or block."""
        self._written_left -= size
        if self._written_left < 0:
            raise OverBudgetError("it writes too much")

    def measure(self, value: Any) -> tuple[int, int]:
        """Return the size of `value` with all its contents, once per reference, and its depth.

        Raises OverBudgetError if either is too large. Contents count once per reference because a
        list that was doubled forty times is small in memory, but not when it is printed.
        """
        if isinstance(value, str):
            return sys.getsizeof(value), 0
        if not isinstance(value, _CONTAINERS):
            return _SMALL, 0
        if known := self._known.get(id(value)):
            return known[1:]
        size, depth = _CONTAINER, 0
        items: Iterable[Any] = value.items() if isinstance(value, dict) else value
        for item in items:
            pair = item if isinstance(value, dict) else (item,)
            for part in pair:
                part_size, part_depth = self.measure(part)
                size += _ELEMENT + part_size
                depth = max(depth, part_depth)
            self.room(size)
        if depth == MAX_DEPTH:
            raise OverBudgetError(f"a list is nested more than {MAX_DEPTH} levels deep")
        self.create(_CONTAINER + _ELEMENT * len(value))
        self._known[id(value)] = value, size, depth + 1
        return size, depth + 1

    def check_arguments(self, *values: Any) -> None:
        """Check the arguments of a call, which may combine `varargs` and `kwargs`."""
        size = 0
        for value in values:
            size += _ELEMENT + self.measure(value)[0]
            self.room(size)

    def keep(self, value: Any) -> Any:
        """Count a value that an operation made, and return it."""
        if isinstance(value, str):
            size = sys.getsizeof(value)
            self.room(size)
            if size >= _LONG and not isinstance(value, _LongText):
                value = _LongText(value)
                value._budget = self
                size = sys.getsizeof(value)
                self.create(size)
            elif size < _LONG:
                self.create(size)
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise OverBudgetError(f"a number has more than {MAX_BITS} bits")
        elif isinstance(value, _CONTAINERS):
            self.measure(value)
        return value

    def take(self, items: Iterable[Any]) -> list[Any]:
        """Return all items as a list. Each is a step."""
        if isinstance(items, list | tuple):
            self.measure(items)
            self.spend(len(items) + 1)
            return list(items)
        if isinstance(items, str):
            self.room((_ELEMENT + _SMALL) * len(items))
            self.create(_SMALL * len(items))
        taken: list[Any] = []
        size = _CONTAINER
        for item in items:
            self.spend()
            size += _ELEMENT + self.measure(item)[0]
            self.room(size)
            taken.append(item)
        self.measure(taken)
        return taken


_current: ContextVar[Budget] = ContextVar("_current")


def current_budget() -> Budget:
    """Return the budget of the current rendering."""
    return _current.get()


@contextmanager
def budgeted(given: int) -> Iterator[None]:
    """Run the code inside with a new `current_budget`. given: as in `Budget`."""
    token = _current.set(Budget(given))
    try:
        yield
    finally:
        _current.reset(token)
