"""Which works run next, and when: the one place that decides how a batch is made. Nothing here waits."""

from dataclasses import dataclass

from layercast.server.batching.policy import Limits, Reason
from layercast.server.batching.queue import Queue
from layercast.server.work import Work


@dataclass(frozen=True, slots=True)
class Batch:
    """Works that share a forward, and why the batch closed."""

    works: list[Work]
    reason: Reason


def gather(queue: Queue, limits: Limits, now: int, draining: bool) -> Batch | None:
    """Take the next batch out of the queue, or None when every group may still wait for more rows.

    A group may run once its oldest work has waited for the delay, once it fills a batch, once it can make exactly a
    preferred number of rows or more than the largest, and always while draining. Of those that may, the highest
    priority goes first, then the peer whose turn it is, then its oldest work. Works that nobody waits for any more
    are dropped on the way.
    """
    until = now if draining else now - limits.delay_ns
    while (oldest := queue.oldest()) and (oldest.arrived <= until or queue.ripe()):
        for lead in queue.leads(until):
            works = queue.batch(lead, limits.max_batch)
            dead = [work for work in works if not work.alive(now)]
            if dead:
                break
            batch = _close(queue, limits, lead, works, until, draining)
            if batch:
                queue.take(batch.works)
                return batch
        else:
            return None
        for work in dead:
            queue.discard(work)
    return None


def _close(queue: Queue, limits: Limits, lead: Work, works: list[Work], until: int, draining: bool) -> Batch | None:
    """Return the batch that `works` make now, or None when it is better to wait for more."""
    if limits.preferred and (preferred := _preferred(works, limits.preferred)):
        return Batch(preferred, "preferred")
    rows = sum(work.rows for work in works)
    if rows >= max(limits.preferred, default=limits.max_batch) or queue.group_rows(lead.key) > rows:
        return Batch(works, "full")
    if draining:
        return Batch(works, "drain")
    if lead.arrived <= until:
        return Batch(works, "timeout" if limits.max_delay else "idle")
    return None


def _preferred(works: list[Work], sizes: tuple[int, ...]) -> list[Work]:
    """Return the longest beginning of `works` that has exactly a preferred number of rows; none if there is none."""
    rows, found = 0, 0
    for count, work in enumerate(works, 1):
        rows += work.rows
        if rows in sizes:
            found = count
    return works[:found]


def ripe_rows(limits: Limits) -> int:
    """Return from how many rows on a group may run before its delay is over."""
    return min((*limits.preferred, limits.max_batch))
