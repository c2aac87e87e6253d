"""Who may call what: the scope of every RPC, checked on gRPC by an interceptor and on HTTP by the routes."""

import ipaddress
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import grpc

from layercast.proto.rpc import FEATURES as FEATURE_RPCS
from layercast.proto.rpc import FEATURES_SERVICE, INFERENCE, INFERENCE_SERVICE
from layercast.server.errors import ServingError
from layercast.server.metrics import Metrics
from layercast.server.service.scopes import ADMIN, FEATURES, METADATA, PREDICT, grant, require
from layercast.server.settings import Settings
from layercast.server.transport.tls import Certificates, read_certificates
from layercast.server.transport.tokens import Tokens, read_tokens

logger = logging.getLogger(__name__)

OPEN: Final = "open"
"""Instead of a scope: what a probe asks, which needs no token."""

# A request of ModelInfer may ask for outputs, for layers, or for both; the service looks at each.
_EITHER: Final = (PREDICT, FEATURES)
RPC_SCOPES: Final[dict[str, tuple[str, ...]]] = {
    "ServerLive": (OPEN,), "ServerReady": (OPEN,), "ModelReady": (OPEN,),
    "ServerMetadata": (METADATA,), "ModelMetadata": (METADATA,), "ModelConfig": (METADATA,),
    "ModelStatistics": (METADATA,), "RepositoryIndex": (METADATA,),
    "SystemSharedMemoryStatus": (METADATA,), "CudaSharedMemoryStatus": (METADATA,),
    "ModelInfer": _EITHER, "ModelStreamInfer": _EITHER,
    "RepositoryModelLoad": (ADMIN,), "RepositoryModelUnload": (ADMIN,),
    "SystemSharedMemoryRegister": (ADMIN,), "SystemSharedMemoryUnregister": (ADMIN,),
    "CudaSharedMemoryRegister": (ADMIN,), "CudaSharedMemoryUnregister": (ADMIN,),
    "TraceSetting": (ADMIN,), "LogSettings": (ADMIN,),
    "ListLayers": (METADATA,), "Extract": (FEATURES,), "ExtractStream": (FEATURES,), "Explain": (FEATURES,),
    "Steer": (FEATURES,),
}  # fmt: skip
"""Any one of the scopes is enough. An RPC that is not here takes `admin`."""

_HEALTH: Final = "/grpc.health.v1.Health/"
_REFLECTION: Final = "/grpc.reflection."
_OURS: Final = {
    method.path: name
    for methods in (INFERENCE, FEATURE_RPCS)
    for name, method in methods.items()
}  # fmt: skip


def scopes_of(path: str) -> tuple[str, ...]:
    """Return which scopes open the RPC at `path`, as in `/inference.GRPCInferenceService/ModelInfer`."""
    if path.startswith(_HEALTH):
        return (OPEN,)
    if path.startswith(_REFLECTION):
        return (METADATA,)
    return RPC_SCOPES.get(_OURS.get(path, ""), (ADMIN,))


@dataclass(frozen=True)
class Security:
    """Certificates and tokens of a server; without them its ports are plain and open."""

    certificates: Certificates | None
    tokens: Tokens | None

    @classmethod
    def read(cls, settings: Settings) -> "Security":
        """Return what the settings name; StartError when a file is missing or wrong."""
        certificates = read_certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
        tokens = read_tokens(settings.token_file) if settings.token_file else None
        security = cls(certificates, tokens)
        if warning := security.warning(settings):
            logger.warning("%s", warning)
        return security

    def warning(self, settings: Settings) -> str:
        """Return what an operator should know before others do, or ""."""
        found = []
        for secret in (settings.token_file, settings.tls_key):
            if secret and secret.stat().st_mode & 0o006:
                found.append(f"every user of this machine can read or write {str(secret)!r} (chmod 600)")
        if not _is_loopback(settings.host):
            if self.certificates is None:
                found.append("calls, and tokens if any, travel unencrypted (tls_certificate, tls_key)")
            if self.tokens is None and (self.certificates is None or self.certificates.client_ca is None):
                found.append("anyone who reaches the ports may call (token_file, or tls_client_ca)")
        return f"listening on {settings.host}: {'; '.join(found)}" if found else ""

    def admit(self, scopes: tuple[str, ...], authorization: str | None, to: str) -> None:
        """Check a call that takes one of `scopes` and grant what its token allows; else a ServingError."""
        if self.tokens is None or scopes == (OPEN,):
            return
        grant(self.tokens.scopes(authorization))
        require(*scopes, to=to)

    def interceptors(self, metrics: Metrics) -> tuple[grpc.aio.ServerInterceptor, ...]:
        """Return what the gRPC server puts before its handlers."""
        return (_Gate(self, metrics),) if self.tokens else ()


class _Gate(grpc.aio.ServerInterceptor):
    """Refuses a call by its metadata, before any of its messages is read."""

    def __init__(self, security: Security, metrics: Metrics) -> None:
        self._security = security
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        path: str = handler_call_details.method
        given = [value for key, value in handler_call_details.invocation_metadata or () if key == "authorization"]
        try:
            self._security.admit(scopes_of(path), _text(given), f"calling {path.rpartition('/')[2][:64]}")
        except ServingError as error:
            self._count(path, error)
            return _refusal(error)
        return await continuation(handler_call_details)

    def _count(self, path: str, error: ServingError) -> None:
        name = _OURS.get(path)
        if name:
            service = INFERENCE_SERVICE if name in INFERENCE else FEATURES_SERVICE
            method = {**INFERENCE, **FEATURE_RPCS}[name]
            self._metrics.rpc_started.labels(method.kind, service, name).inc()
            self._metrics.rpc_handled.labels(method.kind, service, name, error.code.name).inc()


def _text(values: list[Any]) -> str | None:
    """Return the one header of that name; none, when there are several that may differ."""
    return str(values[0]) if len(values) == 1 else None


def _refusal(error: ServingError) -> "grpc.RpcMethodHandler[Any, Any]":
    async def refuse(requests: object, context: "grpc.aio.ServicerContext[Any, Any]") -> NoReturn:
        await context.abort(error.code, error.message)

    # As a stream also for calls of one message: its handler starts before the message has come.
    return grpc.stream_stream_rpc_method_handler(refuse)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
