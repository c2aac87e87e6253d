"""The Open Inference Protocol (KServe v2) with Triton's extensions, free of any transport.

Each method answers the RPC of its name: a message and a Call in, a message out, or a ServingError.
"""

import json
from collections.abc import Iterable

from layercast.models.manifest import TensorSpec
from layercast.proto.codec import decode_inputs, fill_outputs, is_typed, quoted
from layercast.proto.messages import (
    InferStatistics,
    ModelConfig,
    ModelConfigRequest,
    ModelConfigResponse,
    ModelInferRequest,
    ModelInferResponse,
    ModelInput,
    ModelInstanceGroup,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelOutput,
    ModelReadyRequest,
    ModelReadyResponse,
    ModelStatistics,
    ModelStatisticsRequest,
    ModelStatisticsResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
    StatisticDuration,
)
from layercast.server.environment import installed_version
from layercast.server.errors import InvalidArgument, NotFound, Unavailable, Unimplemented
from layercast.server.model import ServedModel
from layercast.server.monitor import Duration, Kind, Statistics
from layercast.server.repository import Repository
from layercast.server.service.answering import Answered, Answering
from layercast.server.service.call import Call
from layercast.server.service.control import ModelControl
from layercast.server.service.requests import check_inputs, resolve_outputs, warnings

EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
    "layercast_features",
)
_IGNORED = frozenset({"triton_enable_empty_final_response"})
_UNSUPPORTED = {
    "sequence_id": "sequences", "sequence_start": "sequences", "sequence_end": "sequences",
    "classification": "classification", "shared_memory_region": "shared memory",
}  # fmt: skip


class InferenceService(ModelControl):
    """Answers `inference.GRPCInferenceService`."""

    def __init__(self, repository: Repository, answering: Answering, *, model_control: bool = False) -> None:
        super().__init__(repository, allowed=model_control)
        self._answering = answering

    async def server_live(self, request: ServerLiveRequest, call: Call) -> ServerLiveResponse:
        """The process runs."""
        return ServerLiveResponse(live=True)

    async def server_ready(self, request: ServerReadyRequest, call: Call) -> ServerReadyResponse:
        """Every model that is counted on has a version that answers; the health service says the same."""
        return ServerReadyResponse(ready=self._repository.ready)

    async def model_ready(self, request: ModelReadyRequest, call: Call) -> ModelReadyResponse:
        """As Triton: an unknown or unready model is not ready, which is no error; a malformed version is."""
        try:
            self._repository.find(request.name, request.version)
        except (NotFound, Unavailable):
            return ModelReadyResponse(ready=False)
        return ModelReadyResponse(ready=True)

    async def server_metadata(self, request: ServerMetadataRequest, call: Call) -> ServerMetadataResponse:
        """Name, version and the extensions that are answered."""
        return ServerMetadataResponse(
            name="layercast", version=installed_version("layercast") or "", extensions=EXTENSIONS
        )

    async def model_metadata(self, request: ModelMetadataRequest, call: Call) -> ModelMetadataResponse:
        """Inputs and outputs; `properties` holds what a client needs to prepare inputs and name classes."""
        model = self._repository.find(request.name, request.version)
        manifest = model.manifest
        versions = [v.number for v in self._repository.versions() if v.name == manifest.name and v.model]
        return ModelMetadataResponse(
            name=manifest.name,
            versions=[str(number) for number in versions],
            platform=f"layercast_{model.loaded.runner.fast.name}",
            inputs=_tensors(manifest.inputs),
            outputs=_tensors(manifest.outputs),
            properties={
                "description": manifest.description,
                "labels": json.dumps(manifest.labels),
                "preprocessing": json.dumps(manifest.preprocessing),
                "layers": str(len(manifest.layers)),
                "max_batch": str(model.batcher.limits.max_batch),
                "engine": model.loaded.runner.fast.name,
                "device": model.loaded.runner.fast.device,
            },
        )

    async def model_config(self, request: ModelConfigRequest, call: Call) -> ModelConfigResponse:
        """The model's settings in Triton's terms, as perf_analyzer asks for them."""
        model = self._repository.find(request.name, request.version)
        return ModelConfigResponse(config=_config(model))

    async def model_statistics(self, request: ModelStatisticsRequest, call: Call) -> ModelStatisticsResponse:
        """Counts and times of one model, or of all when no name is given."""
        if request.name:
            models = [self._repository.find(request.name, request.version)]
        else:
            models = [version.model for version in self._repository.versions() if version.model]
        return ModelStatisticsResponse(model_stats=[_statistics(model) for model in models])

    async def model_infer(self, request: ModelInferRequest, call: Call) -> ModelInferResponse:
        """Predictions, and any layer asked for as an output `layer:PATH[@reducer]`."""
        asks_layers = any(output.name.startswith("layer:") for output in request.outputs)
        kind: Kind = "features" if asks_layers else "predict"
        model = self._answering.find(request.model_name, request.model_version, kind)
        with self._answering.counted(model, kind) as timer:
            _check_parameters(request)
            inputs = decode_inputs(request)
            datatypes = {tensor.name: tensor.datatype for tensor in request.inputs}
            rows = check_inputs(model.manifest, inputs, datatypes)
            wanted = resolve_outputs(model.manifest, [output.name for output in request.outputs])
            timer.decoded()
            answered = await self._answering.run(model, inputs, rows, wanted, call)
            timer.ran(answered)
            response = _response(request, model, answered)
            if warning := warnings(model.manifest, inputs):
                response.parameters["warning"].string_param = warning
            return response


