"""A client of HTTP/2 that builds and reads frames by hand, so that it can send what no client of a library would."""

import socket
import ssl
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from google.protobuf.message import Message
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2_frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    PADDED,
    PREFACE,
    PRIORITISED,
    Kind,
    call_headers,
    frame,
    message,
    settings_frame,
)
from hpack import Decoder, Encoder

Pairs = Iterable[tuple[str, str]]


class Frame(NamedTuple):
    """A frame as it came; `pairs` are the fields of a HEADERS frame that is complete."""

    kind: int
    flags: int
    stream: int
    payload: bytes
    pairs: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        return f"{self.kind} {self.flags:#x} on {self.stream} {self.pairs or self.payload[:40]!r}"

    @property
    def number(self) -> int:
        """The last 32 bits: the error of RST_STREAM, the increment of WINDOW_UPDATE."""
        return int.from_bytes(self.payload[-4:], "big")


@dataclass
class Reply:
    """What came on one stream so far."""

    lists: list[dict[str, str]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: ErrorCodes | None = None

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None

    @property
    def status(self) -> int | None:
        """The status of gRPC, once it is there."""
        given = self.lists[-1].get("grpc-status") if self.lists else None
        return None if given is None else int(given)

    @property
    def text(self) -> str:
        return unquote_to_bytes(self.lists[-1].get("grpc-message", "")).decode()

    @property
    def messages(self) -> list[bytes]:
        """The messages, uncompressed all of them."""
        found, at = [], 0
        while at < len(self.body):
            flag, size = struct.unpack_from(">BI", self.body, at)
            assert flag == 0
            found.append(bytes(self.body[at + 5 : at + 5 + size]))
            at += 5 + size
        return found


class Peer:
    """One connection. It sends what it is told; only `upload` keeps to the windows that the server has opened.

    `streams` holds what came, by stream; `frames` all that came, in its order; `goaway` the last GOAWAY.
    """

    def __init__(
        self,
        port: int,
        settings: Mapping[int, int] | None = None,
        *,
        greet: bool = True,
        tls: ssl.SSLContext | None = None,
        timeout: float = 10.0,
    ) -> None:
        """`greet` exchanges prefaces and settings."""
        plain = socket.create_connection(("127.0.0.1", port), timeout)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = tls.wrap_socket(plain, server_hostname="localhost") if tls else plain
        self.encoder, self.decoder = Encoder(), Decoder()
        self.frames: list[Frame] = []
        self.streams: dict[int, Reply] = defaultdict(Reply)
        self.goaway: Frame | None = None
        self.closed = False
        self.settings: dict[int, int] = {SettingCodes.INITIAL_WINDOW_SIZE: 65_535}
        # What the server lets us send: on the connection, and on each stream beyond its initial window.
        self.opened: dict[int, int] = defaultdict(int, {0: 65_535})
        self._unread = b""
        self._pings = 0
        if greet:
            try:
                self._greet(settings or {})
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def frame(self, kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        self.send(frame(kind, flags, stream, payload))

    def headers(self, stream: int, pairs: Pairs, end: bool = False, flags: int = END_HEADERS) -> None:
        self.frame(Kind.HEADERS, flags | (END_STREAM if end else 0), stream, self.encoder.encode(list(pairs)))

    def data(self, stream: int, payload: bytes = b"", end: bool = False) -> None:
        self.frame(Kind.DATA, END_STREAM if end else 0, stream, payload)

    def reset(self, stream: int, code: int = ErrorCodes.CANCEL) -> None:
        self.frame(Kind.RST_STREAM, 0, stream, struct.pack(">I", code))

    def open_window(self, stream: int, by: int) -> None:
        self.frame(Kind.WINDOW_UPDATE, 0, stream, struct.pack(">I", by))

    def set(self, settings: Mapping[int, int]) -> None:
        """Change settings, and wait until the server has taken them."""
        self.send(settings_frame(settings))
        seen = len(self.frames)
        self.until(lambda: any(frame[:2] == (Kind.SETTINGS, ACK) for frame in self.frames[seen:]))

    def call(self, stream: int, name: str, request: Message | bytes = b"", *more: tuple[str, str]) -> None:
        """Send a whole call of the RPC `name` with one message, whatever the windows are."""
        raw = request if isinstance(request, bytes) else request.SerializeToString()
        self.headers(stream, call_headers(name, *more))
        body = message(raw)
        for at in range(0, len(body), 16_384):
            self.data(stream, body[at : at + 16_384], end=at + 16_384 >= len(body))

    def window(self, stream: int) -> int:
        """Bytes that may be sent on a stream now."""
        of_stream = self.settings[SettingCodes.INITIAL_WINDOW_SIZE] + self.opened[stream]
        return min(self.opened[0], of_stream)

    def spend(self, stream: int, piece: bytes, end: bool = False) -> None:
        """Send DATA and take it off the windows."""
        self.data(stream, piece, end)
        self.opened[0] -= len(piece)
        self.opened[stream] -= len(piece)

    def upload(self, stream: int, body: bytes, end: bool = True, piece: int = 16_384) -> None:
        """Send `body` in DATA frames as the windows allow, or until the server has ended the stream."""
        at = 0
        while at < len(body):
            self.until(lambda: self.window(stream) > 0 or self.streams[stream].over)
            if self.streams[stream].over:
                return
            size = min(piece, self.window(stream), len(body) - at)
            self.spend(stream, body[at : at + size], end and at + size == len(body))
            at += size

    def read(self) -> Frame | None:
        """Return the next frame; None when the server has closed."""
        head = self._exactly(9)
        if head is None:
            return None
        payload = self._exactly(int.from_bytes(head[:3], "big"))
        assert payload is not None, "the connection ended inside a frame"
        found = Frame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
        if found.kind == Kind.HEADERS:
            block = payload
            assert not found.flags & (PADDED | PRIORITISED)
            while not found.flags & END_HEADERS:
                more = self.read()
                assert more is not None
                assert (more.kind, more.stream) == (Kind.CONTINUATION, found.stream)
                block += more.payload
                found = found._replace(flags=found.flags | more.flags)
            found = found._replace(pairs=tuple((str(n), str(v)) for n, v in self.decoder.decode(block)))
        self._note(found)
        return found

    def until(self, condition: Callable[[], Any]) -> None:
        """Read until `condition` holds; fails when the connection ends before."""
        while not condition():
            assert self.read() is not None, f"the connection ended after {self.frames[-5:]}"

    def answer(self, stream: int) -> Reply:
        """Read until the stream has ended, and return what came on it."""
        reply = self.streams[stream]
        self.until(lambda: reply.over)
        return reply

    def ends(self) -> ErrorCodes | None:
        """Read until the server has closed; return the error of its GOAWAY, or None if there was none."""
        while self.read() is not None:
            pass
        return self.said()

    def said(self) -> ErrorCodes | None:
        """The error of the last GOAWAY, or None."""
        return ErrorCodes(int.from_bytes(self.goaway.payload[4:8], "big")) if self.goaway else None

    def ping(self) -> None:
        """Wait until the server has read everything that was sent before."""
        self._pings += 1
        payload = b"h2peer" + self._pings.to_bytes(2, "big")
        self.frame(Kind.PING, 0, 0, payload)
        self.until(lambda: self.frames and self.frames[-1][:4] == (Kind.PING, ACK, 0, payload))

    def _greet(self, settings: Mapping[int, int]) -> None:
        self.send(PREFACE + settings_frame(settings))
        self.until(lambda: any(found.kind == Kind.SETTINGS and not found.flags & ACK for found in self.frames))
        self.frame(Kind.SETTINGS, ACK)
        self.until(lambda: any(found.kind == Kind.SETTINGS and found.flags & ACK for found in self.frames))

    def _exactly(self, size: int) -> bytes | None:
        parts = [self._unread]
        have = len(self._unread)
        while have < size:
            try:
                piece = self.socket.recv(262_144)
            except (ConnectionError, ssl.SSLEOFError):
                piece = b""
            if not piece:
                self.closed = True
                assert not have, "the connection ended inside a frame"
                return None
            parts.append(piece)
            have += len(piece)
        data = b"".join(parts)
        self._unread = data[size:]
        return data[:size]

    def _note(self, found: Frame) -> None:
        self.frames.append(found)
        reply = self.streams[found.stream] if found.stream else None
        if found.kind == Kind.GOAWAY:
            self.goaway = found
        elif found.kind == Kind.SETTINGS and not found.flags & ACK:
            self.settings |= dict(struct.iter_unpack(">HI", found.payload))
        elif found.kind == Kind.WINDOW_UPDATE:
            self.opened[found.stream] += found.number
        elif found.kind == Kind.RST_STREAM and reply:
            reply.reset = ErrorCodes(found.number)
        elif found.kind == Kind.HEADERS and reply:
            assert not reply.over
            reply.lists.append(dict(found.pairs))
        elif found.kind == Kind.DATA and reply:
            assert not reply.over
            assert reply.lists
            reply.body += found.payload
        if reply and found.kind in (Kind.HEADERS, Kind.DATA) and found.flags & END_STREAM:
            reply.ended = True
