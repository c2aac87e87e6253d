"""RPCs of our services with one message in: parse, answer, count, and turn what a service raises into a status."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message

from layercast.proto.bulk import MessageTooComplex, check_bulk
from layercast.proto.codec import CodecError
from layercast.proto.rpc import Method
from layercast.server.batching.policy import late_from
from layercast.server.errors import DeadlineCancelled, InvalidArgument, ResourceExhausted
from layercast.server.service.call import Call
from layercast.server.service.gathering import Gathered
from layercast.server.transport.counted import Context, Counted
from layercast.server.transport.ending import abort, run_counted
from layercast.server.transport.short_call import Short, ShortRpc
from layercast.server.transport.status import Reply

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Answer = Callable[[Any, Call], Awaitable[Message]]
Answers = Callable[[Any, Call], AsyncGenerator[Message, None]]

# A message of fewer bytes parses within a few milliseconds, whatever is in it.
_LARGE: Final = 256 << 10


def parsed(message: type[Message], raw: bytes) -> Message:
    """Return the message in `raw`; InvalidArgument when there is none, ResourceExhausted when it has too many parts."""
    try:
        if len(raw) > _LARGE:
            check_bulk(raw, message)
        return message.FromString(raw)
    except MessageTooComplex as error:
        raise ResourceExhausted(str(error)) from error
    except (DecodeError, CodecError) as error:
        raise InvalidArgument(
            f"the {len(raw)} bytes are no {message.DESCRIPTOR.full_name}; "
            "does the client use the same .proto file, and UTF-8 in its texts?"
        ) from error


class UnaryRpc:
    """One message in, one message out."""

    def __init__(self, method: Method, answer: Answer, counted: Counted, short: Short | None = None) -> None:
        """`short` answers messages of the common kind, `answer` all others."""
        self._request = method.request
        self._answer = answer
        self._counted = counted
        self.short = ShortRpc(short, counted) if short else None

    def handler(self) -> Handler:
        """Return what grpc registers. It parses nothing itself: it would answer malformed bytes with INTERNAL."""
        return grpc.unary_unary_rpc_method_handler(self._handle)

    async def _handle(self, raw: bytes, context: Context) -> bytes:
        if self.short:
            loop, due = asyncio.get_running_loop(), deadline(context)
            since = loop.time()
            future: asyncio.Future[bytes | Reply | None] = loop.create_future()
            if begun := self.short.begin(raw, due, context.peer(), partial(_settle, future)):
                del raw  # what the rows need of it was taken
                try:
                    end = await future
                except asyncio.CancelledError:
                    begun.cancel(late=loop.time() >= late_from(due, since))
                    raise
                if isinstance(end, bytes):
                    return end
                if end:
                    return await abort(context, end)
                assert isinstance(begun, Gathered)  # no other is declined after it was begun
                raw = begun.raw
        body = self._body(raw, context)
        del raw  # which an error would keep
        return await run_counted(self._counted, body, context)

    async def _body(self, raw: bytes, context: Context) -> bytes:
        self._counted.received.inc()
        request = parsed(self._request, raw)
        response = await self._answer(request, Call(deadline(context), len(raw), peer=context.peer()))
        self._counted.sent.inc()
        return response.SerializeToString()


class ServerStreamRpc:
    """One message in, messages out, each made when the client has room for it."""

    def __init__(self, method: Method, answers: Answers, counted: Counted) -> None:
        self._request = method.request
        self._answers = answers
        self._counted = counted

    def handler(self) -> Handler:
        """Return what grpc registers."""
        return grpc.unary_stream_rpc_method_handler(self._handle)

    async def _handle(self, raw: bytes, context: Context) -> None:
        body = self._body(raw, context)
        del raw  # which an error would keep
        await run_counted(self._counted, body, context)

    async def _body(self, raw: bytes, context: Context) -> None:
        self._counted.received.inc()
        clock = asyncio.get_running_loop().time
        call = Call(deadline(context), len(raw), peer=context.peer())
        late = late_from(call.deadline, clock())
        try:
            async with aclosing(self._answers(parsed(self._request, raw), call)) as answers:
                async for answer in answers:
                    await send(context, answer.SerializeToString())
                    self._counted.sent.inc()
        except asyncio.CancelledError:
            if clock() >= late:
                raise DeadlineCancelled from None
            raise


def _settle(future: "asyncio.Future[bytes | Reply | None]", content: bytes | None, failed: Reply | None) -> None:
    if not future.done():
        future.set_result(failed if content is None else content)


async def send(context: Context, raw: bytes) -> None:
    """Send one message of a stream when there is room; CancelledError when the caller has gone meanwhile."""
    try:
        await context.write(raw)
    except grpc.aio.InternalError:  # how grpc says it, if the message was waiting for room
        raise asyncio.CancelledError from None


def deadline(context: Context) -> float | None:
    """Return when the call's time is over, on the event loop's clock, or None."""
    remaining = context.time_remaining()
    return None if remaining is None else asyncio.get_running_loop().time() + remaining
