"""The services that every gRPC server has: health and reflection, guarded like our own, and an answer to all else."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_health.v1 import health_pb2_grpc as health_rpc
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha import reflection_pb2_grpc as reflection_rpc

from layercast.proto.rpc import POOL
from layercast.server.errors import Unimplemented
from layercast.server.metrics import UNKNOWN, Metrics
from layercast.server.text import fit
from layercast.server.transport.calls import Handler, parsed
from layercast.server.transport.counted import Context, Counted, kind_of
from layercast.server.transport.ending import run_counted
from layercast.server.transport.health import Health

Behaviour = Callable[[Any, Context], Awaitable[Any]]


class HandlerTaker(Protocol):
    """What RPCs are registered on: a `grpc.aio.Server`, or what does its work."""

    def add_generic_rpc_handlers(self, handlers: Any, /) -> None:
        """Answer RPCs with `handlers`."""


def add_health(server: HandlerTaker, metrics: Metrics) -> Health:
    """Offer `grpc.health.v1.Health`; return what holds the states."""
    servicer = Health()
    _add(server, metrics, health.SERVICE_NAME, health_rpc.add_HealthServicer_to_server, servicer)
    return servicer


def add_reflection(server: HandlerTaker, metrics: Metrics, services: Sequence[str]) -> None:
    """Offer reflection from our own descriptor pool, after putting the standard services into it."""
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        POOL.AddSerializedFile(file.serialized_pb)
    names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
    servicer = reflection.aio.ReflectionServicer(names, pool=POOL)
    add = reflection_rpc.add_ServerReflectionServicer_to_server
    _add(server, metrics, reflection.SERVICE_NAME, add, servicer)


class UnknownRpcs(grpc.GenericRpcHandler):
    """Answers every RPC that nobody else does, and counts it; the last one registered."""

    def __init__(self, metrics: Metrics) -> None:
        self._counted = Counted(UNKNOWN, UNKNOWN, metrics)

    def service(self, details: grpc.HandlerCallDetails) -> Handler:
        """Return a handler that ends the call before reading from it, whatever its kind."""

        async def refuse() -> None:
            raise Unimplemented(f"this server has no RPC {fit(details.method, 128)}")

        async def handle(_: object, context: Context) -> None:
            await run_counted(self._counted, refuse(), context)

        return grpc.stream_stream_rpc_method_handler(handle)


class _Collected:
    """Takes the handlers that a generated `add_…_to_server` function makes, in place of a server."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same handlers again, bundled."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Handler]) -> None:
        """Keep them."""
        self.handlers.update(handlers)


def _add(server: HandlerTaker, metrics: Metrics, service: str, add: Callable[..., None], servicer: object) -> None:
    collected = _Collected()
    add(servicer, collected)
    guarded = {name: _guarded(service, name, handler, metrics) for name, handler in collected.handlers.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, guarded),))


def _guarded(service: str, name: str, handler: Any, metrics: Metrics) -> Handler:
    """Parse in our own code, and count: what grpc itself can't parse ends as INTERNAL, seen by nobody."""
    counted = Counted(service, name, metrics, kind_of(handler))
    message: Any = handler.request_deserializer.__self__  # the class whose FromString it is
    encode = handler.response_serializer

    async def unary(raw: bytes, context: Context) -> Any:
        counted.received.inc()
        return await handler.unary_unary(parsed(message, raw), context)

    async def watched(raw: bytes, context: Context) -> None:
        counted.received.inc()
        await handler.unary_stream(parsed(message, raw), context)

    async def exchanged(requests: AsyncIterator[bytes], context: Context) -> None:
        async for response in handler.stream_stream(_parsed_all(requests, message, counted), context):
            await context.write(response)
            counted.sent.inc()

    def counting(behaviour: Behaviour) -> Behaviour:
        async def run(request: Any, context: Context) -> Any:
            return await run_counted(counted, behaviour(request, context), context)

        return run

    if handler.request_streaming:
        return grpc.stream_stream_rpc_method_handler(counting(exchanged), response_serializer=encode)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(counting(watched), response_serializer=encode)
    return grpc.unary_unary_rpc_method_handler(counting(unary), response_serializer=encode)


async def _parsed_all(requests: AsyncIterator[bytes], message: Any, counted: Counted) -> AsyncIterator[Any]:
    async for raw in requests:
        counted.received.inc()
        yield parsed(message, raw)
