"""One connection of HTTP/2 (RFC 9113): its streams, its windows, its beginning and its end."""

import asyncio
import logging
import socket
from typing import Final, Protocol, cast

from layercast.server.transport.direct import frames
from layercast.server.transport.direct.calm import ANSWERED, Calm
from layercast.server.transport.direct.frames import Code, ConnectionFault, frame, number_bytes
from layercast.server.transport.direct.heads import MAX_LIST, Head
from layercast.server.transport.direct.pulse import Pulse
from layercast.server.transport.direct.reading import NotHttp2, Reader
from layercast.server.transport.direct.sending import Sending
from layercast.server.transport.direct.stream import WINDOW, Stream
from layercast.server.transport.dispatch import Handlers
from layercast.server.transport.rpc_call import Cause, grpc_peer
from layercast.server.transport.short_call import Begin

logger = logging.getLogger(__name__)

MAX_STREAMS: Final = 1024
"""Calls of one connection at a time, those included that were reset and whose handlers have not ended yet."""
_WINDOW: Final = 64 << 20
"""Bytes of all calls of one connection that may come before they are taken: those that nobody reads leave room for
others."""
_CREDIT: Final = _WINDOW // 4
_WRITTEN: Final = 1 << 20
"""Bytes that may wait for a peer that reads slowly before nothing more is taken from it."""
_LINGER_SECONDS: Final = 1.0
"""What a peer has to read why it is turned out,"""
_PATIENCE_SECONDS: Final = 80.0
"""and what one that has done nothing wrong has to read the last of its answers."""
_GREETING: Final = frames.settings({
    frames.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
    frames.INITIAL_WINDOW_SIZE: WINDOW,
    frames.MAX_HEADER_LIST_SIZE: MAX_LIST,
}) + frame(frames.WINDOW_UPDATE, 0, 0, number_bytes(_WINDOW - frames.DEFAULT_WINDOW))  # fmt: skip
_HTTP1: Final = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n"
    b"this port answers gRPC (HTTP/2); HTTP has a port of its own (--http-port)\n"
)


class Owner(Protocol):
    """What the connections of a server have in common."""

    handlers: Handlers
    short: dict[str, Begin]
    limit: int

    def opened(self, connection: "Connection") -> None:
        """A connection is there."""

    def lost(self, connection: "Connection") -> None:
        """A connection is gone."""


