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
from layercast.server.transport.ports import BACKLOG, listening_socket
from layercast.server.transport.security import Security

_CUT_OFF_SECONDS: Final = 0.1
"""What calls that are cut off have to say so."""
_LEAVE_SECONDS: Final = 1.0
"""What peers have to close their side once all is answered."""
_LOOK_SECONDS: Final = 0.05
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
        self.handlers = Handlers(security.interceptors(metrics), metrics)
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
            lambda: Connection(self),
            sock=self._socket,
            backlog=BACKLOG,
            ssl=self._tls,
            ssl_handshake_timeout=timeout,
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
        await self._gone(_CUT_OFF_SECONDS)

    def opened(self, connection: Connection) -> None:
        """A connection is there."""
        self._connections.add(connection)
        self._alone.clear()
        if self.handlers.stopping:  # accepted, or agreed upon TLS, a moment too late
            connection.leave()

    def lost(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        if not self._connections:
            self._alone.set()

    async def _left(self, seconds: float) -> bool:
        """Wait, so long at most, until all calls are answered and their callers gone; tell whether that is so.

        Who has nothing more to expect and does not go is not waited for much longer.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        polite = False
        while not self._alone.is_set() and clock() < until:
            if not polite and all(connection.is_done for connection in self._connections):
                polite, until = True, min(until, clock() + _LEAVE_SECONDS)
            await self._gone(min(_LOOK_SECONDS, max(0.0, until - clock())))
        return self._alone.is_set() or polite

    async def _gone(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._alone.wait(), seconds)
