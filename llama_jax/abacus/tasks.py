"""Generates questions with one right answer from a seed, to train and evaluate Abacus.

Every generator takes a random generator and today's date and returns ``(key, prompt, answer)``.
The key names the content of the question, and its hash decides whether the question belongs to
training or to the held-out set, so no held-out key is ever trained on:

* Where the operands are many (sums, sorting, strings, dates of a month, conversions by a power of
  ten, ...) the key is made of the operands alone: held-out operands are new in every phrasing.
* Where they are few (times tables, divisions, weekdays, months, conversions by 7, 12, 24 or 60,
  number words below twenty, ends of months) a model can only know the fact, so
  the key is the whole question: a held-out question is a new phrasing of a fact that was seen in
  other phrasings.
"""

import calendar
import datetime
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama_jax.abacus import date_tasks, number_tasks, text_tasks

DEFAULT_DATE = "26 Jul 2024"

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {"type": "string", "description": "The expression to evaluate."}
            },
            "required": ["expression"],
        },
    },
}
"""The tool that Abacus knows, in the form that chat templates take."""

type Generator = Callable[[random.Random, str], tuple[str, str, str]]


@dataclass(frozen=True)
class Question:
    """One exchange: the user's ``prompt`` and the only right ``answer``.

    ``result`` is set on calculator questions: the answer is then the tool call, ``result`` the
    content of the tool message that follows, and the right reply to it is ``str(result)``.
    """

    kind: str
    key: str
    prompt: str
    answer: str
    result: str | int | float | None = None


def is_held_out(kind: str, key: str) -> bool:
    """Return True for the tenth of all keys that training never uses."""
    return hashlib.blake2b(f"{kind}:{key}".encode(), digest_size=1).digest()[0] < 26


def random_date(rng: random.Random, *, held_out: bool = False) -> str:
    """Draw a date of the training or the held-out part, in chat templates' form: 26 Jul 2024."""
    while True:
        day = datetime.date(2000, 1, 1) + datetime.timedelta(rng.randrange(40 * 365))
        date = f"{day.day:02d} {calendar.month_abbr[day.month]} {day.year}"
        if is_held_out("today", date) == held_out:
            return date


KINDS: dict[str, tuple[Generator, tuple[float, float, float, float]]] = {
    "add": (number_tasks.add, (4, 5, 5, 6)),
    "subtract": (number_tasks.subtract, (4, 4, 6, 6)),
    "multiply": (number_tasks.multiply, (1.5, 1.5, 0.8, 0.8)),
    "divide": (number_tasks.divide, (1, 1.2, 1.5, 1)),
    "story": (number_tasks.story, (1.5, 2, 4, 5)),
    "compare": (number_tasks.compare, (1.2, 2.5, 2.5, 2)),
    "extreme": (number_tasks.extreme, (1.5, 2.5, 2.5, 3.5)),
    "sort_numbers": (number_tasks.sort_numbers, (2, 4, 4, 6)),
    "sort_words": (text_tasks.sort_words, (1.5, 3, 4, 6)),
    "reverse": (text_tasks.reverse, (2, 1.5, 2.5, 2)),
    "case": (text_tasks.case, (1, 0.5, 1.2, 1.5)),
    "count_letters": (text_tasks.count_letters, (1.5, 1, 1.5, 1)),
    "count_occurrences": (text_tasks.count_occurrences, (2.5, 3, 4, 6)),
    "letter_at": (text_tasks.letter_at, (1.5, 1.2, 1, 1)),
    "weekday": (date_tasks.weekday, (0.6, 0.6, 0.8, 0.8)),
    "weekday_after": (date_tasks.weekday_after, (2, 4, 0, 0)),
    "month": (date_tasks.month, (0.7, 0.8, 0.8, 0.7)),
    "days_in_month": (date_tasks.days_in_month, (0.7, 0.5, 0.5, 0.6)),
    "leap_year": (date_tasks.leap_year, (1.2, 0.8, 0.8, 0.6)),
    "date_step": (date_tasks.date_step, (1.2, 0.8, 0.6, 0.8)),
    "units": (number_tasks.units, (2, 1.5, 1, 1.5)),
    "parity": (number_tasks.parity, (0.4, 0.2, 0.2, 0.2)),
    "rounding": (number_tasks.rounding, (1.2, 0.8, 1, 1)),
    "number_words": (number_tasks.number_words, (1, 0.7, 0.5, 0.7)),
    "today": (date_tasks.today, (0.4, 1.2, 1.2, 0.8)),
    "decline": (text_tasks.decline, (1, 0.6, 0.5, 0.5)),
    "too_large": (number_tasks.too_large, (0.8, 0.6, 0.5, 0.8)),
    "chat": (text_tasks.chat, (0.5, 0.4, 0.4, 0.4)),
    "days_from": (date_tasks.days_from, (0, 0, 2.5, 0)),
}
"""Every kind that needs no tool, with its share of the questions in the four stages of training.

Counting days (``weekday_after``, then ``days_from``) was given up: addition modulo 7 was not
learnt, not even for the pairs of day and number in training. It is neither trained in the last
stage nor judged."""

ARITHMETIC = frozenset({"add", "subtract", "multiply", "divide", "too_large"})
"""Kinds that become ``calculator`` questions as soon as the tool is offered."""


def draw(kind: str, rng: random.Random, *, held_out: bool, today: str = DEFAULT_DATE) -> Question:
    """Draw one question of ``kind`` from the held-out or from the training part.

    ``chat`` (greetings and the like) has too few questions to hold any out and is never judged.
    """
    generator = number_tasks.calculator if kind == "calculator" else KINDS[kind][0]
    while True:
        key, prompt, answer = generator(rng, today)
        if kind == "chat" or is_held_out(kind, key) == held_out:
            break
    result: str | int | float | None = None
    if kind == "calculator":
        a, operator, b = key.split()
        value: int | float = {
            "+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b),
            "/": int(a) // int(b) if int(a) % int(b) == 0 else round(int(a) / int(b), 3),
        }[operator]  # fmt: skip
        result = rng.choice((value, str(value), str(value)))
    return Question(kind, key, prompt, answer, result)
