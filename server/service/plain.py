"""The request that most are: raw inputs of fixed sizes in the model's order, and every output asked for.

One look tells whether a request is of this kind and right in every way. Any doubt leaves it to the general path, which
says what is wrong; so nothing is refused here, and nothing passes here that the general path would refuse or warn of.
"""

from typing import NamedTuple

import numpy as np

from layercast.models.manifest import Manifest, TensorSpec
from layercast.proto.codec import DATATYPES, tensor_bytes
from layercast.proto.messages import ModelInferRequest, ModelInferResponse
from layercast.server.layers import ENVELOPE, answer_bytes
from layercast.server.service.answering import Answered, tell_times
from layercast.server.service.requests import join
from layercast.server.work import Answer, Array

# The others take more than a view of their bytes: a conversion, or a look at each element.
_VIEWED = frozenset(DATATYPES) - {"BOOL", "BYTES"}


class _Input(NamedTuple):
    name: str
    datatype: str
    dtype: np.dtype[np.generic]
    row_shape: tuple[int, ...]
    row_bytes: int
    range: tuple[float, float] | None


class Plain:
    """What a plain request to one model looks like, worked out once.

    `limit` is the bytes of a message, `largest` those of an answer's values that are put into one without a thread.
    """

    def __init__(self, manifest: Manifest, limit: int, largest: int) -> None:
        self._name, self._version = manifest.name, str(manifest.version)
        self._outputs = [(spec.name, spec.datatype) for spec in manifest.outputs]
        specs = (*manifest.inputs, *manifest.outputs)
        self._possible = all(spec.datatype in _VIEWED and not spec.dynamic_dimensions() for spec in specs)
        self._inputs = [_input(spec) for spec in manifest.inputs] if self._possible else []
        self._most_rows = _most_rows(manifest, limit, largest) if self._possible else 0

    def inputs(self, request: ModelInferRequest) -> tuple[dict[str, Array], int] | None:
        """Return the inputs by name, as views, and how many rows they have; None for any other kind of request."""
        if not self._possible or request.parameters or request.outputs:
            return None
        tensors, raws = request.inputs, request.raw_input_contents
        if len(tensors) != len(self._inputs) or len(raws) != len(self._inputs):
            return None
        found: dict[str, Array] = {}
        rows = 0
        for spec, tensor, raw in zip(self._inputs, tensors, raws, strict=True):
            array = _view(spec, tensor, raw)
            if array is None or (rows and len(array) != rows):
                return None
            rows = len(array)
            found[spec.name] = array
        return (found, rows) if rows <= self._most_rows else None

    def response(self, request: ModelInferRequest, answers: list[Answer], answered: Answered) -> bytes:
        """Return the serialised answer."""
        response = ModelInferResponse()
        self.fill(response, request, answers, answered)
        return response.SerializeToString()

    def fill(
        self, response: ModelInferResponse, request: ModelInferRequest, answers: list[Answer], answered: Answered
    ) -> None:
        """Put the outputs of all parts, the names and the times into the empty `response`."""
        response.model_name, response.model_version, response.id = self._name, self._version, request.id
        for name, datatype in self._outputs:
            values = join([answer.outputs[name] for answer in answers])
            response.outputs.add(name=name, datatype=datatype, shape=values.shape)
            response.raw_output_contents.append(tensor_bytes(values, datatype))
        tell_times(response, answered)


def _most_rows(manifest: Manifest, limit: int, largest: int) -> int:
    row = answer_bytes(manifest, (), 1, None, [spec.name for spec in manifest.outputs])
    return min(limit - ENVELOPE, largest) // row


def _input(spec: TensorSpec) -> _Input:
    dtype, row_shape = DATATYPES[spec.datatype], tuple(spec.shape[1:])
    row_bytes = dtype.itemsize * int(np.prod(row_shape))
    return _Input(spec.name, spec.datatype, dtype, row_shape, row_bytes, spec.range)


def _view(spec: _Input, tensor: ModelInferRequest.InferInputTensor, raw: bytes) -> Array | None:
    """Return the rows of one input, or None unless they are what the model takes, within its range."""
    shape = tuple(tensor.shape)
    if (
        tensor.name != spec.name
        or tensor.datatype != spec.datatype
        or shape[1:] != spec.row_shape
        or not shape
        or shape[0] < 1
        or len(raw) != shape[0] * spec.row_bytes
        or tensor.parameters
        or tensor.HasField("contents")
    ):
        return None
    array = np.frombuffer(raw, spec.dtype).reshape(shape)
    # Written so that NaN, which compares to nothing, counts as outside.
    if spec.range and not (array.min() >= spec.range[0] and array.max() <= spec.range[1]):
        return None
    return array
