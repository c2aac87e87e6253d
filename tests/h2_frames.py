"""Frames of HTTP/2 and messages of gRPC as bytes, also such as no library would write."""

import struct
from collections.abc import Mapping
from enum import IntEnum

from layercast.proto.rpc import FEATURES, INFERENCE

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LARGEST_WINDOW = 2**31 - 1
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITISED = 1, 1, 4, 8, 32


class Kind(IntEnum):
    """Types of frames (RFC 9113, section 6)."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", length: int | None = None) -> bytes:
    """Return a frame; `length` is what its head says, where that isn't the truth."""
    said = len(payload) if length is None else length
    return said.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def settings_frame(settings: Mapping[int, int], flags: int = 0, stream: int = 0) -> bytes:
    payload = b"".join(struct.pack(">HI", *pair) for pair in settings.items())
    return frame(Kind.SETTINGS, flags, stream, payload)


def message(raw: bytes, flag: int = 0) -> bytes:
    """Return a message of gRPC as it goes into the body."""
    return bytes([flag]) + len(raw).to_bytes(4, "big") + raw


def call_headers(name: str, *more: tuple[str, str], **replaced: str | None) -> list[tuple[str, str]]:
    """Return the headers of a call of the RPC `name` (or of a path); `replaced` has underscores, and None for none."""
    path = name if name.startswith("/") else {**INFERENCE, **FEATURES}[name].path
    given = {
        ":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost",
        "te": "trailers", "content-type": "application/grpc",
    }  # fmt: skip
    for key, value in replaced.items():
        given[f":{key}" if f":{key}" in given else key.replace("_", "-")] = value
    return [(key, value) for key, value in given.items() if value is not None] + list(more)
