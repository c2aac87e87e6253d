"""What goes to a peer, within what it allows: windows of the connection and of each stream."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from layercast.server.transport.direct import frames
from layercast.server.transport.direct.calm import SENT, Calm
from layercast.server.transport.direct.frames import Code, ConnectionFault
from layercast.server.transport.direct.heads import header_block
from layercast.server.transport.direct.stream import START, Stream

_OK: Final = header_block(((b"grpc-status", b"0"),))
# The first bytes of the frames of an ordinary answer, up to the number of the stream.
_START_HEAD: Final = frames.frame(frames.HEADERS, frames.END_HEADERS, 0, START)[:5]
_OK_HEAD: Final = frames.frame(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, 0, _OK)[:5]
_DATA: Final = bytes((frames.DATA, 0))
_AT_ONCE: Final = 256 << 10
"""Bytes that are written together."""


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
        self._waiting: dict[Stream, None] = {}
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
        if setting == frames.INITIAL_WINDOW_SIZE:
            if value > frames.MAX_WINDOW:
                raise ConnectionFault(Code.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE is {value}")
            more, self.first_window = value - self.first_window, value
            for stream in self._streams.values():
                stream.sendable += more
                if stream.sendable > frames.MAX_WINDOW:
                    raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE makes a window too large")
            self.flush()

    def widen(self, more: int) -> None:
        """The peer takes so many bytes more of all streams together."""
        if not more:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by 0")
        self._window += more
        if self._window > frames.MAX_WINDOW:
            raise ConnectionFault(Code.FLOW_CONTROL_ERROR, "WINDOW_UPDATE makes the window too large")
        self.flush()

    def answer(self, stream: Stream, raw: bytes) -> bool:
        """Send the whole answer to a call, its only message, if that can be done at once; tell whether it was."""
        size = len(raw)
        framed = size + 5
        if framed > min(frames.MAX_PAYLOAD, self._window, stream.sendable) or self.paused or self._waiting:
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
        self._waiting[stream] = None
        self.flush()

    def send_soon(self, stream: Stream) -> None:
        """The same a moment later, together with what else is ready by then."""
        self._waiting[stream] = None
        self._flush_soon()

    def drop(self, stream: Stream) -> None:
        """Send nothing more of a stream."""
        self._waiting.pop(stream, None)

    def flush(self) -> None:
        """Send what the peer allows, a frame of each stream in turn."""
        stuck: list[Stream] = []
        while self._waiting and not self.paused:
            pieces: list[bytes] = []
            sent: list[Stream] = []
            size = 0
            while self._waiting and size < _AT_ONCE:
                stream = next(iter(self._waiting))
                del self._waiting[stream]
                size += self._take(stream, pieces, sent, stuck)
            self._transport.write(b"".join(pieces))
            for stream in sent:
                self._forget(stream)
        for stream in stuck:
            # Unless it was given up meanwhile.
            if stream.number in self._streams:
                self._waiting[stream] = None

    def _take(self, stream: Stream, pieces: list[bytes], sent: list[Stream], stuck: list[Stream]) -> int:
        """Put what may be sent of the stream now, one frame of data at most, into `pieces`; return its bytes."""
        if not stream.started:
            stream.started = True
            pieces.append(frames.header_frames(stream.number, START, end=False))
        size = 0
        if stream.outgoing:
            size = min(len(stream.outgoing), frames.MAX_PAYLOAD, self._window, stream.sendable)
            if size <= 0:
                stuck.append(stream)
                return 0
            pieces.append(frames.frame(frames.DATA, 0, stream.number, bytes(stream.outgoing[:size])))
            del stream.outgoing[:size]
            self._window -= size
            stream.sendable -= size
            self._calm.earn(SENT)
            stream.make_room()
        if stream.outgoing:
            self._waiting[stream] = None
        elif stream.ending is not None:
            pieces.append(frames.header_frames(stream.number, stream.ending, end=True))
            sent.append(stream)
        return size

    def _flush_soon(self) -> None:
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._soon = None
        self.flush_answers()
        self.flush()
