"""A real gRPC server whose models are lines of numpy: protocol, services and batcher without torch, up in no time."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import hosting
import numpy as np
from serving import Running
from starlette.applications import Starlette

from layercast.models.manifest import FileEntry, Manifest, TensorSpec
from layercast.proto.messages import ModelInferRequest
from layercast.proto.rpc import FEATURES_SERVICE, INFERENCE_SERVICE
from layercast.server.errors import NotFound
from layercast.server.index import Version
from layercast.server.metrics import Metrics
from layercast.server.model import Loaded, ServedModel
from layercast.server.monitor import ModelMonitor
from layercast.server.runner import Runner
from layercast.server.service.administration import AdministrationService, SharedMemoryService
from layercast.server.service.answering import Answering
from layercast.server.service.control import ModelControl
from layercast.server.service.features import FeatureService
from layercast.server.service.inference import InferenceService
from layercast.server.service.metadata import MetadataService
from layercast.server.service.streaming import StreamService
from layercast.server.settings import ModelSettings
from layercast.server.transport.direct.front_end import DirectFrontEnd
from layercast.server.transport.envoy.front_end import EnvoyFrontEnd
from layercast.server.transport.front_end import FrontEnd
from layercast.server.transport.grpcio import GrpcFrontEnd
from layercast.server.transport.security import Security

Arrays = Mapping[str, np.ndarray]
NOBODY_GUARDS = Security(None, None)
_ENTRY = FileEntry(sha256="0" * 64, bytes=0)


FRONT_ENDS: dict[object, Callable[..., FrontEnd]] = {
    "direct": DirectFrontEnd,
    "envoy": lambda *given: EnvoyFrontEnd(*given, Starlette()),
    "grpcio": GrpcFrontEnd,
}


@dataclass
class Model:
    """One model: its tensors as `(name, datatype, shape without the batch)`, and what it computes."""

    function: Callable[[Arrays], dict[str, np.ndarray]]
    inputs: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=lambda: [("x", "FP32", (-1,))])
    outputs: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=lambda: [("y", "FP32", (-1,))])
    labels: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    version: int = 1
    settings: ModelSettings = field(default_factory=lambda: ModelSettings(max_batch=16, max_delay_ms=0))


class _Engine:
    name = "numpy"
    device = "cpu"

    def __init__(self, function: Callable[[Arrays], dict[str, np.ndarray]]) -> None:
        self.run = function


class Shelf:
    """What the services ask of a repository."""

    ready = True

    def __init__(self, models: list[ServedModel]) -> None:
        self.models = {(model.manifest.name, model.manifest.version): model for model in models}

    def find(self, name: str, version: str) -> ServedModel:
        model = self.ready_model(name, version)
        if model is None:
            raise NotFound(f"no {name!r} {version!r}", field="model_name")
        return model

    def ready_model(self, name: str, version: str) -> ServedModel | None:
        found = [(number, model) for (known, number), model in self.models.items() if known == name]
        found = [(number, model) for number, model in found if version in ("", str(number))]
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def versions(self) -> list[Version]:
        return [Version(name, number, "READY", "", model) for (name, number), model in sorted(self.models.items())]


class Server:
    """As much of a server as `Running` needs."""

    http_port = metrics_port = 0

    async def start(
        self,
        models: Mapping[str, Model | list[Model]],
        max_bytes: int,
        settings: Mapping[str, object],
        security: Security,
    ) -> None:
        self.metrics = Metrics()
        each = [(name, m) for name, given in models.items() for m in (given if isinstance(given, list) else [given])]
        self.repository = Shelf([self._serve(name, model) for name, model in each])
        answering = Answering(self.repository, self.metrics, max_bytes)
        inference = InferenceService(answering)
        objects = (
            MetadataService(self.repository),
            ModelControl(self.repository, allowed=False),
            inference,
            StreamService(inference, max_bytes),
            AdministrationService(self.repository),
            SharedMemoryService(),
        )
        features = (FeatureService(self.repository, answering),)
        services = {INFERENCE_SERVICE: objects, FEATURES_SERVICE: features}
        given = (services, self.metrics, max_bytes, True, security)
        self.front_end = FRONT_ENDS[settings["front_end"]](*given)
        self.grpc_port = self.front_end.bind("127.0.0.1", settings["grpc_port"])
        self.front_end.set_health(["", INFERENCE_SERVICE], serving=True)
        await self.front_end.start()

    async def stop(self) -> None:
        await self.front_end.stop(5)
        await asyncio.gather(*(model.batcher.close() for model in self.repository.models.values()))

    def _serve(self, name: str, model: Model) -> ServedModel:
        manifest = Manifest(
            name=name,
            version=model.version,
            architecture="numpy",
            inputs=tuple(TensorSpec(name=n, datatype=d, shape=(-1, *s), range=model.range) for n, d, s in model.inputs),
            outputs=tuple(TensorSpec(name=n, datatype=d, shape=(-1, *s)) for n, d, s in model.outputs),
            labels=model.labels,
            files={"weights.safetensors": _ENTRY, "golden.safetensors": _ENTRY},
        )
        engine = _Engine(model.function)
        loaded = Loaded(manifest, model.settings, (Runner(manifest, engine, None, None),), 1, 0.0, 0.0)
        monitor = ModelMonitor(self.metrics, name, str(model.version), "cpu", loaded.limits)
        return ServedModel(loaded, monitor)


@contextmanager
def numeric(
    models: Mapping[str, Model | list[Model]],
    max_bytes: int = 64 << 20,
    front_end: str | None = None,
    security: Security = NOBODY_GUARDS,
) -> Iterator[Running]:
    """Serve `models` on a free port, by the front end with that name or the one under test."""
    with hosting.event_loop(front_end) as loop, hosting.front_end(front_end) as settings:
        server = Server()
        asyncio.run_coroutine_threadsafe(server.start(models, max_bytes, settings, security), loop).result(30)
        running = Running(server, loop)
        try:
            yield running
        finally:
            running.channel.close()
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)


def asked(model: str, values: np.ndarray, outputs=(), datatype: str = "FP32", **fields) -> ModelInferRequest:
    """A raw request for the input `x`."""
    message = ModelInferRequest(model_name=model, **fields)
    message.inputs.add(name="x", datatype=datatype, shape=values.shape)
    message.raw_input_contents.append(values.tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    return message


def identity(inputs: Arrays) -> dict[str, np.ndarray]:
    return {"y": inputs["x"]}
