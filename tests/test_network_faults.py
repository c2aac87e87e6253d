"""What a broken network or a stranger's bytes do to a server: nothing that outlasts the connection."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import numpy as np
import pytest
from broken_network import proxy
from oracle.soak import gauges
from test_server_inference import offline, request, rows_for, values_of
from test_server_process import FREE, READY, serving

from layercast.proto.messages import ServerLiveRequest, ServerReadyRequest
from layercast.proto.rpc import INFERENCE

X = rows_for("mnist", 20)


class Target:
    """A server process, asked directly or through a broken network."""

    def __init__(self, grpc_port: int, metrics_port: int, right: np.ndarray) -> None:
        self.port = grpc_port
        self.right = right
        self._metrics = f"http://127.0.0.1:{metrics_port}/metrics"

    def infer(self, port: int | None = None, timeout: float = 20.0) -> None:
        """Ask for the right answer, through `port` when it is given."""
        with grpc.insecure_channel(
            f"127.0.0.1:{port or self.port}", [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        ) as channel:
            method = INFERENCE["ModelInfer"]
            call = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
            np.testing.assert_allclose(values_of(call(request("mnist", X), timeout=timeout)), self.right, atol=1e-4)

    def answers(self) -> None:
        """Live, ready, and one right answer."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            for name, message in (("ServerLive", ServerLiveRequest()), ("ServerReady", ServerReadyRequest())):
                method = INFERENCE[name]
                call = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
                response = call(message, timeout=5)
                assert getattr(response, name.removeprefix("Server").lower())
        self.infer()

    def open_files(self) -> int:
        return int(gauges(self._metrics, "process_open_fds")["process_open_fds"])

    def inflight(self) -> int:
        return int(gauges(self._metrics, "layercast_inflight_requests")["layercast_inflight_requests"])


@pytest.fixture(scope="module")
def target(only_mnist, modules) -> Iterator[Target]:
    with serving(only_mnist, *FREE) as server:
        ports = server.read_until(READY)
        yield Target(int(ports[1]), int(ports[3]), offline(modules["mnist"], X))


@pytest.fixture(scope="module")
def length(target) -> int:
    """Bytes that a client sends for one request."""
    with proxy(target.port) as through:
        target.infer(through.port)
        return through.passed


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize("part", [0.0, 0.0002, 0.002, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_connection_broken_in_a_request_leaves_nothing_behind(target, length, part, how):
    with proxy(target.port, after=max(1, int(part * length)), how=how) as broken, pytest.raises(grpc.RpcError) as error:
        target.infer(broken.port, timeout=1)
    assert error.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    target.answers()
    settle(lambda: target.inflight() == 0)


def test_a_client_that_stalls_in_a_message_holds_up_nobody(target, length):
    with ExitStack() as stack, ThreadPoolExecutor(20) as clients:
        stalled = [stack.enter_context(proxy(target.port, after=length // 2, how="stall")) for _ in range(20)]
        ends = [clients.submit(target.infer, one.port, timeout=2) for one in stalled]
        while not all(end.done() for end in ends):
            target.infer()
        assert {end.exception().code() for end in ends} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert {one.passed for one in stalled} == {length // 2}
        target.infer()
    target.answers()


STRANGE = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(range(200)),
    "noise": os.urandom(4096),
    "preface and noise": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(4096),
    "settings flood": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000") * 20_000,
    "continuation flood": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + bytes.fromhex("000000040000000000")
    + bytes.fromhex("000001010000000001") + b"\x82"
    + (bytes.fromhex("000400090000000001") + b"\x00\x80" * 512) * 2_000,
}  # fmt: skip


@pytest.mark.parametrize("data", STRANGE.values(), ids=STRANGE)
def test_bytes_that_are_no_grpc_are_refused(target, data):
    with socket.create_connection(("127.0.0.1", target.port), timeout=10) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65_536):
                pass
        except OSError:
            pass  # refused while we still sent
    target.answers()


def test_idle_and_fleeting_connections_cost_nothing_that_stays(target):
    target.answers()
    before = target.open_files()
    for _ in range(1000):
        socket.create_connection(("127.0.0.1", target.port)).close()
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection(("127.0.0.1", target.port)))
        target.answers()
    settle(lambda: target.open_files() <= before + 5)


def test_a_flood_of_streams_opened_and_reset_leaves_the_others_served(target):
    """Rapid reset (CVE-2023-44487): each stream is cancelled in the packet that opens it."""
    path = INFERENCE["ModelInfer"].path.encode()
    fields = b"\x83\x86" + b"\x04" + bytes([len(path)]) + path  # POST, http, the path as a literal
    fields += b"\x0f\x10\x10application/grpc" + b"\x00\x02te\x08trailers"
    with socket.create_connection(("127.0.0.1", target.port), timeout=20) as sock:
        try:
            sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
            for first in range(1, 40_000, 2_000):
                sock.sendall(
                    b"".join(
                        frame(1, 4, stream, fields) + frame(3, 0, stream, b"\0\0\0\x08")
                        for stream in range(first, first + 2_000, 2)
                    )
                )
                target.infer()
        except ConnectionError:
            pass  # a server may well end such a connection
        target.answers()
    settle(lambda: target.inflight() == 0)
    target.answers()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return an HTTP/2 frame (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def settle(condition) -> None:
    """Wait until the server has noticed; it is asked each time, so there is no need to sleep."""
    for _ in range(500):
        if condition():
            return
    raise AssertionError("it never settled")
