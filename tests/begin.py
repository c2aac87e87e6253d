"""One model behind ModelInfer without a transport: asked on the short path or on the general one, and what was counted."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from numeric import Arrays, Shelf

from layercast.models.manifest import FileEntry, LayerSpec, Manifest, TensorSpec
from layercast.proto.messages import ModelInferRequest, ModelInferResponse
from layercast.proto.rpc import INFERENCE, INFERENCE_SERVICE
from layercast.server.engines.base import Tapping
from layercast.server.inline import NOWHERE, Inline
from layercast.server.metrics import Metrics
from layercast.server.model import Loaded, ServedModel
from layercast.server.monitor import ModelMonitor
from layercast.server.runner import Runner
from layercast.server.service.answering import Answering
from layercast.server.service.inference import InferenceService
from layercast.server.settings import ModelSettings
from layercast.server.transport.calls import UnaryRpc
from layercast.server.transport.counted import Counted

PEER = "ipv4:127.0.0.1:1"
ROWS_OF_TWO = (TensorSpec(name="x", datatype="FP32", shape=(-1, 2)),)
SUMS = (TensorSpec(name="y", datatype="FP32", shape=(-1,)),)
_ENTRY = FileEntry(sha256="0" * 64, bytes=0)


def sums(inputs: Arrays) -> dict[str, np.ndarray]:
    return {"y": inputs["x"].sum(1)}


class Engine:
    """Runs a function of arrays."""

    name = "numpy"
    device = "cpu"

    def __init__(self, function: Callable[[Arrays], dict[str, np.ndarray]]) -> None:
        self.run = function


def served(
    function: Callable[[Arrays], dict[str, np.ndarray]],
    metrics: Metrics,
    inputs: tuple[TensorSpec, ...] = ROWS_OF_TWO,
    outputs: tuple[TensorSpec, ...] = SUMS,
    layers: tuple[LayerSpec, ...] = (),
    taps: Tapping | None = None,
    inline: Inline = NOWHERE,
    **settings: Any,
) -> ServedModel:
    """Return a model `m` of these inputs, outputs and layers that answers what `function` and `taps` give."""
    manifest = Manifest(
        name="m",
        version=1,
        architecture="numpy",
        inputs=inputs,
        outputs=outputs,
        layers=layers,
        files={"weights.safetensors": _ENTRY, "golden.safetensors": _ENTRY},
    )
    chosen = ModelSettings(**{"max_batch": 8, "max_delay_ms": 0, **settings})
    runners = (Runner(manifest, Engine(function), None, taps),)
    loaded = Loaded(manifest, chosen, runners, 1, 0.0, 0.0, inline=inline)
    return ServedModel(loaded, ModelMonitor(metrics, "m", "1", "cpu", loaded.limits))


class Context:
    """A call, as far as a handler asks; it keeps the status that ends it."""

    def __init__(self, deadline: float | None, peer: str) -> None:
        self.status: tuple[Any, ...] | None = None
        self._deadline = deadline
        self._peer = peer

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else self._deadline - asyncio.get_running_loop().time()

    def peer(self) -> str:
        return self._peer

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNKNOWN

    async def abort(self, *status: Any) -> None:
        self.status = status
        raise grpc.aio.AbortError


class Asked:
    """A call that was begun. `ended` gives its answer, or else its status: code, text and trailers."""

    def __init__(self, cancel: Callable[[bool], object]) -> None:
        self.cancel = cancel
        self.told: list[Any] = []
        self._ended = asyncio.Event()

    def tell(self, content: bytes | None, status: tuple[Any, ...] | None) -> None:
        self.told.append(status if content is None else ModelInferResponse.FromString(content))
        self._ended.set()

    async def ended(self) -> Any:
        async with asyncio.timeout(10):
            await self._ended.wait()
        assert len(self.told) == 1
        return self.told[0]


class Subject:
    """A model, asked through `begin` if `short`, else through the handler of an RPC that has no short path."""

    def __init__(self, short: bool, function: Callable[[Arrays], dict[str, np.ndarray]] = sums, **model: Any) -> None:
        self.short = short
        self.function: Any = function
        self.metrics = Metrics()
        self.model = served(function, self.metrics, **model)
        self.batcher = self.model.batcher
        self.service = service = InferenceService(Answering(Shelf([self.model]), self.metrics, 1 << 20))  # type: ignore[arg-type]
        counted = Counted(INFERENCE_SERVICE, "ModelInfer", self.metrics)
        begin = service.begin_model_infer if short else None
        self.rpc = UnaryRpc(INFERENCE["ModelInfer"], service.model_infer, counted, begin)

    def ask(self, message: ModelInferRequest | bytes, deadline: float | None = None, peer: str = PEER) -> Asked | None:
        """Begin a call; None when it is not for the short path."""
        raw = message if isinstance(message, bytes) else message.SerializeToString()
        if not self.short:
            return self._handled(raw, deadline, peer)
        asked = Asked(lambda late: begun and begun.cancel(late))
        begun = self.rpc.short.begin(
            raw, deadline, peer, lambda content, failed: asked.tell(content, failed and tuple(vars(failed).values()))
        )
        return asked if begun else None

    def _handled(self, raw: bytes, deadline: float | None, peer: str) -> Asked:
        context = Context(deadline, peer)
        task = asyncio.ensure_future(self.rpc.handler().unary_unary(raw, context))
        asked = Asked(lambda late: task.cancel())

        def tell(task: "asyncio.Task[bytes]") -> None:
            if not task.cancelled():
                asked.tell(None if task.exception() else task.result(), context.status)

        task.add_done_callback(tell)
        return asked

    def counts(self) -> dict[Any, float]:
        """Return everything that was counted, but no durations, which differ."""
        found: Counter[Any] = Counter()
        for metric in self.metrics.registry.collect():
            for sample in metric.samples:
                if metric.name.startswith(("layercast", "grpc")) and not sample.name.endswith(("_bucket", "_sum")):
                    found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
        statistics = self.model.monitor.statistics
        for name in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
            found[name] = getattr(statistics, name).count
        found["inferences"], found["executions"] = statistics.inferences, statistics.executions
        found["held"] = self.model._holders
        return {name: value for name, value in found.items() if value}

    async def close(self) -> None:
        await self.batcher.close()


def request(*values: float, identifier: str = "7") -> ModelInferRequest:
    """Ask for rows of two numbers each, of the model `m`."""
    array = np.array(values, "f4").reshape(-1, 2)
    message = ModelInferRequest(model_name="m", id=identifier)
    message.inputs.add(name="x", datatype="FP32", shape=array.shape)
    message.raw_input_contents.append(array.tobytes())
    return message
