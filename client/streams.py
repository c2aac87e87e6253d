"""How `predict_many` goes over a stream, for either client: when to take an item, to send and to wait.

What the messages mean is `many`'s.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from typing import Any, TypeAlias

import grpc
import grpc.aio

from layercast.client.errors import Cancelled, Unavailable
from layercast.client.many import Many
from layercast.client.translation import Inputs
from layercast.proto.messages import ModelStreamInferResponse

Items: TypeAlias = Iterable[Inputs]
AsyncItems: TypeAlias = Iterable[Inputs] | AsyncIterable[Inputs]
AsyncCall: TypeAlias = "grpc.aio.StreamStreamCall[Any, Any]"

# An answer, the error that ended the stream, or None for its good end.
_Received: TypeAlias = ModelStreamInferResponse | grpc.RpcError | None

# How grpc.aio tells of a write that failed.
_FAILED_WRITE = "Internal error from Core"


class Stream:
    """An open ModelStreamInfer of the synchronous client.

    gRPC sends in a thread of its own; another collects what arrives, so that it can be looked for without waiting.
    """

    def __init__(self, open_call: Callable[[Iterator[bytes]], Any]) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[_Received] = queue.SimpleQueue()
        self._call = open_call(iter(self._requests.get, None))
        threading.Thread(target=self._collect, name="layercast-answers", daemon=True).start()

    @property
    def ready(self) -> bool:
        """Whether `receive` would return at once."""
        return not self._answers.empty()

    def send(self, request: bytes) -> None:
        """Send a request, in a moment."""
        self._requests.put(request)

    def half_close(self) -> None:
        """Say that no more requests come."""
        self._requests.put(None)

    def receive(self, timeout: float | None) -> ModelStreamInferResponse | None:
        """The next answer, None once the stream has ended well. Raises queue.Empty after `timeout` seconds."""
        received = self._answers.get(timeout=timeout)
        if isinstance(received, grpc.RpcError):
            raise received
        return received

    def close(self) -> None:
        """End the stream, whatever is in flight."""
        self._call.cancel()
        self._requests.put(None)

    def _collect(self) -> None:
        try:
            for answer in self._call:
                self._answers.put(answer)
            self._answers.put(None)
        except grpc.RpcError as error:
            self._answers.put(error)


def results(stream: Stream, many: Many, items: Iterator[Inputs], seconds: float | None) -> Generator[Any, None, None]:
    """Yield the items' results and close the stream. An item is taken only while there is room and no result to give.

    One answer may take so many `seconds`; None is for ever.
    """
    more, error = True, None
    try:
        while True:
            many.advance()
            if unsent := many.unsent:
                yield many.failed(unsent)
            elif more and many.has_room and not stream.ready:
                try:
                    request = many.request(next(items))
                    if request is not None:
                        stream.send(request)
                except StopIteration:
                    more = False
                    stream.half_close()
                except Exception as raised:  # by the iterable: after the results of what came before
                    more, error = False, raised
            elif many.expects or (more and stream.ready):
                yield many.result(_received(stream, many, seconds))
            elif error:
                raise error
            elif not more:
                with contextlib.suppress(queue.Empty, grpc.RpcError):  # everything is answered
                    stream.receive(seconds)
                return
    finally:
        stream.close()


def _received(stream: Stream, many: Many, seconds: float | None) -> ModelStreamInferResponse:
    try:
        answer = stream.receive(seconds)
    except queue.Empty:
        raise many.late(seconds) from None
    except grpc.RpcError as error:
        raise many.broken(error) from error
    if answer is None:
        raise many.cut_short()
    return answer


async def results_async(
    open_call: Callable[[AsyncIterator[bytes]], AsyncCall], many: Many, items: AsyncItems, seconds: float | None
) -> AsyncGenerator[Any, None]:
    """`results` for asyncio: items are taken, and sent, by a task of gRPC's."""
    feed = _Feed(many, items)
    call = open_call(feed.requests())
    # Not call.read(): once the server has ended the stream and a write fails, that forgets what had arrived before.
    answers = aiter(call)
    try:
        while True:
            many.advance()
            feed.moved.set()
            if unsent := many.unsent:
                yield many.failed(unsent)
            elif many.expects:
                yield many.result(await _answer(call, answers, many, seconds))
            elif feed.error:
                raise feed.error
            elif feed.ended:
                break
            else:
                feed.moved.clear()
                await feed.moved.wait()
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError):  # everything is answered
            async with asyncio.timeout(seconds):
                await anext(answers, None)
    finally:
        call.cancel()


class _Feed:
    """Takes items while there is room for them, and gives their requests to gRPC."""

    def __init__(self, many: Many, items: AsyncItems) -> None:
        self.moved = asyncio.Event()
        self.ended = False
        self.error: Exception | None = None
        self._many = many
        self._items = _each(items)

    async def requests(self) -> AsyncIterator[bytes]:
        """Yield the requests of the items."""
        try:
            while True:
                while not self._many.has_room:
                    self.moved.clear()
                    await self.moved.wait()
                request = self._many.request(await anext(self._items))
                self.moved.set()
                if request is not None:
                    yield request
        except StopAsyncIteration:
            pass
        except Exception as error:  # by the iterable: raised after the results of what came before
            self.error = error
        finally:
            self.ended = True
            self.moved.set()


async def _answer(
    call: AsyncCall, answers: AsyncIterator[ModelStreamInferResponse], many: Many, seconds: float | None
) -> ModelStreamInferResponse:
    # A timer that ends the call costs a fraction of an asyncio.timeout for each answer.
    late = asyncio.get_running_loop().call_later(seconds, call.cancel) if seconds is not None else None
    try:
        return await anext(answers)
    except StopAsyncIteration:
        raise many.cut_short() from None
    except grpc.aio.AioRpcError as error:
        # A write that fails because the server has ended the stream hides the status that the server gave.
        if error.details() == _FAILED_WRITE:
            raise many.ended(Unavailable("the server ended it; gRPC does not say why")) from error
        raise many.broken(error) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        if late is not None and late.when() <= asyncio.get_running_loop().time():
            raise many.late(seconds) from None
        raise many.ended(Cancelled("this client was closed")) from None
    finally:
        if late is not None:
            late.cancel()


def _each(items: AsyncItems) -> AsyncIterator[Inputs]:
    return aiter(items) if isinstance(items, AsyncIterable) else _later(items)


async def _later(items: Items) -> AsyncIterator[Inputs]:
    for item in items:
        yield item
