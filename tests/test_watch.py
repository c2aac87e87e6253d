"""`--watch`: what is copied into, changed in and taken out of the repository's folder is served, without a call."""

import shutil
import time
from collections.abc import Callable

import numpy as np
import pytest
import tiny
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import Running, running

from layercast.proto.messages import ServerReadyRequest
from layercast.server.errors import StartError

LOOK = 0.05


@pytest.fixture
def staging(tmp_path):
    """A folder on the same file system, to rename from."""
    return tmp_path / "staging"


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "repository"
    tiny.write(root, 1, seed=1)
    return root


@pytest.fixture
def server(root):
    with running(root, engine="eager", watch=LOOK) as server:
        yield server


def until(true: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(LOOK / 2)


def looks(server: Running, count: int) -> None:
    """Return after so many looks at the folder have begun and ended."""
    seen = 0
    watcher = server.server.watcher
    first = server.on_loop(lambda: watcher.looks)
    while seen < first + count:
        seen = server.on_loop(lambda: watcher.looks)
        time.sleep(LOOK / 2)


def right(server: Running, seed: int, name: str = "tiny", version: str = "") -> bool:
    return np.allclose(tiny.answered(server, name, version), tiny.expected(seed), atol=1e-5)


def test_versions_come_change_and_go(server, root):
    tiny.write(root, 2, seed=2)
    until(lambda: ("tiny", "2") in tiny.index(server) and tiny.index(server)["tiny", "2"] == ("READY", ""))
    assert right(server, 2)
    assert right(server, 1, version="1")
    tiny.write(root, 2, seed=3)
    until(lambda: right(server, 3))
    shutil.rmtree(root / "tiny" / "2")
    until(lambda: list(tiny.index(server)) == [("tiny", "1")])
    assert right(server, 1)


def test_models_come_and_go(server, root):
    tiny.write(root, 1, seed=5, name="other")
    until(lambda: tiny.index(server).get(("other", "1")) == ("READY", ""))
    assert right(server, 5, "other")
    stub = health_pb2_grpc.HealthStub(server.channel)
    watching = stub.Watch(health_pb2.HealthCheckRequest(service="model/other"), timeout=60)
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
    shutil.rmtree(root / "other")
    assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watching.cancel()
    assert list(tiny.index(server)) == [("tiny", "1")]
    assert server.call("ServerReady", ServerReadyRequest()).ready


def test_a_copy_under_way_is_waited_for_in_silence_and_served_when_it_is_whole(server, root, staging):
    whole = tiny.write(staging, 2, seed=2)
    target = root / "tiny" / "2"
    target.mkdir()
    for file in sorted(whole.iterdir()):  # golden, manifest, weights
        content = file.read_bytes()
        (target / file.name).write_bytes(content[: len(content) // 2])
        looks(server, 2)
        assert list(tiny.index(server)) == [("tiny", "1")]
        (target / file.name).write_bytes(content)
    until(lambda: tiny.index(server).get(("tiny", "2")) == ("READY", ""))
    assert right(server, 2)


def test_a_copy_that_stops_half_way_is_named_and_still_served_when_it_goes_on(server, root, staging):
    whole = tiny.write(staging, 2, seed=2)
    tiny.half_copy(whole, root / "tiny" / "2")
    until(lambda: ("tiny", "2") in tiny.index(server))
    state, reason = tiny.index(server)["tiny", "2"]
    assert state == "UNAVAILABLE"
    assert reason.startswith("weights.safetensors has 100 of ")
    assert right(server, 1)
    assert server.call("ServerReady", ServerReadyRequest()).ready
    shutil.copy(whole / "weights.safetensors", root / "tiny" / "2" / "weights.safetensors")
    until(lambda: tiny.index(server)["tiny", "2"] == ("READY", ""))
    assert right(server, 2)


def test_a_broken_version_is_tried_once_and_again_when_it_changes(server, root, staging):
    broken = tiny.write(staging, 1, seed=2)
    golden = tiny.write(staging, 2, seed=3) / "golden.safetensors"
    shutil.copy(golden, broken / "golden.safetensors")
    loads = server.server.metrics.loads.labels("tiny", "1", "failed")
    shutil.rmtree(root / "tiny" / "1")
    broken.rename(root / "tiny" / "1")
    until(lambda: tiny.index(server)["tiny", "1"][1])
    looks(server, 4)
    assert loads.value == 1
    assert right(server, 1)  # from memory
    tiny.write(root, 1, seed=4)
    until(lambda: right(server, 4))
    assert tiny.index(server)["tiny", "1"] == ("READY", "")


def test_the_folder_going_away_takes_nothing_from_anybody(server, root, tmp_path):
    root.rename(tmp_path / "unmounted")
    looks(server, 4)
    assert right(server, 1)
    (tmp_path / "unmounted").rename(root)
    tiny.write(root, 2, seed=2)
    until(lambda: right(server, 2))


def test_a_watched_folder_may_be_empty_at_the_start(tmp_path):
    root = tmp_path / "repository"
    root.mkdir()
    with pytest.raises(StartError, match="holds no model"), running(root):
        pass
    with running(root, engine="eager", watch=LOOK) as server:
        tiny.write(root, 1, seed=1)
        until(lambda: tiny.index(server) == {("tiny", "1"): ("READY", "")})
        assert right(server, 1)
