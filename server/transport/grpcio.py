"""The default front end, grpc.aio: hands messages to the services and their errors to the callers; knows no model."""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2
from grpc_health.v1 import health_pb2_grpc as health_rpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from layercast.proto.rpc import FEATURES, FEATURES_SERVICE, INFERENCE, INFERENCE_SERVICE, POOL, Method
from layercast.server.errors import StartError, Unimplemented
from layercast.server.metrics import Metrics
from layercast.server.service.call import Call
from layercast.server.transport.ports import bound_socket, port_in_use
from layercast.server.transport.security import Security
from layercast.server.transport.status import reply

Answer = Callable[[Any, Call], Awaitable[Message]]

_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The core's default, 300 s, answers clients that ping during a long call with GOAWAY too_many_pings.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


class GrpcFrontEnd:
    """A grpc.aio server for the two services, health and reflection."""

    def __init__(
        self, services: dict[str, object], metrics: Metrics, max_message_bytes: int, reflect: bool, security: Security
    ) -> None:
        options = (
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            # On by default, and then a second server takes part of the traffic of the first, silently.
            ("grpc.so_reuseport", 0),
            *_KEEPALIVE,
        )
        self._server = grpc.aio.server(interceptors=security.interceptors(metrics), options=options)
        self._certificates = security.certificates
        self._metrics = metrics
        for name, methods in ((INFERENCE_SERVICE, INFERENCE), (FEATURES_SERVICE, FEATURES)):
            handlers = {method.name: self._handler(name, method, services[name]) for method in methods.values()}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        self._health = health.aio.HealthServicer()
        health_rpc.add_HealthServicer_to_server(self._health, self._server)
        if reflect:
            _add_reflection(self._server)

    def bind(self, host: str, port: int) -> int:
        """Listen on `host:port` and return the port; StartError when it is in use."""
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        # Tried with a plain socket first: grpc writes lines of its own to standard error when it can't listen.
        bound_socket("gRPC", host, port, "--grpc-port").close()
        try:
            if self._certificates:
                return self._server.add_secure_port(target, self._certificates.grpc_credentials())
            return self._server.add_insecure_port(target)
        except RuntimeError as error:
            raise StartError(port_in_use("gRPC", host, port, "--grpc-port")) from error

    async def start(self) -> None:
        """Answer calls."""
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Refuse new calls at once, and return when the running ones have ended or `grace` seconds are over."""
        await self._server.stop(grace)

    async def set_health(self, services: Sequence[str], serving: bool) -> None:
        """Report services (and models as `model/NAME`) as serving or not to health checks and watchers."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in services:
            await self._health.set(service, status)

    async def shut_health(self) -> None:
        """Report everything as not serving, for good."""
        await self._health.enter_graceful_shutdown()

    def _handler(self, service_name: str, method: Method, service: object) -> "grpc.RpcMethodHandler[Any, Any]":
        answer: Answer | None = getattr(service, _snake(method.name), None)
        if answer is None:
            answer = _unimplemented(method.name)
        call = _Call(answer, method, service_name, self._metrics)
        decode, encode = method.request.FromString, method.response.SerializeToString
        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(call.refuse_stream, decode, encode)
        return grpc.unary_unary_rpc_method_handler(call.unary, decode, encode)


class _Call:
    """One RPC: counts it, and turns what the service raises into its status."""

    def __init__(self, answer: Answer, method: Method, service: str, metrics: Metrics) -> None:
        self._answer = answer
        self._path = method.path
        kind = "bidi_stream" if method.client_streaming else "unary"
        labels = (kind, service, method.name)
        self._started = metrics.rpc_started.labels(*labels)
        self._duration = metrics.rpc_duration.labels(*labels)
        self._handled = {code: metrics.rpc_handled.labels(*labels, code.name) for code in grpc.StatusCode}

    async def unary(self, request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        """Answer one message with one message."""
        start = time.perf_counter()
        self._started.inc()
        code = grpc.StatusCode.OK
        try:
            return await self._answer(request, Call(_deadline(context)))
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            failed = reply(error, self._path)
            code = failed.code
            trailers = (("grpc-status-details-bin", failed.details),) if failed.details else ()
            await context.abort(failed.code, failed.message, trailers)
        finally:
            self._handled[code].inc()
            self._duration.observe(time.perf_counter() - start)

    async def refuse_stream(self, requests: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        """Answer a streaming RPC that no service offers."""
        await self.unary(None, context)


def _deadline(context: "grpc.aio.ServicerContext[Any, Any]") -> float | None:
    remaining = context.time_remaining()
    return None if remaining is None else asyncio.get_running_loop().time() + remaining


def _unimplemented(name: str) -> Answer:
    async def answer(request: Any, call: Call) -> Message:
        raise Unimplemented(f"{name} is not implemented by this server")

    return answer


def _add_reflection(server: grpc.aio.Server) -> None:
    """Offer reflection from our own descriptor pool, after putting the standard services into it."""
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        POOL.AddSerializedFile(file.serialized_pb)
    names = (INFERENCE_SERVICE, FEATURES_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool=POOL)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
