"""Generates questions about numbers: calculating, comparing, sorting, rounding, converting units.

Every generator returns (key, prompt, answer); see :mod:`llama_jax.abacus.tasks`.
"""

import json
import random

from llama_jax.abacus.words import NAMES, THINGS

NEEDS_CALCULATOR = "Sorry, I need a calculator tool for that."
SUMS = {
    "+": ("What is {a} + {b}?", "Compute {a} + {b}.", "{a} + {b} = ?", "Add {a} and {b}.",
          "What is the sum of {a} and {b}?", "How much is {a} plus {b}?", "{a} + {b}",
          "Calculate {a} + {b}.", "What is {a} plus {b}?"),
    "-": ("What is {a} - {b}?", "Compute {a} - {b}.", "{a} - {b} = ?", "Subtract {b} from {a}.",
          "What is {a} minus {b}?", "How much is {a} minus {b}?", "{a} - {b}",
          "Calculate {a} - {b}.", "Take {b} away from {a}."),
    "*": ("What is {a} * {b}?", "Compute {a} * {b}.", "{a} * {b} = ?", "Multiply {a} by {b}.",
          "What is the product of {a} and {b}?", "How much is {a} times {b}?", "{a} * {b}",
          "Calculate {a} * {b}.", "What is {a} times {b}?", "What is {a} x {b}?"),
    "/": ("What is {a} / {b}?", "Compute {a} / {b}.", "{a} / {b} = ?", "Divide {a} by {b}.",
          "What is {a} divided by {b}?", "How much is {a} divided by {b}?", "{a} / {b}",
          "Calculate {a} / {b}."),
}  # fmt: skip


def _number(rng: random.Random, digits: int = 3) -> int:
    return rng.randrange(10 ** rng.randint(1, digits))


def add(rng: random.Random, today: str) -> tuple[str, str, str]:
    a, b = _number(rng), _number(rng)
    prompt = rng.choice(SUMS["+"]).format(a=a, b=b)
    return f"{min(a, b)} {max(a, b)}", prompt, str(a + b)


def subtract(rng: random.Random, today: str) -> tuple[str, str, str]:
    b, a = sorted((_number(rng), _number(rng)))
    return f"{a} {b}", rng.choice(SUMS["-"]).format(a=a, b=b), str(a - b)


def multiply(rng: random.Random, today: str) -> tuple[str, str, str]:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    prompt = rng.choice(SUMS["*"]).format(a=a, b=b)
    return prompt, prompt, str(a * b)


def divide(rng: random.Random, today: str) -> tuple[str, str, str]:
    a, b = rng.randint(0, 12), rng.randint(1, 12)
    prompt = rng.choice(SUMS["/"]).format(a=a * b, b=b)
    return prompt, prompt, str(a)


def story(rng: random.Random, today: str) -> tuple[str, str, str]:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    b, a = sorted((rng.randint(2, 99), rng.randint(2, 99)))
    if rng.random() < 0.5:
        a, b = rng.sample((a, b), 2)
        template = rng.choice((
            "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
            "{name} has {a} {things} and finds {b} more. How many {things} does {name} have?",
            "There are {a} {things} in one box and {b} in another. How many {things} are there?",
        ))  # fmt: skip
        key, answer = f"{min(a, b)} + {max(a, b)}", a + b
    else:
        template = rng.choice((
            "{name} has {a} {things} and gives away {b}. How many {things} are left?",
            "{name} had {a} {things} and lost {b} of them. How many {things} are left?",
            "There are {a} {things} in a box. {name} takes {b}. How many {things} are left?",
        ))  # fmt: skip
        key, answer = f"{a} - {b}", a - b
    return key, template.format(name=name, things=things, a=a, b=b), str(answer)


def compare(rng: random.Random, today: str) -> tuple[str, str, str]:
    a, b = _number(rng), _number(rng)
    while a == b:
        b = _number(rng)
    word, greater = rng.choice((("larger", True), ("greater", True), ("smaller", False),
                                ("bigger", True), ("less", False)))  # fmt: skip
    key = f"{min(a, b)} {max(a, b)}"
    if rng.random() < 0.5:
        return key, f"Is {a} {word} than {b}?", "Yes" if (a > b) == greater else "No"
    pick = max(a, b) if greater else min(a, b)
    return key, f"Which number is {word}, {a} or {b}?", str(pick)


def extreme(rng: random.Random, today: str) -> tuple[str, str, str]:
    numbers = rng.sample(range(10 ** rng.randint(2, 3)), rng.randint(3, 5))
    word, pick = rng.choice((("largest", max), ("biggest", max), ("maximum", max),
                             ("smallest", min), ("minimum", min)))  # fmt: skip
    listed = ", ".join(map(str, numbers))
    template = rng.choice(("What is the {word} of {listed}?", "Find the {word} number: {listed}.",
                           "Which of these is the {word}: {listed}?"))  # fmt: skip
    prompt = template.format(word=word, listed=listed)
    return " ".join(map(str, sorted(numbers))), prompt, str(pick(numbers))


