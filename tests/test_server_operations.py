"""What operators see: metrics, health, reflection, HTTP, broken models."""

import json
import re
import shutil
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from serving import running
from test_server_inference import offline, request, rows_for, values_of

from layercast.proto.messages import ModelReadyRequest, RepositoryIndexRequest, ServerReadyRequest
from layercast.server.errors import StartError


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


@pytest.fixture(scope="module")
def fresh(repository):
    with running(repository, max_batch=16) as server:
        yield server


def test_metrics_count_exactly(fresh, modules):
    own = {"model": "mnist", "version": "1"}
    at_zero = samples(get(fresh.metrics))
    assert value(at_zero, "layercast_rows_total", **own) == 0
    sizes = [1, 2, 3, 4] * 20
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: fresh.call("ModelInfer", request("mnist", rows_for("mnist", n))), sizes))
    with pytest.raises(grpc.RpcError):
        fresh.call("ModelInfer", request("mnist", np.zeros((1, 3), "f4")))
    with pytest.raises(grpc.RpcError):
        fresh.call("ModelInfer", request("mnist", rows_for("mnist", 1), model_version="4"))
    fresh.call("ModelInfer", request("mnist", rows_for("mnist", 2), ["layer:net.0", "layer:net.1"]))
    found = samples(get(fresh.metrics))
    assert value(found, "layercast_rows_total", **own) == sum(sizes) + 2
    assert value(found, "layercast_requests_total", kind="predict", code="OK", **own) == len(sizes)
    assert value(found, "layercast_requests_total", kind="predict", code="INVALID_ARGUMENT", **own) == 1
    assert value(found, "layercast_requests_total", kind="features", code="OK", **own) == 1
    assert (
        value(
            found, "layercast_requests_total", kind="predict", code="NOT_FOUND", model="(unknown)", version="(unknown)"
        )
        == 1
    )
    assert value(found, "layercast_feature_taps_total", **own) == 2
    batches = sum(
        v for (name, labels), v in found.items() if name == "layercast_batches_total" and ("model", "mnist") in labels
    )
    assert value(found, "layercast_batch_rows_count", **own) == batches <= len(sizes) + 1
    assert value(found, "layercast_batch_rows_sum", **own) == sum(sizes) + 2
    assert value(found, "layercast_compute_duration_seconds_count", device="cpu", **own) == batches
    assert value(found, "layercast_queue_duration_seconds_count", **own) == len(sizes) + 1
    assert value(found, "layercast_queue_rows", **own) == 0
    assert value(found, "layercast_inflight_requests", **own) == 0
    rpc = {"grpc_type": "unary", "grpc_service": "inference.GRPCInferenceService", "grpc_method": "ModelInfer"}
    assert value(found, "grpc_server_handled_total", grpc_code="OK", **rpc) == len(sizes) + 1
    assert value(found, "grpc_server_started_total", **rpc) == len(sizes) + 3


def test_unknown_names_add_no_series(fresh):
    def series() -> int:
        return len(samples(get(fresh.metrics)))

    with pytest.raises(grpc.RpcError):
        fresh.call("ModelInfer", request("shared", rows_for("shared", 1), model_version="77"))
    before = series()
    for number in range(50):
        message = request("shared", rows_for("shared", 1))
        message.model_name = f"no-such-model-{number}"
        with pytest.raises(grpc.RpcError):
            fresh.call("ModelInfer", message)
    assert series() == before


def test_http_answers_probes_and_scrapes(fresh):
    assert json.loads(get(f"{fresh.http}/v2/health/live")) == {"live": True}
    assert json.loads(get(f"{fresh.http}/v2/health/ready")) == {"ready": True}
    assert json.loads(get(f"{fresh.http}/v2"))["name"] == "layercast"
    assert "layercast_rows_total" in get(f"{fresh.http}/metrics")
    assert "mnist 1: READY" in get(f"{fresh.http}/")
    with pytest.raises(HTTPError, match="404"):
        get(f"{fresh.http}/v3")
    request_om = urllib.request.Request(
        fresh.metrics, headers={"accept": "application/openmetrics-text; version=1.0.0"}
    )
    with urllib.request.urlopen(request_om, timeout=10) as response:
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        assert response.read().endswith(b"# EOF\n")


def test_health_knows_the_server_its_services_and_each_model(fresh):
    stub = health_pb2_grpc.HealthStub(fresh.channel)
    for service in ("", "inference.GRPCInferenceService", "layercast.v1.FeatureService", "model/mnist"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as raised:
        stub.Check(health_pb2.HealthCheckRequest(service="model/none"), timeout=10)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services_and_describes_their_messages(fresh):
    stub = reflection_pb2_grpc.ServerReflectionStub(fresh.channel)
    ask = reflection_pb2.ServerReflectionRequest
    listed, described = stub.ServerReflectionInfo(
        iter([ask(list_services=""), ask(file_containing_symbol="layercast.v1.FeatureService")]), timeout=10
    )
    names = {service.name for service in listed.list_services_response.service}
    assert {"inference.GRPCInferenceService", "layercast.v1.FeatureService", "grpc.health.v1.Health"} <= names
    assert any(b"ExtractRequest" in file for file in described.file_descriptor_response.file_descriptor_proto)


def copy_of(repository, target, names):
    for name in names:
        shutil.copytree(repository / name, target / name)
    return target


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, change) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


