"""The health service: watchers hear every standing change, and none of them holds up the others or the end."""

import time

import pytest
import tiny
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import running

from layercast.proto.messages import RepositoryModelUnloadRequest

Status = health_pb2.HealthCheckResponse


@pytest.fixture
def root(tmp_path):
    tiny.write(tmp_path, 1, seed=1)
    return tmp_path


def watch(server, service: str):
    stub = health_pb2_grpc.HealthStub(server.channel)
    return stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)


def unload(server) -> None:
    server.call("RepositoryModelUnload", RepositoryModelUnloadRequest(model_name="tiny"))


def test_every_watcher_hears_a_change_also_when_another_has_left(root):
    with running(root, engine="eager", model_control="explicit") as server:
        leaving, staying, server_wide = watch(server, "model/tiny"), watch(server, "model/tiny"), watch(server, "")
        for stream in (leaving, staying, server_wide):
            assert next(stream).status == Status.SERVING
        leaving.cancel()
        while len(server.on_loop(lambda: server.server._grpc._health._watchers)) > 2:
            pass
        unload(server)
        assert next(staying).status == Status.NOT_SERVING
        tiny.load(server)
        assert next(staying).status == Status.SERVING
        server_wide.cancel()


def test_an_unknown_service_becomes_known(root):
    with running(root, engine="eager", watch=0.05) as server:
        stream = watch(server, "model/later")
        assert next(stream).status == Status.SERVICE_UNKNOWN
        tiny.write(root, 1, seed=2, name="later")
        heard = [next(stream).status]
        if heard == [Status.NOT_SERVING]:  # while it loads
            heard.append(next(stream).status)
        assert heard[-1] == Status.SERVING
        stream.cancel()


def test_open_watches_are_told_and_ended_and_do_not_delay_the_end(root):
    with running(root, engine="eager", drain_seconds=60.0) as server:
        streams = [watch(server, service) for service in ("", "model/tiny", "nobody")]
        first = [next(stream).status for stream in streams]
        assert first == [Status.SERVING, Status.SERVING, Status.SERVICE_UNKNOWN]
        began = time.monotonic()
        assert server.wait(server.server.shut_down())
        assert time.monotonic() - began < 20
        assert [[answer.status for answer in stream] for stream in streams] == [
            [Status.NOT_SERVING],
            [Status.NOT_SERVING],
            [],
        ]
