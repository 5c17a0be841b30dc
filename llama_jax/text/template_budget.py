"""Limits what one rendering of a chat template may use: steps, processor time, text and lists.

A template is code from whoever published the checkpoint, and a few lines of it can ask for all the
memory there is or run for ever. Python cannot interrupt one long operation, so each is kept short:
no value may be large, and the clock is read between operations. The sizes here are bytes.
"""

import sys
from collections.abc import ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter, thread_time
from typing import Any

MAX_STEPS = 1_000_000  # loop turns, calls, filters, attributes, outputs; a message takes ~100
MAX_SECONDS = 0.6  # of this thread's processor time; 1,000 messages take 0.1
MAX_VALUE = 8 << 20  # one text, or one list or object with all that it refers to
MAX_HELD = 96 << 20  # long texts that live at one time, short ones and lists that ever lived
MAX_WRITTEN = 64 << 20  # by the template, its macros and its blocks together
MAX_DEPTH = 200  # of lists and objects in each other
MAX_BITS = 64  # of an integer
# The size of the user's input is added to these limits this many times, since a template may write
# all of it again with every message.
_VALUE_PER_GIVEN, _HELD_PER_GIVEN, _WRITTEN_PER_GIVEN = 8, 64, 256

_ELEMENT = 16  # of a list, without what it refers to
_CONTAINER = 256  # an empty list, and what is remembered about it here
_SMALL = 64  # a number, a text of one character
_LONG = 1 << 10  # a text whose end of life is noticed
_CLOCK_EVERY = 0.02  # seconds between two looks at the thread's clock
_CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)


class OverBudgetError(Exception):
    """A rendering exceeds its budget. It is no ValueError, which jinja2 swallows in places."""


class _LongText(str):
    """A text that gives its size back to the budget when nobody refers to it any more."""

    __slots__ = ("_budget",)
    _budget: "Budget"

    def __str__(self) -> str:
        return self  # str() would make a copy that nobody counts

    def __del__(self) -> None:
        self._budget.create(-sys.getsizeof(self))


class Budget:
    """Keeps what one rendering has left; `given` is the size of the variables it starts with."""

    def __init__(self, given: int = 0) -> None:
        self.largest = MAX_VALUE + _VALUE_PER_GIVEN * given
        self._steps_left = MAX_STEPS
        self._held_left = MAX_HELD + _HELD_PER_GIVEN * given
        self._written_left = MAX_WRITTEN + _WRITTEN_PER_GIVEN * given
        self._started = thread_time()
        self._look_at = perf_counter() + _CLOCK_EVERY
        # Container by id -> (itself, so that the id stays its own, size, depth).
        self._known: dict[int, tuple[Any, int, int]] = {}

    def spend(self, steps: int = 1) -> None:
        """Counts steps, and reads the clock."""
        self._steps_left -= steps
        if self._steps_left < 0:
            raise OverBudgetError(f"it takes more than {MAX_STEPS:,} steps")
        now = perf_counter()
        if now > self._look_at:
            self._look_at = now + _CLOCK_EVERY
            if thread_time() - self._started > MAX_SECONDS:
                raise OverBudgetError(f"it takes longer than {MAX_SECONDS:g} seconds")

    def room(self, size: int) -> None:
        """Checks, before it is made, that a value of this size may exist."""
        if size > self.largest:
            raise OverBudgetError(f"a text or list needs more than {self.largest >> 20} MiB")

    def create(self, size: int) -> None:
        """Counts a value of this size that now exists."""
        self._held_left -= size
        if self._held_left < 0 < size:
            raise OverBudgetError("its texts and lists need too much memory together")

    def write(self, size: int) -> None:
        """Counts what goes into the output, or into the text of a macro or block."""
        self._written_left -= size
        if self._written_left < 0:
            raise OverBudgetError("it writes too much")

    def measure(self, value: Any) -> tuple[int, int]:
        """Size with all that `value` refers to, once per reference, and depth of nesting.

        Raises OverBudgetError where either is too large. A list made of two times itself, forty
        times over, is small in memory, but not to whoever prints or compares it.
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
        """Checks what a call is given, which `varargs` and `kwargs` may hand on together."""
        size = 0
        for value in values:
            size += _ELEMENT + self.measure(value)[0]
            self.room(size)

    def keep(self, value: Any) -> Any:
        """Counts a value that an operation made, and returns it."""
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
        """All items as a list, each one a step."""
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
    """Return the budget of the rendering that this code is part of."""
    return _current.get()


@contextmanager
def budgeted(given: int) -> Iterator[None]:
    """Give the code inside a fresh `current_budget`; `given` is as in `Budget`."""
    token = _current.set(Budget(given))
    try:
        yield
    finally:
        _current.reset(token)
