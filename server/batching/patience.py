"""How long rows that would run on the event loop wait for others."""

import time
from typing import Final

_PASSES: Final = 4
_LONGEST_NS: Final = 1_000_000


class Patience:
    """Counts passes of the event loop that bring no request. Asked once a pass.

    A batch in a thread leaves the loop free to gather the next one. One on the loop does not: without patience requests
    that come at the same time would be read and run one by one. A request takes several passes from its first byte to
    the queue; those that bring nothing take some microseconds each.
    """

    def __init__(self) -> None:
        self._quiet = 0

    def came(self) -> None:
        """A request has come."""
        self._quiet = 0

    def lasts(self, arrived: int) -> bool:
        """Tell whether to wait one more pass, the oldest row having arrived at `arrived` (`perf_counter_ns`)."""
        self._quiet += 1
        return self._quiet < _PASSES and time.perf_counter_ns() - arrived < _LONGEST_NS
