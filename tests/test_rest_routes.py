"""Every path of REST v2 beside inference, equal to what gRPC says."""

import json

import pytest
from resting import call, infer, tensor
from serving import running
from test_server_inference import request, rows_for
from test_server_operations import get, samples, value

from layercast.proto.messages import ModelStatisticsRequest, ServerMetadataRequest


def test_probes(served):
    assert (call(served, "GET", "/v2/health/live").json, call(served, "GET", "/v2/health/ready").json) == (
        {"live": True},
        {"ready": True},
    )


@pytest.mark.parametrize(
    ("path", "status"),
    [("mnist", 200), ("mnist/versions/1", 200), ("nothing", 503), ("mnist/versions/7", 503), ("mnist/versions/x", 400)],
)
def test_readiness_of_a_model(served, path, status):
    got = call(served, "GET", f"/v2/models/{path}/ready")
    assert got.status == status
    if status != 400:
        assert got.json == {"ready": status == 200, "name": path.split("/")[0]}


def test_metadata_of_the_server(served):
    expected = served.call("ServerMetadata", ServerMetadataRequest())
    got = call(served, "GET", "/v2").json
    assert got == {"name": "layercast", "version": expected.version, "extensions": list(expected.extensions)}
    assert "binary_tensor_data" in got["extensions"]


@pytest.mark.parametrize("path", ["/v2/models/transformer", "/v2/models/transformer/versions/1"])
def test_metadata_and_configuration_of_a_model(served, path):
    metadata = call(served, "GET", path).json
    assert metadata["inputs"] == [{"name": "tokens", "datatype": "INT64", "shape": [-1, -1]}]
    assert metadata["versions"] == ["1"]
    assert json.loads(metadata["properties"]["labels"]) == ["ham", "spam"]
    config = call(served, "GET", f"{path}/config").json
    assert (config["max_batch_size"], config["input"][0]["data_type"]) == (16, "TYPE_INT64")
    # 64-bit numbers are numbers, not strings as protobuf's own JSON writes them.
    assert config["dynamic_batching"]["max_queue_delay_microseconds"] == 0
    assert config["input"][0]["dims"] == [-1]


def test_statistics_are_those_of_grpc(served):
    infer(served, "shared", {"inputs": [tensor(rows_for("shared", 3))]})
    (own,) = call(served, "GET", "/v2/models/shared/stats").json["model_stats"]
    expected = served.call("ModelStatistics", ModelStatisticsRequest(name="shared")).model_stats[0]
    assert own["inference_count"] == expected.inference_count >= 3
    assert own["inference_stats"]["success"]["ns"] == expected.inference_stats.success.ns
    every = call(served, "GET", "/v2/models/stats").json["model_stats"]
    assert {model["name"] for model in every} == {"mnist", "resnet", "transformer", "shared"}


@pytest.mark.parametrize("body", [b"", {}, {"ready": True}])
def test_the_index(served, body):
    got = call(served, "POST", "/v2/repository/index", body).json
    assert {"name": "mnist", "version": "1", "state": "READY", "reason": ""} in got


class Recorder:
    """A service that keeps what it is asked: routes of calls that a server may not offer reach it by name."""

    def __init__(self) -> None:
        self.asked = None

    def __getattr__(self, name):
        from layercast.proto import messages

        async def answer(message, call):
            self.asked = message
            return getattr(messages, type(message).__name__.removesuffix("Request") + "Response")()

        return answer


@pytest.fixture
def recorder(served, monkeypatch):
    from starlette.testclient import TestClient

    from layercast.server.metrics import Metrics
    from layercast.server.rest.routes import routes
    from layercast.server.transport.security import Security
    from layercast.server.web.app import application

    service, metrics, security = Recorder(), Metrics(), Security(None, None)
    app = application(served.server.repository, metrics, routes([service], metrics, 1 << 20, security), security)
    with TestClient(app) as client:
        yield service, client


@pytest.mark.parametrize(
    ("method", "path", "body", "kind", "expected"),
    [
        ("POST", "/v2/repository/models/m/load", {"parameters": {"config": "{}", "file:1/a": "aGk="}},
         "RepositoryModelLoadRequest", {"model_name": "m", "file": b"hi"}),
        ("POST", "/v2/repository/models/m/unload", {"parameters": {"unload_dependents": True}},
         "RepositoryModelUnloadRequest", {"model_name": "m"}),
        ("POST", "/v2/models/m/trace/setting", {"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": None},
         "TraceSettingRequest", {"model_name": "m", "level": ["TIMESTAMPS", "TENSORS"]}),
        ("GET", "/v2/trace/setting", None, "TraceSettingRequest", {"model_name": ""}),
        ("POST", "/v2/logging", {"log_info": True, "log_verbose_level": 2, "log_format": "default"},
         "LogSettingsRequest", {"verbose": 2}),
        ("GET", "/v2/logging", None, "LogSettingsRequest", {}),
        ("GET", "/v2/systemsharedmemory/region/r/status", None, "SystemSharedMemoryStatusRequest", {"name": "r"}),
        ("POST", "/v2/systemsharedmemory/unregister", None, "SystemSharedMemoryUnregisterRequest", {"name": ""}),
        ("POST", "/v2/cudasharedmemory/region/r/register", {}, "CudaSharedMemoryRegisterRequest", {"name": "r"}),
    ],
)  # fmt: skip
def test_administration_reaches_the_service_by_name(recorder, method, path, body, kind, expected):
    service, client = recorder
    assert client.request(method, path, json=body).status_code == 200
    asked = service.asked
    assert type(asked).__name__ == kind
    extra = {
        "file": lambda: asked.parameters["file:1/a"].bytes_param,
        "level": lambda: list(asked.settings["trace_level"].value),
        "verbose": lambda: asked.settings["log_verbose_level"].uint32_param,
    }
    for key, wanted in expected.items():
        assert (extra[key]() if key in extra else getattr(asked, key)) == wanted


def test_calls_are_counted_by_route_and_status(one_model):
    with running(one_model, engine="eager") as server:
        for _ in range(3):
            infer(server, "shared", {"inputs": [tensor(rows_for("shared", 1))]})
        infer(server, "nothing", {"inputs": [tensor(rows_for("shared", 1))]})
        infer(server, "shared", b"{")
        for number in range(20):
            call(server, "GET", f"/v2/models/unknown-{number}")
        found = samples(get(server.metrics))
        route = "/v2/models/{model}/infer"
        for status, count in (("200", 3), ("404", 1), ("400", 1)):
            assert value(found, "layercast_http_requests_total", route=route, status=status) == count
        assert value(found, "layercast_http_request_duration_seconds_count", route=route) == 5
        assert not [labels for _, labels in found if "unknown-" in str(labels)]
        own = {"model": "shared", "version": "1", "kind": "predict", "code": "OK"}
        assert value(found, "layercast_requests_total", **own) == 3
        server.call("ModelInfer", request("shared", rows_for("shared", 1)))
