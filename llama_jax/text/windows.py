"""Cuts a text that is longer than the model's context into windows. Needs no JAX."""

from collections.abc import Iterator


def window_and_stride(window: int | None, stride: int | None, max_seq_len: int) -> tuple[int, int]:
    """Check both for `rolling_windows`; by default each is the longest possible."""
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
    """Return how to score a text that is longer than the model's context: (begin, first, end) of
    passes.

    A pass reads tokens begin to end - 1, at most `window`, and scores those from `first` on. The
    first one scores all it can, each later one the next `stride`, or what is left, after as many
    tokens before them as fit. Every token but the first, which has nothing before it, is scored
    once. The strided perplexity of Hugging Face's guide; with stride = window - 1 lm-eval's
    loglikelihood_rolling, where the windows of a model of context c hold c + 1 tokens, the last of
    which is only looked up.
    """
    first = 1
    while first < length:
        end = min(window if first == 1 else first + stride, length)
        yield max(0, end - window), first, end
        first = end
