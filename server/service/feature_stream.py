"""`FeatureService.ExtractStream`: layers of many rows, or large ones, in messages of bounded size."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Final

from layercast.proto.codec import Tensor, named_tensor
from layercast.proto.messages import ExtractStreamRequest, ExtractStreamResponse, TensorPart
from layercast.server.batching.policy import late_from
from layercast.server.errors import InvalidArgument
from layercast.server.layers import ENVELOPE, answer_bytes
from layercast.server.model import ServedModel
from layercast.server.service.answering import Answered, Answering, off_loop, permit, timing_of
from layercast.server.service.call import Call
from layercast.server.service.features import Extraction, decode
from layercast.server.service.requests import token_length
from layercast.server.service.terms import NO_PARAMETERS, terms_of
from layercast.server.work import Course

CHUNK_BYTES: Final = 2 << 20
"""Values in one message unless the request says otherwise: stock clients take messages of 4 MiB at most."""

MIN_CHUNK_BYTES: Final = 4 << 10
_PART_BYTES: Final = 16 << 20
"""Values of the rows that run at once. A row that is larger runs alone."""

_RUNNING: Final = 2
"""Parts of one request that run or wait to be sent."""


class FeatureStreamService:
    """Answers `ExtractStream` of `layercast.v1.FeatureService`."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    async def extract_stream(
        self, request: ExtractStreamRequest, call: Call
    ) -> AsyncGenerator[ExtractStreamResponse, None]:
        """Values as Extract gives them, rows in order; one message for no rows.

        The rows run in parts, and one part at most runs ahead of the one whose messages are being taken. An error, also
        of a part in the middle, is raised after the messages of the parts before it. When the generator is closed,
        rows that wait leave the queue and no more run. Unavailable where the model's streams hold too much already, and
        for a caller who takes no message for long.
        """
        late = late_from(call.deadline, asyncio.get_running_loop().time())
        model = self._answering.find(request.extract.model_name, request.extract.model_version, "features")
        with self._answering.counted(model, "features", late) as timer, model.streams.open() as stream:
            stream.hold(2 * call.size)  # as it came, which the transport keeps, and decoded
            asked = await off_loop(call.size, decode, model, request.extract)
            chunk_bytes = self._chunk_bytes(request.chunk_bytes)
            permit(model, asked.inputs, asked.rows, asked.wanted)
            size, row_bytes = _part_rows(model, asked)
            stream.hold(min(_RUNNING * size, asked.rows) * row_bytes)
            identifier = request.extract.id
            del request  # another copy of the inputs
            timer.decoded()
            first_row = queue_ns = compute_ns = 0
            warning = asked.warning
            async with aclosing(self._parts(model, asked, size, call, stream.course)) as parts:
                async for answered in parts:
                    messages = _messages(answered, chunk_bytes, len(asked.wanted.layers))
                    while (message := await off_loop(chunk_bytes, next, messages, None)) is not None:
                        _complete(message, identifier, model, asked.rows, first_row)
                        message.warning, warning = warning, ""
                        async with stream.unread():
                            yield message
                    first_row += _rows(answered.tensors)
                    queue_ns, compute_ns = max(queue_ns, answered.queue_ns), compute_ns + answered.compute_ns
                    del answered, messages  # sent, and large
            timer.ran(Answered([], queue_ns, compute_ns, asked.rows))

    def _chunk_bytes(self, asked: int) -> int:
        largest = self._answering.max_bytes - ENVELOPE
        if not asked:
            return min(CHUNK_BYTES, largest)
        if not MIN_CHUNK_BYTES <= asked <= largest:
            raise InvalidArgument(
                f"chunk_bytes must be from {MIN_CHUNK_BYTES:,} to {largest:,}, or 0 for {CHUNK_BYTES:,}; got {asked:,}",
                field="chunk_bytes",
            )
        return asked

    async def _parts(
        self, model: ServedModel, asked: Extraction, size: int, call: Call, course: Course
    ) -> AsyncGenerator[Answered, None]:
        """Run the rows in parts of `size` rows, in order, one ahead of the one that is taken."""
        terms = terms_of(call, NO_PARAMETERS)
        terms.course = course
        starts = iter(range(0, max(asked.rows, 1), size))
        running: deque[asyncio.Task[Answered]] = deque()
        try:
            while True:
                while len(running) < _RUNNING and (at := next(starts, None)) is not None:
                    inputs = {name: array[at : at + size] for name, array in asked.inputs.items()}
                    rows = min(size, asked.rows - at)
                    work = self._answering.run_permitted(model, inputs, rows, asked.wanted, terms)
                    running.append(asyncio.create_task(work))
                if not running:
                    return
                yield await running[0]
                running.popleft()
        except Exception:
            course.counted = True  # if at all, by the part that failed, and not by the next, which ends with it
            raise
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


def _part_rows(model: ServedModel, asked: Extraction) -> tuple[int, int]:
    """Return how many rows run at once, what a batch holds or fewer where their values are many, and a row's bytes."""
    length = token_length(model.manifest, asked.inputs)
    row = answer_bytes(model.manifest, asked.wanted.taps, 1, length, asked.wanted.outputs)
    return max(1, min(model.batcher.limits.max_batch, _PART_BYTES // max(row, 1))), row


def _messages(answered: Answered, chunk_bytes: int, layers: int) -> Iterator[ExtractStreamResponse]:
    """Yield the part's rows in messages, each with at most `chunk_bytes` of values."""
    tensors, rows = answered.tensors, _rows(answered.tensors)
    size = sum(values[:1].nbytes for _, _, values in tensors)
    timing = timing_of(answered)
    step = max(1, chunk_bytes // max(size, 1))
    for at in range(0, max(rows, 1), step):
        own = [(name, datatype, values[at : at + step]) for name, datatype, values in tensors]
        for parts, partial in _filled(own, chunk_bytes):
            message = ExtractStreamResponse(first_row=at, rows=_rows(own), timing=timing, partial=partial)
            message.layers.extend(part for place, part in parts if place < layers)
            message.outputs.extend(part for place, part in parts if place >= layers)
            yield message


def _filled(tensors: Sequence[Tensor], chunk_bytes: int) -> Iterator[tuple[list[tuple[int, TensorPart]], bool]]:
    """Yield parts of `tensors`, each with its tensor's place, as many at once as fit, and whether more follow."""
    parts: list[tuple[int, TensorPart]] = []
    room = chunk_bytes
    for place, tensor in enumerate(tensors):
        whole = named_tensor(*tensor)
        at, ends = 0, False
        while not ends:
            if not room:
                yield parts, True
                parts, room = [], chunk_bytes
            data = whole.data[at : at + room]
            part = TensorPart(name=whole.name, datatype=whole.datatype, shape=whole.shape, offset=at, data=data)
            parts.append((place, part))
            at, room = at + len(data), room - len(data)
            ends = at == len(whole.data)
    yield parts, False


def _rows(tensors: Sequence[Tensor]) -> int:
    return len(tensors[0][2])


def _complete(
    message: ExtractStreamResponse, identifier: str, model: ServedModel, total_rows: int, first_row: int
) -> None:
    """Fill in what is the whole stream's; `first_row` is the part's."""
    message.model_name, message.model_version = model.manifest.name, str(model.manifest.version)
    message.id = identifier
    message.total_rows = total_rows
    message.first_row += first_row
