"""ModelStreamInfer: many requests over one stream, free of any transport."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from layercast.proto.messages import ModelInferRequest, ModelStreamInferResponse
from layercast.server.errors import ServingError, expected
from layercast.server.service.call import Call
from layercast.server.service.inference import InferenceService

MAX_IN_FLIGHT: Final = 256
"""Requests of one stream that are read and not yet answered; what comes beyond waits unread, with the sender."""

Requests = AsyncIterator[tuple[ModelInferRequest | ServingError, int]]
"""What arrives, with its size in bytes; an error stands for a message that could not be parsed."""


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
        window = _Window(self._max_bytes)
        answers: asyncio.Queue[asyncio.Task[ModelStreamInferResponse] | None] = asyncio.Queue()
        running: set[asyncio.Task[ModelStreamInferResponse]] = set()

        async def read() -> None:
            try:
                async for request, size in requests:
                    await window.enter(size)
                    task = asyncio.create_task(self._answer(request, dataclasses.replace(call, size=size)))
                    running.add(task)
                    answers.put_nowait(task)
            finally:
                answers.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await answers.get()) is not None:
                yield await task
                running.discard(task)
                window.leave()
            await reader
        finally:
            for unfinished in (reader, *running):
                unfinished.cancel()
            await asyncio.gather(reader, *running, return_exceptions=True)

    async def _answer(self, request: ModelInferRequest | ServingError, call: Call) -> ModelStreamInferResponse:
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


class _Window:
    """Bounds what one stream has in flight, in requests and in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._sizes: list[int] = []
        self._left = asyncio.Event()

    async def enter(self, size: int) -> None:
        """Wait until a request of `size` bytes has room; one alone always has."""
        while len(self._sizes) >= MAX_IN_FLIGHT or (self._sizes and sum(self._sizes) + size > self._max_bytes):
            self._left.clear()
            await self._left.wait()
        self._sizes.append(size)

    def leave(self) -> None:
        """The oldest request is answered."""
        self._sizes.pop(0)
        self._left.set()
