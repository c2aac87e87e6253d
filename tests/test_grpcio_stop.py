"""The front end `grpcio`: its servers stop together, whichever of them a caller is connected to."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import grpc
import numpy as np
import pytest
from numeric import Model, asked, identity, numeric
from serving import Running

from layercast.proto.messages import ModelInferRequest
from layercast.proto.rpc import INFERENCE
from layercast.server.transport.grpcio import SERVERS
from layercast.server.transport.ports import listening_socket

CONNECTIONS = 4 * SERVERS
LISTENS = "0A"
"""A state in /proc/net/tcp and tcp6: grpc takes IPv4 addresses as part of IPv6."""


@pytest.fixture
def served() -> Iterator[Running]:
    with numeric({"same": Model(identity)}, front_end="grpcio") as server:
        yield server


@pytest.fixture
def channels(served) -> Iterator[list[grpc.Channel]]:
    """Connections of their own."""
    with ExitStack() as stack:
        own = [("grpc.use_local_subchannel_pool", 1)]
        yield [stack.enter_context(grpc.insecure_channel(served.url, own)) for _ in range(CONNECTIONS)]


def opened(channel: grpc.Channel, number: int) -> grpc.Call:
    """Open a stream, ask once and return the stream, on which nothing more is asked until it ends."""
    method = INFERENCE["ModelStreamInfer"]
    stub = channel.stream_stream(method.path, method.request.SerializeToString, method.response.FromString)
    ended = Event()

    def requests() -> Iterator[ModelInferRequest]:
        yield asked("same", np.zeros((1, 2), "f4"), id=str(number))
        ended.wait(30)

    stream = stub(requests(), timeout=30)
    stream.add_callback(ended.set)
    assert next(stream).infer_response.id == str(number)
    return stream


@pytest.mark.skipif(sys.platform != "linux", reason="one server, and no /proc")
def test_so_many_listen(served):
    rows = [row for name in ("tcp", "tcp6") for row in Path("/proc/net", name).read_text().splitlines()[1:]]
    ports = [local.rpartition(":")[2] for _, local, _, state, *_ in map(str.split, rows) if state == LISTENS]
    assert ports.count(f"{served.server.grpc_port:04X}") == SERVERS


def test_streams_on_all_of_them_end_and_the_port_is_free(served, channels):
    streams = [opened(channel, number) for number, channel in enumerate(channels)]
    served.wait(served.server.front_end.stop(20))
    for stream in streams:
        with pytest.raises(grpc.RpcError) as ended:
            list(stream)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "everything that was read from this stream is answered" in ended.value.details()
    listening_socket("gRPC", "127.0.0.1", served.server.grpc_port, "--grpc-port").close()
