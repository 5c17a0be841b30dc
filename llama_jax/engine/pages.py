"""Manages the pages of the key/value cache: the sequences that own them, the prefixes they hold.

A page holds the keys and values of `page_size` consecutive tokens, which depend on all tokens
before them. So a page is identified by its own tokens and a hash of all pages before it. A sequence
with the prefix of an earlier one shares the full pages of that prefix, and copies the page in which
the two diverge. A page without an owner keeps its content until room is needed, when the least
recently used one is evicted.

Source: automatic prefix caching in vLLM (Kwon et al., 2023) and RadixAttention in SGLang (Zheng et
al., 2024).
"""

import bisect
import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# The digest of a full page's tokens and those of all pages before it; `ROOT` before any page.
BlockHash = bytes
ROOT: BlockHash = b""


class OutOfPagesError(Exception):
    """Raised if fewer pages are free, or can be freed, than are needed."""


@dataclass(frozen=True)
class Content:
    """The content of a page, which is partial while it grows and where a sequence ended in it.

    parent: the hash of all pages before it.
    tokens: the tokens of this page.
    block_hash: the hash of a full page.
    """

    parent: BlockHash
    tokens: tuple[int, ...]
    block_hash: BlockHash | None


@dataclass(frozen=True)
class Match:
    """The prefix of a sequence that is in the cache already.

    pages: full pages to share.
    partial: a page to copy, and how many of its tokens to use.
    """

    pages: tuple[int, ...]
    partial: tuple[int, int] | None
    num_tokens: int


@dataclass
class PageCounts:
    """Counters of prefix sharing.

    queried: tokens of admitted sequences.
    hit: those of them that were found in the cache.
    evicted: pages whose content was dropped to make room.
    """

    queried: int = 0
    hit: int = 0
    evicted: int = 0


