"""The feature service: which layers a model has, and their values for given rows."""

from dataclasses import dataclass

from layercast.models.layer_names import match_layers, nearest
from layercast.proto.codec import named_tensor, quoted
from layercast.proto.messages import (
    ExtractRequest,
    ExtractResponse,
    Layer,
    ListLayersRequest,
    ListLayersResponse,
)
from layercast.server.errors import InvalidArgument
from layercast.server.layers import MAX_PATTERN_LENGTH, resolve
from layercast.server.model import ServedModel
from layercast.server.repository import Repository
from layercast.server.service.answering import Answered, Answering, named_rows, off_loop, timing_of
from layercast.server.service.call import Call
from layercast.server.service.requests import Wanted, resolve_outputs, warnings
from layercast.server.work import Array


@dataclass(frozen=True)
class Extraction:
    """A request for layers, decoded and checked."""

    inputs: dict[str, Array]
    rows: int
    wanted: Wanted
    warning: str


class FeatureService:
    """Answers `layercast.v1.FeatureService`."""

    def __init__(self, repository: Repository, answering: Answering) -> None:
        self._repository = repository
        self._answering = answering

    async def list_layers(self, request: ListLayersRequest, call: Call) -> ListLayersResponse:
        """The model's layers that a glob selects ("" for all), in the order in which they run."""
        model = self._repository.find(request.model_name, request.model_version)
        layers = model.manifest.layers
        if len(request.pattern) > MAX_PATTERN_LENGTH:
            raise InvalidArgument(f"the pattern is longer than {MAX_PATTERN_LENGTH} characters", field="pattern")
        if request.pattern:
            names = set(match_layers(request.pattern, model.manifest.layers_by_path))
            if not names:
                hint = nearest(request.pattern, model.manifest.layers_by_path)
                raise InvalidArgument(
                    f"model {model.manifest.name!r} has no layer {quoted(request.pattern)}{hint}", field="pattern"
                )
            layers = tuple(layer for layer in layers if layer.path in names)
        return ListLayersResponse(
            model_name=model.manifest.name,
            model_version=str(model.manifest.version),
            layers=[Layer(**layer.model_dump(exclude={"clone"})) for layer in layers],
        )

    async def extract(self, request: ExtractRequest, call: Call) -> ExtractResponse:
        """Values of the layers asked for, and of the outputs if any are named."""
        model = self._answering.find(request.model_name, request.model_version, "features")
        with self._answering.counted(model, "features") as timer:
            asked = await off_loop(call.size, decode, model, request)
            timer.decoded()
            answered = await self._answering.run(model, asked.inputs, asked.rows, asked.wanted, call)
            timer.ran(answered)
            size = sum(values.nbytes for _, _, values in answered.tensors)
            return await off_loop(size, _response, request, model, asked, answered)


def decode(model: ServedModel, request: ExtractRequest) -> Extraction:
    """Return what is asked; InvalidArgument for what the model doesn't have, take or give."""
    manifest, settings = model.manifest, model.loaded.settings
    if not request.layers:
        raise InvalidArgument("no layers are asked for; '*' asks for all, ListLayers names them", field="layers")
    inputs, rows = named_rows(manifest, request.inputs)
    layers = resolve(manifest, request.layers, "layers[{}]", settings)
    outputs = resolve_outputs(manifest, request.outputs, settings).outputs if request.outputs else ()
    wanted = Wanted(outputs, tuple(layers), (*(asked.name for asked in layers), *outputs))
    return Extraction(inputs, rows, wanted, warnings(manifest, inputs))


def _response(request: ExtractRequest, model: ServedModel, asked: Extraction, answered: Answered) -> ExtractResponse:
    tensors = [named_tensor(*tensor) for tensor in answered.tensors]
    layers = len(asked.wanted.layers)
    return ExtractResponse(
        model_name=model.manifest.name,
        model_version=str(model.manifest.version),
        id=request.id,
        layers=tensors[:layers],
        outputs=tensors[layers:],
        timing=timing_of(answered),
        warning=asked.warning,
    )
