"""Calls are counted by their end, and one that fails is given its status."""

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, Final, Literal, NoReturn, TypeAlias, TypeVar

import grpc

from layercast.server.errors import DeadlineCancelled
from layercast.server.metrics import Metrics
from layercast.server.transport.status import Reply, reply

T = TypeVar("T")
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Kind = Literal["unary", "server_stream", "bidi_stream"]

# A status goes at once, or after an answer that the caller doesn't read.
_STATUS_SECONDS: Final = 1.0


class Counted:
    """Counts the calls of one RPC and gives those that fail their status."""

    def __init__(self, service: str, name: str, metrics: Metrics, kind: Kind = "unary") -> None:
        self.path = f"/{service}/{name}"
        labels = (kind, service, name)
        self.received = metrics.rpc_received.labels(*labels)
        self.sent = metrics.rpc_sent.labels(*labels)
        self._started = metrics.rpc_started.labels(*labels)
        self._duration = metrics.rpc_duration.labels(*labels)
        self._handled = {code: metrics.rpc_handled.labels(*labels, code.name) for code in grpc.StatusCode}
        self._ok = self._handled[grpc.StatusCode.OK]

    async def run(self, body: Awaitable[T], context: Context) -> T:
        """Await `body` and return what it returns; its error ends the call with a status and trailers."""
        start = self.begun()
        try:
            result = await body
        except asyncio.CancelledError as gone:
            self.left(isinstance(gone, DeadlineCancelled), start)
            raise
        except grpc.aio.AbortError:
            self.ended(context.code(), start)
            raise
        except Exception as error:
            failed = reply(error, self.path)
        else:
            self.ended(grpc.StatusCode.OK, start)
            return result
        # Counted first: who has seen the status finds it in the metrics. Not in the `except`: grpc's own error, which
        # it keeps in a circle, would keep the one before, and that the request, until a garbage collection.
        self.ended(failed.code, start)
        return await abort(context, failed)

    def begun(self) -> float:
        """Count a call and return when it began."""
        self._started.inc()
        return time.perf_counter()

    def answered(self, start: float) -> None:
        """Count the answer to a call of one message, which began at `start`, and its end."""
        self.sent.inc()
        self._ok.inc()
        self._duration.observe(time.perf_counter() - start)

    def left(self, late: bool, start: float) -> None:
        """Count a call whose caller has gone, or else (`late`) whose deadline was over."""
        self.ended(grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED, start)

    def ended(self, code: grpc.StatusCode, start: float) -> None:
        """Count the end of a call that began at `start`."""
        self._handled[code].inc()
        self._duration.observe(time.perf_counter() - start)


async def abort(context: Context, failed: Reply) -> NoReturn:
    """End a call, which is counted, with a status and trailers."""
    try:
        async with asyncio.timeout(_STATUS_SECONDS):
            await context.abort(failed.code, failed.message, failed.trailers)
    except TimeoutError:
        # Who reads nothing takes no status either. grpc has it and sends it when it can; the request goes now.
        raise asyncio.CancelledError from None
