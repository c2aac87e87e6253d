"""Loading and unloading by request: who may, what names and parameters are refused, and storms of it."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tiny
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from serving import Running, running
from test_server_operations import get

from layercast.proto.messages import (
    ModelReadyRequest,
    RepositoryIndexRequest,
    RepositoryModelLoadRequest,
    RepositoryModelUnloadRequest,
    ServerReadyRequest,
)
from layercast.proto.rpc import INFERENCE

TURNS = int(os.environ.get("LAYERCAST_TEST_STORM", "4"))
REQUESTS = {"RepositoryModelLoad": RepositoryModelLoadRequest, "RepositoryModelUnload": RepositoryModelUnloadRequest}
TRAVERSAL = [
    "..", ".", "../tiny", "tiny/../tiny", "/etc/passwd", "tiny/1", "./tiny", "..\\tiny", "tiny\\..\\tiny", "tiny/..", "../../x",
]  # fmt: skip
WHITESPACE = [" ", "\t", "\n", " tiny", "tiny ", " ..", ".. ", "tiny\n"]
OTHERS = [
    "tiny\0",
    "-tiny",
    ".tiny",
    "x" * 129,
    "x" * 1_000_000,
    "http://host/model",
    "tiny\nforged line",
    "mo\u0308del",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("control") / "repository"
    tiny.write(root, 1, seed=1)
    tiny.write(root, 1, seed=7, name="other")
    outside = tmp_path_factory.mktemp("outside")
    tiny.write(outside, 1, seed=1, name="linked")
    (root / "linked").symlink_to(outside / "linked")
    (root / "other" / "2").symlink_to(outside / "linked" / "1")
    return root


@pytest.fixture(scope="module")
def server(root):
    with running(root, engine="eager", model_control="explicit") as server:
        yield server


def unload(server: Running, name: str = "tiny") -> None:
    server.call("RepositoryModelUnload", RepositoryModelUnloadRequest(model_name=name))


def refused(server: Running, rpc: str, request) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        server.call(rpc, request)
    return raised.value


def health(server: Running, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(server.channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status


def wait_for_state(server: Running, state: tuple[str, str], name: str = "tiny") -> None:
    while tiny.index(server)[name, "1"] != state:
        pass


@pytest.mark.parametrize("rpc", sorted(REQUESTS))
def test_it_is_off_unless_the_operator_allows_it(root, rpc):
    with running(root, engine="eager") as server:
        error = refused(server, rpc, REQUESTS[rpc](model_name="tiny"))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "--model-control explicit" in error.details()
        assert tiny.index(server)["tiny", "1"] == ("READY", "")


@pytest.mark.parametrize("rpc", sorted(REQUESTS))
@pytest.mark.parametrize(
    "name", TRAVERSAL + WHITESPACE + OTHERS + ["linked", "nobody"], ids=lambda name: ascii(name)[:20]
)
def test_names_that_name_no_model_are_not_found(server, rpc, name):
    error = refused(server, rpc, REQUESTS[rpc](model_name=name))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert len(error.details()) < 1000
    assert error.details().isprintable()
    assert tiny.index(server) == {("tiny", "1"): ("READY", ""), ("other", "1"): ("READY", "")}


@pytest.mark.parametrize("rpc", sorted(REQUESTS))
def test_an_empty_name_is_an_invalid_argument(server, rpc):
    assert refused(server, rpc, REQUESTS[rpc]()).code() is grpc.StatusCode.INVALID_ARGUMENT


def test_links_out_of_the_repository_are_not_served(server):
    assert ("linked", "1") not in tiny.index(server)
    tiny.load(server, "other")
    assert ("other", "2") not in tiny.index(server)


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("file:../../x", grpc.StatusCode.UNIMPLEMENTED),
        ("file:1/model.onnx", grpc.StatusCode.UNIMPLEMENTED),
        ("config", grpc.StatusCode.UNIMPLEMENTED),
        ("anything", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_files_and_settings_are_never_taken_from_a_request(server, root, key, code):
    before = sorted(root.rglob("*"))
    request = RepositoryModelLoadRequest(model_name="tiny")
    request.parameters[key].bytes_param = b"x"
    assert refused(server, "RepositoryModelLoad", request).code() is code
    assert sorted(root.rglob("*")) == before
    assert np.allclose(tiny.answered(server), tiny.expected(1), atol=1e-5)


def test_a_repository_name_beside_a_model_name_is_refused_as_in_triton(server):
    request = RepositoryModelLoadRequest(repository_name="main", model_name="tiny")
    assert refused(server, "RepositoryModelLoad", request).code() is grpc.StatusCode.UNIMPLEMENTED


def test_kserves_clients_name_the_model_in_field_one_and_are_answered_in_their_way(server):
    for rpc in ("RepositoryModelUnload", "RepositoryModelLoad"):
        call = server.channel.unary_unary(INFERENCE[rpc].path)
        answer = call(b"\x0a\x04tiny", timeout=30)  # model_name = 1
        assert answer == b"\x0a\x04tiny\x10\x01"  # model_name = 1, isLoaded / isUnloaded = 2
    assert tiny.index(server)["tiny", "1"] == ("READY", "")


def test_an_unloaded_model_answers_nothing_and_counts_against_nobody_until_it_is_loaded_again(server):
    assert health(server, "model/tiny") == health_pb2.HealthCheckResponse.SERVING
    unload(server)
    error = refused(server, "ModelInfer", tiny.request())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "unloaded" in error.details()
    assert refused(server, "ModelInfer", tiny.request(version="1")).code() is grpc.StatusCode.UNAVAILABLE
    assert not server.call("ModelReady", ModelReadyRequest(name="tiny")).ready
    assert server.call("ServerReady", ServerReadyRequest()).ready
    wait_for_state(server, ("UNAVAILABLE", "unloaded"))
    assert [m.name for m in server.call("RepositoryIndex", RepositoryIndexRequest(ready=True)).models] == ["other"]
    assert health(server, "model/tiny") == health_pb2.HealthCheckResponse.NOT_SERVING
    assert health(server, "") == health_pb2.HealthCheckResponse.SERVING
    unload(server)  # again: nothing to do, no error
    tiny.load(server)
    assert np.allclose(tiny.answered(server), tiny.expected(1), atol=1e-5)
    assert health(server, "model/tiny") == health_pb2.HealthCheckResponse.SERVING


def test_rows_that_wait_when_a_model_is_unloaded_are_answered(server):
    batcher = server.server.repository.find("tiny", "").batcher
    server.on_loop(batcher.hold)
    waiting = [server.rpc("ModelInfer").future(tiny.request(), timeout=30) for _ in range(3)]
    while server.on_loop(lambda: batcher.queued_rows) < 3 * len(tiny.ROWS):
        pass
    unload(server)
    assert all(np.allclose(tiny.values(call.result()), tiny.expected(1), atol=1e-5) for call in waiting)
    tiny.load(server)


def series(server: Running, **labels: str) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(get(server.metrics))
        for sample in family.samples
        if labels.items() <= sample.labels.items()
    }


def test_series_come_with_a_load_and_go_with_an_unload(server, root):
    own = {"model": "tiny", "version": "1"}
    assert series(server, **own)["layercast_model_ready"] == 1
    loads = series(server, outcome="ok", **own)["layercast_model_loads_total"]
    unload(server)
    wait_for_state(server, ("UNAVAILABLE", "unloaded"))
    assert series(server, **own) == {}
    assert series(server, model="other")["layercast_model_ready"] == 1
    tiny.load(server)
    found = series(server, **own)
    assert (found["layercast_model_ready"], found["layercast_rows_total"]) == (1, 0)
    assert series(server, outcome="ok", **own)["layercast_model_loads_total"] == 1 <= loads
    directory = tiny.write(root, 2, seed=2)
    tiny.edit_manifest(directory, lambda manifest: manifest.update(name="another"))
    refused(server, "RepositoryModelLoad", RepositoryModelLoadRequest(model_name="tiny"))
    failed = series(server, model="tiny", version="2")
    assert failed["layercast_model_ready"] == 0
    assert series(server, model="tiny", version="2", outcome="failed")["layercast_model_loads_total"] == 1


def test_a_storm_of_loads_and_unloads_under_traffic_ends_right(tmp_path):
    tiny.write(tmp_path, 1, seed=1)
    tiny.write(tmp_path, 1, seed=7, name="other")
    allowed = {grpc.StatusCode.UNAVAILABLE}
    wrong: list[object] = []
    done = threading.Event()

    def traffic(server: Running, name: str, seed: int) -> None:
        while not done.is_set():
            try:
                if not np.allclose(tiny.answered(server, name), tiny.expected(seed), atol=1e-5):
                    wrong.append(f"a wrong answer of {name}")
            except grpc.RpcError as error:
                if name == "other" or error.code() not in allowed:
                    wrong.append((name, error.code(), error.details()))

    def control(server: Running) -> None:
        for turn in range(TURNS):
            (unload if turn % 2 else tiny.load)(server)

    with running(tmp_path, engine="eager", model_control="explicit") as server, ThreadPoolExecutor(40) as pool:
        clients = [pool.submit(traffic, server, *who) for who in (("tiny", 1), ("tiny", 1), ("other", 7))]
        storm = [pool.submit(control, server) for _ in range(32)]
        try:
            for one in storm:
                one.result(280)
        finally:
            done.set()
        for client in clients:
            client.result(60)
        assert wrong == []
        tiny.load(server)
        assert tiny.index(server)["tiny", "1"] == ("READY", "")
        assert np.allclose(tiny.answered(server), tiny.expected(1), atol=1e-5)
        unload(server)
        wait_for_state(server, ("UNAVAILABLE", "unloaded"))
        assert server.on_loop(lambda: list(server.server.repository._retiring)) == []


def test_a_load_goes_on_when_its_caller_leaves(tmp_path):
    tiny.write(tmp_path, 1, seed=1)
    with running(tmp_path, engine="eager", model_control="explicit") as server:
        unload(server)
        gate = threading.Event()
        repository = server.server.repository
        server.on_loop(lambda: repository._loader.submit(gate.wait, 30))  # a slow load of something else
        call = server.rpc("RepositoryModelLoad").future(RepositoryModelLoadRequest(model_name="tiny"), timeout=60)
        wait_for_state(server, ("LOADING", ""))
        call.cancel()
        error = refused(server, "ModelInfer", tiny.request())
        assert (error.code(), "loading" in error.details()) == (grpc.StatusCode.UNAVAILABLE, True)
        gate.set()
        wait_for_state(server, ("READY", ""))
        assert np.allclose(tiny.answered(server), tiny.expected(1), atol=1e-5)


def test_an_unload_during_a_load_follows_it(tmp_path):
    tiny.write(tmp_path, 1, seed=1)
    with running(tmp_path, engine="eager", model_control="explicit") as server:
        gate = threading.Event()
        repository = server.server.repository
        server.on_loop(lambda: repository._loader.submit(gate.wait, 30))
        tiny.write(tmp_path, 1, seed=2)
        loading = server.rpc("RepositoryModelLoad").future(RepositoryModelLoadRequest(model_name="tiny"), timeout=60)
        while not server.on_loop(lambda: repository._tasks):
            pass
        unloading = server.rpc("RepositoryModelUnload").future(
            RepositoryModelUnloadRequest(model_name="tiny"), timeout=60
        )
        assert np.allclose(tiny.answered(server), tiny.expected(1), atol=1e-5)
        gate.set()
        loading.result()
        unloading.result()
        wait_for_state(server, ("UNAVAILABLE", "unloaded"))
