"""Whether anything else on this machine takes the processors that a model is timed on."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from layercast.server.engines.race import Instant, now

_LEAST: Final = 0.1
"""Seconds; the system counts in hundredths."""

_FREE: Final = 0.8
"""What part of the processors asked for must have been free, or taken by this process."""


class Others:
    """What others than this process compute from when it is made. `root` is where /proc is found."""

    def __init__(self, root: Path = Path("/"), clock: Callable[[], Instant] = now) -> None:
        self._stat = root / "proc/stat"
        self._clock = clock
        self._begun, self._idle = clock(), self._idle_seconds()

    def are_busy(self, processors: int) -> bool:
        """Tell whether they left fewer than so many `processors`; False where that can't be known (only Linux says)."""
        began, end = self._begun, self._clock()
        before, after = self._idle, self._idle_seconds()
        wall = end.wall - began.wall
        if before is None or after is None or wall < _LEAST:
            return False
        return after - before + end.cpu - began.cpu < _FREE * processors * wall

    def _idle_seconds(self) -> float | None:
        """Return how long the processors of this process had nothing to do, all in all."""
        try:
            own = {f"cpu{number}" for number in os.sched_getaffinity(0)}
            lines = [line.split() for line in self._stat.read_text(encoding="ascii").splitlines()]
            ticks = [int(fields[4]) + int(fields[5]) for fields in lines if fields and fields[0] in own]
            return sum(ticks) / os.sysconf("SC_CLK_TCK") if any(ticks) else None  # zeros where it is not counted
        except (AttributeError, OSError, ValueError, IndexError):
            return None
