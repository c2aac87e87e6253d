"""How fast a model runs at best, so that no forward is spent on an answer that is sure to come too late."""

from collections.abc import Hashable
from dataclasses import dataclass

_WINDOW_NS = 1_000_000_000
_MOST_KEYS = 256


@dataclass(frozen=True, slots=True)
class _Seen:
    rows: int
    compute_ns: int
    at: int


class Pace:
    """The shortest forward of each group within about a second.

    Half of it is taken for the least that the next one takes: other taps may end it earlier. And of that half just the
    part that is one's share of `sharers`, whose processors a lone batch may all have. Fewer rows take at least their
    part of it. What was seen longer ago counts for nothing, so that rows refused because of one slow moment are not
    refused for good.
    """

    def __init__(self, sharers: int = 1) -> None:
        self._sharers = sharers
        self._shortest: dict[Hashable, _Seen] = {}

    def ran(self, key: Hashable, rows: int, compute_ns: int, now: int) -> None:
        """A forward of `rows` rows of the group `key` ended `now`, after so long."""
        seen = self._shortest.get(key)
        if seen is None or compute_ns <= seen.compute_ns or now - seen.at > _WINDOW_NS:
            if len(self._shortest) >= _MOST_KEYS:
                self._shortest.clear()
            self._shortest[key] = _Seen(rows, compute_ns, now)

    def least(self, key: Hashable, rows: int, now: int) -> int:
        """Return how many nanoseconds a forward of `rows` rows takes at least, 0 when that is not known."""
        seen = self._shortest.get(key)
        if seen is None or now - seen.at > _WINDOW_NS:
            return 0
        return seen.compute_ns * min(rows, seen.rows) // (2 * seen.rows * self._sharers)
