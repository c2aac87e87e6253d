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
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from typing import Any, TypeAlias

import grpc
import grpc.aio

from layercast.client.errors import Cancelled
from layercast.client.many import Many
from layercast.client.translation import Inputs
from layercast.proto.messages import ModelStreamInferResponse

Items: TypeAlias = Iterable[Inputs]
AsyncItems: TypeAlias = Iterable[Inputs] | AsyncIterable[Inputs]
AsyncCall: TypeAlias = "grpc.aio.StreamStreamCall[Any, Any]"

# An answer, the error that ended the stream, or None for its good end.
_Received: TypeAlias = ModelStreamInferResponse | grpc.RpcError | None


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
            yield from many.unsent()
            if more and many.has_room and not stream.ready:
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
    call: AsyncCall, many: Many, items: AsyncItems, seconds: float | None
) -> AsyncGenerator[Any, None]:
    """`results` for asyncio: items are taken, and sent, by a task beside."""
    moved = asyncio.Event()
    feeding = asyncio.create_task(_feed(call, many, _each(items), moved))
    feeding.add_done_callback(lambda _: moved.set())
    try:
        while True:
            for result in many.unsent():
                moved.set()
                yield result
            if many.expects:
                result = many.result(await _read(call, many, seconds))
                moved.set()
                yield result
            elif feeding.done():
                await feeding  # raises the iterable's own error
                break
            else:
                moved.clear()
                await moved.wait()
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError):  # everything is answered
            async with asyncio.timeout(seconds):
                await call.read()
    finally:
        feeding.cancel()
        call.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


async def _feed(call: AsyncCall, many: Many, items: AsyncIterator[Inputs], moved: asyncio.Event) -> None:
    """Take items while there is room, and send them."""
    while True:
        while not many.has_room:
            moved.clear()
            await moved.wait()
        try:
            item = await anext(items)
        except StopAsyncIteration:
            break
        request = many.request(item)
        moved.set()
        if request is not None and not await _sent(call.write(request)):
            return
    await _sent(call.done_writing())


async def _read(call: AsyncCall, many: Many, seconds: float | None) -> ModelStreamInferResponse:
    try:
        async with asyncio.timeout(seconds):
            answer = await call.read()
    except TimeoutError:
        raise many.late(seconds) from None
    except grpc.aio.AioRpcError as error:
        raise many.broken(error) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise many.ended(Cancelled("this client was closed")) from None
    if answer is grpc.aio.EOF:
        raise many.cut_short()
    received: ModelStreamInferResponse = answer
    return received


async def _sent(writing: Awaitable[None]) -> bool:
    """Whether the stream still takes what is written. If not, the next read says why."""
    try:
        await writing
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        return False
    return True


async def _each(items: AsyncItems) -> AsyncIterator[Inputs]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