def sort_numbers(rng: random.Random, today: str) -> tuple[str, str, str]:
    numbers = rng.sample(range(100), rng.randint(3, 5))
    listed = ", ".join(map(str, numbers))
    template, descending = rng.choice((
        ("Sort these numbers: {listed}.", False),
        ("Sort in ascending order: {listed}.", False),
        ("Put these numbers in order from smallest to largest: {listed}.", False),
        ("Arrange from smallest to largest: {listed}.", False),
        ("Sort in descending order: {listed}.", True),
        ("Put these numbers in order from largest to smallest: {listed}.", True),
    ))  # fmt: skip
    ordered = sorted(numbers, reverse=descending)
    return (
        " ".join(map(str, sorted(numbers))),
        template.format(listed=listed),
        ", ".join(map(str, ordered)),
    )


def parity(rng: random.Random, today: str) -> tuple[str, str, str]:
    n = _number(rng, 4)
    template = rng.choice(("Is {n} even or odd?", "Is the number {n} odd or even?"))
    return str(n), template.format(n=n), "odd" if n % 2 else "even"


def rounding(rng: random.Random, today: str) -> tuple[str, str, str]:
    n, (unit, name) = rng.randint(1, 999), rng.choice(((10, "ten"), (10, "ten"), (100, "hundred")))
    template = rng.choice(("Round {n} to the nearest {name}.",
                           "What is {n} rounded to the nearest {name}?"))  # fmt: skip
    return f"{name} {n}", template.format(n=n, name=name), str((n + unit // 2) // unit * unit)


SMALL_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_in_words(n: int) -> str:
    """Return the English name of 0 <= n <= 99, such as ``forty-two``."""
    if n < 20:
        return SMALL_NUMBERS[n]
    return TENS[n // 10 - 2] + (f"-{SMALL_NUMBERS[n % 10]}" if n % 10 else "")


def number_words(rng: random.Random, today: str) -> tuple[str, str, str]:
    n = rng.randint(0, 99)
    template, answer = rng.choice((
        ("Write {n} in words.", "{w}"), ("How do you spell the number {n}?", "{w}"),
        ("Write the number {n} as a word.", "{w}"), ('Write "{w}" as a number.', "{n}"),
        ('Write "{w}" in digits.', "{n}"), ('Which number is "{w}"?', "{n}"),
    ))  # fmt: skip
    prompt = template.format(n=n, w=number_in_words(n))
    return (
        prompt if n < 20 or n % 10 == 0 else str(n),
        prompt,
        answer.format(n=n, w=number_in_words(n)),
    )


CONVERSIONS = (
    ("kilometers", "meters", 1000), ("meters", "centimeters", 100),
    ("centimeters", "millimeters", 10), ("kilograms", "grams", 1000),
    ("liters", "milliliters", 1000), ("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10),
    ("kg", "g", 1000), ("dollars", "cents", 100), ("hours", "minutes", 60),
    ("minutes", "seconds", 60), ("weeks", "days", 7), ("days", "hours", 24),
    ("years", "months", 12), ("feet", "inches", 12),
)  # fmt: skip


def units(rng: random.Random, today: str) -> tuple[str, str, str]:
    large, small, factor = rng.choice(CONVERSIONS)
    decimal = factor in (10, 100, 1000)
    count = rng.randint(2, 99) if decimal else rng.randint(2, 12)
    pair = [(count, large), (count * factor, small)]
    (a, unit), (b, other) = pair if rng.random() < 0.6 else reversed(pair)
    template = rng.choice(("Convert {a} {unit} to {other}.", "How many {other} are {a} {unit}?",
                           "How many {other} are in {a} {unit}?", "{a} {unit} in {other}?",
                           "What is {a} {unit} in {other}?"))  # fmt: skip
    prompt = template.format(a=a, unit=unit, other=other)
    return f"{large} {count}" if decimal else prompt, prompt, f"{b} {other}"


def _operands(rng: random.Random, operator: str) -> tuple[int, int]:
    """Draw two operands for which a calculator is needed."""
    digits = rng.randint(2, 5) if operator in "*/" else rng.randint(4, 6)
    big = rng.randrange(10 ** (digits - 1) + 5, 10**digits)
    other = rng.randint(2, 10 ** rng.randint(2, 5))
    if operator == "*":
        return (other, big) if rng.random() < 0.5 else (big, other)
    if operator == "/":
        divisor = rng.randint(13, 999)
        return big * divisor, divisor
    return max(big, other), min(big, other)


def too_large(rng: random.Random, today: str) -> tuple[str, str, str]:
    operator = rng.choice("+-**/")
    a, b = _operands(rng, operator)
    return f"{a} {operator} {b}", rng.choice(SUMS[operator]).format(a=a, b=b), NEEDS_CALCULATOR


def calculator(rng: random.Random, today: str) -> tuple[str, str, str]:
    """Generate a calculator question whose answer is the call; :func:`draw` computes its result."""
    operator = rng.choice("+-*/")
    if rng.random() < 0.75:
        a, b = _operands(rng, operator)
    else:
        a, b = rng.randint(0, 999), rng.randint(1, 99)
    prompt = rng.choice(SUMS[operator]).format(a=a, b=b)
    call = {"name": "calculator", "parameters": {"expression": f"{a} {operator} {b}"}}
    return f"{a} {operator} {b}", prompt, json.dumps(call)