def _response(request: ModelInferRequest, model: ServedModel, answered: Answered) -> ModelInferResponse:
    response = ModelInferResponse(
        model_name=model.manifest.name, model_version=str(model.manifest.version), id=request.id
    )
    response.parameters["queue_ns"].int64_param = answered.queue_ns
    response.parameters["compute_ns"].int64_param = answered.compute_ns
    response.parameters["batch_rows"].int64_param = answered.batch_rows
    fill_outputs(response, answered.tensors, is_typed(request))
    return response


def _check_parameters(request: ModelInferRequest) -> None:
    """Refuse parameters that ask for what is not done; others are the caller's own and change nothing."""
    for key in request.parameters:
        if key in _UNSUPPORTED:
            raise Unimplemented(f"parameter {key!r}: {_UNSUPPORTED[key]} are not supported", field=f"parameters[{key}]")
        if key.startswith("triton_") and key not in _IGNORED:
            raise InvalidArgument(f"parameter {quoted(key)}: the prefix triton_ is reserved", field="parameters")
    for position, output in enumerate(request.outputs):
        for key in output.parameters:
            if key in _UNSUPPORTED:
                raise Unimplemented(
                    f"output {quoted(output.name)}: {_UNSUPPORTED[key]} is not supported",
                    field=f"outputs[{position}].parameters",
                )


def _tensors(specs: Iterable[TensorSpec]) -> list[ModelMetadataResponse.TensorMetadata]:
    return [ModelMetadataResponse.TensorMetadata(name=s.name, datatype=s.datatype, shape=s.shape) for s in specs]


def _config(model: ServedModel) -> ModelConfig:
    manifest, limits = model.manifest, model.batcher.limits
    config = ModelConfig(
        name=manifest.name,
        platform=f"layercast_{model.loaded.runner.fast.name}",
        backend="layercast",
        max_batch_size=limits.max_batch,
        input=[ModelInput(name=s.name, data_type=_data_type(s), dims=s.shape[1:]) for s in manifest.inputs],
        output=[ModelOutput(name=s.name, data_type=_data_type(s), dims=s.shape[1:]) for s in manifest.outputs],
    )
    kind = "KIND_GPU" if model.loaded.runner.fast.device == "cuda" else "KIND_CPU"
    config.instance_group.add(name=manifest.name, count=1, kind=ModelInstanceGroup.Kind.Value(kind))
    config.dynamic_batching.max_queue_delay_microseconds = int(limits.max_delay * 1e6)
    config.dynamic_batching.default_queue_policy.max_queue_size = limits.queue_rows
    return config


def _data_type(spec: TensorSpec) -> str:
    """Return the datatype as the model configuration spells it; BYTES has another name there."""
    return "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"


def _statistics(model: ServedModel) -> ModelStatistics:
    counted: Statistics = model.monitor.statistics
    answer = ModelStatistics(
        name=model.manifest.name,
        version=str(model.manifest.version),
        last_inference=counted.last_inference_ms,
        inference_count=counted.inferences,
        execution_count=counted.executions,
        inference_stats=InferStatistics(
            success=_duration(counted.success),
            fail=_duration(counted.fail),
            queue=_duration(counted.queue),
            compute_input=_duration(counted.compute_input),
            compute_infer=_duration(counted.compute_infer),
            compute_output=_duration(counted.compute_output),
        ),
    )
    for rows, duration in sorted(counted.batches.items()):
        answer.batch_stats.add(batch_size=rows, compute_infer=_duration(duration))
    return answer


def _duration(duration: Duration) -> StatisticDuration:
    return StatisticDuration(count=duration.count, ns=duration.ns)
