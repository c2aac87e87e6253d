"""The application that runs inside Envoy: RPCs go to the handlers that grpc.aio would call, the rest to the web app."""

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import grpc
from starlette.applications import Starlette
from starlette.responses import JSONResponse

from layercast.server.errors import InvalidArgument, Unavailable, Unimplemented
from layercast.server.text import fit
from layercast.server.transport.calls import Handler
from layercast.server.transport.envoy.context import Cause, EnvoyContext, Event, Receive, Send
from layercast.server.transport.envoy.watching import EVERY, Watching
from layercast.server.transport.status import reply

_RPC: Final = b"application/grpc"
_AFTER: Final = (b"", b"+", b";")
_STATUS: Final = {Cause.LATE: grpc.StatusCode.DEADLINE_EXCEEDED, Cause.STOPPED: grpc.StatusCode.UNAVAILABLE}
_LEAVING: Final = "the server is shutting down"


class _Details(NamedTuple):
    """What an interceptor is told of a call."""

    method: str
    invocation_metadata: tuple[tuple[str, str | bytes], ...]


class Adapter:
    """Answers RPCs by registered handlers, in place of a `grpc.aio.Server`, and other requests by `web`."""

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor], max_bytes: int, web: Starlette) -> None:
        self._interceptors = interceptors
        self._limit = max_bytes
        self._web = web
        self._generic: list[grpc.GenericRpcHandler] = []
        self._known: dict[str, Handler] = {}
        self._watching = Watching()
        self._running: set[asyncio.Task[Any] | None] = set()
        self._stopping = False

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Answer RPCs with `handlers`; of several that take one, the first is asked."""
        self._generic += handlers

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer a request of HTTP: an ASGI application."""
        task = asyncio.current_task()
        self._running.add(task)
        try:
            headers = dict(scope["headers"])
            if _is_rpc(scope, headers):
                await self._call(EnvoyContext(scope, headers, receive, send, self._limit), scope["path"])
            elif self._stopping:
                await JSONResponse({"error": _LEAVING}, 503, {"retry-after": "1"})(scope, receive, send)
            else:
                await self._web(scope, _waiting(receive), send)
        finally:
            self._running.discard(task)

    async def stop(self, seconds: float) -> None:
        """Refuse what comes, let what runs end for so long, then cut it off."""
        self._stopping = True
        if await self._ended(seconds):
            return
        for call in self._watching.all():
            call.cancel(Cause.STOPPED)
        await self._ended(0.1)

    async def _ended(self, seconds: float) -> bool:
        running = [task for task in self._running if task and task is not asyncio.current_task()]
        return not running or not (await asyncio.wait(running, timeout=seconds))[1]

    async def _call(self, call: EnvoyContext, path: str) -> None:
        self._watching.add(call)
        try:
            await self._answer(call, path)
            self._watching.discard(call)
            await call.finish()
            if self._stopping or call.is_large:
                # Else a process that ends now would cut off what Envoy still holds for a slow reader.
                await call.left()
        except (OSError, asyncio.CancelledError):  # pyvoy's ClientDisconnectedError is an OSError
            if call.cause is not Cause.GONE:
                raise
        finally:
            self._watching.discard(call)

    async def _answer(self, call: EnvoyContext, path: str) -> None:
        """Let the handler answer; the status that is still to be sent is in `call` then."""
        try:
            if self._stopping:
                raise Unavailable(_LEAVING)
            call.start_clock()
            handler = await self._handler(call, path)
            call.encode = handler.response_serializer
            await _handle(handler, call)
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            status = _STATUS.get(call.cause) if call.cause else None
            task = asyncio.current_task()
            if call.cause is None or status is None or task is None:
                raise
            task.uncancel()
            call.status = (status.value[0], call.cause.value, ())
        except Exception as error:
            failed = reply(error, path)
            call.status = (failed.code.value[0], failed.message, failed.trailers)

    async def _handler(self, call: EnvoyContext, path: str) -> Any:
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


def _is_rpc(scope: Event, headers: Mapping[bytes, bytes]) -> bool:
    """Whether this is a call of gRPC, and not of gRPC-Web, say, or gRPC's type over an HTTP without trailers."""
    kind = headers.get(b"content-type", b"")
    return kind.startswith(_RPC) and kind[len(_RPC) :][:1] in _AFTER and scope["http_version"] == "2"


async def _handle(handler: Any, call: EnvoyContext) -> None:
    if handler.request_streaming:
        await handler.stream_stream(call.messages(), call)
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


def _waiting(receive: Receive) -> Receive:
    """Return `receive` as ASGI has it: once the body has ended, it waits until the caller leaves."""
    ended = False

    async def next_event() -> Event:
        nonlocal ended
        while True:
            # Pyvoy would set the result of a future that was cancelled with who waits for it.
            event = await asyncio.shield(receive())
            if event["type"] != "http.request" or not ended:
                ended = not event.get("more_body")
                return event
            await asyncio.sleep(EVERY)

    return next_event
