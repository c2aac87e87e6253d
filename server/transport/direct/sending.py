"""What goes to a peer, within what it allows: windows of the connection and of each stream."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from layercast.server.transport.direct import frames
from layercast.server.transport.direct.calm import SENT, Calm
from layercast.server.transport.direct.frames import Code, ConnectionFault
from layercast.server.transport.direct.heads import NO_TABLE, START, header_block
from layercast.server.transport.direct.stream import Stream
from layercast.server.transport.rpc_call import Cause

_OK: Final = header_block(((b"grpc-status", b"0"),))
# The first bytes of the frames of an ordinary answer, up to the number of the stream.
_START_HEAD: Final = frames.frame(frames.HEADERS, frames.END_HEADERS, 0, START)[:5]
_OK_HEAD: Final = frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 0, _OK)[:5]
_DATA: Final = bytes((frames.DATA, 0))
_AT_ONCE: Final = 256 << 10
"""Bytes that are written together."""
_CRUMB: Final = 64
"""Fewer bytes in a frame earn their peer nothing: who has them sent so makes the work."""


class Sending:
    """The answers of one connection. `forget` is told of each stream of which all was sent."""

    def __init__(
        self, transport: asyncio.Transport, streams: Mapping[int, Stream], calm: Calm, forget: Callable[[Stream], None]
    ) -> None:
        self._transport = transport
        self._streams = streams
        self._calm = calm
        self._forget = forget
        self._window = self.first_window = frames.DEFAULT_WINDOW
        # Streams that have something to send: those that may, those that wait for the window of the connection, and
        # those that wait for their own. Apart, so that a window which opens a little costs no look at all of them.
        self._waiting: dict[Stream, None] = {}
        self._crowded: dict[Stream, None] = {}
        self._stuck: set[Stream] = set()
        self._resize = b""
        self._answers: list[bytes] = []
        self._soon: asyncio.Handle | None = None
        self.paused = False

    def set(self, setting: int, value: int) -> None:
        """Go by what the peer has set; ConnectionFault for what it may not set."""
        if setting == frames.ENABLE_PUSH and value > 1:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"ENABLE_PUSH is {value}")
        # Larger frames than the smallest that every peer takes are not sent: others' answers come in between.
        if setting == frames.MAX_FRAME_SIZE and not frames.MAX_PAYLOAD <= value < 1 << 24:
            raise ConnectionFault(Code.PROTOCOL_ERROR, f"MAX_FRAME_SIZE is {value}")
        if setting == frames.HEADER_TABLE_SIZE and value < frames.DEFAULT_TABLE:
            # A peer that keeps a smaller table waits to be told that ours is (RFC 7541, section 4.2). We need none.
            self._resize = NO_TABLE
        if setting == frames.INITIAL_WINDOW_SIZE:
            if value > frames.MAX_WINDOW:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE is {value}")
            more, self.first_window = value - self.first_window, value
            for stream in self._streams.values():
                stream.sendable += more
                if stream.sendable > frames.MAX_WINDOW:
                    raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE makes a window too large")
            for stream in [stream for stream in self._stuck if stream.sendable > 0]:
                self._free(stream)
            self._flush_soon()

    def widen(self, more: int) -> None:
        """The peer takes so many bytes more of all streams together."""
        if not more:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by 0")
        self._window += more
        if self._window > frames.MAX_WINDOW:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "WINDOW_UPDATE makes the window too large")
        self._flush_soon()

    def widen_stream(self, stream: Stream, more: int) -> None:
        """The peer takes so many bytes more of this stream."""
        stream.sendable += more
        if stream in self._stuck and stream.sendable > 0:
            self._free(stream)
            self._flush_soon()

    @property
    def unsent(self) -> int:
        """Bytes that wait for a window of the peer's."""
        waiting = (*self._stuck, *self._crowded)
        return sum(len(stream.outgoing) for stream in waiting) if waiting else 0

    def headers(self, number: int, block: bytes, end: bool) -> bytes:
        """Return a header block as it goes to this peer."""
        resize, self._resize = self._resize, b""
        return frames.header_frames(number, resize + block, end)

    def answer(self, stream: Stream, raw: bytes) -> bool:
        """Send the whole answer to a call, its only message, if that can be done at once; tell whether it was."""
        size = len(raw)
        framed = size + 5
        if framed > min(frames.MAX_PAYLOAD, self._window, stream.sendable):
            return False
        if self.paused or self._waiting or self._resize:
            return False
        self._window -= framed
        number = stream.number.to_bytes(4, "big")
        self._answers += (
            _START_HEAD, number, START,
            framed.to_bytes(3, "big"), _DATA, number, b"\0", size.to_bytes(4, "big"), raw,
            _OK_HEAD, number, _OK,
        )  # fmt: skip
        # Others of this peer may run in the same batch, and each write costs as much as all else about an answer.
        if len(self._streams) > 1:
            self._flush_soon()
        else:
            self.flush_answers()
        self._forget(stream)
        return True

    def flush_answers(self) -> None:
        """Write the answers that are ready."""
        if self._answers:
            content = b"".join(self._answers)
            self._answers.clear()
            self._transport.write(content)

    def send(self, stream: Stream) -> None:
        """Send what waits in the stream, and its end if it has one."""
        self._enter(stream)
        self.flush()

    def send_soon(self, stream: Stream) -> None:
        """The same a moment later, together with what else is ready by then."""
        self._enter(stream)
        self._flush_soon()

    def drop(self, stream: Stream) -> None:
        """Send nothing more of a stream."""
        self._waiting.pop(stream, None)
        self._crowded.pop(stream, None)
        self._stuck.discard(stream)

    def close(self) -> None:
        """Send nothing more: the connection, gone or ended on our side, does not take it."""
        self.paused = True
        self._answers.clear()
        if self._soon:
            self._soon.cancel()

    def flush(self) -> None:
        """Send what the peer allows, a frame of each stream in turn."""
        while not self.paused and (stream := self._next()):
            pieces: list[bytes] = []
            sent: list[Stream] = []
            size = 0
            while stream:
                size += self._take(stream, pieces, sent)
                stream = self._next() if size < _AT_ONCE else None
            self._transport.write(b"".join(pieces))
            for stream in sent:
                self._forget(stream)

    def _enter(self, stream: Stream) -> None:
        if stream.cause is not Cause.GONE and stream not in self._stuck and stream not in self._crowded:
            self._waiting[stream] = None

    def _free(self, stream: Stream) -> None:
        self._stuck.discard(stream)
        self._waiting[stream] = None

    def _next(self) -> Stream | None:
        """Take out the stream whose turn it is."""
        streams = self._waiting or (self._crowded if self._window > 0 else None)
        if not streams:
            return None
        stream = next(iter(streams))
        del streams[stream]
        return stream

    def _take(self, stream: Stream, pieces: list[bytes], sent: list[Stream]) -> int:
        """Put what may be sent of the stream now, one frame of data at most, into `pieces`; return its bytes."""
        if not stream.started:
            stream.started = True
            pieces.append(self.headers(stream.number, START, end=False))
        size = 0
        if stream.outgoing:
            size = min(len(stream.outgoing), frames.MAX_PAYLOAD, self._window, stream.sendable)
            if stream.sendable <= 0:
                self._stuck.add(stream)
                return 0
            if size <= 0:
                self._crowded[stream] = None
                return 0
            pieces.append(frames.frame(frames.DATA, 0, stream.number, bytes(stream.outgoing[:size])))
            del stream.outgoing[:size]
            self._window -= size
            stream.sendable -= size
            self._calm.earn(SENT if size >= _CRUMB else 0)
            stream.make_room()
        if stream.outgoing:
            self._waiting[stream] = None
        elif stream.ending is not None:
            pieces.append(self.headers(stream.number, stream.ending, end=True))
            sent.append(stream)
        return size

    def _flush_soon(self) -> None:
        """Send in the next pass of the event loop: what comes until then, windows or answers, is taken together."""
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._soon = None
        self.flush_answers()
        self.flush()
