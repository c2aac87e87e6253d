"""Explanations over the wire: `FeatureService.Explain`."""

import math
from typing import Any, Final

from layercast.models.artefact import to_numpy
from layercast.models.explain import Explanation
from layercast.models.explain.subject import Progress
from layercast.models.layer_names import match_layers
from layercast.models.manifest import Manifest
from layercast.proto.codec import named_tensor
from layercast.proto.messages import ExplainRequest, ExplainResponse, Timing
from layercast.server import memory, processors
from layercast.server.engines.eager import EagerEngine
from layercast.server.errors import InvalidArgument, ResourceExhausted, Unavailable
from layercast.server.explaining import Explained, ExplainLane, Job
from layercast.server.layers import MAX_PATTERN_LENGTH, NOT_LISTED, OFF, POOLED_ONLY
from layercast.server.model import ServedModel
from layercast.server.service.answering import Answered, Answering, named_rows, off_loop
from layercast.server.service.call import Call
from layercast.server.service.requests import warnings
from layercast.server.work import Array

_CHUNK_ROWS: Final = 32
_ENVELOPE: Final = 64 << 10
_LARGEST_FLOAT: Final = 8
_ROLLOUT: Final = "attention-rollout"
_OF_LAYERS: Final = ("gradcam", _ROLLOUT)
"""Methods whose answer is a map of a layer inside."""


class ExplainService:
    """Answers `Explain` of `layercast.v1.FeatureService`."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._lane = ExplainLane()

    async def explain(self, request: ExplainRequest, call: Call) -> ExplainResponse:
        """How much each value of the inputs counts for what the model answers, row by row."""
        model = self._answering.find(request.model_name, request.model_version, "explain")
        with self._answering.counted(model, "explain") as timer:
            engine = model.loaded.runner.eager
            if model.batcher.draining:
                raise Unavailable(f"model {model.manifest.name!r} is shutting down and takes no new requests")
            if engine is None:
                raise InvalidArgument(
                    f"model {model.manifest.name!r} can't be explained: its code is not trusted here, so that only its "
                    "exported programs run"
                )
            _check_allowed(model, request)
            inputs = await off_loop(call.size, _decode, model.manifest, request)
            rows = len(next(iter(inputs.values())))
            self._check_size(inputs)
            evaluations = _Evaluations()
            job = _job(model, engine, request, inputs, evaluations)
            timer.decoded()
            try:
                explained = await self._lane.run(job, call.deadline)
            finally:
                model.monitor.evaluated(request.method, evaluations.total)
            model.monitor.explained(request.method, evaluations.total / max(rows, 1), explained.compute_ns)
            timer.ran(Answered([], explained.queue_ns, explained.compute_ns, rows))
            return await off_loop(
                call.size, _response, request, model, explained, rows, warnings(model.manifest, inputs)
            )

    def _check_size(self, inputs: dict[str, Array]) -> None:
        """Refuse, before anything is computed, an answer that would not fit into a message."""
        size = max(math.prod(array.shape) for array in inputs.values()) * _LARGEST_FLOAT + _ENVELOPE
        if size > self._answering.max_bytes:
            raise ResourceExhausted(
                f"the attributions may take {size:,} bytes, an answer holds {self._answering.max_bytes:,}; "
                "send fewer rows"
            )


class _Evaluations:
    """Counts the rows that an explanation runs, over all its passes. Filled in the thread that runs it."""

    def __init__(self) -> None:
        self.total = 0
        self._of_pass = 0

    def progress(self, done: int, total: int) -> None:
        self.total += done - self._of_pass
        self._of_pass = done if done < total else 0


def _check_allowed(model: ServedModel, request: ExplainRequest) -> None:
    """Raise InvalidArgument where the model's settings keep back what the explanation would show of its inside."""
    settings, name, layer = model.loaded.settings, model.manifest.name, request.options.layer
    if settings.features == "false":
        raise InvalidArgument(f"model {name!r} can't be explained: {OFF}")
    if request.method not in _OF_LAYERS:
        return
    if settings.features == "pooled":
        raise InvalidArgument(f"method {request.method} gives a map of a layer, and {POOLED_ONLY}", field="method")
    if settings.feature_layers == ("*",):
        return
    if not layer:
        raise InvalidArgument(f"{NOT_LISTED}; name one of those in options.layer", field="options.layer")
    selected = match_layers(layer[:MAX_PATTERN_LENGTH], model.manifest.layers_by_path)
    layers = model.manifest.layers_by_path
    # A rollout shows the maps of a module that has them as a layer of their own, whatever it is asked by.
    maps = [path for at in selected if (path := f"{at}.weights") in layers] if request.method == _ROLLOUT else []
    for spec in (layers[path] for path in (*selected, *maps)):
        if not spec.available:
            raise InvalidArgument(f"layer {spec.path!r} can't be explained: {spec.reason}", field="options.layer")


def _job(
    model: ServedModel,
    engine: EagerEngine,
    request: ExplainRequest,
    inputs: dict[str, Array],
    evaluations: _Evaluations,
) -> Job:
    arguments = _arguments(request) | {"max_evaluations": model.loaded.settings.max_explain_evaluations}
    each = list(request.targets)
    targets = each[0] if len(each) == 1 else each or None

    def job(progress: Progress) -> Explanation:
        def counted(done: int, total: int) -> None:
            evaluations.progress(done, total)
            progress(done, total)

        processors.prepare(model.loaded.threads * len(model.loaded.runners))  # one explanation at a time has all
        return memory.within(
            lambda: engine.explain(inputs, request.method, targets, counted, **arguments),
            lambda: "the explanation takes more memory than there is left; send fewer rows, or smaller ones",
        )

    return job


def _decode(manifest: Manifest, request: ExplainRequest) -> dict[str, Array]:
    inputs, _ = named_rows(manifest, request.inputs)
    return {spec.name: inputs[spec.name] for spec in manifest.inputs}


def _arguments(request: ExplainRequest) -> dict[str, Any]:
    """Return the arguments of `models.explain.explain` that the request sets, and the server's own."""
    options: dict[str, Any] = {field.name: value for field, value in request.options.ListFields()}
    for name in ("window", "stride"):
        if name in options:
            sizes = list(options[name])
            options[name] = sizes[0] if len(sizes) == 1 else sizes
    if len(options.get("layer", "")) > MAX_PATTERN_LENGTH:
        raise InvalidArgument(f"the pattern is longer than {MAX_PATTERN_LENGTH} characters", field="options.layer")
    if options.get("baseline", 0.5).is_integer():
        options["baseline"] = int(options["baseline"])  # a whole number is a token id where the input is of those
    return {
        **options,
        "of": request.input or None,
        "output": request.output or None,
        "chunk_rows": _CHUNK_ROWS,
    }


def _response(
    request: ExplainRequest, model: ServedModel, explained: Explained, rows: int, warning: str
) -> ExplainResponse:
    found = explained.explanation
    values = to_numpy(found.attributions)
    delta = found.delta
    return ExplainResponse(
        model_name=model.manifest.name,
        model_version=str(model.manifest.version),
        id=request.id,
        attributions=named_tensor("attributions", "FP64" if values.itemsize == _LARGEST_FLOAT else "FP32", values),
        targets=found.targets.tolist(),
        delta=[] if delta is None else delta.tolist(),
        timing=Timing(queue_ns=explained.queue_ns, compute_ns=explained.compute_ns, batch_rows=rows),
        warning=warning,
    )
