"""Requests that a front end hands over one by one: those for a model whose forwards are short wait for each other.

As long as they wait, nothing is done for them. What is done for many at a time costs each of them less, in the model
and before it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from layercast.server.service.answering import LARGE
from layercast.server.service.bunch import Bunch
from layercast.server.service.callers import TICK_SECONDS, Callers
from layercast.server.service.heads import Known
from layercast.server.service.short import Short, Told, abandoned
from layercast.server.work import Terms

_SOON_SECONDS: Final = 0.05
"""A request with less time than this waits for nobody."""

_LARGEST: Final = 16 << 10
"""A message of more bytes has rows enough by itself."""


class Declinable(Told, Protocol):
    """A call that may turn out not to be answered here."""

    def declined(self) -> None:
        """The request is not plain, or not right; nothing was told or counted."""


class Gathered:
    """A plain request that waits for others; later, the way to what answers it. `raw` is for one that is declined."""

    __slots__ = ("_gathering", "begun", "call", "came", "deadline", "known", "peer", "raw")

    def __init__(
        self, gathering: "Gathering", known: Known, raw: bytes, deadline: float | None, peer: str, call: Declinable
    ) -> None:
        self.known: Known | None = known
        self.raw = raw
        self.deadline = deadline
        self.peer = peer
        self.call = call
        self.came = time.perf_counter_ns()
        self.begun: Short | Bunch | None = None
        self._gathering = gathering

    def begun_as(self, work: Short | Bunch) -> None:
        """The answer comes from there."""
        self.begun, self.known, self.raw = work, None, b""  # what the rows need of it was taken

    def decline(self) -> None:
        """Leave the request to the general path."""
        self.known = None
        self.call.declined()

    @property
    def terms(self) -> Terms:
        """On what terms the rows are queued now."""
        return Terms(self.deadline, peer=self.peer, waited_ns=time.perf_counter_ns() - self.came)

    def cancel(self, late: bool) -> None:
        """The caller has gone, or else (`late`) its deadline is over: tell nothing any more."""
        if isinstance(self.begun, Bunch):
            self.begun.leave(self.call, late)
        elif self.begun:
            self.begun.cancel(late)
        elif self.known:  # it is counted as if it had been queued, where it might have cost another its place
            self._gathering.leave(self)
            self.call.begun(self.known.id_field)
            abandoned(self.known.model, self.call, self.came, late)
            self.known = None
        else:  # declined just now: the general path, which would count it, has not begun
            self.call.begun(b"")
            self.call.left(late)


Begin = Callable[[Sequence[Gathered]], None]
"""Begins to answer requests that have waited, or declines them. Raises nothing."""


class Gathering:
    """The requests for one model that wait for each other, `most` at most. See `Callers` for how many do."""

    def __init__(self, begin: Begin, most: int) -> None:
        self._begin = begin
        self._most = most
        self._callers = Callers()
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Gathered, None] = {}
        self._bytes = 0
        self._ended = False
        self._tick: asyncio.TimerHandle | None = None

    def takes(self, size: int, deadline: float | None) -> bool:
        """Tell whether a request of so many bytes, which has just come, waits for others."""
        soon = deadline is not None and deadline - self._loop.time() < _SOON_SECONDS
        if self._ended or size > _LARGEST or soon:
            return False
        many = len(self._waiting) + 1
        self._callers.came(many)
        if many == 1 and self._callers.enough(1):
            self._callers.ran(1)
            return False
        return True

    def take(self, known: Known, raw: bytes, deadline: float | None, peer: str, call: Declinable) -> Gathered:
        """Let a request wait; if it is the last that the others have waited for, begin them all."""
        gathered = Gathered(self, known, raw, deadline, peer, call)
        self._waiting[gathered] = None
        self._bytes += len(raw)
        many = len(self._waiting)
        if many >= self._most or self._bytes >= LARGE or self._callers.enough(many):
            self._begin_all()
        elif not self._tick:
            self._tick = self._loop.call_later(TICK_SECONDS, self._ticked)
        return gathered

    def leave(self, gathered: Gathered) -> None:
        """Let a request wait no longer."""
        del self._waiting[gathered]
        self._bytes -= len(gathered.raw)

    def end(self) -> None:
        """Begin all that waits, and from now on let nothing wait."""
        self._ended = True
        if self._waiting:
            self._begin_all()

    def _ticked(self) -> None:
        self._tick = None
        many = len(self._waiting)
        if not many:
            return
        self._callers.ticked(many)
        if self._callers.enough(many):
            self._begin_all()
        else:
            self._tick = self._loop.call_later(TICK_SECONDS, self._ticked)

    def _begin_all(self) -> None:
        if self._tick:
            self._tick.cancel()
            self._tick = None
        waiting, self._waiting, self._bytes = list(self._waiting), {}, 0
        self._callers.ran(len(waiting))
        self._begin(waiting)
