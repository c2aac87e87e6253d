"""What the two clients share about their channel: address, options, limits, deadlines."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from layercast.client.errors import LayercastError, ResourceExhausted

DEFAULT_URL = "localhost:8001"
DEFAULT_TIMEOUT = 10.0
DEFAULT_MAX_MESSAGE_BYTES = 64 << 20
_LOOPBACK = ("localhost", "127.", "[::1]")


@dataclass(frozen=True, slots=True)
class Connection:
    """Where a client calls, and within what limits."""

    url: str = DEFAULT_URL
    timeout: float | None = DEFAULT_TIMEOUT
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    credentials: grpc.ChannelCredentials | None = None
    # Not shown: a token may be among them.
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        scheme, separator, rest = self.url.partition("://")
        if separator and scheme not in ("grpc", "http", "https"):
            raise ValueError(f"url {self.url!r} has an unknown scheme; write host:port")
        address = (rest if separator else self.url).rstrip("/")
        if not address or "/" in address:
            raise ValueError(f"url {self.url!r} is not an address; write host:port, for example {DEFAULT_URL}")
        if self.max_message_bytes <= 0:
            raise ValueError(f"max_message_bytes is {self.max_message_bytes}; it must be positive")
        if scheme == "https" and separator and self.credentials is None:
            object.__setattr__(self, "credentials", grpc.ssl_channel_credentials())
        object.__setattr__(self, "url", address)

    @property
    def options(self) -> Sequence[tuple[str, Any]]:
        """Channel arguments. gRPC's own limit for answers is 4 MiB, which one batch of images exceeds."""
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            # By default a client looks for a restarted server only after a wait that grows to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        if self.url.startswith(_LOOPBACK):
            # A proxy from the environment cannot reach this machine's loopback address.
            options.append(("grpc.enable_http_proxy", 0))
        return options

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """What is sent along with every call."""
        return tuple(self.headers.items())

    def deadline(self, timeout: float | None) -> "Deadline":
        """Starts now; None takes the client's timeout. One deadline covers every RPC of an operation."""
        return Deadline(self.timeout if timeout is None else timeout)

    def oversize(self, request: Message) -> LayercastError | None:
        """The error for a request that gRPC would refuse to send, or None."""
        size = request.ByteSize()
        if size <= self.max_message_bytes:
            return None
        return ResourceExhausted(
            f"the request has {size} bytes, this client sends at most {self.max_message_bytes}: "
            "send fewer rows at a time, or raise max_message_bytes here and the server's limit"
        )


class Deadline:
    """`timeout` seconds from its making; None is never."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._end = None if timeout is None else time.monotonic() + timeout

    @property
    def left(self) -> float | None:
        """Seconds left, not below zero."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)
