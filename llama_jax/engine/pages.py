"""Who owns which page of the key/value cache, and which pages hold a beginning that others share.

A page holds the keys and values of `page_size` consecutive tokens, and these depend on all tokens
before them. So a page is known by its content: the chain of pages before it and its own tokens. A
sequence that begins as an earlier one did takes over the earlier one's full pages, and copies the
page in the middle of which the two part. A page that nobody uses any more keeps its content until
room is needed; the one used longest ago goes first.

Idea: automatic prefix caching in vLLM (Kwon et al., 2023), RadixAttention in SGLang (Zheng et al.,
2024).
"""

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Chain = bytes  # a digest of all full pages up to a point
ROOT: Chain = b""


class OutOfPagesError(Exception):
    """Fewer pages are free, or can be freed, than were asked for."""


@dataclass(frozen=True)
class Content:
    """What a page holds: `tokens`, after the full pages of `chain`; less than a page while it grows
    or where a sequence ended in it. end: the chain with a full page's own tokens."""

    chain: Chain
    tokens: tuple[int, ...]
    end: Chain | None


@dataclass(frozen=True)
class Match:
    """The beginning of a sequence that is in the cache already.

    pages: full ones, to share. partial: a page to copy, and how many of its tokens to use.
    """

    pages: tuple[int, ...]
    partial: tuple[int, int] | None
    num_tokens: int


@dataclass
class PageCounts:
    """queried, hit: tokens of admitted sequences, and those of them found in the cache. evicted:
    pages whose content was given up to make room."""

    queried: int = 0
    hit: int = 0
    evicted: int = 0


@dataclass
class PagePool:
    """Pages 0 to num_pages - 1: each is free, owned by one or more sequences, or kept for its
    content."""

    num_pages: int
    page_size: int
    counts: PageCounts = field(default_factory=PageCounts)
    _free: list[int] = field(init=False)
    _owners: list[int] = field(init=False)
    _kept: OrderedDict[int, None] = field(default_factory=OrderedDict)
    _content: dict[int, Content] = field(default_factory=dict)
    _children: dict[tuple[Chain, int], set[int]] = field(default_factory=lambda: defaultdict(set))
    _full: dict[Chain, int] = field(default_factory=dict)  # full pages by their `Content.end`

    def __post_init__(self) -> None:
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._owners = [0] * self.num_pages

    @property
    def num_available(self) -> int:
        """Pages that `take` could give: free ones, and kept ones that nobody owns."""
        return len(self._free) + len(self._kept)

    def take(self, count: int) -> list[int]:
        """Pages for one owner; their content is void. Raises `OutOfPagesError`, taking none."""
        if count > self.num_available:
            raise OutOfPagesError
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more owner for each page."""
        for page in pages:
            self._owners[page] += 1
            self._kept.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """One owner less. pages: of a sequence, in order; its end will be given up first."""
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
        chains: list[Chain] | None = None,
    ) -> None:
        """The first `len(tokens)` tokens of a sequence now stand in `pages`, in order.

        start: tokens of it that were registered before. chains: as in `match`.
        """
        chains = extend_chains([] if chains is None else chains, tokens, self.page_size)
        first = start // self.page_size
        for number in range(first, -(-len(tokens) // self.page_size)):
            part = tuple(tokens[number * self.page_size : (number + 1) * self.page_size])
            chain = chains[number - 1] if number else ROOT
            end = chains[number] if len(part) == self.page_size else None
            self._describe(pages[number], Content(chain, part, end))

    def match(self, tokens: Sequence[int], chains: list[Chain] | None = None) -> Match:
        """The longest beginning of `tokens` that is in the cache.

        chains: of the sequence, see `extend_chains`: what is missing of them is added, so that a
        caller who keeps the list has them computed once.
        """
        chains = extend_chains([] if chains is None else chains, tokens, self.page_size)
        pages: list[int] = []
        for end in chains[: len(tokens) // self.page_size]:
            if end not in self._full:
                break
            pages.append(self._full[end])
        at = len(pages) * self.page_size
        if at == len(tokens):
            return Match(tuple(pages), None, at)
        chain = chains[len(pages) - 1] if pages else ROOT
        page, common = self._longest(chain, tokens[at : at + self.page_size])
        return Match(tuple(pages), (page, common) if common else None, at + common)

    def owners(self, page: int) -> int:
        return self._owners[page]

    def check(self) -> None:
        """Assert that every page is in exactly one state; for tests."""
        owned = {page for page, owners in enumerate(self._owners) if owners}
        free, kept = set(self._free), set(self._kept)
        assert len(free) == len(self._free) and min(self._owners, default=0) >= 0
        assert not (owned & free or owned & kept or free & kept)
        assert len(owned) + len(free) + len(kept) == self.num_pages
        assert kept <= self._content.keys() and not free & self._content.keys()
        full = {page: content.end for page, content in self._content.items() if content.end}
        assert full == {page: end for end, page in self._full.items()}

    def _longest(self, chain: Chain, wanted: Sequence[int]) -> tuple[int, int]:
        """The page after `chain` that has the most tokens in common with `wanted`, and how many."""
        best, most = -1, 0
        for page in sorted(self._children.get((chain, wanted[0]), ())):
            common = _common(self._content[page].tokens, wanted)
            if common > most:
                best, most = page, common
        return best, most

    def _describe(self, page: int, content: Content) -> None:
        """Note a page's content, unless another page holds all of it already."""
        known = self._content.get(page)
        if known == content:
            return
        other, common = self._longest(content.chain, content.tokens)
        if other not in (-1, page) and common == len(content.tokens):
            return
        if known is not None:
            self._forget(page)
        self._content[page] = content
        self._children[content.chain, content.tokens[0]].add(page)
        if content.end is not None:
            self._full[content.end] = page

    def _forget(self, page: int) -> None:
        content = self._content.pop(page)
        if content.end is not None:
            del self._full[content.end]
        key = (content.chain, content.tokens[0])
        self._children[key].discard(page)
        if not self._children[key]:
            del self._children[key]

    def _evict(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self._forget(page)
        self.counts.evicted += 1
        return page


def extend_chains(chains: list[Chain], tokens: Sequence[int], page_size: int) -> list[Chain]:
    """Add to `chains`, one after each full page of a sequence, those of `tokens` that are missing.

    chains: of a beginning of `tokens`, or of more than that; changed and returned.
    """
    first, count = len(chains), len(tokens) // page_size
    if first < count:
        missing = np.asarray(tokens[first * page_size : count * page_size], np.int32)
        for page in missing.reshape(-1, page_size):
            before = chains[-1] if chains else ROOT
            chains.append(hashlib.blake2b(before + page.tobytes(), digest_size=16).digest())
    return chains


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(differ[0]) if differ.size else size
