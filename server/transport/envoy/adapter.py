"""The application that runs inside Envoy: RPCs go to the handlers that grpc.aio would call, the rest to the web app."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from starlette.applications import Starlette
from starlette.responses import JSONResponse

from layercast.server.transport.dispatch import LEAVING, Handlers
from layercast.server.transport.envoy.context import EnvoyContext, Event, Receive, Send
from layercast.server.transport.envoy.watching import EVERY, Watching
from layercast.server.transport.rpc_call import Cause, is_rpc


class Adapter:
    """Answers RPCs by registered handlers, in place of a `grpc.aio.Server`, and other requests by `web`."""

    def __init__(self, handlers: Handlers, max_bytes: int, web: Starlette) -> None:
        self._handlers = handlers
        self._limit = max_bytes
        self._web = web
        self._watching = Watching()
        self._running: set[asyncio.Task[Any] | None] = set()

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Answer RPCs with `handlers`; of several that take one, the first is asked."""
        self._handlers.add_generic_rpc_handlers(handlers)

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer a request of HTTP: an ASGI application."""
        task = asyncio.current_task()
        self._running.add(task)
        try:
            headers = dict(scope["headers"])
            if _is_rpc(scope, headers):
                await self._call(EnvoyContext(scope, headers, receive, send, self._limit), scope["path"])
            elif self._handlers.stopping:
                await JSONResponse({"error": LEAVING}, 503, {"retry-after": "1"})(scope, receive, send)
            else:
                await self._web(scope, _waiting(receive), send)
        finally:
            self._running.discard(task)

    async def stop(self, seconds: float) -> None:
        """Refuse what comes, let what runs end for so long, then cut it off."""
        self._handlers.stopping = True
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
            await self._handlers.answer(call, path, call.looked)
            self._watching.discard(call)
            await call.finish()
            if self._handlers.stopping or call.is_large:
                # Else a process that ends now would cut off what Envoy still holds for a slow reader.
                await call.left()
        except (OSError, asyncio.CancelledError):  # pyvoy's ClientDisconnectedError is an OSError
            if call.cause is not Cause.GONE:
                raise
        finally:
            self._watching.discard(call)


def _is_rpc(scope: Event, headers: Mapping[bytes, bytes]) -> bool:
    """Whether this is a call of gRPC, and not gRPC's type over an HTTP without trailers."""
    return is_rpc(headers.get(b"content-type", b"")) and scope["http_version"] == "2"


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
