"""One RPC inside Envoy, with what handlers made for grpc.aio ask of a call."""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from enum import Enum
from typing import Any, Final, NoReturn, cast

import grpc

from layercast.server.errors import InvalidArgument, Unimplemented
from layercast.server.transport.envoy.framing import Frames, Pairs, framed, status_headers, too_large
from layercast.server.transport.inflate import WINDOW_BITS, Broken, TooLarge, inflate
from layercast.server.transport.timeouts import seconds_of

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

_HEADERS: Final = ((b"content-type", b"application/grpc"), (b"grpc-accept-encoding", b"identity,gzip,deflate"))
_START: Final[Event] = {"type": "http.response.start", "status": 200, "headers": _HEADERS, "trailers": True}
_OK: Final[Event] = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]}
# Inflating more than this would hold up other calls, and an answer of more may wait for its reader.
_LARGE: Final = 64 << 10
# Bytes of answers that may wait here for a caller who reads slowly.
_AHEAD: Final = 64 << 10
_NOT_METADATA: Final = frozenset((b"content-type", b"te", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"))


class Cause(Enum):
    """Why a call was cancelled."""

    GONE = "the caller has left"
    LATE = "the deadline passed"
    STOPPED = "the server is shutting down"


class EnvoyContext:
    """Reads the messages of a call and writes its answers.

    It has what our handlers use of `grpc.aio.ServicerContext`. `encode` makes bytes of what the handler sends, if it
    doesn't itself; `cause` is set once the call is cancelled.
    """

    __slots__ = (
        "_answer", "_body_ended", "_code", "_coming", "_ended", "_frames", "_headers", "_limit", "_loop", "_outgoing",
        "_receive", "_room", "_scope", "_send", "_sending", "_started", "_task", "_waiter",
        "cause", "deadline", "encode", "looked", "status",
    )  # fmt: skip

    def __init__(self, scope: Event, headers: Mapping[bytes, bytes], receive: Receive, send: Send, limit: int) -> None:
        """`headers` are the last of each name in `scope`; `limit` is for a message either way, in bytes."""
        self._scope, self._receive, self._send, self._limit = scope, receive, send, limit
        self._loop = asyncio.get_running_loop()
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._headers = headers
        self._frames = Frames(limit)
        self._coming: asyncio.Future[Event] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._body_ended = self._started = self._ended = False
        self._outgoing = bytearray()
        self._sending: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._answer: bytes | None = None
        self._code: grpc.StatusCode | None = None
        self.status: tuple[int, str, Pairs] = (0, "", ())
        self.encode: Callable[[Any], bytes] | None = None
        self.cause: Cause | None = None
        self.deadline: float | None = None
        self.looked = self._loop.time()

    def start_clock(self) -> None:
        """Read the deadline, which counts from now; InvalidArgument when it can't be read."""
        if given := self._headers.get(b"grpc-timeout"):
            self.deadline = self.looked + seconds_of(given.decode("latin-1"))

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What the caller sent besides messages; values of names that end in `-bin` are bytes."""
        return tuple(
            (name.decode("latin-1"), _unpacked(value) if name.endswith(b"-bin") else value.decode("latin-1"))
            for name, value in self._scope["headers"]
            if name not in _NOT_METADATA
        )

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - self._loop.time())

    def peer(self) -> str:
        """Who calls, as grpc writes it."""
        host, port = self._scope["client"] or ("", 0)
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

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
            if self._coming is None:
                self._ask()
            # Not the future of the coming piece itself: cancelled with the reader, it would take the piece along.
            self._waiter = self._loop.create_future()
            await self._waiter
        compressed, raw = found
        return await self._inflated(raw) if compressed else raw

    async def messages(self) -> AsyncIterator[Any]:
        """Yield the bytes of message after message."""
        while (raw := await self.read()) is not grpc.aio.EOF:
            yield raw

    async def write(self, message: Any) -> None:
        """Send a message, and wait while the caller is far behind."""
        frame = self._framed(message)
        if not self._started:
            self._started = True
            await self._send(_START)
        if not self._outgoing and self._sending is None:
            # A moment later, together with what else is ready by then: each time, a thread of Envoy is woken.
            self._loop.call_soon(self._send_on)
        self._outgoing += frame
        while len(self._outgoing) > _AHEAD:
            self._room = self._loop.create_future()
            await self._room

    def answer(self, message: Any) -> None:
        """Keep the one message of a call, which goes out with the end."""
        self._answer = self._framed(message)

    @property
    def is_large(self) -> bool:
        """Whether the answer is more than Envoy passes on at once."""
        return self._answer is not None and len(self._answer) > _LARGE

    async def finish(self) -> None:
        """Send the end: the answer if there is one, and the status."""
        send, self._ended = self._send, True
        if self._answer is not None:
            await send(_START)
            await send({"type": "http.response.body", "body": self._answer})
            await send(_OK)
            return
        headers = status_headers(*self.status)
        if self._started:
            await send({"type": "http.response.body", "body": bytes(self._outgoing)})
            await send({"type": "http.response.trailers", "headers": headers})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *headers]})
            await send({"type": "http.response.body", "body": b""})

    async def left(self) -> None:
        """Wait until Envoy has nothing more to send to the caller."""
        while self.cause is None:
            self.look()
            await asyncio.sleep(0.01)

    def look(self) -> None:
        """Ask whether the caller is still there. Envoy doesn't tell by itself."""
        # What was read and not yet taken waits for its reader: nobody reads ahead of a slow service.
        if self._coming is None and (self._body_ended or self._frames.empty):
            self._ask()

    def cancel(self, cause: Cause) -> None:
        """End the handler."""
        if self.cause is None:
            self.cause = cause
            self._task.cancel()

    def _framed(self, message: Any) -> bytes:
        raw: bytes = self.encode(message) if self.encode else message
        if len(raw) > self._limit:
            raise too_large(f"{len(raw):,} bytes", self._limit)
        return framed(raw)

    def _send_on(self) -> None:
        """Send what was written, unless there is an end already or Envoy has not yet taken what was sent before."""
        if self._outgoing and self._sending is None and not self._ended:
            event = {"type": "http.response.body", "body": bytes(self._outgoing), "more_body": True}
            self._outgoing.clear()
            # A future; an error where the caller has left before.
            self._sending = asyncio.ensure_future(self._send(event))
            self._sending.add_done_callback(self._sent)

    def _sent(self, sending: "asyncio.Future[None]") -> None:
        self._sending = None
        if sending.exception():  # pyvoy's ClientDisconnectedError
            self.cancel(Cause.GONE)
            return
        if self._room and not self._room.done():
            self._room.set_result(None)
        self._send_on()

    def _ask(self) -> None:
        # A future; where the caller sent no body at all, something else that can be awaited.
        self._coming = asyncio.ensure_future(self._receive())
        self._coming.add_done_callback(self._arrived)

    def _arrived(self, coming: "asyncio.Future[Event]") -> None:
        self._coming = None
        if coming.cancelled() or coming.exception():
            self.cancel(Cause.GONE)
            return
        event = coming.result()
        if event["type"] == "http.disconnect":
            self.cancel(Cause.GONE)
            return
        if event["body"]:
            self._frames.feed(event["body"])
        self._body_ended = not event["more_body"]
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def _inflated(self, raw: bytes) -> bytes:
        encoding = self._headers.get(b"grpc-encoding", b"identity").decode("latin-1")
        if encoding not in WINDOW_BITS:
            raise Unimplemented("a message is compressed as the header grpc-encoding does not say; use gzip or deflate")
        try:
            if len(raw) <= _LARGE:
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
