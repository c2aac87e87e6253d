"""What the Open Inference Protocol tells about the server and its models, free of any transport."""

import json
from collections.abc import Iterable

from layercast.models.manifest import TensorSpec
from layercast.proto.messages import (
    InferStatistics,
    ModelConfig,
    ModelConfigRequest,
    ModelConfigResponse,
    ModelDynamicBatching,
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
from layercast.server.batching.policy import Limits
from layercast.server.environment import installed_version
from layercast.server.errors import NotFound, Unavailable
from layercast.server.model import ServedModel
from layercast.server.monitor import Duration, Statistics
from layercast.server.repository import Repository
from layercast.server.service.call import Call

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "logging",
    "model_configuration",
    "model_repository",
    "parameters",
    "statistics",
    "trace",
    "layercast_features",
)


class MetadataService:
    """Answers the questions of `inference.GRPCInferenceService`: every RPC that runs no model and changes nothing."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def server_live(self, request: ServerLiveRequest, call: Call) -> ServerLiveResponse:
        """The process runs."""
        return ServerLiveResponse(live=True)

    async def server_ready(self, request: ServerReadyRequest, call: Call) -> ServerReadyResponse:
        """Every model has a version that answers."""
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
                "engines": model.loaded.engines,
                "device": model.loaded.runner.fast.device,
            },
        )

    async def model_config(self, request: ModelConfigRequest, call: Call) -> ModelConfigResponse:
        """The model's settings in Triton's terms, as perf_analyzer asks for them."""
        model = self._repository.find(request.name, request.version)
        return ModelConfigResponse(config=_config(model))

    async def model_statistics(self, request: ModelStatisticsRequest, call: Call) -> ModelStatisticsResponse:
        """Counts and times of one version, of every version of a model, or of all models when no name is given."""
        if request.name:
            models = [self._repository.find(request.name, request.version)]
        if not request.name or not request.version:
            models = [v.model for v in self._repository.versions() if v.model and request.name in ("", v.name)]
        return ModelStatisticsResponse(model_stats=[_statistics(model) for model in models])


def _tensors(specs: Iterable[TensorSpec]) -> list[ModelMetadataResponse.TensorMetadata]:
    return [ModelMetadataResponse.TensorMetadata(name=s.name, datatype=s.datatype, shape=s.shape) for s in specs]


def _config(model: ServedModel) -> ModelConfig:
    manifest, settings, batcher = model.manifest, model.loaded.settings, model.batcher
    config = ModelConfig(
        name=manifest.name,
        platform=f"layercast_{model.loaded.runner.fast.name}",
        backend="layercast",
        max_batch_size=batcher.limits.max_batch,
        input=[ModelInput(name=s.name, data_type=_data_type(s), dims=s.shape[1:]) for s in manifest.inputs],
        output=[ModelOutput(name=s.name, data_type=_data_type(s), dims=s.shape[1:]) for s in manifest.outputs],
    )
    config.parameters["engines"].string_value = model.loaded.engines
    kind = "KIND_GPU" if model.loaded.runner.fast.device == "cuda" else "KIND_CPU"
    config.instance_group.add(name=manifest.name, count=batcher.instances, kind=ModelInstanceGroup.Kind.Value(kind))
    if settings.versions == "latest":
        config.version_policy.latest.num_versions = 1
    else:
        config.version_policy.all.SetInParent()
    if settings.batching:
        _batching(config.dynamic_batching, batcher.limits)
    return config


def _batching(config: ModelDynamicBatching, limits: Limits) -> None:
    config.preferred_batch_size.extend(limits.preferred)
    config.max_queue_delay_microseconds = int(limits.max_delay * 1e6)
    if limits.priorities > 1:
        config.priority_levels = config.default_priority_level = limits.priorities
    policy = config.default_queue_policy
    policy.max_queue_size = limits.queue_rows
    policy.allow_timeout_override = True
    if limits.queue_timeout:
        policy.default_timeout_microseconds = int(limits.queue_timeout * 1e6)


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
