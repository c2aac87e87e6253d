"""One call on a stream of HTTP/2: what came of it, what is still to be sent, and who answers it."""

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

from layercast.server.batching.policy import late_from
from layercast.server.errors import InvalidArgument
from layercast.server.transport.direct.frames import Code
from layercast.server.transport.direct.heads import START, Head, header_block
from layercast.server.transport.framing import announced, message_of, status_headers
from layercast.server.transport.rpc_call import AHEAD, Cause, RpcCall
from layercast.server.transport.short_call import Begun
from layercast.server.transport.status import Reply, reply

if TYPE_CHECKING:
    from layercast.server.transport.direct.calls import Calls

logger = logging.getLogger(__name__)

WINDOW: Final = 1 << 20
"""Bytes of a call that may come before they are taken."""
_CREDIT: Final = WINDOW // 4
_GRACE: Final = 0.02
"""Seconds after the deadline in which the service, which knows better how far the call got, may end it itself."""
_MOST_PIECES: Final = 1 << 14
"""Of more, each so small, the pieces would be the larger part of what is kept."""


class Stream(RpcCall):
    """A call, and the flow control of its two directions."""

    __slots__ = (
        "_begun", "_calls", "_missing", "_owed", "_path", "_pieces", "_since", "_timer", "_untaken",
        "_was_answered",
        "ending", "number", "promised", "receivable", "sendable", "started",
    )  # fmt: skip

    together: ClassVar[bool] = True

    def __init__(self, calls: "Calls", number: int, head: Head, limit: int, sendable: int) -> None:
        """`limit` is for a message either way, `sendable` what the caller takes at first, in bytes."""
        super().__init__(head.pairs, head.headers, limit)
        self._calls = calls
        self._path = head.path
        # Of a call that has a short path, until it is clear whether it goes there.
        self._pieces: list[bytes] | None = [] if head.path in calls.short else None
        self._missing = 0
        self._begun: Begun | None = None
        self._was_answered = False
        self._timer: asyncio.TimerHandle | None = None
        self._since = self._loop.time()
        # Bytes that came and were not yet allowed again, of this stream and of the connection.
        self._owed = self._untaken = 0
        self.number = number
        # Bytes of the body that `content-length` says are still to come, -1 where nothing says how many.
        self.promised = head.length
        self.receivable = WINDOW
        self.sendable = sendable
        self.started = False
        self.ending: bytes | None = None

    def peer(self) -> str:
        """Who calls, as grpc writes it."""
        return self._calls.peer

    def start_clock(self, since: float) -> None:
        """Read the deadline, which counts from `since`, and see that the call ends with it."""
        super().start_clock(since)
        if self.deadline is not None and self._timer is None:
            self._timer = self._loop.call_at(self.deadline + _GRACE, self.end, Cause.LATE)

    def start(self) -> None:
        """Let the message come, until the deadline at most, where there is a short path; or else the handler answer."""
        if self._pieces is None:
            self.run()
            return
        try:
            self.start_clock(self._since)
        except InvalidArgument:  # the deadline can't be read, as the handler will say
            self.run()

    def run(self) -> None:
        """Let the handler answer."""
        if self._pieces is not None:
            pieces, self._pieces = self._pieces, None
            self._fed(b"".join(pieces), self._body_ended)
        self._task = self._loop.create_task(self._run())
        # Not at the end of `_run`, whose first step may never come: a reset in the same read cancels it before.
        self._task.add_done_callback(self._ran)

    def keeps_promise(self, many: int, ended: bool) -> bool:
        """Count so many bytes more of a body of promised length; tell whether it can still be, or is, that long."""
        self.promised -= many
        return self.promised == 0 if ended else self.promised >= 0

    def take(self, piece: bytes, size: int, ended: bool) -> None:
        """Take a piece of the body that had `size` bytes with its padding."""
        self._owed += size
        self._untaken += size
        if self._pieces is None:
            self._fed(piece, ended)
            return
        self._body_ended = ended
        if not self._pieces:
            self._missing = announced(piece, self._limit)
        self._pieces.append(piece)
        self._missing -= len(piece)
        if ended:
            if self._missing or not self._is_begun(message_of(self._pieces)):
                self.run()
            else:
                self._pieces = None
        elif self._missing < 0 or len(self._pieces) > _MOST_PIECES:
            self.run()
        else:
            self._ask()

    def end_body(self) -> None:
        """The caller has sent all."""
        self.take(b"", 0, ended=True)

    @property
    def has_ended_body(self) -> bool:
        """Whether the caller has sent all."""
        return self._body_ended

    def owes(self) -> int:
        """Return how many bytes came and were not yet allowed again on the connection; they are, from now on."""
        untaken, self._untaken = self._untaken, 0
        return untaken

    async def write(self, message: Any) -> None:
        """Send a message, and wait while the caller is far behind."""
        await self.write_all((message,))

    async def write_all(self, messages: Sequence[Any]) -> None:
        """Send several, and wait in between while the caller is far behind."""
        for message in messages:
            self.outgoing += self._framed(message)
            if len(self.outgoing) > AHEAD:
                self._calls.send_soon(self)
                await self._has_room()
        self._calls.send_soon(self)

    def end(self, cause: Cause) -> None:
        """End the call before its time."""
        if self.cause is not None:
            return
        if self.ending is not None:
            # All was said, and waits for the caller's window. Nobody reads it after the deadline.
            if cause is Cause.LATE:
                self._calls.give_up(self, Code.CANCEL)
            return
        if self._task:
            self.cancel(cause)
            return
        self.cause, self._pieces = cause, None
        begun, self._begun = self._begun, None
        if begun:
            # A caller whose deadline is over resets the call, often before the deadline is over here.
            begun.cancel(late=self._loop.time() >= late_from(self.deadline, self._since))
        else:
            self._calls.handlers.cut_short(self, self._path, self._since)
        if cause is not Cause.GONE:
            self.cut(cause)
            self._finish()

    def close(self) -> None:
        """Nothing more will be sent."""
        if self._timer:
            self._timer.cancel()
        self.outgoing.clear()

    @property
    def is_running(self) -> bool:
        """Whether a handler is still at work."""
        return self._task is not None and not self._task.done()

    def _ask(self) -> None:
        """Allow the caller as many bytes as came: whoever reads has taken them, and needs more."""
        # On the connection at once: each of many streams may owe less than is worth a frame, and together they owe all.
        self._calls.took(self.owes())
        if self._owed >= _CREDIT and not self._body_ended:
            self.receivable += self._owed
            self._calls.allow(self.number, self._owed)
            self._owed = 0

    def _is_begun(self, raw: bytes) -> bool:
        """Start the answer to a call that has a short path, its body being there; tell whether that was possible."""
        try:
            begun = self._calls.short[self._path](raw, self.deadline, self.peer(), self._answered)
        except Exception:  # of one call, which the handler answers; the others of its connection go on
            logger.exception("the short path to %s failed", self._path)
            return self._was_answered
        # It may have been answered before `begin` came back.
        self._begun = None if self._was_answered else begun
        return begun is not None

    def _answered(self, raw: bytes | None, failed: Reply | None) -> None:
        """Send the answer of the short path."""
        self._begun, self._was_answered = None, True
        if self.cause is not None:
            return
        if raw is not None and self._calls.answer(self, raw):
            return
        try:
            if raw is not None:
                self.answer(raw)
        except Exception as error:  # it is larger than a message may be
            failed = reply(error, self._path)
        if failed:
            self.fail(failed)
        self._finish()

    async def _run(self) -> None:
        await self._calls.handlers.answer(self, self._path, self._since)
        self._finish()

    def _ran(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error:
            logger.error("the call to %s failed", self._path, exc_info=error)
        self._calls.handlers.cut_short(self, self._path, self._since)  # its task may never have begun
        self._calls.ran(self)

    def _finish(self) -> None:
        """Have the end sent: the answer if there is one, and the status."""
        headers = status_headers(*self.status)
        if self._whole is not None:
            self.outgoing += self._whole
        if self.outgoing or self.started:
            self.ending = header_block(headers)
        else:
            self.ending, self.started = START + header_block(headers), True
        self._calls.send(self)
