"""How a call ends that has a task: it is counted, and given its status if it fails."""

import asyncio
from collections.abc import Awaitable
from typing import Final, NoReturn, TypeVar

import grpc

from layercast.server.errors import DeadlineCancelled
from layercast.server.transport.counted import Context, Counted
from layercast.server.transport.status import Reply, reply

T = TypeVar("T")

# A status goes at once, or after an answer that the caller doesn't read.
_STATUS_SECONDS: Final = 1.0


async def run_counted(counted: Counted, body: Awaitable[T], context: Context) -> T:
    """Await `body` and return what it returns; its error ends the call with a status and trailers."""
    start = counted.begun()
    try:
        result = await body
    except asyncio.CancelledError as gone:
        counted.left(isinstance(gone, DeadlineCancelled), start)
        raise
    except grpc.aio.AbortError:
        counted.ended(context.code(), start)
        raise
    except Exception as error:
        failed = reply(error, counted.path)
    else:
        counted.ended(grpc.StatusCode.OK, start)
        return result
    # Counted first: who has seen the status finds it in the metrics. Not in the `except`: grpc's own error, which
    # it keeps in a circle, would keep the one before, and that the request, until a garbage collection.
    counted.ended(failed.code, start)
    return await abort(context, failed)


async def abort(context: Context, failed: Reply) -> NoReturn:
    """End a call, which is counted, with a status and trailers."""
    try:
        async with asyncio.timeout(_STATUS_SECONDS):
            await context.abort(failed.code, failed.message, failed.trailers)
    except TimeoutError:
        # Who reads nothing takes no status either. grpc has it and sends it when it can; the request goes now.
        raise asyncio.CancelledError from None
