"""A real gRPC server in this process, whose models are a few lines of numpy. It does not use Layercast's codec."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import catalogue as catalogue_module
import grpc
import numpy as np
import pytest

import layercast.client as lc
from layercast.client.main import main
from layercast.proto.messages import (
    ExplainRequest,
    ExplainResponse,
    ExtractRequest,
    ExtractResponse,
    Layer,
    ListLayersRequest,
    ListLayersResponse,
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ModelStreamInferResponse,
    NamedTensor,
    RepositoryIndexResponse,
    ServerLiveResponse,
    ServerReadyResponse,
    Timing,
)
from layercast.proto.rpc import FEATURES, FEATURES_SERVICE, INFERENCE, INFERENCE_SERVICE, Method

IMAGE = {
    "kind": "image",
    "mode": "L",
    "width": 28,
    "height": 28,
    "scale": 1 / 255,
    "layout": "CHW",
    "background": "dark",
}
TEXT = {"kind": "text", "encoding": "utf-8", "pad": 256, "max_length": 8, "overlong": "cut"}
DTYPES = {"FP32": "<f4", "INT64": "<i8", "INT32": "<i4"}

# name: inputs, outputs, properties
Tensors = list[tuple[str, str, list[int]]]
MODELS: dict[str, tuple[Tensors, Tensors, dict[str, Any]]] = {
    "mnist": (
        [("image", "FP32", [-1, 1, 28, 28])],
        [("logits", "FP32", [-1, 10])],
        {"labels": [*"0123456789"], "preprocessing": IMAGE, "description": "digits", "max_batch": 2},
    ),
    "sms": (
        [("tokens", "INT64", [-1, -1])],
        [("logits", "FP32", [-1, 2])],
        {"labels": ["ham", "spam"], "preprocessing": TEXT},
    ),
    "pair": (
        [("a", "FP32", [-1, 2]), ("b", "INT32", [-1, 2])],
        [("sum", "FP32", [-1, 2]), ("difference", "FP32", [-1, 2])],
        {},
    ),
    # Their layers hold what was sent: the mean and the largest value of each row.
    "gallery": (
        [("image", "FP32", [-1, 1, 28, 28])],
        [("logits", "FP32", [-1, 10])],
        {"preprocessing": IMAGE, "max_batch": 4},
    ),
    "essays": ([("tokens", "INT64", [-1, -1])], [("logits", "FP32", [-1, 2])], {"preprocessing": TEXT}),
    "typed": ([("x", "FP32", [-1])], [("y", "INT64", [-1])], {}),
    "malformed": ([("x", "FP32", [-1])], [("y", "FP32", [-1])], {}),
    "slow": ([("x", "FP32", [-1])], [("y", "FP32", [-1])], {}),
    "large": ([("x", "FP32", [-1])], [("y", "UINT8", [-1])], {}),
    "doubtful": ([("x", "FP32", [-1])], [("y", "FP32", [-1])], {}),
    **{
        f"echo_{datatype}": ([("x", datatype, [-1, -1])], [("y", datatype, [-1, -1])], {})
        for datatype in ["BOOL", "UINT8", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16", "BYTES"]
    },
}


class FakeServer:
    """Answers by the tables above and keeps what it was asked. A model called `fail:CODE` fails with that status."""

    def __init__(self, port: int = 0) -> None:
        self.models = dict(MODELS)
        self.requests: list[Any] = []
        self.headers: list[dict[str, Any]] = []
        self.released = threading.Event()
        self.after = ""
        self.drained = 0
        self.versions = ["2"]
        # Called with every ExtractRequest; a status that it returns is the answer.
        self.before: Callable[[ExtractRequest], grpc.StatusCode | None] = lambda request: None
        self._server = grpc.server(
            ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)]
        )
        calls: dict[str, Callable[[Any], Any]] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "RepositoryIndex": self.repository_index,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
            "ListLayers": self.list_layers,
            "Extract": self.extract,
            "Explain": self.explain,
        }
        for service, methods in ((INFERENCE_SERVICE, INFERENCE), (FEATURES_SERVICE, FEATURES)):
            handlers = {name: self._handler(method, calls[name]) for name, method in methods.items() if name in calls}
            if service == INFERENCE_SERVICE:
                handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
                    self.model_stream_infer,
                    ModelInferRequest.FromString,
                    ModelStreamInferResponse.SerializeToString,
                )
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self.url = f"localhost:{self._server.add_insecure_port(f'localhost:{port}')}"
        self._server.start()

    def stop(self) -> None:
        self.released.set()
        self._server.stop(None).wait()

    def asked(self, kind: type) -> list[Any]:
        return [request for request in self.requests if isinstance(request, kind)]

    def _handler(self, method: Method, call: Callable[[Any], Any]) -> Any:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            self.requests.append(request)
            self.headers.append(dict(context.invocation_metadata()))
            name = getattr(request, "model_name", "") or getattr(request, "name", "")
            if name.startswith("fail:"):
                context.abort(grpc.StatusCode[name[5:]], f"the server's own text about {name}")
            if name and name not in self.models and method.name != "ModelReady":
                context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: {name!r} is not found")
            if isinstance(request, ExtractRequest) and (status := self.before(request)):
                context.abort(status, f"the test wants {status.name}")
            return call(request)

        return grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=method.request.FromString, response_serializer=lambda m: m.SerializeToString()
        )

    def server_live(self, request: Any) -> ServerLiveResponse:
        return ServerLiveResponse(live=True)

    def server_ready(self, request: Any) -> ServerReadyResponse:
        return ServerReadyResponse(ready=False)

    def model_ready(self, request: ModelReadyRequest) -> ModelReadyResponse:
        return ModelReadyResponse(ready=request.name in self.models)

    def repository_index(self, request: Any) -> RepositoryIndexResponse:
        response = RepositoryIndexResponse()
        response.models.add(name="mnist", version="1", state="UNAVAILABLE", reason="weights differ\x1b[31m")
        response.models.add(name="mnist", version="2", state="READY")
        return response

    def model_metadata(self, request: ModelMetadataRequest) -> ModelMetadataResponse:
        inputs, outputs, properties = self.models[request.name]
        response = ModelMetadataResponse(name=request.name, versions=self.versions, platform="fake")
        for ours, declared in ((response.inputs, inputs), (response.outputs, outputs)):
            for name, datatype, shape in declared:
                ours.add(name=name, datatype=datatype, shape=shape)
        for name, value in properties.items():
            response.properties[name] = value if isinstance(value, str) else json.dumps(value)
        return response

    def model_infer(self, request: ModelInferRequest) -> ModelInferResponse:
        response = ModelInferResponse(model_name=request.model_name, model_version="2", id=request.id)
        if request.model_name == "slow":
            self.released.wait(30)
        elif request.model_name == "typed":
            response.outputs.add(name="y", datatype="INT64", shape=[2]).contents.int64_contents.extend([-1, 2**40])
        elif request.model_name == "malformed":
            response.outputs.add(name="y", datatype="FP32", shape=[3])
            response.raw_output_contents.append(b"\0" * 4)
        elif request.model_name == "large":
            response.outputs.add(name="y", datatype="UINT8", shape=[5 << 20])
            response.raw_output_contents.append(bytes(5 << 20))
        elif request.model_name == "doubtful":
            response.outputs.add(name="y", datatype="FP32", shape=[1])
            response.raw_output_contents.append(bytes(4))
            response.parameters["warning"].string_param = "input 'x': want values from 0 to 1, got 0 to 7"
        elif request.model_name.startswith("echo_"):
            (given,) = request.inputs
            response.outputs.add(name="y", datatype=given.datatype, shape=given.shape)
            response.raw_output_contents.append(request.raw_input_contents[0])
        else:
            self._compute(request, response)
        return response

    def model_stream_infer(
        self, requests: Iterator[ModelInferRequest], context: grpc.ServicerContext
    ) -> Iterator[ModelStreamInferResponse]:
        """Answers in order. A NaN fails its own request; `after` says what becomes of the stream after four."""
        self.headers.append(dict(context.invocation_metadata()))
        for number, request in enumerate(requests):
            self.requests.append(request)
            if number == 4 and self.after:
                if self.after == "ends":
                    return
                if self.after == "breaks":
                    context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
                request.id = "17"
            answer = ModelStreamInferResponse()
            if any(np.isnan(np.frombuffer(raw, "<f4")).any() for raw in request.raw_input_contents):
                answer.error_message = "input 'x': NaN"
                answer.infer_response.id = request.id
                answer.infer_response.parameters["error_code"].string_param = "INVALID_ARGUMENT"
            else:
                answer.infer_response.CopyFrom(self.model_infer(request))
            yield answer
        self.drained += 1

    def _compute(self, request: ModelInferRequest, response: ModelInferResponse) -> None:
        arrays = {
            tensor.name: np.frombuffer(raw, DTYPES[tensor.datatype]).reshape(tuple(tensor.shape))
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        if request.model_name == "pair":
            results = {"sum": arrays["a"] + arrays["b"], "difference": arrays["a"] - arrays["b"]}
        elif request.model_name == "sms":
            long = (arrays["tokens"] != 256).sum(axis=1) > 4
            results = {"logits": np.stack([np.zeros(len(long)), long * np.log(3)], axis=1)}
        else:
            # The label is the number of bright pixels in the corner, which no MNIST picture has: always 0.
            bright = (arrays["image"][:, 0, :3, :3] > 0.5).sum(axis=(1, 2))
            results = {"logits": np.eye(10)[bright] * np.log(9)}
        wanted = [output.name for output in request.outputs] or list(results)
        for name in wanted:
            result = results[name].astype("<f4")
            response.outputs.add(name=name, datatype="FP32", shape=result.shape)
            response.raw_output_contents.append(result.tobytes())

    def list_layers(self, request: ListLayersRequest) -> ListLayersResponse:
        layers = [
            Layer(path="net.0", type="Linear", datatype="FP32", shape=[-1, 512], parameters=401920, available=True),
            Layer(path="net.1", type="Fused", datatype="FP32", shape=[-1, -1], order=1, reason="never runs"),
        ]
        return ListLayersResponse(layers=[layer for layer in layers if request.pattern in ("*", layer.path)])

    def extract(self, request: ExtractRequest) -> ExtractResponse:
        rows = request.inputs[0].shape[0]
        response = ExtractResponse(model_name=request.model_name, id=request.id)
        for tap in ["net.0", "net.1"] if list(request.layers) == ["*"] else request.layers:
            values, datatype = np.arange(rows * 3, dtype="<f2").reshape(rows, 3), "FP16"
            if request.model_name in ("gallery", "essays"):
                (sent,) = request.inputs
                flat = np.frombuffer(sent.data, DTYPES[sent.datatype]).reshape(rows, -1)
                values, datatype = np.stack([flat.mean(axis=1), flat.max(axis=1)], axis=1).astype("<f4"), "FP32"
            response.layers.append(NamedTensor(name=tap, datatype=datatype, shape=values.shape, data=values.tobytes()))
        for name in request.outputs:
            response.outputs.append(NamedTensor(name=name, datatype="BOOL", shape=[rows], data=b"\1" * rows))
        return response

    def explain(self, request: ExplainRequest) -> ExplainResponse:
        """A patch of a picture, or the last token, counts: for the score, or with occlusion against it."""
        shape = list(request.inputs[0].shape)
        values = np.zeros(shape, "<f4")
        values[..., -1:] = 1
        if len(shape) == 4:
            values[:] = 0
            values[:, :, 4:8, 10:14] = 1
        if request.method == "gradcam":
            values = values[:, 0]
        if request.method == "occlusion":
            values = -values
        rows = shape[0]
        given = list(request.targets)
        return ExplainResponse(
            model_name=request.model_name,
            model_version="2",
            id=request.id,
            attributions=NamedTensor(datatype="FP32", shape=values.shape, data=values.tobytes()),
            targets=given * rows if len(given) == 1 else given or [1] * rows,
            delta=[0.5] * rows if request.method == "integrated-gradients" else [],
            timing=Timing(queue_ns=1_000_000, compute_ns=2_000_000_000, batch_rows=rows),
            warning="values beyond 0 to 1" if request.method == "saliency" else "",
        )


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.stop()


class Blocking:
    """The asyncio client behind the face of the synchronous one."""

    def __init__(self, url: str, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = lc.AsyncClient(url, **options)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            return await method(*arguments, **options)

        return lambda *arguments, **options: self._runner.run(call(*arguments, **options))

    def predict_many(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        return self._each(self._client.predict_many(*arguments, **options))

    def _each(self, results: AsyncGenerator[Any, None]) -> Iterator[Any]:
        async def step() -> list[Any]:
            async for result in results:
                return [result]
            return []

        try:
            while found := self._runner.run(step()):
                yield found[0]
        finally:
            self._runner.run(results.aclose())

    def finish(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """A maker of clients, of either kind; those that it made are closed."""
    opened: list[Any] = []

    def make(url: str, **options: Any) -> Any:
        opened.append(lc.Client(url, **options) if request.param == "sync" else Blocking(url, **options))
        return opened[-1]

    yield make
    for client in opened:
        client.close() if isinstance(client, lc.Client) else client.finish()


@pytest.fixture
def client(connect: Callable[..., Any], server: FakeServer) -> Any:
    return connect(server.url)


@pytest.fixture
def run(
    server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process against the server; exit code, stdout and stderr."""
    monkeypatch.setenv("LAYERCAST_URL", server.url)

    def call(*arguments: Any) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    root = tmp_path / "catalogue"
    catalogue_module.write(root)
    return root
