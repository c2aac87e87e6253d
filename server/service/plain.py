"""The request that most are: raw inputs in the model's order; outputs, and a few layers, each of a size known before.

One look tells whether a request is of this kind and right in every way. Any doubt leaves it to the general path, which
says what is wrong; so nothing is refused here, and nothing passes here that the general path would refuse or warn of.
"""

import math
from collections.abc import Iterator
from typing import Final

from layercast.models.manifest import Manifest, TensorSpec
from layercast.models.reducers import reduced_shape
from layercast.proto.codec import DATATYPES, MAX_RANK
from layercast.proto.messages import ModelInferRequest
from layercast.server.errors import ServingError
from layercast.server.layers import ENVELOPE, answer_bytes, reduced_datatype, sizes
from layercast.server.service.form import Form, Shape, View, check_of
from layercast.server.service.requests import Wanted, length_in, resolve_outputs
from layercast.server.service.template import Result, Template
from layercast.server.settings import ModelSettings

# The others take more than a view of their bytes: a conversion, or a look at each element.
_VIEWED: Final = frozenset(DATATYPES) - {"BOOL", "BYTES"}
_MOST_FORMS: Final = 1024
"""Of one model; callers choose rows, lengths and layers, and what they chose once may never come again."""
_MOST_NAMES: Final = 16
"""Of outputs and layers in one request: what more asks for takes long to compute, and memory to remember."""
_MOST_TEXT: Final = 1024
"""Characters of these together."""

Names = tuple[str, ...]


class Plain:
    """What plain requests to one model look like, worked out once for each of the sizes that come.

    `limit` is the bytes of a message, `largest` those of an answer's values that are put into one without a thread.
    `settings` say which layers may be asked for.
    """

    def __init__(self, manifest: Manifest, limit: int, largest: int, settings: ModelSettings) -> None:
        self._manifest, self._limit, self._settings = manifest, limit, settings
        self._most_bytes = min(limit - ENVELOPE, largest)
        self._inputs = [(spec, check_of(spec)) for spec in manifest.inputs if _viewed(spec)]
        self._possible = len(self._inputs) == len(manifest.inputs) and all(
            _viewed(spec) and not spec.dynamic_dimensions() for spec in manifest.outputs
        )
        self._forms: dict[tuple[tuple[Shape, ...], Names], Form] = {}
        self._wanted: dict[Names, Wanted | None] = {}
        self._templates: dict[tuple[Result, ...], Template] = {}

    def form(self, request: ModelInferRequest) -> Form | None:
        """Return what the request has in common with others of its sizes; None for any other kind of request.

        What is left to look at is the values: see `Form.inputs`.
        """
        if not self._possible or request.parameters:
            return None
        names = _names(request)
        tensors, raws = request.inputs, request.raw_input_contents
        if names is None or len(tensors) != len(self._inputs) or len(raws) != len(self._inputs):
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
        return self._form(tuple(shapes), tuple(map(len, raws)), names)

    def _form(self, shapes: tuple[Shape, ...], sizes: tuple[int, ...], names: Names) -> Form | None:
        form = self._forms.get((shapes, names))
        if form:
            return form if form.sizes == sizes else None
        if not self._right(shapes) or sizes != tuple(self._sizes(shapes)):
            return None
        wanted = self._resolved(names)
        results = self._results(wanted, shapes) if wanted else ()
        if not wanted or not results:
            return None
        if len(self._forms) >= _MOST_FORMS:
            self._forms.clear()
            self._templates.clear()
        form = self._forms[shapes, names] = self._made(shapes, sizes, wanted, results)
        return form

    def _resolved(self, names: Names) -> Wanted | None:
        """Return what the names of outputs and layers mean; None for what the general path refuses or takes."""
        if names not in self._wanted:
            if len(self._wanted) >= _MOST_FORMS:
                self._wanted.clear()
            try:
                wanted = resolve_outputs(self._manifest, names, self._settings)
            except ServingError:
                wanted = None
            self._wanted[names] = wanted if wanted and len(wanted.order) <= _MOST_NAMES else None
        return self._wanted[names]

    def _results(self, wanted: Wanted, shapes: tuple[Shape, ...]) -> tuple[Result, ...]:
        """Return the tensors of the answer to inputs of these shapes, in order; none if they are not to be had so."""
        manifest, rows = self._manifest, shapes[0][0]
        length = length_in(manifest, {spec.name: shape for (spec, _), shape in zip(self._inputs, shapes, strict=True)})
        try:
            layers = answer_bytes(manifest, wanted.taps, rows, length)
        except ServingError:  # a reducer that does not fit this length
            return ()
        outputs = answer_bytes(manifest, (), rows, length, wanted.outputs)
        if layers + outputs > self._most_bytes or layers > self._settings.max_feature_bytes:
            return ()
        found = {
            spec.name: Result(spec.name, spec.name, spec.datatype, (rows, *spec.shape[1:])) for spec in manifest.outputs
        }
        for name, tap in wanted.layers_by_name.items():
            layer = manifest.layers_by_path[tap.layer]
            datatype = reduced_datatype(layer, tap)
            if datatype not in _VIEWED:
                return ()
            found[name] = Result(name, tap, datatype, reduced_shape(sizes(layer.shape, rows, length), tap.reducer))
        return tuple(found[name] for name in wanted.order)

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
        return len(dynamic) == len({place for place, _ in dynamic})

    def _sizes(self, shapes: tuple[Shape, ...]) -> Iterator[int]:
        for (spec, _), shape in zip(self._inputs, shapes, strict=True):
            yield math.prod(shape) * DATATYPES[spec.datatype].itemsize

    def _made(
        self, shapes: tuple[Shape, ...], sizes: tuple[int, ...], wanted: Wanted, results: tuple[Result, ...]
    ) -> Form:
        views = [
            View(spec.name, DATATYPES[spec.datatype], shape, check)
            for (spec, check), shape in zip(self._inputs, shapes, strict=True)
        ]
        if results not in self._templates:
            self._templates[results] = Template(self._manifest, shapes[0][0], self._limit, results)
        length = next(
            (shape[1] for (spec, _), shape in zip(self._inputs, shapes, strict=True) if spec.pad is not None), 0
        )
        return Form(views, sizes, length, wanted, self._templates[results])


def _names(request: ModelInferRequest) -> Names | None:
    """Return the names of the outputs and layers that are asked for; None where there is more to be seen to."""
    if not request.outputs:
        return ()
    names = tuple(output.name for output in request.outputs)
    if len(names) > _MOST_NAMES or sum(map(len, names)) > _MOST_TEXT or any(o.parameters for o in request.outputs):
        return None
    return names


def _viewed(spec: TensorSpec) -> bool:
    return spec.datatype in _VIEWED and len(spec.shape) <= MAX_RANK


def _fits(spec: TensorSpec, shape: Shape) -> bool:
    longest = math.inf if spec.max_length is None else spec.max_length
    return len(shape) == len(spec.shape) and all(
        got == want or (want == -1 and got >= 1 and (not place or got <= longest))
        for place, (want, got) in enumerate(zip(spec.shape, shape, strict=True))
    )
