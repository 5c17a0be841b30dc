"""Generates questions about words and letters, small talk, and questions that Abacus declines.

Every generator returns (key, prompt, answer); see :mod:`llama_jax.abacus.tasks`.
"""

import random
import string

from llama_jax.abacus.words import ADJECTIVES, DECLINED_TEMPLATES, GREETINGS, WORDS

DECLINE = "Sorry, I can only answer short questions about numbers, words, dates and units."
ORDINALS = ("first", "second", "third", "fourth", "fifth")


def _word(rng: random.Random, low: int = 3, high: int = 8) -> str:
    """Draw a word of the list or, equally often, a made-up one, with low to high letters."""
    if rng.random() < 0.5:
        while not low <= len(word := rng.choice(WORDS)) <= high:
            pass
        return word
    pair = ("bcdfghjklmnpqrstvwxyz", "aeiou")
    start = rng.randrange(2)
    return "".join(rng.choice(pair[(start + i) % 2]) for i in range(rng.randint(low, high)))


def sort_words(rng: random.Random, today: str) -> tuple[str, str, str]:
    words: list[str] = []
    for _ in range(rng.randint(3, 4)):
        while (word := _word(rng, 3, 6))[0] in (other[0] for other in words):
            pass
        words.append(word)
    template = rng.choice((
        "Sort these words alphabetically: {listed}.", "Put these words in order: {listed}.",
        "Sort in alphabetical order: {listed}.", "Arrange these words from A to Z: {listed}.",
    ))  # fmt: skip
    listed = ", ".join(words)
    return " ".join(sorted(words)), template.format(listed=listed), ", ".join(sorted(words))


def reverse(rng: random.Random, today: str) -> tuple[str, str, str]:
    word = _word(rng, 3, 6)
    template = rng.choice(('Reverse the word "{w}".', 'Write "{w}" backwards.',
                           'What is "{w}" spelled backwards?', 'Reverse "{w}".'))  # fmt: skip
    return word, template.format(w=word), word[::-1]


def case(rng: random.Random, today: str) -> tuple[str, str, str]:
    word = _word(rng)
    template, upper = rng.choice((
        ('Write "{w}" in upper case.', True), ('Convert "{w}" to capital letters.', True),
        ('Change "{w}" to upper case.', True), ('Write "{w}" in lower case.', False),
        ('Convert "{w}" to small letters.', False), ('Change "{w}" to lower case.', False),
    ))  # fmt: skip
    given, answer = (word, word.upper()) if upper else (word.upper(), word)
    return word, template.format(w=given), answer


def count_letters(rng: random.Random, today: str) -> tuple[str, str, str]:
    word = _word(rng, 2, 9)
    template = rng.choice(('How many letters are in "{w}"?', 'Count the letters in "{w}".',
                           'How long is the word "{w}"?',
                           'How many letters does the word "{w}" have?'))  # fmt: skip
    return word, template.format(w=word), str(len(word))


def count_occurrences(rng: random.Random, today: str) -> tuple[str, str, str]:
    word = _word(rng, 3, 8)
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice(string.ascii_lowercase)
    template = rng.choice(('How many times does "{c}" appear in "{w}"?',
                           'Count the letter "{c}" in "{w}".',
                           'How often does the letter "{c}" occur in "{w}"?'))  # fmt: skip
    return f"{letter} {word}", template.format(c=letter, w=word), str(word.count(letter))


def letter_at(rng: random.Random, today: str) -> tuple[str, str, str]:
    word = _word(rng, 5, 8)
    index, name = rng.choice((*enumerate(ORDINALS), (0, "first"), (-1, "last"), (-1, "last")))
    template = rng.choice(('What is the {name} letter of "{w}"?',
                           'Give the {name} letter of the word "{w}".',
                           'Which letter comes {name} in "{w}"?'))  # fmt: skip
    return f"{name} {word}", template.format(name=name, w=word), word[index]


def chat(rng: random.Random, today: str) -> tuple[str, str, str]:
    prompts, answer = rng.choice(GREETINGS)
    prompt = rng.choice(prompts)
    return prompt, prompt, answer


def decline(rng: random.Random, today: str) -> tuple[str, str, str]:
    template = rng.choice(DECLINED_TEMPLATES)
    topic = rng.choice((_word(rng), _word(rng), _word(rng).capitalize()))
    prompt = template.format(topic=topic, adjective=rng.choice(ADJECTIVES), other=_word(rng))
    return prompt, prompt, DECLINE
