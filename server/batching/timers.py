"""How long a request may wait: the queue's timeout or its caller's shorter one, and the deadline."""

import asyncio
from collections.abc import Sequence

from layercast.server.batching.admission import RETRY_SECONDS, End
from layercast.server.batching.endings import Endings, too_late
from layercast.server.batching.queue import Queue
from layercast.server.errors import Unavailable
from layercast.server.work import Course, Terms, Work


class Timers:
    """Ends requests by `end` that wait too long in `queue`; `timeout` is its own, in seconds, if it has one."""

    def __init__(self, name: str, timeout: float | None, queue: Queue, endings: Endings, end: End) -> None:
        self._name = name
        self._timeout = timeout
        self._queue = queue
        self._endings = endings
        self._end = end
        self._loop = asyncio.get_running_loop()

    def of(self, works: Sequence[Work], terms: Terms) -> list[asyncio.TimerHandle]:
        """Return the timers of a request that was queued just now, to be cancelled when it has ended."""
        own, asked = self._timeout, terms.timeout
        seconds = own if asked is None else asked if own is None else min(own, asked)
        timers = []
        if seconds is not None:
            left = max(0.0, seconds - terms.waited_ns / 1e9)
            timers.append(self._loop.call_later(left, self._time_out, works, seconds, terms.course))
        if terms.deadline is not None:
            timers.append(self._loop.call_at(terms.deadline, lambda: self._end(works, too_late())))
        return timers

    def _time_out(self, works: Sequence[Work], seconds: float, course: Course | None) -> None:
        if any(work in self._queue for work in works):
            self._endings.rejected("queue_timeout", course)
            error = f"Request timeout expired: the rows waited {seconds * 1000:g} ms in the queue of {self._name!r}"
            self._end(works, Unavailable(error, retry_after=RETRY_SECONDS))
