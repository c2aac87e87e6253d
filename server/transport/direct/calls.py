"""The calls of one connection: how each begins, what comes of it, and how it is forgotten."""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from layercast.server.transport.direct import frames
from layercast.server.transport.direct.calm import ANSWERED, Calm
from layercast.server.transport.direct.frames import Code, ConnectionFault, frame, number_bytes
from layercast.server.transport.direct.heads import Head
from layercast.server.transport.direct.sending import Sending
from layercast.server.transport.direct.stream import Stream
from layercast.server.transport.dispatch import Handlers
from layercast.server.transport.rpc_call import Cause
from layercast.server.transport.short_call import Begin

MAX_STREAMS: Final = 1024
"""Calls of one connection at a time, those included that were reset and whose handlers have not ended yet."""
WINDOW: Final = 64 << 20
"""Bytes of all calls of one connection that may come before they are taken: those that nobody reads leave room for
others."""
_CREDIT: Final = WINDOW // 4


class Answering(Protocol):
    """What answers the calls of a server. `limit` is for a message either way, in bytes."""

    handlers: Handlers
    short: dict[str, Begin]
    limit: int


class Calls:
    """The calls of one peer, and the window that they share.

    `last` is the number of the one that began last. Once `refusing`, no more are taken, and `on_idle` is called when
    none is left; once `deaf`, nothing more is said to the peer but what calls answer.
    """

    def __init__(
        self, by: Answering, peer: str, transport: asyncio.Transport, calm: Calm, on_idle: Callable[[], None]
    ) -> None:
        self.handlers = by.handlers
        # A call that takes a token is looked at by its headers, before its message has come.
        self.short: dict[str, Begin] = {} if by.handlers.guarded else by.short
        self.peer = peer
        self.last = 0
        self.refusing = self.deaf = False
        self._limit = by.limit
        self._transport = transport
        self._calm = calm
        self._on_idle = on_idle
        self._streams: dict[int, Stream] = {}
        self._receivable = WINDOW
        self._owed = 0
        self.sending = Sending(transport, self._streams, calm, self._forget)
        self.answer, self.send, self.send_soon = self.sending.answer, self.sending.send, self.sending.send_soon

    @property
    def idle(self) -> bool:
        """Whether none is left."""
        return not self._streams

    def on_data(self, number: int, payload: bytes, size: int, ended: bool) -> None:
        """Give a part of a body to its call."""
        self._receivable -= size
        if self._receivable < 0:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "more data than the connection's window allows")
        stream = self._streams.get(number)
        if stream is None:
            self._check_past(number)
            self.took(size)
        elif stream.has_ended_body or stream.receivable < size:
            self.took(size)
            self._reset(stream, Code.STREAM_CLOSED if stream.has_ended_body else Code.FLOW_CONTROL_ERROR)
        elif stream.promised >= 0 and not stream.keeps_promise(len(payload), ended):
            self.took(size)
            self._reset(stream, Code.PROTOCOL_ERROR)
        else:
            stream.receivable -= size
            stream.take(payload, size, ended)
            if ended:
                self.took(stream.owes())

    def on_headers(self, number: int, head: Head, ended: bool) -> None:
        """Begin a call, or end the body of one."""
        if stream := self._streams.get(number):
            if stream.has_ended_body or not ended or not head.is_trailers or stream.promised > 0:
                self._reset(stream, Code.STREAM_CLOSED if stream.has_ended_body else Code.PROTOCOL_ERROR)
            else:
                stream.end_body()
        elif number <= self.last:
            self._check_past(number)
            self._send_reset(number, Code.STREAM_CLOSED)
        elif not number % 2:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"HEADERS on stream {number}, which no client opens")
        else:
            self.last = number
            self._open(number, head, ended)

    def on_reset(self, number: int) -> None:
        """End a call that the peer has given up."""
        if stream := self._streams.get(number):
            self._abandon(stream)
        else:
            self._check_past(number)

    def on_window(self, number: int, more: int) -> None:
        """Send what may be sent now."""
        if not number:
            self.sending.widen(more)
        elif stream := self._streams.get(number):
            if not more or stream.sendable + more > frames.MAX_WINDOW:
                self._reset(stream, Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR)
            else:
                self.sending.widen_stream(stream, more)
        else:
            self._check_past(number)

    def allow(self, number: int, many: int) -> None:
        """Let the peer send so many bytes more of this stream."""
        self._transport.write(frame(frames.WINDOW_UPDATE, 0, number, number_bytes(many)))

    def took(self, many: int) -> None:
        """So many bytes no longer wait here; let the peer send as many again, when they are worth a frame."""
        self._owed += many
        if self._owed >= _CREDIT and not self.deaf:
            self._transport.write(frame(frames.WINDOW_UPDATE, 0, 0, number_bytes(self._owed)))
            self._receivable += self._owed
            self._owed = 0
            self._calm.earn(_CREDIT >> 10)

    def ran(self, stream: Stream) -> None:
        """The handler of a call has ended."""
        if stream.ending is not None and stream.cause is not Cause.GONE:
            return
        if stream.cause is not Cause.GONE and stream.number in self._streams:
            # Without a status, so that its caller does not wait for one.
            self._send_reset(stream.number, Code.INTERNAL_ERROR)
            stream.cause = Cause.GONE
        self._forget(stream)

    def give_up(self, stream: Stream, code: Code) -> None:
        """End a call that is not to go on, whatever of it is still to be sent."""
        self._send_reset(stream.number, code)
        self._abandon(stream)

    def cut_off(self) -> None:
        """End every call with a status."""
        for stream in list(self._streams.values()):
            stream.end(Cause.STOPPED)

    def abandon_all(self) -> None:
        """End every call: nobody waits for any."""
        for stream in list(self._streams.values()):
            self._abandon(stream)

    def set(self, setting: int, value: int) -> None:
        """Go by what the peer has set."""
        if setting == frames.INITIAL_WINDOW_SIZE:
            self._calm.spend(len(self._streams) // 8)  # the windows of all of them move
        self.sending.set(setting, value)

    def _open(self, number: int, head: Head, ended: bool) -> None:
        full = len(self._streams) >= MAX_STREAMS or self.sending.unsent > 2 * self._limit
        if self.refusing or full:
            self._calm.spend()
            self._send_reset(number, Code.REFUSED_STREAM)
        elif head.malformed or (ended and head.length > 0):
            self._calm.spend()
            self._send_reset(number, Code.PROTOCOL_ERROR)
        elif head.refusal:
            self._calm.spend()
            self._transport.write(self.sending.headers(number, head.refusal, end=True))
            if not ended:
                self._send_reset(number, Code.NO_ERROR)
        else:
            stream = Stream(self, number, head, self._limit, self.sending.first_window)
            self._streams[number] = stream
            stream.start()
            if ended:
                stream.end_body()

    def _check_past(self, number: int) -> None:
        """Raise ConnectionFault for a frame of a stream that never was; to one that has ended, some may still come."""
        if not 0 < number <= self.last or not number % 2:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"a frame of stream {number}, which is not open")
        self._calm.spend()

    def _reset(self, stream: Stream, code: Code) -> None:
        self._calm.spend()
        self.give_up(stream, code)

    def _send_reset(self, number: int, code: Code) -> None:
        if not self.deaf:
            self._transport.write(frame(frames.RST_STREAM, 0, number, number_bytes(code)))

    def _abandon(self, stream: Stream) -> None:
        """End a call that nobody waits for; until its handler, if it has one, has ended too, it counts as one."""
        stream.end(Cause.GONE)
        stream.cause = Cause.GONE  # also where it was late before
        # What it had to say would take up the window that the others have.
        self.sending.drop(stream)
        if not stream.is_running:
            self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        """A call has ended, and all of it was sent."""
        if self._streams.pop(stream.number, None) is None:
            return
        self.sending.drop(stream)
        stream.close()
        self.took(stream.owes())
        if stream.cause is not Cause.GONE:
            self._calm.earn(ANSWERED)
            if not stream.has_ended_body:
                # Answered before it was all said: the caller need not go on.
                self._send_reset(stream.number, Code.NO_ERROR)
        if self.refusing and not self._streams:
            self._on_idle()
