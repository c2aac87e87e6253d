"""The front end grpcio shares its port among several servers of grpc.aio: callers see one, and no other process gets in."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from test_server_inference import offline, request, rows_for, values_of
from test_server_process import READY, serving

from layercast.proto.rpc import INFERENCE
from layercast.server.transport.grpcio import SERVERS

GRPCIO = ("--front-end", "grpcio", "--http-port", "0", "--metrics-port", "0", "--engine", "eager")
CONNECTIONS = 6 * SERVERS


def asked(port: str, x: np.ndarray) -> np.ndarray:
    """Ask over a connection of its own."""
    method = INFERENCE["ModelInfer"]
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        infer = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        return values_of(infer(request("mnist", x), timeout=30))


def test_every_connection_is_answered_whichever_server_has_it(only_mnist, modules):
    rows = [rows_for("mnist", 1 + at % 3) for at in range(CONNECTIONS)]
    with serving(only_mnist, *GRPCIO, "--grpc-port", "0") as server, ThreadPoolExecutor(CONNECTIONS) as pool:
        port, _, _ = server.read_until(READY).groups()
        for x, got in zip(rows, pool.map(lambda x: asked(port, x), rows), strict=True):
            np.testing.assert_allclose(got, offline(modules["mnist"], x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("second", ["grpcio", "direct"])
def test_no_other_process_shares_the_port(only_mnist, second):
    with serving(only_mnist, *GRPCIO, "--grpc-port", "0") as server:
        port, _, _ = server.read_until(READY).groups()
        other = ("--front-end", second, *GRPCIO[2:], "--grpc-port", port)
        with serving(only_mnist, *other) as late:
            late.read_until(f"gRPC port {port} on 127.0.0.1 is in use.*--grpc-port")
            late.rest()
            assert late.popen.returncode == 1
        assert asked(port, rows_for("mnist", 1)).shape == (1, 10)
