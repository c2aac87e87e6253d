"""The frames of HTTP/2 (RFC 9113, section 4 and 6), as far as a server of gRPC reads and writes them."""

import struct
from enum import IntEnum
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD: Final = 9
"""Bytes before a frame's payload."""
MAX_PAYLOAD: Final = 1 << 14
"""The largest payload that is taken, which is what every peer may send, and what a peer takes until it says more."""
MAX_WINDOW: Final = (1 << 31) - 1

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
WITH_PRIORITY: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6
DEFAULT_WINDOW: Final = 65_535
DEFAULT_TABLE: Final = 4096

unpack_head: Final = struct.Struct(">HBBBI").unpack_from
"""Two parts of the length, 16 bits and 8; type, flags, stream."""


class Code(IntEnum):
    """Why a stream or a connection ends (RFC 9113, section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class ConnectionFault(Exception):
    """The peer broke a rule of the connection, which ends with `code` and the text."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def settings(values: dict[int, int]) -> bytes:
    """Return the frame that announces `values`."""
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in values.items()))


def number_bytes(value: int) -> bytes:
    """Return `value` as windows and error codes are written."""
    return value.to_bytes(4, "big")


def goaway(last: int, code: Code, text: str = "") -> bytes:
    """Return the frame after which no stream above `last` is answered."""
    return frame(GOAWAY, 0, 0, number_bytes(last) + number_bytes(code) + text.encode()[:256])


def header_frames(stream: int, block: bytes, end: bool) -> bytes:
    """Return a header block as HEADERS and as many CONTINUATION as it takes; `end` ends the stream."""
    pieces = [block[at : at + MAX_PAYLOAD] for at in range(0, len(block), MAX_PAYLOAD)]
    whole = b""
    for at, piece in enumerate(pieces):
        flags = (END_HEADERS if at == len(pieces) - 1 else 0) | (END_STREAM if end and not at else 0)
        whole += frame(CONTINUATION if at else HEADERS, flags, stream, piece)
    return whole


def unpadded(flags: int, payload: bytes) -> bytes:
    """Return the payload of DATA or HEADERS without its padding."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(Code.PROTOCOL_ERROR, "a frame has more padding than it has bytes")
    return payload[1 : len(payload) - payload[0]]
