"""How many callers have a request under way at a time, and how many requests therefore wait for each other."""

import math
import time
from typing import Final

TICK_SECONDS: Final = 0.003
"""Without a request for so long, all are here. Event loops may count in whole milliseconds."""
_LONGEST_NS: Final = 12_000_000
"""Who still comes after so long comes without end."""
_PART: Final = 3 / 4
"""Of the callers, whose requests are worth waiting for. The others come while those are answered."""
_GAP_NS: Final = 500_000
"""Requests that come further apart, in the mean, are answered sooner one by one."""
_FEWEST: Final = 4
_MOST: Final = 512
"""After so many batches callers are counted again: after few at first, later, while they stay as many, after more."""


class Callers:
    """Counts callers by letting a batch wait, now and then, until no more requests come.

    What has come then is what all callers have under way. From then on a batch waits for a part of that: who is alone
    waits for nobody.
    """

    def __init__(self) -> None:
        self._wanted = 1.0
        self._before = 1
        self._between = self._left = _FEWEST
        self._first = self._last = 0
        self._more = self._all_here = False

    def came(self, requests: int) -> None:
        """A request has come; with it there are so many."""
        self._last = time.perf_counter_ns()
        if requests == 1:
            self._first, self._more, self._all_here = self._last, False, False
        else:
            self._more = True

    def enough(self, requests: int) -> bool:
        """Tell whether so many requests wait no longer for others."""
        return self._all_here or requests >= self._wanted

    def ticked(self, requests: int) -> None:
        """A tick has passed, and so many requests are still not enough."""
        waited = time.perf_counter_ns() - self._first
        if not self._more:
            gap = (self._last - self._first) / max(1, requests - 1)
            self._learn(math.ceil(requests * _PART) if gap <= _GAP_NS else 1)
        elif waited >= _LONGEST_NS:  # they come without end: as many as do while one would be answered
            self._learn(requests * _GAP_NS * 2 // waited if waited <= requests * _GAP_NS else 1)
        self._more = False

    def ran(self, requests: int) -> None:
        """So many requests wait no longer."""
        if self._wanted == math.inf and not self._all_here:
            self._learn(math.ceil(requests * _PART))  # there was no room for more
        self._all_here = False
        self._left -= 1
        if self._left <= 0:
            self._wanted = math.inf

    def _learn(self, wanted: int) -> None:
        same = self._wanted == math.inf and abs(wanted - self._before) <= wanted // 8
        self._between = min(_MOST, self._between * 2) if same else _FEWEST
        self._before = max(1, wanted)
        self._wanted = float(self._before)
        self._left, self._all_here = self._between, True
