"""The gRPC health service: one status a service, in step with what the server says elsewhere."""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """Answers `grpc.health.v1.Health`.

    grpcio's own asyncio servicer is not used: there, one watcher that leaves silences the others of its service, one
    that doesn't read holds up whoever sets a status, and an open watch holds up the end of the server.
    """

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._watchers: set[asyncio.Event] = set()
        self._shut = self._closed = False

    def set(self, services: Iterable[str], serving: bool) -> None:
        """Report services as serving or not, from now on."""
        self._serving |= dict.fromkeys(services, serving and not self._shut)
        self._wake()

    def shut(self) -> None:
        """Report everything as not serving, for good."""
        self._shut = True
        self.set(list(self._serving), False)

    def close(self) -> None:
        """End every watch once it has been told the last status."""
        self._closed = True
        self._wake()

    async def Check(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:  # noqa: N802
        """The status of one service; NOT_FOUND for one that is not known."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        return _Response(status=self._status(request.service))

    async def Watch(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:  # noqa: N802
        """The status of one service, again whenever it changes; SERVICE_UNKNOWN until it is known."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        told = None
        try:
            while True:
                changed.clear()
                status, last = self._status(request.service), self._closed
                if status != told:
                    await context.write(_Response(status=status))
                    told = status
                if last:
                    return
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _status(self, service: str) -> Any:
        if service not in self._serving:
            return _Response.SERVICE_UNKNOWN
        return _Response.SERVING if self._serving[service] else _Response.NOT_SERVING

    def _wake(self) -> None:
        for changed in self._watchers:
            changed.set()
