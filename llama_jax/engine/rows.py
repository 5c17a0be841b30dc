"""The rows of an engine: who runs in each, and how far they all have come, as arrays over the rows.

What a round of decoding asks of every row, how much it may draw, whether it has the pages for that,
what it needs of the sampler, is answered for all of them at once, so that the host's work before a
launch does not grow with their number.
"""

from dataclasses import dataclass

import numpy as np

from llama_jax.engine.request import Request
from llama_jax.engine.sampling import KINDS, Kind, kind_of
from llama_jax.model.kv_cache import PAGE_SIZE


@dataclass(eq=False)
class Row:
    """A request that is being worked on.

    number: its row. tokens: what has to go through prefill, tokens drawn before a preemption among
    them. pages: its own and shared ones, in order. limit: tokens it may draw in all. stored: those
    of `tokens` that are in the cache once all that is launched has run.
    """

    request: Request
    number: int
    tokens: list[int]
    pages: list[int]
    limit: int
    stored: int

    @property
    def left(self) -> int:
        """Tokens that still have to go through prefill."""
        return len(self.tokens) - self.stored

    @property
    def is_prefilling(self) -> bool:
        return self.stored < len(self.tokens)


@dataclass(frozen=True, eq=False)
class Drawing:
    """A launch of decode on its way. rows, by number: those there were; counts, int64 [batch]: how
    many tokens each may draw in it; stays: which stay those were, see `Rows`."""

    rows: list[Row | None]
    counts: np.ndarray
    stays: np.ndarray


class Rows:
    """All rows. running: in the order of their admission; prefilling: those of them whose prompt is
    not through. table: int32 [batch, pages_per_row], the pages of each, `no_page` where there are
    none.

    room: int64 [batch], tokens that a row may draw in decode, once all that is launched has run and
    drawn as much as it may; 0 before its prompt is through, and for a row that nobody has.
    """

    def __init__(self, batch_size: int, pages_per_row: int, no_page: int) -> None:
        self.running: list[Row] = []
        self.prefilling: list[Row] = []
        self.num_streamed = 0
        self.table = np.full((batch_size, pages_per_row), no_page, np.int32)
        self._no_page = no_page
        self._free = list(range(batch_size))[::-1]
        self._rows: list[Row | None] = [None] * batch_size
        # Of each row: tokens in its cache, pages, what it needs of the sampler, whether it wants
        # logprobs, whether a grammar says what may follow, and how many had it before.
        zeros = np.zeros((7, batch_size), np.int64)
        self.room, self._length, self._held, self._kinds, self._asks, self._matched = zeros[:6]
        self._stays = zeros[6]

    def enter(
        self, request: Request, tokens: list[int], pages: list[int], limit: int, stored: int
    ) -> Row:
        """Give a request a row that is free."""
        row = Row(request, self._free.pop(), tokens, pages, limit, stored)
        self._rows[row.number] = row
        self.running.append(row)
        self.prefilling.append(row)
        self.num_streamed += request.is_streamed
        self._kinds[row.number] = KINDS.index(kind_of(request.params))
        self._asks[row.number] = request.params.logprobs is not None
        self._matched[row.number] = request.matcher is not None
        self._note_pages(row)
        return row

    def leave(self, row: Row) -> None:
        self.running.remove(row)
        if row in self.prefilling:
            self.prefilling.remove(row)
        self.num_streamed -= row.request.is_streamed
        self.table[row.number] = self._no_page
        self.room[row.number] = self._held[row.number] = 0
        self._stays[row.number] += 1
        self._rows[row.number] = None
        self._free.append(row.number)

    def prefill(self, row: Row, count: int) -> None:
        """The next `count` tokens of a row's prompt are on their way into the cache."""
        row.stored += count
        if not row.is_prefilling:
            self.prefilling.remove(row)

    def begin(self, row: Row) -> None:
        """The first token of a row is on its way; it goes on in decode."""
        self.room[row.number] = row.limit - len(row.request.token_ids) - 1
        self._length[row.number] = len(row.tokens)

    def lacking(self, counts: np.ndarray) -> np.ndarray:
        """How many more pages each row needs to draw `counts` tokens: int64 [batch]."""
        needed = -(-(self._length + counts) // PAGE_SIZE) - self._held
        return np.where(counts > 0, np.maximum(needed, 0), 0)

    def add_pages(self, number: int, pages: list[int]) -> None:
        row = self._rows[number]
        assert row is not None
        row.pages += pages
        self._note_pages(row)

    def needs(self, counts: np.ndarray) -> tuple[Kind, bool]:
        """What the rows that draw `counts` tokens need of the sampler, and whether any of them
        wants logprobs."""
        drawing = counts > 0
        return KINDS[int(np.max(self._kinds * drawing))], bool(np.any(self._asks * drawing))

    def matched(self, counts: np.ndarray) -> list[Row]:
        """Those of the rows that draw `counts` tokens whose grammar says what may follow."""
        numbers = np.flatnonzero((counts > 0) & (self._matched > 0)).tolist()
        return [row for number in numbers if (row := self._rows[number])]

    def launch(self, counts: np.ndarray) -> Drawing:
        """The rows draw `counts` tokens, at most."""
        self.room -= counts
        self._length += counts
        return Drawing(self._rows.copy(), counts, self._stays.copy())

    def settle(self, drawing: Drawing, drawn: np.ndarray) -> None:
        """So many were drawn of those that might have been: int32 [batch]."""
        fewer = np.where(self._stays == drawing.stays, drawing.counts - drawn, 0)
        self.room += fewer
        self._length -= fewer

    def _note_pages(self, row: Row) -> None:
        self.table[row.number, : len(row.pages)] = row.pages
        self._held[row.number] = len(row.pages)
