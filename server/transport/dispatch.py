"""From a call to the handler that answers it, and from its end to a status, where no gRPC library does it."""

import asyncio
import functools
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, NamedTuple

import grpc

from layercast.server.errors import InvalidArgument, Unavailable, Unimplemented
from layercast.server.text import fit
from layercast.server.transport.calls import Handler
from layercast.server.transport.rpc_call import Cause, RpcCall
from layercast.server.transport.status import reply

LEAVING: Final = "the server is shutting down"


class _Details(NamedTuple):
    """What an interceptor is told of a call."""

    method: str
    invocation_metadata: tuple[tuple[str, str | bytes], ...]


class Handlers:
    """Registered handlers, as a `grpc.aio.Server` holds them, behind its interceptors."""

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor]) -> None:
        self.guarded = bool(interceptors)
        self.stopping = False
        self._interceptors = interceptors
        self._generic: list[grpc.GenericRpcHandler] = []
        self._known: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Answer RPCs with `handlers`; of several that take one, the first is asked."""
        self._generic += handlers

    async def answer(self, call: RpcCall, path: str, since: float) -> None:
        """Let the handler answer a call that came at `since`; the status that is still to be sent is in `call` then.

        Raises CancelledError when the caller has left, or the task was cancelled by somebody else.
        """
        try:
            if self.stopping:
                raise Unavailable(LEAVING)
            call.start_clock(since)
            handler = await self._handler(call, path)
            call.encode = handler.response_serializer
            await _handle(handler, call)
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if call.cause in (None, Cause.GONE) or task is None:
                raise
            task.uncancel()
            call.cut(call.cause)
        except Exception as error:
            call.fail(reply(error, path))

    async def _handler(self, call: RpcCall, path: str) -> Any:
        if not self._interceptors:
            return self._known.get(path) or self._look_up(_Details(path, ()))

        async def found(details: Any) -> Any:
            return self._look_up(details)

        for interceptor in reversed(self._interceptors):
            found = functools.partial(interceptor.intercept_service, found)
        return await found(_Details(path, call.invocation_metadata()))

    def _look_up(self, details: Any) -> Any:
        for handlers in self._generic:
            if handler := handlers.service(details):
                if isinstance(handlers, grpc.ServiceRpcHandler):
                    self._known[details.method] = handler
                return handler
        raise Unimplemented(f"this server has no RPC {fit(details.method, 128)}")


async def _handle(handler: Any, call: RpcCall) -> None:
    if handler.request_streaming:
        await handler.stream_stream(_messages(call), call)
        return
    raw = await call.read()
    if raw is grpc.aio.EOF:
        raise InvalidArgument("the call ended before its message")
    if await call.read() is not grpc.aio.EOF:
        raise InvalidArgument("the call has more than one message")
    if handler.response_streaming:
        await handler.unary_stream(raw, call)
    else:
        call.answer(await handler.unary_unary(raw, call))


async def _messages(call: RpcCall) -> AsyncIterator[Any]:
    """Yield the bytes of message after message."""
    while (raw := await call.read()) is not grpc.aio.EOF:
        yield raw
