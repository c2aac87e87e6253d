"""Which works run next, and when: the one place that decides how a batch is made. Nothing here waits."""

from dataclasses import dataclass, field
from typing import NamedTuple

from layercast.server.batching.pace import Pace
from layercast.server.batching.policy import Limits, Reason
from layercast.server.batching.queue import Queue
from layercast.server.work import Work


class Batch(NamedTuple):
    """Works that share a forward, how many rows they have together, and why the batch closed."""

    works: list[Work]
    rows: int
    reason: Reason


@dataclass(slots=True)
class Gathered:
    """The next batch, None when every group may still wait for more rows; and works that will not run.

    Those are out of the queue too. Nobody waits for them any more, or not for as long as a forward takes.
    """

    batch: Batch | None = None
    dropped: list[Work] = field(default_factory=list)


def gather(queue: Queue, limits: Limits, pace: Pace, now: int, draining: bool, free: int = 1) -> Gathered:
    """Take the next batch out of the queue, for one of `free` instances that wait for one.

    A group may run once its oldest work has waited for the delay, once it fills a batch, once it can make exactly a
    preferred number of rows or more than the largest, and always while draining. Of those that may, the highest
    priority goes first, then the peer whose turn it is, then its oldest work. What came together is shared out: with
    two instances free, half of it runs on each.
    """
    dropped: list[Work] = []
    until = now if draining else now - limits.delay_ns
    while (oldest := queue.oldest()) and (oldest.arrived <= until or queue.ripe()):
        for lead in queue.leads(until):
            works = queue.batch(lead, limits.max_batch)
            rows = sum(work.rows for work in works)
            earliest = now + pace.least(lead.key, rows, now)
            if dead := [work for work in works if not work.alive(earliest)]:
                break
            batch = _close(queue, limits, lead, Batch(works, rows, "full"), until, draining)
            if batch:
                if free > 1 and (draining or lead.arrived <= until) and not limits.preferred:
                    batch = _share(batch, queue.group_rows(lead.key), free)
                queue.take(batch.works)
                return Gathered(batch, dropped)
        else:
            break
        for work in dead:
            queue.discard(work)
        dropped += dead
    return Gathered(None, dropped)


def _close(queue: Queue, limits: Limits, lead: Work, found: Batch, until: int, draining: bool) -> Batch | None:
    """Return the batch that the works `found` make now, or None when it is better to wait for more."""
    if limits.preferred and (preferred := _preferred(found.works, limits.preferred)):
        return preferred
    rows = found.rows
    if rows >= max(limits.preferred, default=limits.max_batch) or queue.group_rows(lead.key) > rows:
        return found
    if draining:
        return found._replace(reason="drain")
    if lead.arrived <= until:
        return found._replace(reason="timeout" if limits.max_delay else "idle")
    return None


def _share(found: Batch, waiting: int, free: int) -> Batch:
    """Return what one of the free instances runs when each is to have its part of the group's rows that wait."""
    part, rows = -(-waiting // free), 0
    if part >= found.rows:
        return found
    for count, work in enumerate(found.works, 1):
        rows += work.rows
        if rows >= part:
            return found if rows == found.rows else Batch(found.works[:count], rows, "idle")
    return found


def _preferred(works: list[Work], sizes: tuple[int, ...]) -> Batch | None:
    """Return the longest beginning of `works` that has exactly a preferred number of rows; None if there is none."""
    rows, found = 0, None
    for count, work in enumerate(works, 1):
        rows += work.rows
        if rows in sizes:
            found = Batch(works[:count], rows, "preferred")
    return found


def ripe_rows(limits: Limits) -> int:
    """Return from how many rows on a group may run before its delay is over."""
    return min((*limits.preferred, limits.max_batch))
