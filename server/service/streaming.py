"""ModelStreamInfer: many requests over one stream, free of any transport."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any, Protocol

from layercast.proto.messages import ModelInferRequest, ModelInferResponse
from layercast.server.service.bunch import Asked, bunches
from layercast.server.service.call import Call
from layercast.server.service.flight import Flight, Slot
from layercast.server.service.inference import InferenceService
from layercast.server.service.template import id_field


class Requests(Protocol):
    """The serialised requests of one stream, as they arrive: an async iterator, which waits for each.

    `together` says that `ready` gives whatever else came with a request.
    """

    together: bool

    def __aiter__(self) -> "Requests":
        """Return itself."""

    async def __anext__(self) -> bytes:
        """Return the next request."""

    def ready(self) -> bytes | None:
        """Return the next request if it is there already."""

    def parsed(self, raw: bytes) -> Any:
        """Return the message in `raw`, a ModelInferRequest; ServingError when there is none."""


class StreamService:
    """Answers ModelStreamInfer."""

    def __init__(self, inference: InferenceService, max_bytes: int) -> None:
        self._inference = inference
        self._max_bytes = max_bytes

    async def model_stream_infer(self, requests: Requests, call: Call) -> AsyncGenerator[list[bytes], None]:
        """One answer a request, **in the order of the requests**, each with its id. They run at the same time.

        Yields serialised answers, all that are ready. A request that fails is answered with `error_message`, and an
        `infer_response` that holds its id and, as parameter `error_code`, the status that it would have had alone; the
        stream goes on. With `call.fails_whole`, or once the stream's own deadline is over, an error ends the stream
        instead, after the answers before it. Every answer carries the parameter `triton_final_response`, true, since
        each request has one answer: `triton_enable_empty_final_response` adds nothing. When the requests end, so does
        the stream, once all are answered; when the caller goes, what is still queued is withdrawn.
        """
        flight = Flight(call, self._max_bytes, partial(self._begin, requests, call), requests.together)
        reader = asyncio.create_task(_read(requests, flight))
        try:
            while answers := await flight.front():
                yield answers
                flight.leave(len(answers))
            await reader
        finally:
            unfinished: list[asyncio.Task[Any]] = [reader, *flight.close()]
            reader.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)

    def _begin(self, requests: Requests, call: Call, messages: Sequence[tuple[bytes, Slot]]) -> None:
        """Begin to answer requests: the common kind without a task, and those that are alike as one work."""
        plain: list[Asked[Slot]] = []
        found = self._inference.all_known([raw for raw, _ in messages])
        for known, (raw, slot) in zip(found, messages, strict=True):
            if known:
                plain.append(Asked(known, raw, slot))
            else:
                self._begin_other(requests, call, raw, slot)
        for bunch in bunches(plain):
            begun = self._inference.begin_together(bunch, call.deadline, call.peer)
            for asked in bunch:
                if begun:
                    asked.call.wait_for(begun)
                else:
                    self._begin_alone(requests, call, asked)

    def _begin_alone(self, requests: Requests, call: Call, asked: Asked[Slot]) -> None:
        if short := self._inference.begin(asked.known, call.deadline, call.peer, asked.call):
            asked.call.wait_for(short)
        else:
            self._begin_other(requests, call, asked.raw, asked.call)

    def _begin_other(self, requests: Requests, call: Call, raw: bytes, slot: Slot) -> None:
        try:
            request = requests.parsed(raw)
        except Exception as error:
            slot.failed(error)
        else:
            slot.begun(id_field(request))
            slot.run(self._answer(request, Call(call.deadline, len(raw), peer=call.peer)))

    async def _answer(self, request: ModelInferRequest, call: Call) -> bytes:
        response = ModelInferResponse()
        await self._inference.infer_into(response, request, call)
        return response.SerializeToString()


async def _read(requests: Requests, flight: Flight) -> None:
    """Take in each request as soon as it is there and there is room for it."""
    try:
        async for first in requests:
            raw: bytes | None = first
            while raw is not None:
                if not flight.has_room(len(raw)):
                    await flight.room(len(raw))
                flight.enter(raw)
                raw = requests.ready()
            flight.came()
    finally:
        flight.end()
