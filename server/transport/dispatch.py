"""From a call to the handler that answers it, and from its end to a status, where no gRPC library does it."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, NamedTuple

import grpc

from layercast.server.errors import InvalidArgument, Unavailable, Unimplemented
from layercast.server.metrics import UNKNOWN, Metrics
from layercast.server.text import fit
from layercast.server.transport.calls import Handler
from layercast.server.transport.counted import Counted, kind_of
from layercast.server.transport.rpc_call import Cause, RpcCall
from layercast.server.transport.status import reply

LEAVING: Final = "the server is shutting down"


class _Details(NamedTuple):
    """What an interceptor is told of a call."""

    method: str
    invocation_metadata: tuple[tuple[str, str | bytes], ...]


class Handlers:
    """Registered handlers, as a `grpc.aio.Server` holds them, behind its interceptors."""

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor], metrics: Metrics) -> None:
        self.guarded = bool(interceptors)
        self.stopping = False
        self._interceptors = interceptors
        self._generic: list[grpc.GenericRpcHandler] = []
        self._known: dict[str, Handler] = {}
        self._metrics = metrics
        self._counted: dict[str, Counted] = {}

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
            message = _messages(call) if handler.request_streaming else await _message(call)
            call.is_counted = True  # by the handler
            await _handle(handler, message, call)
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            self.cut_short(call, path, since)
            task = asyncio.current_task()
            if call.cause in (None, Cause.GONE) or task is None:
                raise
            task.uncancel()
            call.cut(call.cause)
        except Exception as error:
            failed = reply(error, path)
            self.cut_short(call, path, since, failed.code)
            call.fail(failed)

    def cut_short(self, call: RpcCall, path: str, since: float, code: grpc.StatusCode | None = None) -> None:
        """Count a call that came at `since` and ended, with `code` or by a cancel, unless its handler has it by now."""
        if call.is_counted:
            return
        call.is_counted = True
        seconds = asyncio.get_running_loop().time() - since
        self._counts_of(path).cut_short(code or call.code_of_cancel(since), seconds)

    def _counts_of(self, path: str) -> Counted:
        if path not in self._known:
            with contextlib.suppress(Unimplemented):
                self._look_up(_Details(path, ()))
        handler = self._known.get(path)
        key = path if handler else UNKNOWN
        if key not in self._counted:
            _, service, name = path.split("/") if handler else (0, UNKNOWN, UNKNOWN)
            self._counted[key] = Counted(service, name, self._metrics, kind_of(handler) if handler else "unary")
        return self._counted[key]

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


async def _handle(handler: Any, message: Any, call: RpcCall) -> None:
    if handler.request_streaming:
        await handler.stream_stream(message, call)
    elif handler.response_streaming:
        await handler.unary_stream(message, call)
    else:
        call.answer(await handler.unary_unary(message, call))


async def _message(call: RpcCall) -> Any:
    """Return the bytes of the only message."""
    raw = await call.read()
    if raw is grpc.aio.EOF:
        raise InvalidArgument("the call ended before its message")
    if await call.read() is not grpc.aio.EOF:
        raise InvalidArgument("the call has more than one message")
    return raw


async def _messages(call: RpcCall) -> AsyncIterator[Any]:
    """Yield the bytes of message after message."""
    while (raw := await call.read()) is not grpc.aio.EOF:
        yield raw
