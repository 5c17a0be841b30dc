"""Encodes words by byte-pair encoding, given a vocabulary and its merges.

Merges have an order: the first one that applies anywhere in a word is done first, at its leftmost
place (Sennrich et al., https://arxiv.org/abs/1508.07909). `bpe` does this for any merges. tiktoken,
which is faster, has ids instead of merges, and joins the two tokens that make the one of lowest id;
`tiktoken_ranks` tells whether the result is the same.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

Merge = tuple[str, str]

# Distinct words whose tokens are cached; a text has few.
_CACHED_WORDS = 1 << 16
_CACHED_LENGTH = 64


def bpe(
    vocab: Mapping[str, int], merges: Sequence[Merge], *, ignore_merges: bool, byte_fallback: bool
) -> Callable[[str], list[int]]:
    """Return a function from a word to its token ids.

    vocab: has both parts of each merge and their result, and every character of every word unless
        byte_fallback is set.
    ignore_merges: whether a word that is a token becomes it, whatever the merges are.
    byte_fallback: whether a character without a token becomes the tokens "<0x0A>" of its UTF-8
        bytes, all of which are in `vocab`.
    """
    ranks: dict[tuple[int, int], tuple[int, int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks[vocab[left], vocab[right]] = rank, vocab[left + right]
    bytes_of = [vocab[f"<0x{byte:02X}>"] for byte in range(256)] if byte_fallback else []

    def tokens(word: str) -> tuple[int, ...]:
        if ignore_merges and word in vocab:
            return (vocab[word],)
        ids: list[int] = []
        for character in word:
            if character in vocab:
                ids.append(vocab[character])
            else:
                ids += [bytes_of[byte] for byte in character.encode()]
        return tuple(merge(ids, ranks))

    cached = lru_cache(_CACHED_WORDS)(tokens)
    return lambda word: list((cached if len(word) <= _CACHED_LENGTH else tokens)(word))


def merge(ids: list[int], ranks: Mapping[tuple[int, int], tuple[int, int]]) -> list[int]:
    """Apply all merges to token ids. ranks: (left, right) -> (rank, result).

    This takes O(n log n): a heap holds candidates by (rank, place), a linked list the neighbours.
    """
    following = list(range(1, len(ids) + 1))  # place of the next token
    previous = list(range(-1, len(ids) - 1))
    merged = list(ids)
    heap: list[tuple[int, int, int, int]] = []  # rank, place, and the two ids that are merged

    def consider(place: int) -> None:
        if place >= 0 and following[place] < len(merged):
            pair = merged[place], merged[following[place]]
            if pair in ranks:
                heapq.heappush(heap, (ranks[pair][0], place, *pair))

    for place in range(len(merged)):
        consider(place)
    gone = -1  # marks a place that was merged into the one before
    while heap:
        _, place, left, right = heapq.heappop(heap)
        after = following[place]
        if merged[place] != left or after == len(merged) or merged[after] != right:
            continue
        merged[place] = ranks[left, right][1]
        merged[after] = gone
        following[place] = following[after]
        if following[place] < len(merged):
            previous[following[place]] = place
        consider(previous[place])
        consider(place)
    return [token_id for token_id in merged if token_id != gone]


def tiktoken_ranks(
    vocab: Mapping[str, int], merges: Sequence[Merge], ignore_merges: bool
) -> dict[str, int] | None:
    """Return ranks (token -> id) with which tiktoken encodes every word as `bpe` does, or None if
    it might not.

    1. Merges must be in the order of the ids that they make, so that both have the same priorities.
    2. If a token arises in a context, merging inside its bytes runs as when it is encoded alone.
       So a single pair can make it: the last one when it is encoded alone. That pair must be a
       merge.
    3. A token that merging never makes is reached only as a whole word, by `ignore_merges`.
       tiktoken always looks up whole words, so without ignore_merges the token is left out.
    """
    made = [vocab[left + right] for left, right in merges]
    if any(later < earlier for earlier, later in itertools.pairwise(made)):
        return None
    listed = set(merges)
    if len(listed) < len(merges):
        return None
    if not ignore_merges:
        products = set(made)
        vocab = {token: i for token, i in vocab.items() if len(token) == 1 or i in products}
    ranks = dict(vocab)
    for token in vocab:
        if len(token) == 1:
            continue
        if ignore_merges and _all_listed(token, vocab, listed):
            continue
        last = _last_merge(token, vocab)
        if last is None:
            if not ignore_merges:
                del ranks[token]
        elif last not in listed:
            return None
    return ranks


def _all_listed(token: str, vocab: Mapping[str, int], listed: set[Merge]) -> bool:
    """Return whether every pair of tokens that makes `token` is a merge."""
    for i in range(1, len(token)):
        left, right = token[:i], token[i:]
        if left in vocab and right in vocab and (left, right) not in listed:
            return False
    return True


def _last_merge(token: str, vocab: Mapping[str, int]) -> Merge | None:
    """Return the pair that makes `token` when its bytes are merged by lowest id, or None if they do
    not become it."""
    parts = list(token)
    while len(parts) > 2:
        ids = [vocab.get(left + right, math.inf) for left, right in itertools.pairwise(parts)]
        best = min(range(len(ids)), key=ids.__getitem__)
        if ids[best] == math.inf:
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]
