"""A request from the queue to its end: timers end it, whoever asked is told, and nothing is left of it."""

import asyncio
from collections.abc import Callable, Sequence

from layercast.server.batching.endings import Endings
from layercast.server.batching.policy import Phase
from layercast.server.errors import DeadlineExceeded
from layercast.server.work import NOBODY, Answer, Course, Work


class Waiting:
    """The works of one request that were queued. Its asker says how it ended: `failed` or `left`, and always `over`."""

    __slots__ = ("_course", "_endings", "_timers", "_withdraw", "_works")

    def __init__(
        self,
        works: Sequence[Work],
        course: Course | None,
        timers: Sequence[asyncio.TimerHandle],
        endings: Endings,
        withdraw: Callable[[Sequence[Work]], Phase],
    ) -> None:
        self._works = works
        self._course = course
        self._timers = timers
        self._endings = endings
        self._withdraw = withdraw

    def failed(self, error: Exception) -> None:
        """The request ended with `error`: none of its other rows run."""
        phase = self._withdraw(self._works)
        if isinstance(error, DeadlineExceeded):
            self._endings.expired(phase, self._course)

    def left(self, late: bool) -> None:
        """The caller has gone, or else (`late`) its deadline is over: the rows leave the queue at once."""
        phase = self._withdraw(self._works)
        if late:
            self._endings.expired(phase, self._course)
        else:
            self._endings.cancelled(phase, self._course)

    def over(self) -> None:
        """Nobody waits any more.

        Parts refer to each other and to who asks, and an error, by its traceback, to the works that it ended. Only a
        garbage collection would free such a circle, inputs and all, and collections hold up every request.
        """
        for timer in self._timers:
            timer.cancel()
        for work in self._works:
            work.parts, work.asker = (), NOBODY


def ask(works: Sequence[Work]) -> "list[asyncio.Future[Answer]]":
    """Return futures that are told the ends of these works."""
    loop = asyncio.get_running_loop()
    futures: list[asyncio.Future[Answer]] = [loop.create_future() for _ in works]
    for work, future in zip(works, futures, strict=True):
        work.asker = future
    return futures


def forget(futures: "list[asyncio.Future[Answer]]") -> None:
    """Let nobody wait for these any more, nor keep them: an error refers to the list by its traceback."""
    for future in futures:
        # A part that failed beside the one that is reported would else be logged as never looked at.
        if not future.cancel() and not future.cancelled():
            future.exception()
    futures.clear()
