"""Cuts what a peer sends into frames, puts header blocks together, and hands on what the frames say."""

from collections.abc import Callable
from typing import Final, Protocol

from layercast.server.transport.direct import frames
from layercast.server.transport.direct.calm import Calm
from layercast.server.transport.direct.frames import Code, ConnectionFault
from layercast.server.transport.direct.heads import MAX_LIST, Head, Heads

_MOST_HEADERS: Final = 2 * MAX_LIST
"""Bytes of one header block, encoded."""
_KIND: Final = 3
"""Where a frame's type is, which its flags follow."""
_NUMBER: Final = (1 << 31) - 1
"""The bits of a stream's number; one bit more is sent and means nothing."""
_SIZES: Final = {frames.PRIORITY: 5, frames.RST_STREAM: 4, frames.PING: 8, frames.WINDOW_UPDATE: 4}


class NotHttp2(Exception):
    """A peer speaks HTTP/1."""


class Hearer(Protocol):
    """What is told of what came on the connection itself. It raises ConnectionFault for what may not come."""

    deaf: bool
    """Whether it hears nothing any more."""

    def on_greeting(self) -> None:
        """The peer speaks HTTP/2."""

    def on_settings(self, values: list[tuple[int, int]]) -> None:
        """What the peer wants from now on."""

    def on_ping(self, payload: bytes) -> None:
        """The peer wants these bytes back."""

    def on_goaway(self) -> None:
        """The peer begins no more streams."""


class StreamHearer(Protocol):
    """What is told of what came on streams, and how much of them the peer takes. It raises ConnectionFault too."""

    def on_data(self, number: int, payload: bytes, size: int, ended: bool) -> None:
        """A part of a body, which had `size` bytes with its padding."""

    def on_headers(self, number: int, head: Head, ended: bool) -> None:
        """Headers, or trailers, of a stream."""

    def on_reset(self, number: int) -> None:
        """The peer wants no more of a stream."""

    def on_window(self, number: int, more: int) -> None:
        """The peer takes more, of a stream or, with number 0, of all."""


