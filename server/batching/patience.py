"""Whether rows run on the event loop, and how long they wait there for others: by how requests have come of late."""

import time
from typing import Final

_PASSES: Final = 4
_LONGEST_NS: Final = 1_000_000
_BUNCH: Final = 1.5
_WEIGHT: Final = 1 / 16
"""Of the latest pass in the mean of requests a pass, and of the latest batch in that of requests a batch."""


class Patience:
    """Counts requests, and passes of the event loop that bring none. Asked once a pass.

    A batch in a thread leaves the loop free to gather the next one. One on the loop does not: where a front end hands
    over one request a pass (grpc.aio does, however many wait), all would run alone. So rows run on the loop only while
    requests come in bunches. Then, too, they wait for others: a request takes several passes from its first byte to the
    queue; those that bring nothing take some microseconds each.

    A front end may hand over `together`, in one pass, all that came while the loop was busy. Then rows always run on
    the loop. To read what came takes a while, in which others come that have been answered together with those: where
    batches have been of several requests, rows wait for one more pass, and see who did.
    """

    def __init__(self, together: bool = False) -> None:
        self._together = together
        self._quiet = self._new = 0
        self._bunch = self._batch = 1.0
        self._has_waited = False

    @property
    def here(self) -> bool:
        """Whether a short forward delays nobody who would have shared the next one."""
        return self._together or self._bunch >= _BUNCH

    def came(self) -> None:
        """A request has come."""
        self._quiet = 0
        self._new += 1

    def passed(self) -> None:
        """The loop has made a pass."""
        if self._new:
            self._bunch += (self._new - self._bunch) * _WEIGHT
            self._new = 0

    def ran(self, requests: int) -> None:
        """A batch of so many requests runs now."""
        self._has_waited = False
        self._batch += (requests - self._batch) * _WEIGHT

    def lasts(self, arrived: int) -> bool:
        """Tell whether to wait one more pass, the oldest row having arrived at `arrived` (`perf_counter_ns`)."""
        self._quiet += 1
        if self._together:
            waits = not self._has_waited and self._batch >= _BUNCH
            self._has_waited = True
            return waits
        return self._quiet < _PASSES and time.perf_counter_ns() - arrived < _LONGEST_NS
