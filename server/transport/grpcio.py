"""The front end `grpcio`, grpc.aio: hands messages to the services and their errors to the callers; knows no model."""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import grpc

from layercast.server.errors import StartError
from layercast.server.metrics import Metrics
from layercast.server.transport.front_end import FrontEnd
from layercast.server.transport.ports import bound_socket, not_bound
from layercast.server.transport.security import Security

SERVERS: Final = 8 if sys.platform == "linux" else 1
"""One server of grpc.aio takes one call at a time from the core, and the next one some passes of the event loop later.
Several on the same port, among which Linux shares out connections, take as many, and what is done in a pass for all
costs each less. Elsewhere the one that listened last would get every connection."""

_OPTIONS: Final = (
    # Without it only one of them could listen. Who starts beside another is refused by a plain socket, see `bind`.
    ("grpc.so_reuseport", int(SERVERS > 1)),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The core's default, 300 s, answers clients that ping during a long call with GOAWAY too_many_pings.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Calls of one connection at a time, calls that were reset and are not yet cleared away included: who opens and
    # resets without end gets no further. A call over it is refused; clients wait or try again by themselves. Twice
    # what one connection sensibly holds, since an answered call takes a moment to be cleared away.
    ("grpc.max_concurrent_streams", 1024),
    # Headers of a call in bytes: over the first some are refused, over the second all.
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.absolute_max_metadata_size", 32 << 10),
)


class GrpcFrontEnd(FrontEnd):
    """Servers of grpc.aio for the two services, health and reflection."""

    def __init__(
        self,
        services: Mapping[str, Sequence[object]],
        metrics: Metrics,
        max_message_bytes: int,
        reflect: bool,
        security: Security,
    ) -> None:
        """`services` holds, by the service's name, the objects that answer its RPCs, each some of them."""
        limits = (
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
        )
        interceptors = security.interceptors(metrics)
        self._servers = [
            grpc.aio.server(interceptors=interceptors, options=(*limits, *_OPTIONS)) for _ in range(SERVERS)
        ]
        self._certificates = security.certificates
        super().__init__(self, services, metrics, reflect)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Answer RPCs with `handlers`."""
        for server in self._servers:
            server.add_generic_rpc_handlers(handlers)

    def bind(self, host: str, port: int) -> int:
        """Listen on `host:port` and return the port; StartError when it can't be taken."""
        # Tried with a plain socket first: it alone is refused where another server has the port and would share it, and
        # grpc writes lines of its own to standard error when it can't listen.
        bound_socket("gRPC", host, port, "--grpc-port").close()
        try:
            for server in self._servers:
                port = self._listen(server, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError as error:
            raise StartError(not_bound(error, "gRPC", host, port, "--grpc-port")) from error
        return port

    def _listen(self, server: grpc.aio.Server, target: str) -> int:
        if self._certificates:
            return server.add_secure_port(target, self._certificates.grpc_credentials())
        return server.add_insecure_port(target)

    async def start(self) -> None:
        """Answer calls."""
        for server in self._servers:
            await server.start()

    async def stop(self, grace: float) -> None:
        """Refuse new calls at once, and return when the running ones have ended or `grace` seconds are over."""
        self._close()
        await asyncio.gather(*(server.stop(grace) for server in self._servers))
