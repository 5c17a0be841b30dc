"""Pages and their content, without a model."""

import random

import pytest

from llama_jax.engine import pages as pages_module
from llama_jax.engine.pages import ROOT, Match, OutOfPagesError, PagePool, extend_block_hashes

SIZE = 4


def pool(count: int = 6) -> PagePool:
    return PagePool(count, SIZE)


def store(pages: PagePool, tokens: list[int]) -> list[int]:
    taken = pages.take(-(-len(tokens) // SIZE))
    pages.register(tokens, taken)
    return taken


def test_pages_are_taken_and_given_back() -> None:
    pages = pool()
    first = pages.take(4)
    assert len(set(first)) == 4 and pages.num_available == 2
    with pytest.raises(OutOfPagesError):
        pages.take(3)
    assert pages.num_available == 2
    pages.release(first)
    assert pages.num_available == 6
    pages.check()


def test_the_longest_prefix_is_found() -> None:
    pages = pool()
    taken = store(pages, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert pages.match([1, 2, 3, 4, 5, 6, 7, 8, 9, 9]) == Match(tuple(taken[:2]), (taken[2], 1), 9)
    assert pages.match([1, 2, 3, 4, 5, 6, 0]) == Match(tuple(taken[:1]), (taken[1], 2), 6)
    assert pages.match([1, 2, 3, 4]) == Match(tuple(taken[:1]), None, 4)
    assert pages.match([2, 3, 4, 1]) == Match((), None, 0)
    # The same four tokens after others are other keys and values.
    assert pages.match([5, 6, 7, 8]) == Match((), None, 0)
    assert pages.match([]) == Match((), None, 0)


def test_the_longest_prefix_among_many_is_found_by_few_comparisons(monkeypatch) -> None:
    """Prompts begin with the same token, so all their first pages come after the same hash."""
    draw, pages, stored = random.Random(0), pool(300), []
    for _ in range(2000):
        while pages.num_available < 3:
            pages.release(stored.pop(draw.randrange(len(stored))))
        stored.append(store(pages, [7, *draw.choices(range(3), k=draw.randint(0, 9))]))
    pages.check()
    compared = []
    common = pages_module._common
    monkeypatch.setattr(pages_module, "_common", lambda a, b: compared.append(1) or common(a, b))
    for _ in range(200):
        wanted = [7, *draw.choices(range(3), k=10)]
        match = pages.match(wanted)
        at = SIZE * len(match.pages)
        parent = extend_block_hashes([], wanted[:at], SIZE)[-1] if at else ROOT
        after = [each.tokens for each in pages._content.values() if each.parent == parent]
        longest = max((common(each, wanted[at : at + SIZE]) for each in after), default=0)
        assert match.num_tokens == at + longest
    assert len(compared) <= 2 * 200


def test_a_growing_page_is_described_anew() -> None:
    pages = pool()
    taken = pages.take(2)
    pages.register([1, 2], taken)
    assert pages.match([1, 2, 3, 4]).num_tokens == 2
    pages.register([1, 2, 3, 4, 5], taken, 2)
    assert pages.match([1, 2, 3, 4, 5, 6]).num_tokens == 5


def test_two_pages_of_one_content_are_known_once() -> None:
    pages = pool()
    first, second = store(pages, [1, 2, 3, 4]), store(pages, [1, 2, 3, 4])
    assert pages.match([1, 2, 3, 4]).pages == tuple(first)
    pages.release(second)
    pages.check()
    assert pages.num_available == 5
    pages.release(first)
    assert pages.match([1, 2, 3, 4]).pages == tuple(first)


def test_the_page_used_longest_ago_goes_first_and_a_sequences_end_before_its_beginning() -> None:
    pages = pool(4)
    old, new = store(pages, [1, 2, 3, 4, 5, 6, 7, 8]), store(pages, [9, 9, 9, 9])
    pages.release(old)
    pages.release(new)
    pages.take(2)  # the free one, and old's second page
    assert pages.match([1, 2, 3, 4, 5, 6, 7, 8]).pages == (old[0],)
    assert pages.match([9, 9, 9, 9]).pages == tuple(new)
    assert pages.counts.evicted == 1
    pages.take(1)
    assert pages.match([1, 2, 3, 4]).pages == ()
    assert pages.match([9, 9, 9, 9]).pages == tuple(new)
    pages.check()


def test_a_shared_page_stays_until_its_last_owner_leaves() -> None:
    pages = pool(2)
    taken = store(pages, [1, 2, 3, 4])
    pages.share(taken)
    pages.release(taken)
    assert pages.owners(taken[0]) == 1 and pages.num_available == 1
    pages.release(taken)
    assert pages.num_available == 2
    pages.share(taken)  # out of those kept for their content, back into use
    assert pages.num_available == 1 and pages.owners(taken[0]) == 1
    pages.check()
