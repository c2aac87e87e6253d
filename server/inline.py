"""Which batches of a model are over so soon that the event loop may wait for them."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Final

_LIMIT: Final = 0.00075
"""Seconds. A hand-over takes 0.1 ms of a processor, and twice that where the loop is busy, since both threads want
Python's lock; nothing else is answered while a forward runs inline,"""
_LIMIT_A_REQUEST: Final = 0.0001
"""but that is so while requests are read and answered too, each of which takes as long as this."""
_LONGEST: Final = 0.0025
"""Other models' requests wait that long at most, whatever it costs to answer those that are in the batch."""


def limit(requests: int) -> float:
    """Return the seconds that a forward of so many requests may take on the loop; of 0, of any requests."""
    return min(_LIMIT + requests * _LIMIT_A_REQUEST, _LONGEST)


@dataclass(frozen=True, slots=True)
class Inline:
    """How many rows run on the event loop, and of how many requests they must be at least.

    `rows` has such pairs, rows ascending, for batches up to each of the `lengths`, which ascend; longer ones never do.
    Without lengths, for all batches, if it has any. For rows in between, the next pair counts, and of its requests as
    many parts.
    """

    rows: tuple[tuple[tuple[int, int], ...], ...] = ()
    lengths: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        """Tell whether any batch does."""
        return any(self.rows)

    def reaches(self, length: int) -> bool:
        """Tell whether batches of this length may, if they have few rows."""
        return not self.lengths or length <= self.lengths[-1]

    def takes(self, rows: int, requests: int, length: int) -> bool:
        """Tell whether so many rows of so many requests do, the longest of this length."""
        at = bisect_left(self.lengths, length) if self.lengths else 0
        if at < len(self.rows):
            for most, least in self.rows[at]:
                if rows <= most:
                    return requests * most >= least * rows
        return False


NOWHERE: Final = Inline()


def up_to(rows: int, single_rows: int = 0) -> Inline:
    """Return limits, the same for every length: so many rows, and, if they are more, so many requests of one row."""
    pairs = ((rows, 0), (single_rows, single_rows)) if single_rows > rows else ((rows, 0),)
    return Inline((tuple(pair for pair in pairs if pair[0]),))
