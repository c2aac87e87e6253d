"""The batcher's queue: levels of priority, fair between peers, in groups that may share a forward.

Plain data, no clock, no loop. Every change takes constant time, so that a full queue can be cancelled row by row.
"""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from layercast.server.work import Work

# An OrderedDict is a linked list: its first entry is found at once even after many others before it were deleted. A
# line of one work, as most are, is a plain dictionary, which is made in a fifth of the time.
_Line = dict[Work, None]
"""Works of one peer, in order of arrival."""


class Held:
    """What waits, of one peer or of all."""

    __slots__ = ("bytes", "requests", "rows", "works")

    def __init__(self, works: int = 0, rows: int = 0, bytes: int = 0, requests: int = 0) -> None:
        self.works = works
        self.rows = rows
        self.bytes = bytes
        self.requests = requests

    def add(self, works: int, rows: int, size: int, requests: int) -> None:
        """Hold so much more, or less where it is below 0."""
        self.works += works
        self.rows += rows
        self.bytes += size
        self.requests += requests


@dataclass(slots=True)
class _Level:
    """The works of one priority, twice: each peer's line, and each group's lines. In both, the first is next."""

    peers: OrderedDict[str, _Line] = field(default_factory=OrderedDict)
    groups: defaultdict[Hashable, OrderedDict[str, _Line]] = field(default_factory=lambda: defaultdict(OrderedDict))


class Queue:
    """Works that wait. `ripe` is the rows that make a group worth a look before its delay is over.

    `longest` is the largest length since nothing waited.
    """

    def __init__(self, ripe: int) -> None:
        self._ripe = ripe
        self._order: OrderedDict[Work, None] = OrderedDict()
        self._levels: dict[int, _Level] = {}
        self._group_rows: dict[Hashable, int] = {}
        self._ripe_keys: set[Hashable] = set()
        self.held = Held()
        self.longest = 0
        self.peers: dict[str, Held] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, work: object) -> bool:
        return work in self._order

    def __iter__(self) -> Iterator[Work]:
        """Iterate over the works in order of arrival."""
        return iter(self._order)

    def push(self, work: Work) -> None:
        """Append `work` to its peer's line."""
        level = self._levels.get(work.priority) or self._new_level(work.priority)
        peer, key, rows, size, requests = work.peer, work.key, work.rows, work.bytes, work.requests
        for lines in (level.peers, level.groups[key]):
            line = lines.get(peer)
            if line is None:
                lines[peer] = {work: None}
            else:
                if len(line) == 1:
                    line = lines[peer] = OrderedDict(line)
                line[work] = None
        self._order[work] = None
        own = self.peers.get(peer)
        if own is None:
            self.peers[peer] = Held(1, rows, size, requests)
        else:
            own.add(1, rows, size, requests)
        self.held.add(1, rows, size, requests)
        if work.length:
            self.longest = max(self.longest, work.length)
        total = self._group_rows[key] = self._group_rows.get(key, 0) + rows
        if total >= self._ripe:
            self._ripe_keys.add(key)

    def discard(self, work: Work) -> bool:
        """Take `work` out, wherever it stands; tell whether it was there."""
        if work not in self._order:
            return False
        del self._order[work]
        peer, key, rows, requests = work.peer, work.key, work.rows, work.requests
        level = self._levels[work.priority]
        group, own = level.groups[key], self.peers[peer]
        for lines in (level.peers, group):
            line = lines[peer]
            del line[work]
            if not line:
                del lines[peer]
        if not group:
            del level.groups[key]
        for held in (self.held, own):
            held.add(-1, -rows, -work.bytes, -requests)
        if not own.works:
            del self.peers[peer]
            if not self._order:
                self.longest = 0
        total = self._group_rows[key] - rows
        if total:
            self._group_rows[key] = total
        else:
            del self._group_rows[key]
        if total < self._ripe:
            self._ripe_keys.discard(key)
        return True

    def oldest(self) -> Work | None:
        """Return the work that has waited longest."""
        return next(iter(self._order), None)

    def newest(self, peer: str) -> Work:
        """Return the last work of `peer`, of its lowest priority; KeyError when it has none here."""
        for level in reversed(self._levels.values()):
            if peer in level.peers:
                return next(reversed(level.peers[peer]))
        raise KeyError(peer)

    def group_rows(self, key: Hashable) -> int:
        """Return how many rows wait in the group `key`."""
        return self._group_rows.get(key, 0)

    def ripe(self) -> bool:
        """Tell whether any group holds enough rows to be worth a look."""
        return bool(self._ripe_keys)

    def leads(self, until: int) -> Iterator[Work]:
        """Yield the works that may lead a batch now, the one to prefer first.

        Those are, by priority and then by whose turn it is, the peer's oldest work if it arrived at `until` or
        before, or else its oldest of each ripe group.
        """
        for level in self._levels.values():
            for peer, line in level.peers.items():
                first = next(iter(line))
                if first.arrived <= until:
                    yield first
                elif self._ripe_keys:
                    lines = (level.groups[key] for key in self._ripe_keys if key in level.groups)
                    heads = (next(iter(own[peer])) for own in lines if peer in own)
                    yield from sorted(heads, key=lambda work: work.arrived)

    def batch(self, lead: Work, limit: int) -> list[Work]:
        """Return the works of the lead's group that would run next, up to `limit` rows together, at least one.

        Higher priorities come first; within one, peers take turns, the lead's first. A peer whose next work has no
        room waits, its later ones too; other peers go on.
        """
        works: list[Work] = []
        rows = 0
        for priority, level in self._levels.items():
            lines = level.groups.get(lead.key)
            if not lines:
                continue
            if priority == lead.priority:
                lines.move_to_end(lead.peer, last=False)
            if len(lines) == 1:
                (only,) = lines.values()
                rows = _append(works, rows, only, limit)
                continue
            again: deque[Iterator[Work]] = deque()
            for line in lines.values():
                if rows >= limit:
                    break
                turn = iter(line)
                work = next(turn)
                if not works or rows + work.rows <= limit:
                    works.append(work)
                    rows += work.rows
                    if len(line) > 1:
                        again.append(turn)
            while again and rows < limit:
                turn = again.popleft()
                following = next(turn, None)
                if following is not None and rows + following.rows <= limit:
                    works.append(following)
                    rows += following.rows
                    again.append(turn)
        return works

    def take(self, works: list[Work]) -> None:
        """Take `works` out to be run: their peers go to the end of the turns."""
        if len(works) == len(self._order):
            self._clear()
            return
        for work in works:
            self.discard(work)
            level = self._levels[work.priority]
            if work.peer in level.peers:
                level.peers.move_to_end(work.peer)
                if work.peer in level.groups.get(work.key, ()):
                    level.groups[work.key].move_to_end(work.peer)

    def _clear(self) -> None:
        """Take everything out, at once: most batches take all that waits."""
        for level in self._levels.values():
            level.peers.clear()
            level.groups.clear()
        for kept in (self._order, self._group_rows, self._ripe_keys, self.peers):
            kept.clear()
        self.held.works = self.held.rows = self.held.bytes = self.held.requests = self.longest = 0

    def _new_level(self, priority: int) -> _Level:
        level = self._levels[priority] = _Level()
        self._levels = dict(sorted(self._levels.items()))
        return level


def _append(works: list[Work], rows: int, line: _Line, limit: int) -> int:
    """Append the works of a line that has no other beside it; return the rows of all `works` then."""
    for work in line:
        if works and rows + work.rows > limit:
            break
        works.append(work)
        rows += work.rows
    return rows
