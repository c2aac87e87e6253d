"""HTTP ports: an ASGI application on uvicorn, on the server's own event loop."""

import asyncio
import contextlib
import math
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from layercast.server.transport.ports import listening_socket

_MAX_HEAD = 64 << 10
# Longer than the 60 seconds after which most load balancers and client pools let go of an idle connection: if the
# server closes first, a request that is on its way is lost.
_KEEP_ALIVE = 75


class _Protocol(HttpToolsProtocol):
    """HTTP/1.1 parsed in C, which chunks of a few bytes can't slow down, with a bound on request line and headers."""

    _head = -1
    """Bytes of the head that came after its first read; below 0 outside a head."""

    def data_received(self, data: bytes) -> None:
        if self._head >= 0:
            self._head += len(data)
            if self._head > _MAX_HEAD:
                self.transport.write(STATUS_LINE[431] + b"connection: close\r\ncontent-length: 0\r\n\r\n")
                self.transport.close()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        self._head = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers, which nothing here reads, come after the head.
        if self._head >= 0:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head = -1
        super().on_headers_complete()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the lifecycle has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpFrontEnd:
    """Serves one application on one port."""

    def __init__(self, application: Starlette, what: str, option: str, tls: ssl.SSLContext | None = None) -> None:
        config = uvicorn.Config(
            application,
            http=_Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE,
            server_header=False,
        )
        config.load()
        config.ssl = tls
        self._server = _Server(config)
        self._what = what
        self._option = option
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def bind(self, host: str, port: int) -> int:
        """Take `host:port` and return the port; StartError when it can't be taken."""
        self._socket = listening_socket(self._what, host, port, self._option)
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        """Answer requests."""
        if self._socket is None:
            raise RuntimeError("this is a bug: start before bind")
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self, seconds: float) -> None:
        """Close the port and let running requests end, for so long at most."""
        self._server.config.timeout_graceful_shutdown = max(1, math.ceil(seconds))
        self._server.should_exit = True
        if self._task:
            await self._task
        if self._socket:
            self._socket.close()
