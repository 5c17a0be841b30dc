"""Generates questions about weekdays, months, leap years and dates.

Every generator returns (key, prompt, answer); see :mod:`llama_jax.abacus.tasks`.
"""

import calendar
import datetime
import random

DAYS = tuple(calendar.day_name)
MONTHS = tuple(calendar.month_name)[1:]


def _neighbour(rng: random.Random, names: tuple[str, ...], unit: str) -> tuple[str, str, str]:
    i, step = rng.randrange(len(names)), rng.choice((-1, 1))
    side, order = ("before", "previous") if step < 0 else ("after", "next")
    template = rng.choice((
        "What {unit} comes {side} {name}?", "Which {unit} is {side} {name}?",
        "What is the {unit} {side} {name}?", "Name the {unit} {side} {name}.",
        "Today is {name}. What is the {order} {unit}?" if unit == "day" else
        "It is {name}. What is the {order} {unit}?", "Which {unit} comes right {side} {name}?",
    ))  # fmt: skip
    prompt = template.format(unit=unit, side=side, order=order, name=names[i])
    return prompt, prompt, names[(i + step) % len(names)]


def weekday(rng: random.Random, today: str) -> tuple[str, str, str]:
    return _neighbour(rng, DAYS, "day")


def weekday_after(rng: random.Random, today: str) -> tuple[str, str, str]:
    i, count, future = rng.randrange(7), rng.randint(2, 30), rng.random() < 0.6
    template = rng.choice((
        "What day is {n} days after {day}?", "Today is {day}. What day is it in {n} days?",
        "If today is {day}, what day will it be in {n} days?",
        "Which day comes {n} days after {day}?",
    ) if future else (
        "What day is {n} days before {day}?", "Today is {day}. What day was it {n} days ago?",
        "Which day comes {n} days before {day}?",
    ))  # fmt: skip
    answer = DAYS[(i + (count if future else -count)) % 7]
    return f"{i} {count} {future}", template.format(day=DAYS[i], n=count), answer


def days_from(rng: random.Random, today: str) -> tuple[str, str, str]:
    i, count, future = rng.randrange(7), rng.randint(2, 14), rng.random() < 0.6
    template = rng.choice((
        "Which day is {n} days from {day}?", "{day} is today. What day is it in {n} days?",
        "What day will it be {n} days after {day}?", "Count {n} days up from {day}.",
        "It is {day} now. What day is it after {n} days?",
    ) if future else (
        "Count {n} days back from {day}.", "{day} is today. What day was it {n} days ago?",
        "It is {day} now. What day was it {n} days before?",
        "What day was it {n} days before {day}?",
    ))  # fmt: skip
    prompt = template.format(day=DAYS[i], n=count)
    return prompt, prompt, DAYS[(i + (count if future else -count)) % 7]


def month(rng: random.Random, today: str) -> tuple[str, str, str]:
    if rng.random() < 0.6:
        return _neighbour(rng, MONTHS, "month")
    i = rng.randint(1, 12)
    template, answer = rng.choice((
        ("Which month is number {i}?", "{name}"), ("What is month number {i}?", "{name}"),
        ("Name month {i} of the year.", "{name}"), ("What number is the month {name}?", "{i}"),
        ("Which number does {name} have in the year?", "{i}"),
    ))  # fmt: skip
    prompt = template.format(i=i, name=MONTHS[i - 1])
    return prompt, prompt, answer.format(i=i, name=MONTHS[i - 1])


def days_in_month(rng: random.Random, today: str) -> tuple[str, str, str]:
    year, month = rng.randint(1900, 2099), rng.choice((2, rng.randint(1, 12)))
    template = rng.choice(("How many days does {m} {y} have?", "How many days are in {m} {y}?",
                           "How many days are there in {m} {y}?",
                           "What is the number of days in {m} {y}?"))  # fmt: skip
    prompt = template.format(m=MONTHS[month - 1], y=year)
    return f"{year} {month}", prompt, str(calendar.monthrange(year, month)[1])


def leap_year(rng: random.Random, today: str) -> tuple[str, str, str]:
    """Generate questions about years from 1800 to 2199. Of the few full centuries only the
    phrasing is held out."""
    year = 100 * rng.randint(18, 21) + rng.choice((0, *range(100), *range(0, 100, 4)))
    template = rng.choice(("Is {y} a leap year?", "Was {y} a leap year?",
                           "Is the year {y} a leap year?",
                           "Does the year {y} have a leap day?"))  # fmt: skip
    prompt = template.format(y=year)
    answer = "Yes" if calendar.isleap(year) else "No"
    return prompt if year % 100 == 0 else str(year), prompt, answer


def date_step(rng: random.Random, today: str) -> tuple[str, str, str]:
    """Generate questions about the day before or after a date in a year that is no leap year."""
    step = rng.choice((-1, 1))
    if rng.random() < 0.3:
        first = datetime.date(2023, rng.randint(1, 12), 1)
        day = first if step < 0 else first - datetime.timedelta(1)
    else:
        day = datetime.date(2023, 1, 1) + datetime.timedelta(rng.randrange(365))
    other = day + datetime.timedelta(step)
    side = "after" if step > 0 else "before"
    template = rng.choice(("Which date comes {side} {d} {m}?",
                           "What date is one day {side} {d} {m}?",
                           "What is the date {side} {d} {m}?",
                           "Give the date {side} {d} {m}."))  # fmt: skip
    prompt = template.format(side=side, d=day.day, m=MONTHS[day.month - 1])
    key = prompt if day.month != other.month else f"{day.month} {day.day} {side}"
    return key, prompt, f"{other.day} {MONTHS[other.month - 1]}"


def today(rng: random.Random, today: str) -> tuple[str, str, str]:
    template, answer = rng.choice((
        ("What is the date today?", today), ("What date is it?", today),
        ("What day is it today?", today), ("Tell me the date.", today),
        ("What year is it?", today[-4:]), ("Which year is it now?", today[-4:]),
    ))  # fmt: skip
    return today, template, answer
