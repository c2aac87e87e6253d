"""Answers to plain requests: serialised once for a number of rows, but for the values, the id and the times."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from layercast.models.manifest import Manifest
from layercast.proto.codec import DATATYPES, fill_outputs
from layercast.proto.fields import mark, varint
from layercast.proto.messages import InferParameter, ModelInferRequest, ModelInferResponse
from layercast.server.layers import check_answer
from layercast.server.service.answering import Answered, tell_times
from layercast.server.work import Answer, Array, Tap

Values = Mapping[Any, Array]
"""What the model gave: its outputs by name, layers by tap."""

_LONGEST_VARINT: Final = 10


class Result(NamedTuple):
    """One tensor of an answer: its name, where its values are among those that the model gave, and what they are."""

    name: str
    source: str | Tap
    datatype: str
    shape: tuple[int, ...]


class Template:
    """The answer to plain requests of so many rows: `results` of these sizes, all raw.

    `limit` is the bytes of a message.
    """

    def __init__(self, manifest: Manifest, rows: int, limit: int, results: Sequence[Result]) -> None:
        self._limit = limit
        self._results = results
        named = ModelInferResponse(model_name=manifest.name, model_version=str(manifest.version))
        self._head = named.SerializeToString()
        self._rows = rows
        described = [
            ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=shape)
            for name, _, datatype, shape in results
        ]
        before = ModelInferResponse(outputs=described).SerializeToString()
        self._parts: list[tuple[str | Tap, np.dtype[np.generic], tuple[int, ...], bytes]] = []
        for _, source, datatype, shape in results:
            dtype = DATATYPES[datatype]
            size = math.prod(shape) * dtype.itemsize
            self._parts.append((source, dtype, shape, before + mark(ModelInferResponse, "raw_output_contents", size)))
            before = b""
        self._batch = (-1, -1)
        self._batch_times = b""

    def answer(self, id_field: bytes, given: Values, queue_ns: int, compute_ns: int, batch_rows: int) -> bytes:
        """Return the serialised answer. `id_field` is the request's id as it stands in a message, b"" without one."""
        parts = [self._head, id_field, _time("queue_ns", queue_ns), self._times(compute_ns, batch_rows)]
        for source, dtype, shape, before in self._parts:
            values = given[source]
            if values.shape != shape or values.dtype != dtype:
                return self._odd(id_field, given, Answered([], queue_ns, compute_ns, batch_rows))
            parts.append(before)
            parts.append(values.tobytes())
        return b"".join(parts)

    def answers(
        self,
        id_fields: Sequence[bytes],
        given: Values,
        queue_ns: int,
        compute_ns: int,
        batch_rows: int,
    ) -> list[bytes]:
        """Return the answers to several requests, whose rows lie one after the other in `given`."""
        many, rows = len(id_fields), self._rows
        usual = all(
            given[source].shape == (rows * many, *shape[1:]) and given[source].dtype == dtype
            for source, dtype, shape, _ in self._parts
        )
        if not usual or len(self._parts) != 1:
            return [
                self.answer(
                    own,
                    {source: values[at * rows : (at + 1) * rows] for source, values in given.items()},
                    queue_ns,
                    compute_ns,
                    batch_rows,
                )
                for at, own in enumerate(id_fields)
            ]
        ((source, _, _, before),) = self._parts
        values, head = given[source].tobytes(), self._head
        size = len(values) // many
        middle = _time("queue_ns", queue_ns) + self._times(compute_ns, batch_rows) + before
        return [b"".join((head, own, middle, values[at * size : (at + 1) * size])) for at, own in enumerate(id_fields)]

    def _times(self, compute_ns: int, batch_rows: int) -> bytes:
        if self._batch != (compute_ns, batch_rows):
            self._batch = compute_ns, batch_rows
            self._batch_times = _time("compute_ns", compute_ns) + _time("batch_rows", batch_rows)
        return self._batch_times

    def _odd(self, id_field: bytes, given: Values, answered: Answered) -> bytes:
        """Return the answer of a model that gives what its manifest does not say, as far as there is one."""
        response = ModelInferResponse.FromString(self._head + id_field)
        tensors = [(name, datatype, given[source]) for name, source, datatype, _ in self._results]
        fill_outputs(response, tensors, typed=False)
        tell_times(response, answered)
        content = response.SerializeToString()
        check_answer(len(content), self._limit, "send fewer rows")
        return content


def values_of(answer: Answer) -> Values:
    """Return all that the model gave."""
    return {**answer.outputs, **answer.features} if answer.features else answer.outputs


def id_field(request: ModelInferRequest) -> bytes:
    """Return the request's id as it stands in a message."""
    return ModelInferResponse(id=request.id).SerializeToString() if request.id else b""


def _entries(name: str) -> Sequence[bytes]:
    """Return what stands before the value of a parameter that is a number, by how many bytes that takes."""
    entry = ModelInferResponse(parameters={name: InferParameter(int64_param=0)}).SerializeToString()
    # The last byte is the number; the message that it is in ends with it, and so does the entry.
    parameter = InferParameter(int64_param=0).SerializeToString()
    found = [b""]
    for size in range(1, _LONGEST_VARINT + 1):
        value = parameter[:-1] + bytes(size)
        inner = entry[2 : -len(parameter) - 1] + varint(len(value)) + value
        found.append((mark(ModelInferResponse, "parameters", len(inner)) + inner)[:-size])
    return found


_TIMES: Final = {name: _entries(name) for name in ("queue_ns", "compute_ns", "batch_rows")}


def _time(name: str, number: int) -> bytes:
    value = varint(number)
    return _TIMES[name][len(value)] + value