class Reader:
    """The frames of one connection. `feed` it with what comes."""

    def __init__(self, hearer: Hearer, streams: StreamHearer, calm: Calm) -> None:
        self.greeted = False
        self._hearer = hearer
        self._streams = streams
        self._calm = calm
        self._heads = Heads(calm)
        self._rest = b""
        self._block: tuple[int, int, bytearray] | None = None
        self._kinds: dict[int, Callable[[int, int, bytes], None]] = {
            frames.HEADERS: self._headers, frames.PRIORITY: self._priority, frames.RST_STREAM: self._reset,
            frames.SETTINGS: self._settings, frames.PUSH_PROMISE: self._push, frames.PING: self._ping,
            frames.GOAWAY: self._goaway, frames.WINDOW_UPDATE: self._window, frames.CONTINUATION: self._continuation,
        }  # fmt: skip

    def feed(self, data: bytes) -> None:
        """Take what came. Raises ConnectionFault where it breaks a rule, NotHttp2 where it is no HTTP/2 at all."""
        if self._rest:
            data = self._rest + data
        at = 0 if self.greeted else self._greet(data)
        self._rest = data[self._frames(data, at) :] if self.greeted else data

    def _greet(self, data: bytes) -> int:
        """Return where the frames begin, once the peer's first words are all there."""
        first = data[: len(frames.PREFACE)]
        if not frames.PREFACE.startswith(first):
            if b"HTTP/1" in data[:4096]:
                raise NotHttp2
            raise ConnectionFault(Code.PROTOCOL_ERROR, "this is not HTTP/2")
        # With the first frame's type and flags: settings are a part of the greeting.
        then = data[len(frames.PREFACE) + _KIND : len(frames.PREFACE) + _KIND + 2]
        self.greeted = len(then) == 2
        if self.greeted:
            self._hearer.on_greeting()
            if then[0] != frames.SETTINGS or then[1] & frames.ACK:
                raise ConnectionFault(Code.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        return len(first)

    def _frames(self, data: bytes, at: int) -> int:
        """Take the whole frames of `data` from `at` on; return where the first incomplete one begins."""
        end, hearer, streams = len(data), self._hearer, self._streams
        while end - at >= frames.HEAD and not hearer.deaf:
            high, low, kind, flags, number = frames.unpack_head(data, at)
            size, start = high << 8 | low, at + frames.HEAD
            if size > frames.MAX_PAYLOAD:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"a frame of {size:,} bytes")
            if end - start < size:
                break
            at = start + size
            number &= _NUMBER
            if self._block is not None and (kind != frames.CONTINUATION or number != self._block[0]):
                raise ConnectionFault(Code.PROTOCOL_ERROR, "a frame inside a header block")
            payload = data[start:at]
            if kind == frames.DATA:
                if flags & frames.PADDED:
                    payload = frames.unpadded(flags, payload)
                ended = bool(flags & frames.END_STREAM)
                if not payload and not ended:
                    self._calm.spend()
                elif not ended and end - at > frames.HEAD:
                    at, more, ended = _following(data, at, number)
                    if more:
                        size += sum(map(len, more))
                        payload = b"".join((payload, *more))
                streams.on_data(number, payload, size, ended)
            elif take := self._kinds.get(kind):
                if size != _SIZES.get(kind, size):
                    raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"a frame of type {kind} with {size} bytes")
                take(number, flags, payload)
            else:
                self._calm.spend()
        return at

    def _headers(self, number: int, flags: int, payload: bytes) -> None:
        payload = frames.unpadded(flags, payload)
        if flags & frames.WITH_PRIORITY:
            if len(payload) < _SIZES[frames.PRIORITY]:
                raise ConnectionFault(Code.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
            payload = payload[_SIZES[frames.PRIORITY] :]
        if flags & frames.END_HEADERS:
            self._streams.on_headers(number, self._heads.read(payload), bool(flags & frames.END_STREAM))
        else:
            self._block = (number, flags, bytearray(payload))

    def _continuation(self, number: int, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        if not payload:
            self._calm.spend()
        _, first, block = self._block
        block += payload
        if len(block) > _MOST_HEADERS:
            raise ConnectionFault(Code.ENHANCE_YOUR_CALM, f"headers of more than {_MOST_HEADERS:,} bytes")
        if flags & frames.END_HEADERS:
            self._block = None
            self._streams.on_headers(number, self._heads.read(bytes(block)), bool(first & frames.END_STREAM))

    def _priority(self, number: int, *_: object) -> None:
        self._calm.spend()
        if not number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "PRIORITY without a stream")

    def _reset(self, number: int, *_: object) -> None:
        self._calm.spend()
        self._streams.on_reset(number)

    def _settings(self, number: int, flags: int, payload: bytes) -> None:
        self._calm.spend()
        if number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % 6 or (flags & frames.ACK and payload):
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"SETTINGS of {len(payload)} bytes")
        if not flags & frames.ACK:
            self._hearer.on_settings(
                [
                    (int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 6], "big"))
                    for at in range(0, len(payload), 6)
                ]
            )

    def _push(self, *_: object) -> None:
        raise ConnectionFault(Code.PROTOCOL_ERROR, "PUSH_PROMISE from a client")

    def _ping(self, number: int, flags: int, payload: bytes) -> None:
        self._calm.spend()
        if number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "PING on a stream")
        if not flags & frames.ACK:
            self._hearer.on_ping(payload)

    def _goaway(self, number: int, _: int, payload: bytes) -> None:
        if number:
            raise ConnectionFault(Code.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise ConnectionFault(Code.FRAME_SIZE_ERROR, f"GOAWAY of {len(payload)} bytes")
        self._hearer.on_goaway()

    def _window(self, number: int, _: int, payload: bytes) -> None:
        self._calm.spend()
        self._streams.on_window(number, int.from_bytes(payload, "big") & frames.MAX_WINDOW)


def _following(data: bytes, at: int, number: int) -> tuple[int, list[memoryview], bool]:
    """Return where the whole frames of `data` end that begin at `at` and go on with a body, their payloads, and
    whether the last one ends it.

    A body of many frames mostly comes in one piece: taken together, it costs one call and one copy. What is out of the
    ordinary, padding or nothing in a frame, is left to be looked at alone.
    """
    end, view, found, ended = len(data), memoryview(data), list[memoryview](), False
    while not ended and end - at > frames.HEAD:
        high, low, kind, flags, own = frames.unpack_head(data, at)
        size, start = high << 8 | low, at + frames.HEAD
        if kind != frames.DATA or own & _NUMBER != number or flags & frames.PADDED:
            break
        if not 0 < size <= frames.MAX_PAYLOAD or end - start < size:
            break
        at = start + size
        found.append(view[start:at])
        ended = bool(flags & frames.END_STREAM)
    return at, found, ended
