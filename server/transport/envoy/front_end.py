"""The front end `envoy`: Envoy holds the ports and hands requests to Python, which runs inside it."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

from starlette.applications import Starlette

from layercast.server.metrics import Metrics
from layercast.server.transport.dispatch import Handlers
from layercast.server.transport.envoy.adapter import Adapter
from layercast.server.transport.front_end import FrontEnd
from layercast.server.transport.security import Security

applications: Final[dict[int, Adapter]] = {}
"""What answers on which of Envoy's ports."""
answering: Final = asyncio.Event()
"""Set once a port is answered on."""
_FLUSH_SECONDS: Final = 0.05
"""What Envoy's own thread has to write out what it was given last."""


class EnvoyFrontEnd(FrontEnd):
    """gRPC and HTTP, both on each of its ports. `bind` and `start` them; Envoy listens already."""

    def __init__(
        self,
        services: Mapping[str, Sequence[object]],
        metrics: Metrics,
        max_message_bytes: int,
        reflect: bool,
        security: Security,
        web: Starlette,
    ) -> None:
        """`web` answers what is no RPC."""
        self._adapter = Adapter(Handlers(security.interceptors(metrics), metrics), max_message_bytes, web)
        self._ports: list[int] = []
        self._stopping: asyncio.Task[None] | None = None
        super().__init__(self._adapter, services, metrics, reflect)

    def bind(self, host: str, port: int) -> int:
        """Answer on `port`, one of those that Envoy was started with."""
        self._ports.append(port)
        return port

    async def start(self) -> None:
        """Answer calls."""
        for port in self._ports:
            applications[port] = self._adapter
        answering.set()

    async def stop(self, grace: float) -> None:
        """Refuse new calls at once, and return when the running ones have ended or `grace` seconds are over."""
        if self._stopping is None:
            self._close()
            self._stopping = asyncio.create_task(self._adapter.stop(grace))
        await asyncio.shield(self._stopping)
        await asyncio.sleep(_FLUSH_SECONDS)
