"""gRPC inside HTTP/2: messages with a head of five bytes, a status in the trailers."""

import base64
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote

from layercast.server.errors import InvalidArgument, ResourceExhausted

_HEAD: Final = 5  # a flag, 1 for compressed, and the length
# All printable ASCII but the percent sign, as gRPC writes `grpc-message`.
_PLAIN: Final = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")

Pairs = Iterable[tuple[str, str | bytes]]


def framed(message: bytes) -> bytes:
    """Return `message` as it goes into the body."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def encoded(pairs: Pairs) -> list[tuple[bytes, bytes]]:
    """Return metadata as headers; values of names that end in `-bin` are bytes."""
    return [
        (name.encode(), base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode())
        for name, value in pairs
    ]


def status_headers(code: int, message: str, trailers: Pairs) -> list[tuple[bytes, bytes]]:
    """Return the trailers that end a call."""
    headers = [(b"grpc-status", str(code).encode())]
    if message:
        headers.append((b"grpc-message", quote(message, safe=_PLAIN).encode()))
    return headers + encoded(trailers)


class Frames:
    """Cuts a body, which comes in pieces, into messages of at most `limit` bytes.

    Who feeds it only when `next` had nothing holds one message and one piece at most.
    """

    __slots__ = ("_at", "_data", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data: bytes | bytearray = b""
        self._at = 0

    @property
    def empty(self) -> bool:
        """Whether everything that was fed has come out."""
        return self._at == len(self._data)

    def feed(self, piece: bytes) -> None:
        """Take what came."""
        if self.empty:
            self._data, self._at = piece, 0
            return
        if isinstance(self._data, bytes):
            self._data = bytearray(self._data)
        # Not each time: many small messages may wait here, and all that follows would move.
        if 2 * self._at >= len(self._data):
            del self._data[: self._at]
            self._at = 0
        self._data += piece

    def next(self) -> tuple[bool, bytes] | None:
        """Return whether the next message is compressed, and its bytes; None while it isn't complete.

        Raises ResourceExhausted as soon as its head says that it is too large, and InvalidArgument for no such head.
        """
        data, start = self._data, self._at + _HEAD
        if len(data) < start:
            return None
        flag, size = data[self._at], int.from_bytes(data[self._at + 1 : start], "big")
        if flag > 1:
            raise InvalidArgument(f"a message begins with {flag}; gRPC has 0 there, or 1 when it is compressed")
        if size > self._limit:
            raise too_large(f"{size:,} bytes", self._limit)
        if len(data) < start + size:
            return None
        self._at = start + size
        with memoryview(data) as view:
            return bool(flag), bytes(view[start : self._at])

    def next_plain(self) -> bytes | None:
        """Return the bytes of the next message if it is complete, and such that `next` returns it uncompressed."""
        data, at = self._data, self._at
        start = at + _HEAD
        if len(data) < start or data[at]:
            return None
        size = int.from_bytes(data[at + 1 : start], "big")
        end = start + size
        if size > self._limit or len(data) < end:
            return None
        self._at = end
        if isinstance(data, bytes):
            return data[start:end]
        with memoryview(data) as view:
            return bytes(view[start:end])


def announced(piece: bytes, limit: int) -> int:
    """Return how long a body is that begins with `piece` and is one message of at most `limit` bytes, uncompressed.

    -1 when it can't be one, or too little of it is there to tell.
    """
    size = int.from_bytes(piece[1:_HEAD], "big")
    return size + _HEAD if len(piece) >= _HEAD and not piece[0] and size <= limit else -1


def message_of(pieces: list[bytes]) -> bytes:
    """Return the message that a body is which comes in these pieces and is as long as `announced` said."""
    first = pieces[0][_HEAD:]
    return b"".join((first, *pieces[1:])) if len(pieces) > 1 else first


def too_large(size: str, limit: int) -> ResourceExhausted:
    """Return the error for a message of more than `limit` bytes."""
    return ResourceExhausted(
        f"the message has {size}, the limit is {limit:,}; "
        "send fewer rows at a time, or raise the server's --max-message-mb"
    )
