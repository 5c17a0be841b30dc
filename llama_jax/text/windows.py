"""Splits a text that is longer than the model's context into windows. Imports no JAX."""

from collections.abc import Iterator


def window_and_stride(window: int | None, stride: int | None, max_seq_len: int) -> tuple[int, int]:
    """Check both, or return their defaults, which are the longest possible."""
    window = max_seq_len if window is None else window
    stride = window - 1 if stride is None else stride
    if window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    if window > max_seq_len:
        raise ValueError(f"window {window} is longer than max_seq_len, {max_seq_len}")
    if not 1 <= stride < window:
        raise ValueError(f"stride must be in [1, window - 1 = {window - 1}], got {stride}")
    return window, stride


def rolling_windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield windows (begin, first, end) that score a text longer than the model's context.

    Each reads tokens begin to end - 1, at most `window`, and scores those from `first` on. The
    first window scores as many as fit, each later one the next `stride` (or the remaining) tokens
    after as much context as fits. Every token but the very first is scored once.

    This is the strided perplexity of Hugging Face's guide. With stride = window - 1 it is lm-eval's
    loglikelihood_rolling, in which windows of a model of context c have c + 1 tokens, because the
    last is not read.
    """
    first = 1
    while first < length:
        end = min(window if first == 1 else first + stride, length)
        yield max(0, end - window), first, end
        first = end
