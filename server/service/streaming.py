"""ModelStreamInfer: many requests over one stream, free of any transport."""

import asyncio
import dataclasses
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, Final

from layercast.proto.messages import ModelInferRequest, ModelStreamInferResponse
from layercast.server.errors import ServingError, expected
from layercast.server.service.call import Call
from layercast.server.service.inference import InferenceService

MAX_IN_FLIGHT: Final = 256
"""Requests of one stream that are read and not yet answered; what comes beyond waits unread, with the sender."""

_DEEP: Final = 16
"""Unanswered requests from which on a stream is one that sends far ahead."""
_TOGETHER: Final = 32
"""What such a stream sends more is started together, so many at a time, ..."""
_GATHER_SECONDS: Final = 0.003
"""... or after so long, which is less than it takes to answer those before."""

Request = ModelInferRequest | ServingError
Answer = ModelStreamInferResponse
Requests = AsyncIterator[tuple[Request, int]]
"""What arrives, with its size in bytes; an error stands for a message that could not be parsed.

Messages that come together should be given without a wait between them: they are then started together too.
"""


class StreamService:
    """Answers ModelStreamInfer."""

    def __init__(self, inference: InferenceService, max_bytes: int) -> None:
        self._inference = inference
        self._max_bytes = max_bytes

    async def model_stream_infer(
        self, requests: Requests, call: Call
    ) -> AsyncGenerator[ModelStreamInferResponse, None]:
        """One answer a request, **in the order of the requests**, each with its id. They run at the same time.

        A request that fails is answered with `error_message`, and an `infer_response` that holds its id and, as
        parameter `error_code`, the status that it would have had alone; the stream goes on. With `call.fails_whole`,
        or once the stream's own deadline is over, an error ends the stream instead, after the answers before it.
        Every answer carries the parameter `triton_final_response`, true, since each request has one answer:
        `triton_enable_empty_final_response` adds nothing. When the requests end, so does the stream, once all are
        answered; when the caller goes, what is still queued is withdrawn.
        """
        flight = _Flight(self._max_bytes, self._answer)
        reader = asyncio.create_task(self._read(requests, call, flight))
        try:
            while (task := await flight.oldest()) is not None:
                yield await task
                flight.leave()
            await reader
        finally:
            unfinished: list[asyncio.Task[Any]] = [reader, *flight.close()]
            for each in unfinished:
                each.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    async def _read(self, requests: Requests, call: Call, flight: "_Flight") -> None:
        """Take in each request as soon as it is there and there is room for it."""
        try:
            async for request, size in requests:
                if not flight.has_room(size):
                    await flight.room(size)
                if call.size != size:  # most messages of a stream have one size
                    call = dataclasses.replace(call, size=size)
                flight.enter(request, call)
        finally:
            flight.end()

    async def _answer(self, request: Request, call: Call) -> Answer:
        """Return the answer to one message of a stream."""
        answer = ModelStreamInferResponse()
        try:
            if isinstance(request, ServingError):
                raise request
            await self._inference.infer_into(answer.infer_response, request, call)
        except Exception as error:
            shown = expected(error, "ModelStreamInfer")
            if call.fails_whole or _over(call):
                raise shown from error
            answer.ClearField("infer_response")
            answer.error_message = shown.message
            answer.infer_response.id = "" if isinstance(request, ServingError) else request.id
            answer.infer_response.parameters["error_code"].string_param = shown.code.name
        answer.infer_response.parameters["triton_final_response"].bool_param = True
        return answer


def _over(call: Call) -> bool:
    """Whether the time of the whole stream has passed: there is nobody to go on for."""
    return call.deadline is not None and asyncio.get_running_loop().time() >= call.deadline


class _Flight:
    """What one stream has in flight, in the order of its requests, bounded in requests and in bytes.

    grpc.aio gives one message at a time, each in a pass of its own of the event loop. Answered one by one, they would
    run in many small batches; so what a stream sends far ahead is gathered for a moment and started together.
    """

    def __init__(self, max_bytes: int, answer: Callable[[Request, Call], Coroutine[Any, Any, Answer]]) -> None:
        self._max_bytes = max_bytes
        self._answer = answer
        self._started: deque[tuple[asyncio.Task[Answer], int]] = deque()
        self._gathered: list[tuple[Request, Call]] = []
        self._gather_until: asyncio.TimerHandle | None = None
        self._bytes = 0
        self._ended = False
        # For the reader, which waits while it is full, and the writer, which waits while it is empty.
        self._changed = asyncio.Event()

    def has_room(self, size: int) -> bool:
        """Whether a request of `size` bytes may enter; one alone always may."""
        count = len(self._started) + len(self._gathered)
        return not count or (count < MAX_IN_FLIGHT and self._bytes + size <= self._max_bytes)

    async def room(self, size: int) -> None:
        """Wait until there is room."""
        self._start()
        while not self.has_room(size):
            self._changed.clear()
            await self._changed.wait()

    def enter(self, request: Request, call: Call) -> None:
        """Answer a request, at once or together with those that come next."""
        self._bytes += call.size
        self._gathered.append((request, call))
        if len(self._started) < _DEEP or len(self._gathered) >= _TOGETHER:
            self._start()
        elif self._gather_until is None:
            self._gather_until = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._start)

    def end(self) -> None:
        """No more requests come."""
        self._ended = True
        self._start()

    async def oldest(self) -> asyncio.Task[Answer] | None:
        """Wait for a request and return the task that answers the oldest; None when no more come."""
        while not self._started:
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._started[0][0]

    def leave(self) -> None:
        """The oldest request is answered."""
        _, size = self._started.popleft()
        self._bytes -= size
        if self._gathered and len(self._started) < _DEEP:
            self._start()
        self._changed.set()

    def close(self) -> list[asyncio.Task[Answer]]:
        """Drop what has not started, and return the tasks of what is not answered."""
        if self._gather_until:
            self._gather_until.cancel()
        self._gathered.clear()
        return [task for task, _ in self._started]

    def _start(self) -> None:
        if self._gather_until:
            self._gather_until.cancel()
            self._gather_until = None
        for request, call in self._gathered:
            self._started.append((asyncio.create_task(self._answer(request, call)), call.size))
        self._gathered.clear()
        self._changed.set()
