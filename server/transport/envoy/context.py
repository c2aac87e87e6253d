"""One RPC inside Envoy: its messages come and go as events of ASGI."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, Final, cast

from layercast.server.transport.framing import status_headers
from layercast.server.transport.rpc_call import HEADERS, LARGE, Cause, RpcCall, grpc_peer

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]

_START: Final[Event] = {"type": "http.response.start", "status": 200, "headers": HEADERS, "trailers": True}
_OK: Final[Event] = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]}


class EnvoyContext(RpcCall):
    """A call that Envoy hands over."""

    __slots__ = (
        "_coming", "_ended", "_receive", "_scope", "_send", "_sending", "_started", "looked",
    )  # fmt: skip

    def __init__(self, scope: Event, headers: Mapping[bytes, bytes], receive: Receive, send: Send, limit: int) -> None:
        """`headers` are the last of each name in `scope`; `limit` is for a message either way, in bytes."""
        super().__init__(scope["headers"], headers, limit)
        self._scope, self._receive, self._send = scope, receive, send
        self._task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._coming: asyncio.Future[Event] | None = None
        self._started = self._ended = False
        self._sending: asyncio.Future[None] | None = None
        self.looked = self._loop.time()

    def peer(self) -> str:
        """Who calls, as grpc writes it."""
        host, port = self._scope["client"] or ("", 0)
        return grpc_peer(host, port)

    async def write(self, message: Any) -> None:
        """Send a message, and wait while the caller is far behind."""
        frame = self._framed(message)
        if not self._started:
            self._started = True
            await self._send(_START)
        if not self.outgoing and self._sending is None:
            # A moment later, together with what else is ready by then: each time, a thread of Envoy is woken.
            self._loop.call_soon(self._send_on)
        self.outgoing += frame
        await self._has_room()

    @property
    def is_large(self) -> bool:
        """Whether the answer is more than Envoy passes on at once."""
        return self._whole is not None and len(self._whole) > LARGE

    async def finish(self) -> None:
        """Send the end: the answer if there is one, and the status."""
        send, self._ended = self._send, True
        if self._whole is not None:
            await send(_START)
            await send({"type": "http.response.body", "body": self._whole})
            await send(_OK)
            return
        headers = status_headers(*self.status)
        if self._started:
            await send({"type": "http.response.body", "body": bytes(self.outgoing)})
            await send({"type": "http.response.trailers", "headers": headers})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *headers]})
            await send({"type": "http.response.body", "body": b""})

    async def left(self) -> None:
        """Wait until Envoy has nothing more to send to the caller."""
        while self.cause is None:
            self.look()
            await asyncio.sleep(0.01)

    def look(self) -> None:
        """Ask whether the caller is still there. Envoy doesn't tell by itself."""
        # What was read and not yet taken waits for its reader: nobody reads ahead of a slow service.
        if self._body_ended or self._frames.empty:
            self._ask()

    def _send_on(self) -> None:
        """Send what was written, unless there is an end already or Envoy has not yet taken what was sent before."""
        if self.outgoing and self._sending is None and not self._ended:
            event = {"type": "http.response.body", "body": bytes(self.outgoing), "more_body": True}
            self.outgoing.clear()
            # A future; an error where the caller has left before.
            self._sending = asyncio.ensure_future(self._send(event))
            self._sending.add_done_callback(self._sent)

    def _sent(self, sending: "asyncio.Future[None]") -> None:
        self._sending = None
        if sending.exception():  # pyvoy's ClientDisconnectedError
            self.cancel(Cause.GONE)
            return
        self._send_on()
        self.make_room()

    def _ask(self) -> None:
        if self._coming:
            return
        # A future; where the caller sent no body at all, something else that can be awaited.
        self._coming = asyncio.ensure_future(self._receive())
        self._coming.add_done_callback(self._arrived)

    def _arrived(self, coming: "asyncio.Future[Event]") -> None:
        self._coming = None
        if coming.cancelled() or coming.exception():
            self.cancel(Cause.GONE)
            return
        event = coming.result()
        if event["type"] == "http.disconnect":
            self.cancel(Cause.GONE)
            return
        self._fed(event["body"], not event["more_body"])
