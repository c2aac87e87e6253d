"""Triton's classification extension: an output as its k best classes, `score:index:label`."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from layercast.models.manifest import Manifest, TensorSpec
from layercast.proto.codec import MAX_BYTES_ELEMENTS, Tensor
from layercast.proto.messages import ModelInferRequest
from layercast.server.errors import InvalidArgument, ResourceExhausted
from layercast.server.work import Array

Classes = Mapping[str, tuple[int, Sequence[str]]]
"""By output name: how many classes are wanted, and the labels of all of them (none when the model has none)."""

KEY = "classification"
# The longest score and index: "-1.2345678901234567e+308:" and "2147483647:", and the length before each element.
_SCORE_BYTES = 48


def resolve_classes(
    manifest: Manifest, outputs: Iterable[ModelInferRequest.InferRequestedOutputTensor], rows: int, limit: int
) -> Classes:
    """Return what `outputs` want classified. Raises InvalidArgument for a k that the output hasn't got.

    Raises ResourceExhausted, before anything runs, when the answer would be over `limit` bytes.
    """
    found: dict[str, tuple[int, Sequence[str]]] = {}
    specs = {spec.name: spec for spec in manifest.outputs}
    for position, output in enumerate(outputs):
        if KEY not in output.parameters:
            continue
        field = f"outputs[{position}].parameters[{KEY}]"
        if output.name not in specs:
            raise InvalidArgument(
                f"classification is for outputs of the model: {', '.join(specs)}; a layer has no classes", field=field
            )
        count = output.parameters[KEY].int64_param
        classes = _class_count(specs[output.name], field)
        if not 1 <= count <= classes:
            raise InvalidArgument(
                f"output {output.name!r} has {classes} classes: want 1 to {classes} of them, got {count}", field=field
            )
        labels = manifest.labels if len(manifest.labels) == classes else ()
        found[output.name] = (count, labels)
        size = rows * count * (_SCORE_BYTES + max((len(label.encode()) for label in labels), default=0))
        if size > limit or rows * count > MAX_BYTES_ELEMENTS:
            raise ResourceExhausted(
                f"{count} classes of {rows} rows take up to {size:,} bytes, an answer holds {limit:,} and "
                f"{MAX_BYTES_ELEMENTS:,} classes; send fewer rows or ask for fewer classes"
            )
    return found


def _class_count(spec: TensorSpec, field: str) -> int:
    if -1 in spec.shape[1:] or spec.datatype in ("BYTES", "BOOL"):
        raise InvalidArgument(
            f"output {spec.name!r} is {spec.datatype} of shape {list(spec.shape)}; "
            "classification takes numbers and a fixed number of classes",
            field=field,
        )
    return math.prod(spec.shape[1:])


def classified(tensors: Sequence[Tensor], classes: Classes) -> Sequence[Tensor]:
    """Return `tensors`, those in `classes` turned into BYTES [rows, k]."""
    if not classes:
        return tensors
    return [
        (name, "BYTES", best(values, *classes[name])) if name in classes else (name, datatype, values)
        for name, datatype, values in tensors
    ]


def best(values: Array, count: int, labels: Sequence[str] = ()) -> Array:
    """Return the `count` highest scores of each row as text `score:index[:label]`, the best first, [N, count].

    What follows dimension 0 is read as one list of classes. Of equal scores the lower index comes first; NaN is last.
    Scores have as many digits as it takes to give the same float again.
    """
    scores = values.reshape(len(values), math.prod(values.shape[1:]))
    # Reversed, so that the stable ascending sort leaves the lower of two equal indices in front once it is turned.
    order = scores.shape[1] - 1 - np.argsort(scores[:, ::-1], axis=1, kind="stable")[:, ::-1]
    if scores.dtype.kind == "f":
        # numpy sorts NaN to the end, which is the front now.
        missing = np.take_along_axis(np.isnan(scores), order, axis=1)
        order = np.take_along_axis(order, np.argsort(missing, axis=1, kind="stable"), axis=1)
    order = order[:, :count]
    result = np.empty(order.shape, object)
    for row, indices in enumerate(order):
        for place, index in enumerate(indices):
            label = f":{labels[index]}" if labels else ""
            result[row, place] = f"{scores[row, index]!s}:{index}{label}".encode()
    return result
