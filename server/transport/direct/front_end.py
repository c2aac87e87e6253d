"""The front end `direct`: connections of HTTP/2 on the server's event loop."""

import asyncio
import contextlib
import socket
from collections.abc import Mapping, Sequence
from typing import Final

from layercast.server.metrics import Metrics
from layercast.server.transport.direct.connection import Connection
from layercast.server.transport.dispatch import Handlers
from layercast.server.transport.front_end import FrontEnd
from layercast.server.transport.ports import listening_socket
from layercast.server.transport.security import Security

_CUT_OFF_SECONDS: Final = 0.1
"""What calls that are cut off have to say so."""
_HANDSHAKE_SECONDS: Final = 10.0


class DirectFrontEnd(FrontEnd):
    """A server of gRPC for the two services, health and reflection."""

    def __init__(
        self,
        services: Mapping[str, Sequence[object]],
        metrics: Metrics,
        max_message_bytes: int,
        reflect: bool,
        security: Security,
    ) -> None:
        """`services` holds, by the service's name, the objects that answer its RPCs, each some of them."""
        self.handlers = Handlers(security.interceptors(metrics))
        self.limit = max_message_bytes
        self._tls = security.certificates.http2 if security.certificates else None
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._alone = asyncio.Event()
        self._alone.set()
        super().__init__(self.handlers, services, metrics, reflect)

    def bind(self, host: str, port: int) -> int:
        """Take `host:port` and return the port; StartError when it can't be taken."""
        self._socket = listening_socket("gRPC", host, port, "--grpc-port")
        return int(self._socket.getsockname()[1])

    async def start(self) -> None:
        """Answer calls."""
        if self._socket is None:
            raise RuntimeError("this is a bug: start before bind")
        timeout = _HANDSHAKE_SECONDS if self._tls else None
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self), sock=self._socket, ssl=self._tls, ssl_handshake_timeout=timeout
        )

    async def stop(self, grace: float) -> None:
        """Refuse new calls at once, and return when the running ones have ended or `grace` seconds are over."""
        self._close()
        self.handlers.stopping = True
        if self._server:
            self._server.close()
        for connection in list(self._connections):
            connection.leave()
        if not await self._left(grace):
            for connection in list(self._connections):
                connection.cut_off()
            await self._left(_CUT_OFF_SECONDS)
        for connection in list(self._connections):
            connection.abort()
        await self._left(_CUT_OFF_SECONDS)

    def opened(self, connection: Connection) -> None:
        """A connection is there."""
        self._connections.add(connection)
        self._alone.clear()

    def lost(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        if not self._connections:
            self._alone.set()

    async def _left(self, seconds: float) -> bool:
        """Wait, so long at most, until all connections are gone; tell whether they are."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._alone.wait(), seconds)
        return self._alone.is_set()
