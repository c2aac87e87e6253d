"""RPCs of our services with many messages in: read, answer, count, for as long as the caller likes and we run."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from layercast.proto.rpc import Method
from layercast.server.errors import Unavailable
from layercast.server.service.call import Call
from layercast.server.transport.calls import Handler, deadline, parsed, send
from layercast.server.transport.counted import Context, Counted
from layercast.server.transport.ending import run_counted
from layercast.server.transport.rpc_call import RpcCall

StreamAnswer = Callable[["Incoming", Call], AsyncGenerator[list[bytes], None]]
"""Yields the serialised answers that are ready."""

# Sent by a client that wants the first error inside a stream as the status of the stream.
_FAILS_WHOLE: Final = ("triton_grpc_error", "true")


class StreamRpc:
    """Messages in, messages out, for as long as the client likes and the server runs."""

    def __init__(self, method: Method, answer: StreamAnswer, counted: Counted) -> None:
        self._request = method.request
        self._answer = answer
        self._counted = counted
        self._open: set[Incoming] = set()

    def handler(self) -> Handler:
        """Return what grpc registers."""
        return grpc.stream_stream_rpc_method_handler(self._handle)

    def close(self) -> None:
        """Read no more from any open stream. Each ends, as unavailable, once what was read is answered."""
        for incoming in self._open:
            incoming.close()

    async def _handle(self, _: object, context: Context) -> None:
        await run_counted(self._counted, self._body(context), context)

    async def _body(self, context: Context) -> None:
        incoming = Incoming(context, self._request, self._counted)
        self._open.add(incoming)
        metadata = context.invocation_metadata() or ()
        fails_whole = _FAILS_WHOLE in [(str(k), v) for k, v in metadata]
        call = Call(deadline(context), fails_whole=fails_whole, peer=context.peer())
        try:
            async with aclosing(self._answer(incoming, call)) as answers:
                async for ready in answers:
                    await self._send(context, ready)
        finally:
            self._open.discard(incoming)
        if incoming.closed:
            raise Unavailable("the server is shutting down; everything that was read from this stream is answered")

    async def _send(self, context: Context, ready: list[bytes]) -> None:
        if isinstance(context, RpcCall):
            await context.write_all(ready)
            self._counted.sent.inc(len(ready))
            return
        for raw in ready:
            await send(context, raw)
            self._counted.sent.inc()


class Incoming:
    """The messages of one stream, serialised; `together` says that `ready` gives all that came with one.

    An async iterator for one consumer at a time. It ends when the client has half-closed, or after `close`.
    """

    def __init__(self, context: Context, message: type[Message], counted: Counted) -> None:
        self.closed = False
        self._call = context if isinstance(context, RpcCall) else None
        self.together = self._call is not None and self._call.together
        self._context = context
        self._message = message
        self._counted = counted
        self._reader: asyncio.Task[Any] | None = None

    def close(self) -> None:
        """End after the message that was read last."""
        self.closed = True
        if self._reader:
            self._reader.cancel()

    def __aiter__(self) -> "Incoming":
        return self

    async def __anext__(self) -> bytes:
        raw = await self._read()
        if raw is grpc.aio.EOF:
            raise StopAsyncIteration
        self._counted.received.inc()
        return bytes(raw)

    def ready(self) -> bytes | None:
        """Return the next message if it is there already, and whole."""
        raw = None if self.closed or self._call is None else self._call.ready()
        if raw is not None:
            self._counted.received.inc()
        return raw

    def parsed(self, raw: bytes) -> Message:
        """Return the message in `raw`; ServingError when there is none."""
        return parsed(self._message, raw)

    async def _read(self) -> Any:
        if self.closed:
            return grpc.aio.EOF
        self._reader = reader = asyncio.current_task()
        try:
            return await self._context.read()
        except asyncio.CancelledError:
            # Ours ends the iteration; the caller's own leaves with it.
            if self.closed and reader and not reader.uncancel():
                return grpc.aio.EOF
            raise
        finally:
            self._reader = None
