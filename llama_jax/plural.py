"""Puts numbers before nouns, in what is printed."""


def counted(number: int, noun: str) -> str:
    """Return "1 token" or "2,000 tokens", for a noun whose plural ends in s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