class Connection(asyncio.Protocol):
    """Takes the calls of one peer. `deaf` is set once nothing more is heard from it."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.handlers = owner.handlers
        # A call that takes a token is looked at by its headers, before its message has come.
        self.short: dict[str, Begin] = {} if owner.handlers.guarded else owner.short
        self.peer = ""
        self.deaf = False
        self._loop = asyncio.get_running_loop()
        self._calm = Calm()
        self._reader = Reader(self, self._calm)
        self._streams: dict[int, Stream] = {}
        self._leaving = self._has_greeted = self._has_heard_all = False
        self._last = 0
        self._receivable = _WINDOW
        self._owed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the peer's first words."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITTEN)
        self._sending = Sending(self._transport, self._streams, self._calm, self._forget)
        self.answer, self.send, self.send_soon = self._sending.answer, self._sending.send, self._sending.send_soon
        name = transport.get_extra_info("peername")
        self.peer = grpc_peer(*name[:2]) if isinstance(name, tuple) else ""
        self._pulse = Pulse(
            self._loop,
            greeted=lambda: self._reader.greeted,
            silent=lambda: self._fail(Code.PROTOCOL_ERROR, "nothing came"),
            ask=lambda: self._transport.write(frame(frames.PING, 0, 0, bytes(8))),
            gone=self.abort,
        )
        self._owner.opened(self)

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        if self.deaf:
            return
        self._pulse.heard = True
        try:
            self._reader.feed(data)
        except ConnectionFault as fault:
            self._fail(fault.code, str(fault))
        except NotHttp2:
            self._transport.write(_HTTP1)
            self._close(_LINGER_SECONDS)
        except Exception:
            logger.exception("a connection of HTTP/2 failed")
            self._fail(Code.INTERNAL_ERROR, "")

    def eof_received(self) -> bool:
        """The peer sends no more: answer what has come whole, while it reads. TLS ends both ways at once."""
        if self.deaf or not self._transport.can_write_eof():
            return False
        for stream in list(self._streams.values()):
            if not stream.has_ended_body:
                self._abandon(stream)
        if self._streams and not self._has_heard_all:
            self._leaving = self._has_heard_all = True
            # Not only to be polite: a peer that has gone answers it with a reset, which nothing else would bring.
            self._transport.write(frames.goaway(self._last, Code.NO_ERROR))
            self._pulse.look_after(self._is_broken)
        return bool(self._streams)

    def pause_writing(self) -> None:
        """The peer reads slowly: take nothing more from it until it has read."""
        self._sending.paused = True
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """The peer has read."""
        if not self.deaf and not self._transport.is_closing():
            self._sending.paused = False
            self._transport.resume_reading()
            self._sending.flush()

    def connection_lost(self, error: Exception | None) -> None:
        """End every call: nobody is there to be answered."""
        self.deaf = True
        self._pulse.stop()
        self._sending.close()
        self._abandon_all()
        self._owner.lost(self)

    def leave(self) -> None:
        """Take no more calls; close when those that run have ended."""
        if not self._leaving and not self.deaf:
            self._leaving = True
            self.on_greeting()
            self._transport.write(frames.goaway(self._last, Code.NO_ERROR))
            self._close_if_done()

    def cut_off(self) -> None:
        """End every call with a status."""
        for stream in list(self._streams.values()):
            stream.end(Cause.STOPPED)

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is still to be answered or sent."""
        return not self._streams and not self._transport.get_write_buffer_size()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

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

    def on_greeting(self) -> None:
        """Greet in turn. Not before: who speaks HTTP/1 is to understand what it is told."""
        if not self._has_greeted:
            self._has_greeted = True
            self._transport.write(_GREETING)

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
        elif number <= self._last:
            self._check_past(number)
            self._send_reset(number, Code.STREAM_CLOSED)
        elif not number % 2:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"HEADERS on stream {number}, which no client opens")
        else:
            self._last = number
            self._open(number, head, ended)

    def on_reset(self, number: int) -> None:
        """End a call that the peer has given up."""
        if stream := self._streams.get(number):
            self._abandon(stream)
        else:
            self._check_past(number)

    def on_settings(self, values: list[tuple[int, int]]) -> None:
        """Go by them, and say so."""
        # Of those that one frame sets again and again, the last counts; each could move the windows of all streams.
        for setting, value in dict(values).items():
            if setting == frames.INITIAL_WINDOW_SIZE:
                self._calm.spend(len(self._streams) // 8)  # the windows of all of them move
            self._sending.set(setting, value)
        self._transport.write(frame(frames.SETTINGS, frames.ACK, 0))

    def on_ping(self, payload: bytes) -> None:
        """Send it back."""
        self._transport.write(frame(frames.PING, frames.ACK, 0, payload))

    def on_goaway(self) -> None:
        """Close when the calls that run have ended."""
        self._leaving = True
        self._close_if_done()

    def on_window(self, number: int, more: int) -> None:
        """Send what may be sent now."""
        if not number:
            self._sending.widen(more)
        elif stream := self._streams.get(number):
            if not more or stream.sendable + more > frames.MAX_WINDOW:
                self._reset(stream, Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR)
            else:
                self._sending.widen_stream(stream, more)
        else:
            self._check_past(number)

    def _open(self, number: int, head: Head, ended: bool) -> None:
        full = len(self._streams) >= MAX_STREAMS or self._sending.unsent > 2 * self._owner.limit
        if self._leaving or full:
            self._calm.spend()
            self._send_reset(number, Code.REFUSED_STREAM)
        elif head.malformed or (ended and head.length > 0):
            self._calm.spend()
            self._send_reset(number, Code.PROTOCOL_ERROR)
        elif head.refusal:
            self._calm.spend()
            self._transport.write(self._sending.headers(number, head.refusal, end=True))
            if not ended:
                self._send_reset(number, Code.NO_ERROR)
        else:
            stream = Stream(self, number, head, self._owner.limit, self._sending.first_window)
            self._streams[number] = stream
            stream.start()
            if ended:
                stream.end_body()

    def _check_past(self, number: int) -> None:
        """Raise ConnectionFault for a frame of a stream that never was; to one that has ended, some may still come."""
        if not 0 < number <= self._last or not number % 2:
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
        self._sending.drop(stream)
        if not stream.is_running:
            self._forget(stream)

    def _abandon_all(self) -> None:
        for stream in list(self._streams.values()):
            self._abandon(stream)

    def _forget(self, stream: Stream) -> None:
        """A call has ended, and all of it was sent."""
        if self._streams.pop(stream.number, None) is None:
            return
        self._sending.drop(stream)
        stream.close()
        self.took(stream.owes())
        if stream.cause is not Cause.GONE:
            self._calm.earn(ANSWERED)
            if not stream.has_ended_body:
                # Answered before it was all said: the caller need not go on.
                self._send_reset(stream.number, Code.NO_ERROR)
        self._close_if_done()

    def _close_if_done(self) -> None:
        """Close after the last answer, which a peer may read slowly."""
        if self._leaving and not self._streams and not self.deaf:
            self._close(_PATIENCE_SECONDS)

    def _is_broken(self) -> bool:
        """Tell whether the connection was found broken; without reading, the event loop does not see it."""
        if self._transport.is_closing():
            return False
        error: int = self._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return error != 0

    def _fail(self, code: Code, text: str) -> None:
        """Say what the peer did wrong, and close."""
        self.on_greeting()
        self._transport.write(frames.goaway(self._last, code, text))
        self._close(_LINGER_SECONDS)
        self._abandon_all()

    def _close(self, seconds: float) -> None:
        """Close once all is written and the peer closes too, after so long in any case."""
        self._sending.flush_answers()
        self._sending.close()
        self.deaf = True
        self._pulse.end_within(seconds)
        # Closed with bytes unread, TCP would take back what was written last: what still comes is read, and not heard.
        if self._transport.can_write_eof() and not self._has_heard_all:
            self._transport.resume_reading()
            self._transport.write_eof()
        else:
            self._transport.close()