@dataclass
class PagePool:
    """Tracks pages 0 to num_pages - 1: each is free, owned by one or more sequences, or kept for
    its content."""

    num_pages: int
    page_size: int
    counts: PageCounts = field(default_factory=PageCounts)
    _free: list[int] = field(init=False)
    _owners: list[int] = field(init=False)
    _kept: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _content: dict[int, Content] = field(default_factory=dict)
    # The tokens and numbers of the pages after each hash, in order.
    _children: dict[BlockHash, list[tuple[tuple[int, ...], int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _full: dict[BlockHash, int] = field(default_factory=dict)  # full pages

    def __post_init__(self) -> None:
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._owners = [0] * self.num_pages

    @property
    def num_available(self) -> int:
        """Return the number of pages that `take` can give: free ones and kept ones."""
        return len(self._free) + len(self._kept)

    def take(self, count: int) -> list[int]:
        """Take pages for one owner; their content is void. Raises `OutOfPagesError` and takes none
        if there are too few."""
        if count > self.num_available:
            raise OutOfPagesError
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Add an owner to each page."""
        for page in pages:
            self._owners[page] += 1
            self._kept.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Remove an owner from each page. pages: of a sequence, in order; the last are evicted
        first."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                if page in self._content:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def register(
        self,
        tokens: Sequence[int],
        pages: Sequence[int],
        start: int = 0,
        block_hashes: list[BlockHash] | None = None,
    ) -> None:
        """Record that `pages` hold the first `len(tokens)` tokens of a sequence, in order.

        start: the number of its tokens that were registered before.
        block_hashes: as in `match`.
        """
        block_hashes = extend_block_hashes(
            [] if block_hashes is None else block_hashes, tokens, self.page_size
        )
        first = start // self.page_size
        for number in range(first, -(-len(tokens) // self.page_size)):
            part = tuple(tokens[number * self.page_size : (number + 1) * self.page_size])
            parent = block_hashes[number - 1] if number else ROOT
            block_hash = block_hashes[number] if len(part) == self.page_size else None
            self._describe(pages[number], Content(parent, part, block_hash))

    def match(self, tokens: Sequence[int], block_hashes: list[BlockHash] | None = None) -> Match:
        """Find the longest prefix of `tokens` that is in the cache.

        block_hashes: of the sequence, see `extend_block_hashes`. Missing ones are appended, so a
            caller who keeps the list has each computed once.
        """
        block_hashes = extend_block_hashes(
            [] if block_hashes is None else block_hashes, tokens, self.page_size
        )
        pages: list[int] = []
        for block_hash in block_hashes[: len(tokens) // self.page_size]:
            if block_hash not in self._full:
                break
            pages.append(self._full[block_hash])
        at = len(pages) * self.page_size
        if at == len(tokens):
            return Match(tuple(pages), None, at)
        parent = block_hashes[len(pages) - 1] if pages else ROOT
        page, common = self._longest(parent, tuple(tokens[at : at + self.page_size]))
        return Match(tuple(pages), (page, common) if common else None, at + common)

    def owners(self, page: int) -> int:
        return self._owners[page]

    def check(self) -> None:
        """Assert that every page is in exactly one state. For tests."""
        owned = {page for page, owners in enumerate(self._owners) if owners}
        free, kept = set(self._free), set(self._kept)
        assert len(free) == len(self._free) and min(self._owners, default=0) >= 0
        assert not (owned & free or owned & kept or free & kept)
        assert len(owned) + len(free) + len(kept) == self.num_pages
        assert kept <= self._content.keys() and not free & self._content.keys()
        full = {page: each.block_hash for page, each in self._content.items() if each.block_hash}
        assert full == {page: block_hash for block_hash, page in self._full.items()}
        children = [(parent, *each) for parent, all in self._children.items() for each in all]
        contents = [(each.parent, each.tokens, page) for page, each in self._content.items()]
        assert sorted(children) == sorted(contents)

    def _longest(self, parent: BlockHash, tokens: tuple[int, ...]) -> tuple[int, int]:
        """Return a page after `parent` with the longest prefix in common with `tokens`, and the
        length of that prefix; -1 and 0 if none begins as they do."""
        children = self._children.get(parent, [])
        at = bisect.bisect_left(children, (tokens, -1))
        best, most = -1, 0
        # The pages are in order, so none has more in common than the two beside `tokens`.
        for others, page in children[max(0, at - 1) : at + 1]:
            common = _common(others, tokens)
            if common > most:
                best, most = page, common
        return best, most

    def _describe(self, page: int, content: Content) -> None:
        """Record a page's content, unless another page holds all of it already."""
        known = self._content.get(page)
        if known == content:
            return
        other, common = self._longest(content.parent, content.tokens)
        if other not in (-1, page) and common == len(content.tokens):
            return
        if known is not None:
            self._forget(page)
        self._content[page] = content
        bisect.insort(self._children[content.parent], (content.tokens, page))
        if content.block_hash is not None:
            self._full[content.block_hash] = page

    def _forget(self, page: int) -> None:
        content = self._content.pop(page)
        if content.block_hash is not None:
            del self._full[content.block_hash]
        children = self._children[content.parent]
        del children[bisect.bisect_left(children, (content.tokens, page))]
        if not children:
            del self._children[content.parent]

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self._forget(page)
        self.counts.evicted += 1
        return page


def extend_block_hashes(
    block_hashes: list[BlockHash], tokens: Sequence[int], page_size: int
) -> list[BlockHash]:
    """Append the missing hashes of the full pages of `tokens` to `block_hashes`, and return it.

    block_hashes: of a prefix of `tokens`, or of a longer sequence.
    """
    first, count = len(block_hashes), len(tokens) // page_size
    if first < count:
        missing = np.asarray(tokens[first * page_size : count * page_size], np.int32)
        for page in missing.reshape(-1, page_size):
            before = block_hashes[-1] if block_hashes else ROOT
            block_hashes.append(hashlib.blake2b(before + page.tobytes(), digest_size=16).digest())
    return block_hashes


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(differ[0]) if differ.size else size
