"""Calls of one message in and one out that are answered without a task."""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from layercast.server.transport.counted import Counted
from layercast.server.transport.status import Reply, reply

logger = logging.getLogger(__name__)

Ended = Callable[[bytes | None, Reply | None], None]
"""Told how a call ended: the answer's bytes, or else the status of a failed one.

Neither if the call, which had to wait for others, is not of the common kind: then nothing was done or counted."""


class Begun(Protocol):
    """A call that was begun and is told its end."""

    def cancel(self, late: bool) -> None:
        """The caller has gone, or else (`late`) its deadline is over: tell nothing any more."""


Begin = Callable[[bytes, float | None, str, Ended], Begun | None]
"""`ShortRpc.begin` of an RPC."""


class Short(Protocol):
    """Begins to answer a message at once if it is of the common kind; returns None, having done nothing, if not."""

    def __call__(self, raw: bytes, deadline: float | None, peer: str, call: "ShortCall", /) -> Begun | None:
        """`call` is told what it is to count."""


class ShortCall:
    """A call without a task: counts it, and tells `ended` how it ended."""

    __slots__ = ("_counted", "_ended", "_start")

    def __init__(self, counted: Counted, ended: Ended) -> None:
        self._counted = counted
        self._ended = ended
        self._start = time.perf_counter()

    def begun(self, _: bytes) -> None:
        """Count the call and its message."""
        self._counted.begun()
        self._counted.received.inc()

    def declined(self) -> None:
        """Tell that the call is not answered here."""
        self._tell(None, None)

    def answered(self, content: bytes) -> None:
        """Tell the answer."""
        self._counted.answered(self._start)
        self._tell(content, None)

    def failed(self, error: Exception) -> None:
        """Tell the status of a failed call."""
        failed = reply(error, self._counted.path)
        self._counted.ended(failed.code, self._start)
        self._tell(None, failed)

    def left(self, late: bool) -> None:
        """Count the call; nobody is there to be told."""
        self._counted.left(late, self._start)

    def _tell(self, content: bytes | None, failed: Reply | None) -> None:
        try:
            self._ended(content, failed)
        except Exception:  # not the business of the rows that ran beside
            logger.exception("the end of a call to %s could not be told", self._counted.path)


class ShortRpc:
    """The calls of one RPC that `short` answers."""

    def __init__(self, short: Short, counted: Counted) -> None:
        self._short = short
        self._counted = counted

    def begin(self, raw: bytes, deadline: float | None, peer: str, ended: Ended) -> Begun | None:
        """Begin to answer the message if it is of the common kind; else do and count nothing, and return None.

        `ended` is told how the call ended: once, on the event loop, perhaps before this returns.
        """
        return self._short(raw, deadline, peer, ShortCall(self._counted, ended))
