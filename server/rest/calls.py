"""One HTTP request from start to end: counted, answered or refused, given up when the caller leaves."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from google.protobuf.message import Message
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from layercast.server.errors import Unimplemented
from layercast.server.metrics import Metrics
from layercast.server.rest.status import error_response
from layercast.server.service.call import Call, method_of
from layercast.server.transport.security import RPC_SCOPES, Security
from layercast.server.transport.timeouts import seconds_of

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]

_GONE = 499


@dataclass(frozen=True)
class Context:
    """What the routes share. `services` answer the protocol's RPCs, each some; `max_bytes` bounds bodies either way."""

    services: Sequence[object]
    metrics: Metrics
    max_bytes: int
    security: Security
    _large: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    async def call(self, rpc: str, message: Message, call: Call) -> Any:
        """Call the method for an RPC on the service that has it; Unimplemented when none has."""
        answer = method_of(self.services, rpc)
        if answer is None:
            raise Unimplemented(f"{rpc} is not implemented by this server")
        return await answer(message, call)

    async def work(self, work: Callable[[], T], large: bool) -> T:
        """Return what `work` returns; when it is `large`, from a thread, and no more than two such at a time.

        JSON takes many times its size while it is parsed, so the number of documents is what bounds the memory.
        """
        if not large:
            return work()
        async with self._large:
            return await asyncio.to_thread(work)

    def route(self, path: str, rpc: str, endpoint: Endpoint, method: str) -> Route:
        """Return a route that is open to whoever may call `rpc`, and counted under its path as written here."""
        counted = self.metrics.http_requests
        duration = self.metrics.http_duration.labels(path)

        async def answer(request: Request) -> Response:
            start = time.perf_counter()
            status = _GONE
            try:
                self.security.admit(RPC_SCOPES[rpc], authorization(request), f"calling {rpc}")
                response = await endpoint(request)
                status = response.status_code
            except ClientDisconnect:
                # Nobody reads this answer; the count does.
                response = Response(status_code=_GONE)
            except Exception as error:
                response = error_response(error, path)
                status = response.status_code
            finally:
                counted.labels(path, str(status)).inc()
                duration.observe(time.perf_counter() - start)
            return response

        return Route(path, answer, methods=[method])


def authorization(request: Request) -> str | None:
    """Return the header with the token; none, when there are several that may differ."""
    given = request.headers.getlist("authorization")
    return given[0] if len(given) == 1 else None


def call_of(request: Request) -> Call:
    """Return the call with the deadline of the header `grpc-timeout`, which starts now: `250m` is 250 milliseconds."""
    given = request.headers.get("grpc-timeout")
    peer = f"{request.client.host}:{request.client.port}" if request.client else ""
    if given is None:
        return Call(peer=peer)
    return Call(deadline=asyncio.get_running_loop().time() + seconds_of(given), peer=peer)


async def unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """Return what `answer` returns; cancel it and raise ClientDisconnect when the caller leaves before that.

    The request's body must have been read.
    """
    answering = asyncio.create_task(answer)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        return answering.result()
    finally:
        answering.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
