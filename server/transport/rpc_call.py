"""One RPC, with what handlers made for grpc.aio ask of a call; what the front ends of our own have in common."""

import asyncio
import base64
import binascii
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar, Final, NoReturn

import grpc

from layercast.server.batching.policy import late_from
from layercast.server.errors import InvalidArgument, Unimplemented
from layercast.server.transport.framing import Frames, Pairs, framed, too_large
from layercast.server.transport.inflate import WINDOW_BITS, Broken, TooLarge, inflate
from layercast.server.transport.status import Reply
from layercast.server.transport.timeouts import seconds_of

# Inflating more than this would hold up other calls, and an answer of more may wait for its reader.
LARGE: Final = 64 << 10
AHEAD: Final = 64 << 10
"""Bytes of answers that may wait for a caller who reads slowly."""
HEADERS: Final = ((b"content-type", b"application/grpc"), (b"grpc-accept-encoding", b"identity,gzip,deflate"))
"""What every answer begins with."""
_RPC: Final = b"application/grpc"
_AFTER: Final = (b"", b"+", b";")
_NOT_METADATA: Final = frozenset((b"content-type", b"te", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"))


def is_rpc(content_type: bytes) -> bool:
    """Tell whether a request of this type is a call of gRPC, and not of gRPC-Web, say."""
    return content_type.startswith(_RPC) and content_type[len(_RPC) :][:1] in _AFTER


def grpc_peer(host: str, port: int) -> str:
    """Return an address as grpc writes it."""
    return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


class Cause(Enum):
    """Why a call was cancelled."""

    GONE = "the caller has left"
    LATE = "the deadline passed"
    STOPPED = "the server is shutting down"


_STATUS: Final = {Cause.LATE: grpc.StatusCode.DEADLINE_EXCEEDED, Cause.STOPPED: grpc.StatusCode.UNAVAILABLE}


class RpcCall:
    """Reads the messages of a call and writes its answers.

    It has what our handlers use of `grpc.aio.ServicerContext`. `together` tells whether whatever came while the event
    loop was busy is there at once. `encode` makes bytes of what the handler sends, if it doesn't itself; `outgoing` is
    what was written and is still to be sent; `cause` is set once the call is cancelled; `is_counted` is, once somebody
    sees to it that its end is counted; `status` is what it ends with: code, text, trailers.
    """

    __slots__ = (
        "_body_ended", "_code", "_frames", "_headers", "_limit", "_loop", "_pairs", "_room", "_task", "_waiter",
        "_whole", "cause", "deadline", "encode", "is_counted", "outgoing", "status",
    )  # fmt: skip

    together: ClassVar[bool] = False

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]], headers: Mapping[bytes, bytes], limit: int) -> None:
        """`headers` are the last of each name in `pairs`; `limit` is for a message either way, in bytes."""
        self._pairs, self._headers, self._limit = pairs, headers, limit
        self._loop = asyncio.get_running_loop()
        self._frames = Frames(limit)
        self._task: asyncio.Task[Any] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._body_ended = False
        self._whole: bytes | None = None
        self._code: grpc.StatusCode | None = None
        self.is_counted = False
        self.outgoing = bytearray()
        self.status: tuple[int, str, Pairs] = (0, "", ())
        self.encode: Callable[[Any], bytes] | None = None
        self.cause: Cause | None = None
        self.deadline: float | None = None

    def peer(self) -> str:
        """Who calls, as grpc writes it."""
        raise NotImplementedError

    async def write(self, message: Any) -> None:
        """Send a message, and wait while the caller is far behind."""
        raise NotImplementedError

    async def write_all(self, messages: Sequence[bytes]) -> None:
        """Send several."""
        for message in messages:
            await self.write(message)

    def _ask(self) -> None:
        """Have more of the body brought; `_fed` is to be called when it is there."""
        raise NotImplementedError

    def start_clock(self, since: float) -> None:
        """Read the deadline, which counts from `since`; InvalidArgument when it can't be read."""
        if given := self._headers.get(b"grpc-timeout"):
            self.deadline = since + seconds_of(given.decode("latin-1"))

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What the caller sent besides messages; values of names that end in `-bin` are bytes."""
        return tuple(
            (name.decode("latin-1"), _unpacked(value) if name.endswith(b"-bin") else value.decode("latin-1"))
            for name, value in self._pairs
            if name not in _NOT_METADATA
        )

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - self._loop.time())

    def code(self) -> grpc.StatusCode | None:
        """The status that `abort` was called with."""
        return self._code

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Pairs = ()) -> NoReturn:
        """End the call with a status."""
        self._code = code
        self.status = (code.value[0], details, trailing_metadata)
        raise grpc.aio.AbortError

    async def read(self) -> Any:
        """Return the bytes of the next message, or `grpc.aio.EOF` when the caller has sent all."""
        while (found := self._frames.next()) is None:
            if self._body_ended:
                if not self._frames.empty:
                    raise InvalidArgument("the call ended in the middle of a message")
                return grpc.aio.EOF
            self._ask()
            # Not the future of the coming piece itself: cancelled with the reader, it would take the piece along.
            self._waiter = self._loop.create_future()
            await self._waiter
        compressed, raw = found
        return await self._inflated(raw) if compressed else raw

    def ready(self) -> bytes | None:
        """Return the next message if it is there, whole and not compressed."""
        return self._frames.next_plain()

    def answer(self, message: Any) -> None:
        """Keep the one message of a call, which goes out with the end."""
        self._whole = self._framed(message)

    def fail(self, failed: Reply) -> None:
        """Let the call end with this status."""
        self.status = (failed.code.value[0], failed.message, failed.trailers)

    def cut(self, cause: Cause) -> None:
        """Let the call end with the status of `cause`; KeyError for one whose caller is not there to be told."""
        self.status = (_STATUS[cause].value[0], cause.value, ())

    def code_of_cancel(self, since: float) -> grpc.StatusCode:
        """Return what a call that came at `since` and was cancelled is counted under."""
        if self.cause is not None and self.cause in _STATUS:
            return _STATUS[self.cause]
        # A caller whose deadline is over resets the call, often before the deadline is over here.
        late = self._loop.time() >= late_from(self.deadline, since)
        return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED

    def make_room(self) -> None:
        """Some of what was written has been sent: let the writer go on if little is left."""
        if self._room and not self._room.done() and len(self.outgoing) <= AHEAD:
            self._room.set_result(None)

    async def _has_room(self) -> None:
        """Wait until little of what was written is left to be sent."""
        while len(self.outgoing) > AHEAD:
            self._room = self._loop.create_future()
            await self._room

    def cancel(self, cause: Cause) -> None:
        """End the handler."""
        if self.cause is None:
            self.cause = cause
            if self._task:
                self._task.cancel()

    def _fed(self, piece: bytes, ended: bool) -> None:
        """Take what came of the body, and wake who waits for it."""
        if piece:
            self._frames.feed(piece)
        self._body_ended = ended
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    def _framed(self, message: Any) -> bytes:
        raw: bytes = self.encode(message) if self.encode else message
        if len(raw) > self._limit:
            raise too_large(f"{len(raw):,} bytes", self._limit)
        return framed(raw)

    async def _inflated(self, raw: bytes) -> bytes:
        encoding = self._headers.get(b"grpc-encoding", b"identity").decode("latin-1")
        if encoding not in WINDOW_BITS:
            raise Unimplemented("a message is compressed as the header grpc-encoding does not say; use gzip or deflate")
        try:
            if len(raw) <= LARGE:
                return bytes(inflate(raw, encoding, self._limit))
            return bytes(await asyncio.to_thread(inflate, raw, encoding, self._limit))
        except TooLarge as error:
            raise too_large("more bytes once it is inflated", self._limit) from error
        except Broken as error:
            raise InvalidArgument(f"a message does not inflate as the header grpc-encoding says: {error}") from error


def _unpacked(value: bytes) -> bytes:
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4))
    except binascii.Error:
        return value
