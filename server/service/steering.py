"""Steering over the wire: what a model answers when values inside it are changed, `FeatureService.Steer`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from layercast.models.edits import Action, Add, Clamp, Edit, Mean, Planned, Request, Scale, SteeringError, Zero
from layercast.models.manifest import Manifest
from layercast.proto.codec import named_tensor
from layercast.proto.messages import Edit as EditMessage
from layercast.proto.messages import SteerRequest, SteerResponse
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.tensors import token_mask
from layercast.server.errors import InvalidArgument, PermissionDenied
from layercast.server.layers import MAX_PATTERN_LENGTH, OFF, POOLED_ONLY, PREFIX, resolve
from layercast.server.model import ServedModel
from layercast.server.service.answering import Answered, Answering, named_rows, off_loop, timing_of
from layercast.server.service.call import Call
from layercast.server.service.requests import Wanted, resolve_outputs, token_length, warnings
from layercast.server.work import Array

MAX_EDITS: Final = 64
"""Edits of one request."""


@dataclass(frozen=True)
class _Asked:
    """A request, decoded and checked."""

    inputs: dict[str, Array]
    rows: int
    wanted: Wanted
    edits: tuple[Planned, ...]
    warning: str


class SteeringService:
    """Answers `Steer` of `layercast.v1.FeatureService`.

    No scope of its own: a token that may read every layer and every output learns nothing new by changing its own rows,
    and the operator says yes to each model by the setting `steering`.
    """

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    async def steer(self, request: SteerRequest, call: Call) -> SteerResponse:
        """Outputs, and layers if any are named, of a forward in which layers were changed for these rows."""
        model = self._answering.find(request.model_name, request.model_version, "features")
        with self._answering.counted(model, "features") as timer:
            engine = _engine(model)
            asked = await off_loop(call.size, _decode, model, engine, request)
            timer.decoded()
            answered = await self._answering.run(model, asked.inputs, asked.rows, asked.wanted, call, edits=asked.edits)
            model.monitor.steered()
            timer.ran(answered)
            size = sum(values.nbytes for _, _, values in answered.tensors)
            return await off_loop(size, _response, request, model, asked, answered)


def _engine(model: ServedModel) -> EagerEngine:
    """Return what edits run on; PermissionDenied unless the operator allows them."""
    settings, name = model.loaded.settings, model.manifest.name
    if not settings.steering:
        raise PermissionDenied(
            f"steering is off for model {name!r}; the operator turns it on with steering = true in the "
            "model's layercast.toml, or for every model with --steering"
        )
    # Who clamps a value and looks at what that changes in the outputs has soon found what it was.
    if settings.features != "true":
        shown = OFF if settings.features == "false" else POOLED_ONLY
        raise PermissionDenied(f"model {name!r} can't be steered, since edits tell of single values: {shown}")
    engine = model.loaded.runner.eager
    if engine is None:
        raise InvalidArgument(
            f"model {model.manifest.name!r} can't be steered: its code is not trusted here, so that only its exported "
            "programs run"
        )
    return engine


def _decode(model: ServedModel, engine: EagerEngine, request: SteerRequest) -> _Asked:
    manifest, settings = model.manifest, model.loaded.settings
    inputs, rows = named_rows(manifest, request.inputs)
    for position, name in enumerate(request.outputs):
        if name.startswith(PREFIX):
            raise InvalidArgument("layers are asked for in `layers`, without a prefix", field=f"outputs[{position}]")
    outputs = resolve_outputs(manifest, request.outputs, settings).outputs
    layers = resolve(manifest, request.layers, "layers[{}]", settings)
    wanted = Wanted(outputs, tuple(layers), (*outputs, *(asked.name for asked in layers)))
    edits = _planned(model, engine, request.edits, _request(manifest, inputs, rows))
    most = settings.max_batch
    if rows > most and any(isinstance(edit.action, Mean) for edit in edits):
        raise InvalidArgument(
            f"a mean is taken over rows that run together, model {manifest.name!r} runs at most {most}, "
            f"got {rows}; send fewer",
            field="edits",
        )
    return _Asked(inputs, rows, wanted, edits, warnings(manifest, inputs))


def _request(manifest: Manifest, inputs: dict[str, Array], rows: int) -> Request:
    mask = token_mask(manifest.inputs, inputs)
    tokens = None if mask is None else mask.sum(axis=1).tolist()
    return Request(rows, token_length(manifest, inputs), tokens)


def _planned(
    model: ServedModel, engine: EagerEngine, messages: Sequence[EditMessage], request: Request
) -> tuple[Planned, ...]:
    if not messages:
        raise InvalidArgument("no edits are given; Extract answers without any", field="edits")
    if len(messages) > MAX_EDITS:
        raise InvalidArgument(f"{len(messages)} edits are given, at most {MAX_EDITS} may be", field="edits")
    planned = []
    for position, message in enumerate(messages):
        try:
            planned.append(engine.plan(model.manifest.layers_by_path, _edit(message), request))
        except SteeringError as error:
            where = f"edits[{position}]"
            raise InvalidArgument(str(error), field=f"{where}.{error.field}" if error.field else where) from error
    return tuple(planned)


def _edit(message: EditMessage) -> Edit:
    if not message.layer or len(message.layer) > MAX_PATTERN_LENGTH:
        raise SteeringError(f"want the name of a layer, of at most {MAX_PATTERN_LENGTH} characters", "layer")
    selected = {name: tuple(getattr(message, name)) for name in ("units", "channels", "heads", "positions")}
    return Edit(message.layer, _action(message), **selected)


def _action(message: EditMessage) -> Action:
    match message.WhichOneof("action"):
        case "zero":
            return Zero()
        case "scale":
            return Scale(message.scale)
        case "add":
            return Add(tuple(message.add.values))
        case "clamp":
            bounds = message.clamp
            return Clamp(
                bounds.low if bounds.HasField("low") else None, bounds.high if bounds.HasField("high") else None
            )
        case "mean":
            return Mean()
    raise SteeringError("no action is given; want one of zero, scale, add, clamp, mean")


def _response(request: SteerRequest, model: ServedModel, asked: _Asked, answered: Answered) -> SteerResponse:
    tensors = [named_tensor(*tensor) for tensor in answered.tensors]
    outputs = len(asked.wanted.outputs)
    return SteerResponse(
        model_name=model.manifest.name,
        model_version=str(model.manifest.version),
        id=request.id,
        outputs=tensors[:outputs],
        layers=tensors[outputs:],
        timing=timing_of(answered),
        warning=asked.warning,
    )
