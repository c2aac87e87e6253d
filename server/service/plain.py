"""The request that most are: raw inputs in the model's order, and every output asked for, each of a fixed size.

One look tells whether a request is of this kind and right in every way. Any doubt leaves it to the general path, which
says what is wrong; so nothing is refused here, and nothing passes here that the general path would refuse or warn of.
"""

import math
from collections.abc import Iterator
from typing import Final

from layercast.models.manifest import Manifest, TensorSpec
from layercast.proto.codec import DATATYPES, MAX_RANK
from layercast.proto.messages import ModelInferRequest
from layercast.server.layers import ENVELOPE, answer_bytes
from layercast.server.service.form import Form, Shape, View, check_of
from layercast.server.service.template import Template

# The others take more than a view of their bytes: a conversion, or a look at each element.
_VIEWED: Final = frozenset(DATATYPES) - {"BOOL", "BYTES"}
_MOST_FORMS: Final = 1024
"""Of one model; callers choose rows and lengths, and what they chose once may never come again."""


class Plain:
    """What plain requests to one model look like, worked out once for each of the sizes that come.

    `limit` is the bytes of a message, `largest` those of an answer's values that are put into one without a thread.
    """

    def __init__(self, manifest: Manifest, limit: int, largest: int) -> None:
        self._manifest, self._limit = manifest, limit
        self._inputs = [(spec, check_of(spec)) for spec in manifest.inputs if _viewed(spec)]
        self._possible = len(self._inputs) == len(manifest.inputs) and all(
            _viewed(spec) and not spec.dynamic_dimensions() for spec in manifest.outputs
        )
        self._most_rows = _most_rows(manifest, limit, largest) if self._possible else 0
        self._forms: dict[tuple[Shape, ...], Form] = {}
        self._templates: dict[int, Template] = {}

    def form(self, request: ModelInferRequest) -> Form | None:
        """Return what the request has in common with others of its sizes; None for any other kind of request.

        What is left to look at is the values: see `Form.inputs`.
        """
        if not self._possible or request.parameters or request.outputs:
            return None
        tensors, raws = request.inputs, request.raw_input_contents
        if len(tensors) != len(self._inputs) or len(raws) != len(self._inputs):
            return None
        shapes = []
        for (spec, _), tensor in zip(self._inputs, tensors, strict=True):
            if (
                tensor.name != spec.name
                or tensor.datatype != spec.datatype
                or tensor.parameters
                or tensor.HasField("contents")
            ):
                return None
            shapes.append(tuple(tensor.shape))
        return self._form(tuple(shapes), tuple(map(len, raws)))

    def _form(self, shapes: tuple[Shape, ...], sizes: tuple[int, ...]) -> Form | None:
        form = self._forms.get(shapes)
        if form:
            return form if form.sizes == sizes else None
        if not self._right(shapes) or sizes != tuple(self._sizes(shapes)):
            return None
        if len(self._forms) >= _MOST_FORMS:
            self._forms.clear()
            self._templates.clear()
        form = self._forms[shapes] = self._made(shapes, sizes)
        return form

    def _right(self, shapes: tuple[Shape, ...]) -> bool:
        """Tell whether the model takes inputs of these shapes together, in one answer."""
        specs = [spec for spec, _ in self._inputs]
        if not all(_fits(spec, shape) for spec, shape in zip(specs, shapes, strict=True)):
            return False
        # An export ties dynamic sizes of one place to each other.
        dynamic = {
            (place, shape[place])
            for spec, shape in zip(specs, shapes, strict=True)
            for place in (0, *spec.dynamic_dimensions())
        }
        return len(dynamic) == len({place for place, _ in dynamic}) and shapes[0][0] <= self._most_rows

    def _sizes(self, shapes: tuple[Shape, ...]) -> Iterator[int]:
        for (spec, _), shape in zip(self._inputs, shapes, strict=True):
            yield math.prod(shape) * DATATYPES[spec.datatype].itemsize

    def _made(self, shapes: tuple[Shape, ...], sizes: tuple[int, ...]) -> Form:
        views = [
            View(spec.name, DATATYPES[spec.datatype], shape, check)
            for (spec, check), shape in zip(self._inputs, shapes, strict=True)
        ]
        rows = shapes[0][0]
        if rows not in self._templates:
            self._templates[rows] = Template(self._manifest, rows, self._limit)
        return Form(views, sizes, self._templates[rows])


def _viewed(spec: TensorSpec) -> bool:
    return spec.datatype in _VIEWED and len(spec.shape) <= MAX_RANK


def _fits(spec: TensorSpec, shape: Shape) -> bool:
    longest = math.inf if spec.max_length is None else spec.max_length
    return len(shape) == len(spec.shape) and all(
        got == want or (want == -1 and got >= 1 and (not place or got <= longest))
        for place, (want, got) in enumerate(zip(spec.shape, shape, strict=True))
    )


def _most_rows(manifest: Manifest, limit: int, largest: int) -> int:
    row = answer_bytes(manifest, (), 1, None, [spec.name for spec in manifest.outputs])
    return min(limit - ENVELOPE, largest) // row
