"""One connection of HTTP/2 (RFC 9113): its beginning, its settings, its end, and whether it is there."""

import asyncio
import logging
from typing import Final, Protocol, cast

from layercast.server.transport.direct import calls, frames, stream
from layercast.server.transport.direct.calls import Answering, Calls
from layercast.server.transport.direct.calm import Calm
from layercast.server.transport.direct.frames import Code, ConnectionFault, frame, number_bytes
from layercast.server.transport.direct.heads import MAX_LIST
from layercast.server.transport.direct.pulse import Pulse
from layercast.server.transport.direct.reading import NotHttp2, Reader
from layercast.server.transport.rpc_call import grpc_peer

logger = logging.getLogger(__name__)

_WRITTEN: Final = 1 << 20
"""Bytes that may wait for a peer that reads slowly before nothing more is taken from it."""
_LINGER_SECONDS: Final = 1.0
"""What a peer has to read why it is turned out,"""
_PATIENCE_SECONDS: Final = 80.0
"""and what one that has done nothing wrong has to read the last of its answers."""
_GREETING: Final = frames.settings({
    frames.MAX_CONCURRENT_STREAMS: calls.MAX_STREAMS,
    frames.INITIAL_WINDOW_SIZE: stream.WINDOW,
    frames.MAX_HEADER_LIST_SIZE: MAX_LIST,
}) + frame(frames.WINDOW_UPDATE, 0, 0, number_bytes(calls.WINDOW - frames.DEFAULT_WINDOW))  # fmt: skip
_HTTP1: Final = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n"
    b"this port answers gRPC (HTTP/2); HTTP has a port of its own (--http-port)\n"
)


class Owner(Answering, Protocol):
    """What the connections of a server have in common."""

    def opened(self, connection: "Connection") -> None:
        """A connection is there."""

    def lost(self, connection: "Connection") -> None:
        """A connection is gone."""


class Connection(asyncio.Protocol):
    """Takes the calls of one peer. `deaf` is set once nothing more is heard from it."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.peer = ""
        self.deaf = False
        self._loop = asyncio.get_running_loop()
        self._has_greeted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the peer's first words."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITTEN)
        name = transport.get_extra_info("peername")
        self.peer = grpc_peer(*name[:2]) if isinstance(name, tuple) else ""
        calm = Calm()
        self._calls = Calls(self._owner, self.peer, self._transport, calm, self._close_if_done)
        self._sending = self._calls.sending
        self._reader = Reader(self, self._calls, calm)
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
        self._calls.deaf = True
        self._sending.close()
        self._calls.abandon_all()
        self._owner.lost(self)

    def leave(self) -> None:
        """Take no more calls; close when those that run have ended."""
        if not self._calls.refusing and not self.deaf:
            self._calls.refusing = True
            self.on_greeting()
            self._transport.write(frames.goaway(self._calls.last, Code.NO_ERROR))
            self._close_if_done()

    def cut_off(self) -> None:
        """End every call with a status."""
        self._calls.cut_off()

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is still to be answered or sent."""
        return self._calls.idle and not self._transport.get_write_buffer_size()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def on_greeting(self) -> None:
        """Greet in turn. Not before: who speaks HTTP/1 is to understand what it is told."""
        if not self._has_greeted:
            self._has_greeted = True
            self._transport.write(_GREETING)

    def on_settings(self, values: list[tuple[int, int]]) -> None:
        """Go by them, and say so."""
        # Of those that one frame sets again and again, the last counts; each could move the windows of all streams.
        for setting, value in dict(values).items():
            self._calls.set(setting, value)
        self._transport.write(frame(frames.SETTINGS, frames.ACK, 0))

    def on_ping(self, payload: bytes) -> None:
        """Send it back."""
        self._transport.write(frame(frames.PING, frames.ACK, 0, payload))

    def on_goaway(self) -> None:
        """Close when the calls that run have ended."""
        self._calls.refusing = True
        self._close_if_done()

    def _close_if_done(self) -> None:
        """Close after the last answer, which a peer may read slowly."""
        if self._calls.refusing and self._calls.idle and not self.deaf:
            self._close(_PATIENCE_SECONDS)

    def _fail(self, code: Code, text: str) -> None:
        """Say what the peer did wrong, and close."""
        self.on_greeting()
        self._transport.write(frames.goaway(self._calls.last, code, text))
        self._close(_LINGER_SECONDS)
        self._calls.abandon_all()

    def _close(self, seconds: float) -> None:
        """Close once all is written and the peer closes too, after so long in any case."""
        self._sending.flush_answers()
        self._sending.close()
        self.deaf = self._calls.deaf = True
        self._pulse.end_within(seconds)
        # Closed with bytes unread, TCP would take back what was written last: what still comes is read, and not heard.
        if self._transport.can_write_eof():
            self._transport.resume_reading()
            self._transport.write_eof()
        else:
            self._transport.close()
