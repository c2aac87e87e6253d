"""Answers to plain requests: serialised once for a number of rows, but for the values, the id and the times."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from layercast.models.manifest import Manifest
from layercast.proto.codec import DATATYPES, fill_outputs
from layercast.proto.fields import mark, varint
from layercast.proto.messages import InferParameter, ModelInferRequest, ModelInferResponse
from layercast.server.layers import check_answer
from layercast.server.service.answering import Answered, tell_times
from layercast.server.work import Array

_LONGEST_VARINT: Final = 10


class Template:
    """The answer to plain requests of so many rows, whose outputs are all raw and of fixed sizes.

    `limit` is the bytes of a message.
    """

    def __init__(self, manifest: Manifest, rows: int, limit: int) -> None:
        self._limit = limit
        self._outputs = [(spec.name, spec.datatype) for spec in manifest.outputs]
        named = ModelInferResponse(model_name=manifest.name, model_version=str(manifest.version))
        self._head = named.SerializeToString()
        self._rows = rows
        shapes = [(rows, *spec.shape[1:]) for spec in manifest.outputs]
        described = [
            ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=shape)
            for (name, datatype), shape in zip(self._outputs, shapes, strict=True)
        ]
        before = ModelInferResponse(outputs=described).SerializeToString()
        self._parts: list[tuple[str, np.dtype[np.generic], tuple[int, ...], bytes]] = []
        for (name, datatype), shape in zip(self._outputs, shapes, strict=True):
            dtype = DATATYPES[datatype]
            size = int(np.prod(shape)) * dtype.itemsize
            self._parts.append((name, dtype, shape, before + mark(ModelInferResponse, "raw_output_contents", size)))
            before = b""
        self._batch = (-1, -1)
        self._batch_times = b""

    def answer(
        self, id_field: bytes, outputs: Mapping[str, Array], queue_ns: int, compute_ns: int, batch_rows: int
    ) -> bytes:
        """Return the serialised answer. `id_field` is the request's id as it stands in a message, b"" without one."""
        parts = [self._head, id_field, _time("queue_ns", queue_ns), self._times(compute_ns, batch_rows)]
        for name, dtype, shape, before in self._parts:
            values = outputs[name]
            if values.shape != shape or values.dtype != dtype:
                return self._odd(id_field, outputs, Answered([], queue_ns, compute_ns, batch_rows))
            parts.append(before)
            parts.append(values.tobytes())
        return b"".join(parts)

    def answers(
        self,
        id_fields: Sequence[bytes],
        outputs: Mapping[str, Array],
        queue_ns: int,
        compute_ns: int,
        batch_rows: int,
    ) -> list[bytes]:
        """Return the answers to several requests, whose rows lie one after the other in `outputs`."""
        many, rows = len(id_fields), self._rows
        usual = all(
            outputs[name].shape == (rows * many, *shape[1:]) and outputs[name].dtype == dtype
            for name, dtype, shape, _ in self._parts
        )
        if not usual or len(self._parts) != 1:
            return [
                self.answer(
                    own,
                    {name: values[at * rows : (at + 1) * rows] for name, values in outputs.items()},
                    queue_ns,
                    compute_ns,
                    batch_rows,
                )
                for at, own in enumerate(id_fields)
            ]
        ((name, _, _, before),) = self._parts
        values, head = outputs[name].tobytes(), self._head
        size = len(values) // many
        middle = _time("queue_ns", queue_ns) + self._times(compute_ns, batch_rows) + before
        return [b"".join((head, own, middle, values[at * size : (at + 1) * size])) for at, own in enumerate(id_fields)]

    def _times(self, compute_ns: int, batch_rows: int) -> bytes:
        if self._batch != (compute_ns, batch_rows):
            self._batch = compute_ns, batch_rows
            self._batch_times = _time("compute_ns", compute_ns) + _time("batch_rows", batch_rows)
        return self._batch_times

    def _odd(self, id_field: bytes, outputs: Mapping[str, Array], answered: Answered) -> bytes:
        """Return the answer of a model that gives what its manifest does not say, as far as there is one."""
        response = ModelInferResponse.FromString(self._head + id_field)
        fill_outputs(response, [(name, datatype, outputs[name]) for name, datatype in self._outputs], typed=False)
        tell_times(response, answered)
        content = response.SerializeToString()
        check_answer(len(content), self._limit, "send fewer rows")
        return content


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
