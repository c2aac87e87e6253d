"""The front end `grpcio`, grpc.aio: hands messages to the services and their errors to the callers; knows no model."""

from collections.abc import Mapping, Sequence
from typing import Final

import grpc

from layercast.server.errors import StartError
from layercast.server.metrics import Metrics
from layercast.server.transport.front_end import FrontEnd
from layercast.server.transport.ports import bound_socket, not_bound
from layercast.server.transport.security import Security

_OPTIONS: Final = (
    # On by default, and then a second server takes part of the traffic of the first, silently.
    ("grpc.so_reuseport", 0),
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
    """A grpc.aio server for the two services, health and reflection."""

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
        self._server = grpc.aio.server(interceptors=security.interceptors(metrics), options=(*limits, *_OPTIONS))
        self._certificates = security.certificates
        super().__init__(self._server, services, metrics, reflect)

    def bind(self, host: str, port: int) -> int:
        """Listen on `host:port` and return the port; StartError when it can't be taken."""
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        # Tried with a plain socket first: grpc writes lines of its own to standard error when it can't listen.
        bound_socket("gRPC", host, port, "--grpc-port").close()
        try:
            if self._certificates:
                return self._server.add_secure_port(target, self._certificates.grpc_credentials())
            return self._server.add_insecure_port(target)
        except RuntimeError as error:
            raise StartError(not_bound(error, "gRPC", host, port, "--grpc-port")) from error

    async def start(self) -> None:
        """Answer calls."""
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Refuse new calls at once, and return when the running ones have ended or `grace` seconds are over."""
        self._close()
        await self._server.stop(grace)
