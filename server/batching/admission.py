"""Who may wait: a request is queued whole or refused at once, and no peer may keep the others out of a full queue."""

import time
from collections.abc import Callable, Sequence

from layercast.server.batching.endings import Endings
from layercast.server.batching.policy import Limits
from layercast.server.batching.queue import Held, Queue
from layercast.server.errors import Evicted, InvalidArgument, ServingError, Unavailable
from layercast.server.work import Course, Terms, Work

RETRY_SECONDS = 0.1

End = Callable[[Sequence[Work], ServingError], None]
"""Takes a request's works out of the queue and ends them with an error."""


class Admission:
    """Queues works within the limits of rows and bytes.

    When the queue is full, a peer that holds less than an even share of it still gets in: the newest requests of the
    peer that holds most make room, and are refused in its place.
    """

    def __init__(self, name: str, limits: Limits, queue: Queue, endings: Endings, end: End) -> None:
        self._name = name
        self._limits = limits
        self._queue = queue
        self._endings = endings
        self._end = end

    def admit(self, works: Sequence[Work], terms: Terms, expires: int | None) -> None:
        """Queue the works of one request. `expires` is its deadline on `time.perf_counter_ns`'s clock.

        Raises InvalidArgument for a request that the empty queue could not hold, Unavailable when there is no room.
        """
        limits, held, rows, size = self._limits, self._queue.held, 0, 0
        for work in works:
            rows += work.rows
            size += work.bytes
        if held.rows + rows > limits.queue_rows or held.bytes + size > limits.queue_bytes:
            wanted = Held(len(works), rows, size)
            self._check_possible(wanted, terms.course)
            self._make_room(wanted, terms)
        priority = terms.priority if 1 <= terms.priority <= limits.priorities else limits.priorities
        now = time.perf_counter_ns()
        for work in works:
            work.parts, work.peer, work.expires, work.arrived = works, terms.peer, expires, now - terms.waited_ns
            work.course, work.priority = terms.course, priority
            self._queue.push(work)

    def _check_possible(self, wanted: Held, course: Course | None) -> None:
        limits = self._limits
        if wanted.rows > limits.queue_rows:
            self._endings.rejected("too_large", course)
            raise InvalidArgument(
                f"the request has {wanted.rows} rows, the queue holds {limits.queue_rows}; "
                f"send them in several requests"
            )
        if wanted.bytes > limits.queue_bytes:
            self._endings.rejected("too_large", course)
            raise InvalidArgument(
                f"the inputs take {wanted.bytes:,} bytes, the queue holds {limits.queue_bytes:,}; "
                f"send them in several requests"
            )

    def fits(self, rows: int, size: int) -> bool:
        """Tell whether there is room for so many rows and bytes."""
        return not (self._lacks_rows(wanted := Held(1, rows, size)) or self._lacks_bytes(wanted))

    def check_room(self, rows: int, peer: str) -> None:
        """Raise Unavailable when a request of so many rows is sure to be refused as things stand."""
        if self._queue.held.rows + rows > self._limits.queue_rows >= rows > 0:
            self._check_fair(Held(1, rows, 0), Terms(peer=peer))

    def _make_room(self, wanted: Held, terms: Terms) -> None:
        """Return when the request fits, having ended others if that is fair; raise Unavailable if it is not."""
        if self._lacks_rows(wanted) or self._lacks_bytes(wanted):
            self._check_fair(wanted, terms)
        # What the others hold is more than their even shares together, so one of them holds more than its own.
        while self._lacks_rows(wanted):
            self._evict(max(self._queue.peers, key=lambda name: self._queue.peers[name].rows))
        while self._lacks_bytes(wanted):
            self._evict(max(self._queue.peers, key=lambda name: self._queue.peers[name].bytes))

    def _check_fair(self, wanted: Held, terms: Terms) -> None:
        """Raise Unavailable unless the peer may have room in a full queue: it would hold no more than an even share."""
        limits = self._limits
        own = self._queue.peers.get(terms.peer) or Held()
        peers = len(self._queue.peers) + (own.works == 0)
        if (self._lacks_rows(wanted) and own.rows + wanted.rows > limits.queue_rows / peers) or (
            self._lacks_bytes(wanted) and own.bytes + wanted.bytes > limits.queue_bytes / peers
        ):
            raise self._full(wanted, terms.course)

    def _lacks_rows(self, wanted: Held) -> bool:
        return self._queue.held.rows + wanted.rows > self._limits.queue_rows

    def _lacks_bytes(self, wanted: Held) -> bool:
        return self._queue.held.bytes + wanted.bytes > self._limits.queue_bytes

    def _evict(self, peer: str) -> None:
        newest = self._queue.newest(peer)
        # Of several requests, queued as one work, one ends; the others are queued again, where they were: last.
        self._endings.rejected("queue_full", newest.course if newest.requests == 1 else None)
        self._end(
            newest.parts,
            Evicted(
                f"the queue of model {self._name!r} is full and this caller holds most of it: "
                f"the rows made room for another's; try again shortly, or send fewer at a time",
                retry_after=RETRY_SECONDS,
            ),
        )

    def _full(self, wanted: Held, course: Course | None) -> Unavailable:
        self._endings.rejected("queue_full", course)
        held, limits = self._queue.held, self._limits
        if self._lacks_rows(wanted):
            what = f"{held.rows} of {limits.queue_rows} rows wait, {wanted.rows} more came"
        else:
            what = f"{held.bytes:,} of {limits.queue_bytes:,} bytes wait, {wanted.bytes:,} more came"
        return Unavailable(
            f"the queue of model {self._name!r} is full: {what}; try again shortly", retry_after=RETRY_SECONDS
        )
