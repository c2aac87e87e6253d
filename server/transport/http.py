"""HTTP ports: an ASGI application on uvicorn, on the server's own event loop."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from layercast.server.errors import StartError
from layercast.server.transport.ports import bound_socket, not_bound


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the lifecycle has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpFrontEnd:
    """Serves one application on one port."""

    def __init__(self, application: Starlette, what: str, option: str) -> None:
        config = uvicorn.Config(
            application, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2
        )
        self._server = _Server(config)
        self._what = what
        self._option = option
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def bind(self, host: str, port: int) -> int:
        """Take `host:port` and return the port; StartError when it can't be taken."""
        sock = bound_socket(self._what, host, port, self._option)
        try:
            sock.listen(1024)
        except OSError as error:
            sock.close()
            raise StartError(not_bound(error, self._what, host, port, self._option)) from error
        self._socket = sock
        return int(sock.getsockname()[1])

    async def start(self) -> None:
        """Answer requests."""
        if self._socket is None:
            raise RuntimeError("this is a bug: start before bind")
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Close the port and let running requests end."""
        self._server.should_exit = True
        if self._task:
            await self._task
        if self._socket:
            self._socket.close()
