"""The end of a server: what is answered, what is refused, in which order, and how soon the process is gone."""

import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

import grpc
import numpy as np
import pytest
import tiny
from grpc_health.v1 import health_pb2, health_pb2_grpc
from test_server_operations import get
from test_server_process import FREE, READY, serving

from layercast.proto.messages import RepositoryModelLoadRequest, ServerReadyRequest
from layercast.proto.rpc import INFERENCE

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

SLOW = (
    f"""
import time
MARK = {float(tiny.ROWS[0, 0])!r}
"""
    + """
from layercast.server.engines.eager import EagerEngine
run = EagerEngine.run
def slow(self, inputs):
    if inputs["x"][0, 0] == MARK:  # the tests' requests, and not what a load runs
        print("computing", flush=True)
        time.sleep({seconds})
    return run(self, inputs)
EagerEngine.run = slow
"""
)
SLOW_LOAD = """
import time
from layercast.server import repository
load = repository.load
def slow(*given, count=[]):
    count.append(1)
    if len(count) > {quick}:
        print("loading", flush=True)
        time.sleep(600)
    return load(*given)
repository.load = slow
"""


@pytest.fixture
def root(tmp_path):
    tiny.write(tmp_path, 1, seed=1)
    return tmp_path


@contextmanager
def channel_to(port: str):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel


def rpc(channel: grpc.Channel, name: str):
    method = INFERENCE[name]
    return channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)


def refusal(infer) -> grpc.RpcError:
    """Ask until a request is refused."""
    while True:
        try:
            infer(tiny.request(rows=tiny.ROWS[1:2]), timeout=30)
        except grpc.RpcError as error:
            return error


def test_sigterm_says_not_ready_then_refuses_what_comes_and_answers_what_was_admitted(root):
    patch = SLOW.format(seconds=0.3)
    with serving(root, *FREE, "--max-batch", "3", "--drain-delay-seconds", "2.5", patch=patch) as server:
        ports = server.read_until(READY)
        with channel_to(ports[1]) as channel:
            infer = rpc(channel, "ModelInfer")
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
            assert next(health).status == health_pb2.HealthCheckResponse.SERVING
            calls = [infer.future(tiny.request(), timeout=60) for _ in range(7)]
            server.read_until("computing")
            server.popen.send_signal(signal.SIGTERM)
            assert next(health).status == NOT_SERVING
            assert not rpc(channel, "ServerReady")(ServerReadyRequest(), timeout=10).ready
            with pytest.raises(HTTPError, match="503"):
                get(f"http://127.0.0.1:{ports[2]}/v2/health/ready")
            # Whoever has not heard of it yet is answered while the delay lasts.
            calls += [infer.future(tiny.request(), timeout=60) for _ in range(4)]
            # A call that meets the very moment at which grpc closes its port is cancelled by grpc itself.
            assert refusal(infer).code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
            for call in calls:
                assert np.allclose(tiny.values(call.result()), tiny.expected(1), atol=1e-5)
        assert "stopped" in server.rest()
        assert server.popen.returncode == 0


def test_a_forward_that_never_ends_does_not_keep_the_process(root):
    patch = SLOW.format(seconds=600)
    with serving(root, *FREE, "--max-batch", "3", "--drain-seconds", "0.5", patch=patch) as server:
        ports = server.read_until(READY)
        with channel_to(ports[1]) as channel:
            calls = [rpc(channel, "ModelInfer").future(tiny.request(), timeout=60) for _ in range(3)]
            server.read_until("computing")
            began = time.monotonic()
            server.popen.send_signal(signal.SIGTERM)
            for call in calls:
                assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
            assert "cut off" in server.rest()
            assert time.monotonic() - began < 10
        assert server.popen.returncode == 1


def test_a_second_signal_ends_the_process_at_once(root):
    patch = SLOW.format(seconds=600)
    with serving(root, *FREE, "--drain-seconds", "600", patch=patch) as server:
        ports = server.read_until(READY)
        with channel_to(ports[1]) as channel:
            call = rpc(channel, "ModelInfer").future(tiny.request(), timeout=60)
            server.read_until("computing")
            server.popen.send_signal(signal.SIGTERM)
            server.read_until("stopping")
            server.popen.send_signal(signal.SIGTERM)
            assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
        server.rest()
        assert server.popen.returncode == 130


def test_a_slow_load_holds_up_neither_requests_nor_the_end(root):
    with serving(root, *FREE, "--model-control", "explicit", patch=SLOW_LOAD.format(quick=1)) as server:
        ports = server.read_until(READY)
        tiny.write(root, 2, seed=2)
        with channel_to(ports[1]) as channel:
            request = RepositoryModelLoadRequest(model_name="tiny")
            loading = rpc(channel, "RepositoryModelLoad").future(request, timeout=60)
            server.read_until("loading")
            answer = rpc(channel, "ModelInfer")(tiny.request(), timeout=10)
            assert np.allclose(tiny.values(answer), tiny.expected(1), atol=1e-5)
            assert rpc(channel, "ServerReady")(ServerReadyRequest(), timeout=10).ready
            began = time.monotonic()
            server.popen.send_signal(signal.SIGTERM)
            assert loading.exception().code() is grpc.StatusCode.UNAVAILABLE
            server.rest()
            assert time.monotonic() - began < 8
        assert server.popen.returncode == 0


def test_sigterm_during_the_first_load_ends_the_process(root):
    with serving(root, *FREE, patch=SLOW_LOAD.format(quick=0)) as server:
        server.read_until("loading")
        server.popen.send_signal(signal.SIGTERM)
        assert "stopped while starting" in server.rest()
        assert server.popen.returncode == 0


def processes_naming(text: str) -> list[Path]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(path)
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_export_of_the_zoo_ends_with_the_server(tmp_path, number):
    cache = tmp_path / "cache"
    with serving(None, *FREE, "--cache", str(cache)) as server:
        server.read_until("exporting ")
        while len(processes_naming(f"{cache}/zoo-")) < 1:
            pass
        server.popen.send_signal(number)
        server.popen.wait(30)
        end = time.monotonic() + 20
        while processes_naming(str(cache)):
            assert time.monotonic() < end, "the export outlived the server"
            time.sleep(0.05)


def test_an_export_ends_when_its_standard_input_does_and_leaves_nothing_half_done(tmp_path):
    """Its output stays open, so that it isn't a broken pipe that ends it."""
    command = [sys.executable, "-m", "layercast.models.commands.export", "--all", "--output", str(tmp_path)]
    with subprocess.Popen([*command, "--until-stdin-ends"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin
        assert child.stdout
        assert child.stdout.readline()  # a program is written, and more are to come
        child.stdin.close()
        assert child.wait(30) == 130
    assert [path for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_a_killed_server_leaves_nothing_in_the_way_of_the_next(root):
    with serving(root, *FREE) as first:
        ports = first.read_until(READY)
        with channel_to(ports[1]) as channel:
            rpc(channel, "ModelInfer")(tiny.request(), timeout=30)
            first.popen.kill()
            first.popen.wait(30)
    same = ("--grpc-port", ports[1], "--http-port", ports[2], "--metrics-port", ports[3], "--engine", "eager")
    with serving(root, *same) as second:
        again = second.read_until(READY)
        assert again.groups() == ports.groups()
        with channel_to(again[1]) as channel:
            answer = rpc(channel, "ModelInfer")(tiny.request(), timeout=30, wait_for_ready=True)
            assert np.allclose(tiny.values(answer), tiny.expected(1), atol=1e-5)
