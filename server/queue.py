"""The batcher's queue: first come, first served, in groups that may share a forward. Plain data, no clock, no loop."""

from collections import deque
from collections.abc import Hashable

from layercast.server.work import Work


class Queue:
    """Works in groups by `Work.key`, counted in rows. Works that ended while waiting are skipped when taken."""

    def __init__(self) -> None:
        self._groups: dict[Hashable, deque[Work]] = {}
        self.rows = 0

    def __len__(self) -> int:
        return sum(len(group) for group in self._groups.values())

    def holds(self, work: Work) -> bool:
        """Tell whether `work` still waits here."""
        return work in self._groups.get(work.key, ())

    def push(self, work: Work) -> None:
        """Append `work` to its group."""
        self._groups.setdefault(work.key, deque()).append(work)
        self.rows += work.rows

    def discard(self, work: Work) -> None:
        """Take `work` out, wherever it stands; nothing happens when it is not in the queue."""
        if self.holds(work):
            self._groups[work.key].remove(work)
            self._shrink(work)

    def oldest(self) -> Work | None:
        """Return the work that has waited longest, still in the queue."""
        return min((group[0] for group in self._groups.values()), key=lambda work: work.arrived, default=None)

    def waiting(self, key: Hashable, limit: int) -> int:
        """Return how many rows wait in the group `key`, counting no further than `limit`."""
        total = 0
        for work in self._groups.get(key, ()):
            total += work.rows
            if total >= limit:
                break
        return total

    def take(self, key: Hashable, limit: int) -> list[Work]:
        """Remove and return works of the group `key` from its front, up to `limit` rows together, at least one."""
        taken: list[Work] = []
        rows = 0
        group = self._groups.get(key)
        while group and (not taken or rows + group[0].rows <= limit):
            work = group.popleft()
            rows += work.rows
            taken.append(work)
        for work in taken:
            self._shrink(work)
        return taken

    def _shrink(self, work: Work) -> None:
        self.rows -= work.rows
        if not self._groups.get(work.key, True):
            del self._groups[work.key]
