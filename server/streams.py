"""The open streams of one model's layers: what they may hold together, and how long one may go unread."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

from layercast.server.batching.admission import RETRY_SECONDS
from layercast.server.batching.endings import Endings
from layercast.server.batching.policy import Observer
from layercast.server.errors import Unavailable
from layercast.server.work import Course

TAKEN_SECONDS = 60.0
"""How long a caller may leave a message; then its stream ends."""

HURRIED_SECONDS = 5.0
"""The same once the model is on its way out, or the server: who does not read must not keep it."""


class OpenStreams:
    """Counts the bytes that the open streams of the model `name` hold, `limit` at most; one alone may hold more."""

    def __init__(self, name: str, limit: int, observer: Observer) -> None:
        self._name = name
        self._limit = limit
        self._endings = Endings(observer)
        self._hurried = False
        self._unread: set[asyncio.Timeout] = set()
        self.bytes = 0

    @contextmanager
    def open(self) -> Iterator["OpenStream"]:
        """Give a new stream, which holds nothing yet and gives back what it holds at the end."""
        stream = OpenStream(self)
        try:
            yield stream
        finally:
            self.bytes -= stream.bytes

    def hurry(self) -> None:
        """End, from now on, streams that go unread for `HURRIED_SECONDS`."""
        self._hurried = True
        soon = asyncio.get_running_loop().time() + HURRIED_SECONDS
        for clock in self._unread:
            if (when := clock.when()) is not None and when > soon:
                clock.reschedule(soon)

    def admit(self, stream: "OpenStream", size: int) -> None:
        """Let `stream` hold `size` bytes more; Unavailable when they are too many beside what others hold."""
        if self.bytes > stream.bytes and self.bytes + size > self._limit:
            self._endings.rejected("queue_full", stream.course)
            raise Unavailable(
                f"the open streams of layers of model {self._name!r} hold {self.bytes:,} of {self._limit:,} bytes, "
                f"{size:,} more came; try again shortly",
                retry_after=RETRY_SECONDS,
            )
        self.bytes += size
        stream.bytes += size

    @asynccontextmanager
    async def unread(self, stream: "OpenStream") -> AsyncIterator[None]:
        """End `stream`, by Unavailable, when the body takes too long. See `OpenStream.unread`."""
        seconds = HURRIED_SECONDS if self._hurried else TAKEN_SECONDS
        clock = asyncio.timeout(seconds)
        self._unread.add(clock)
        try:
            async with clock:
                yield
        finally:
            self._unread.discard(clock)
            if clock.expired():
                stream.course.counted = True  # the parts that wait end with it, and not since the caller went away
                raise Unavailable(
                    f"no message of the stream was taken for {HURRIED_SECONDS if self._hurried else seconds:g} s; "
                    "read as it comes, or ask for fewer rows at a time"
                )


class OpenStream:
    """One stream: the `bytes` that it holds, and what its parts have in common."""

    def __init__(self, streams: OpenStreams) -> None:
        self._streams = streams
        self.course = Course()
        self.bytes = 0

    def hold(self, size: int) -> None:
        """Hold `size` bytes more; Unavailable when the model's streams hold too many."""
        self._streams.admit(self, size)

    def unread(self) -> AbstractAsyncContextManager[None]:
        """Wait in the body, a `yield` of one message, until the caller takes it: not for ever.

        When it is over, the task that waits for the caller is cancelled as `asyncio.timeout` does it; when it then
        closes the generator, and also when it goes on as if nothing were, the body ends with Unavailable.
        """
        return self._streams.unread(self)