BROKEN = {
    "a flipped byte": (lambda v: flip(v / "weights.safetensors"), "weights.safetensors: sha256"),
    "a cut program": (lambda v: (v / "model.onnx").write_bytes(b""), "model.onnx has 0 of [0-9]+ bytes"),
    "a missing file": (lambda v: (v / "model.ts").unlink(), "model.ts"),
    "a future schema": (lambda v: edit(v / "manifest.json", lambda m: m.update(schema_version=9)), "schema_version"),
    "no JSON": (lambda v: (v / "manifest.json").write_text("{"), "not JSON"),
    "another architecture": (
        lambda v: edit(v / "manifest.json", lambda m: m.update(architecture="MLP")),
        "MLP|weights",
    ),
    "another name": (lambda v: edit(v / "manifest.json", lambda m: m.update(name="other")), "'other'"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_version_says_why_and_the_others_serve(repository, modules, tmp_path, fault):
    damage, reason = BROKEN[fault]
    root = copy_of(repository, tmp_path, ["mnist", "shared"])
    shutil.copytree(root / "shared" / "1", root / "shared" / "2")
    edit(root / "shared" / "2" / "manifest.json", lambda m: m.update(version=2))
    damage(root / "shared" / "2")
    with running(root, engine="eager") as server:
        index = {(m.name, m.version): m for m in server.call("RepositoryIndex", RepositoryIndexRequest()).models}
        assert index["shared", "2"].state == "UNAVAILABLE"
        assert re.search(reason, index["shared", "2"].reason)
        assert str(tmp_path) not in index["shared", "2"].reason
        assert not server.call("ModelReady", ModelReadyRequest(name="shared", version="2")).ready
        with pytest.raises(grpc.RpcError) as raised:
            server.call("ModelInfer", request("shared", rows_for("shared", 1), model_version="2"))
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        x = rows_for("shared", 1)
        answer = server.call("ModelInfer", request("shared", x))
        assert answer.model_version == "1"
        np.testing.assert_allclose(values_of(answer), offline(modules["shared"], x), atol=1e-5)
        assert server.call("ServerReady", ServerReadyRequest()).ready


def test_a_model_with_no_version_that_loads_makes_the_server_unready(repository, tmp_path):
    root = copy_of(repository, tmp_path, ["mnist", "shared"])
    flip(root / "shared" / "1" / "weights.safetensors")
    with running(root, engine="eager") as server:
        assert not server.call("ServerReady", ServerReadyRequest()).ready
        with pytest.raises(HTTPError, match="503"):
            get(f"{server.http}/v2/health/ready")
        assert server.call("ModelReady", ModelReadyRequest(name="mnist")).ready
        stub = health_pb2_grpc.HealthStub(server.channel)
        for service, ready in (
            ("", False),
            ("inference.GRPCInferenceService", False),
            ("model/shared", False),
            ("model/mnist", True),
        ):
            status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
            assert (status == health_pb2.HealthCheckResponse.SERVING) == ready


def test_the_highest_version_answers_and_each_can_be_named(repository, modules, tmp_path):
    root = copy_of(repository, tmp_path, ["shared"])
    shutil.copytree(root / "shared" / "1", root / "shared" / "10")
    edit(root / "shared" / "10" / "manifest.json", lambda m: m.update(version=10))
    for ignored in ("0", "01", "latest", "2.part"):
        (root / "shared" / ignored).mkdir()
    with running(root, engine="eager") as server:
        x = rows_for("shared", 1)
        assert server.call("ModelInfer", request("shared", x)).model_version == "10"
        assert server.call("ModelInfer", request("shared", x, model_version="1")).model_version == "1"
        assert [m.version for m in server.call("RepositoryIndex", RepositoryIndexRequest()).models] == ["1", "10"]


@pytest.mark.parametrize("engine", ["eager", "torchscript", "onnx", "exported"])
def test_every_engine_gives_the_same_answers(repository, modules, engine):
    with running(repository, engine=engine, max_batch=16) as server:
        for model, module in modules.items():
            x = rows_for(model, 19)
            answer = server.call("ModelInfer", request(model, x))
            np.testing.assert_allclose(values_of(answer), offline(module, x), atol=1e-4, rtol=1e-4)
            assert server.server.repository.find(model, "").loaded.runner.fast.name == engine


def test_a_models_own_settings_hold(repository, tmp_path):
    root = copy_of(repository, tmp_path, ["shared"])
    (root / "shared" / "layercast.toml").write_text('engine = "torchscript"\nmax_batch = 3\n')
    with running(root) as server:
        model = server.server.repository.find("shared", "")
        assert (model.loaded.runner.fast.name, model.batcher.limits.max_batch) == ("torchscript", 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nothing", "is not a folder"),
        (lambda root: root, "holds no model"),
    ],
)
def test_a_repository_without_models_stops_the_start(tmp_path, make, message):
    with pytest.raises(StartError, match=message), running(make(tmp_path)):
        pass


def test_cuda_asked_for_and_absent_is_said(repository):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(StartError, match="torch finds no CUDA device here"), running(repository, device="cuda"):
        pass
