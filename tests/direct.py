"""A server whose front end is `direct`, and what its tests do with it beside speaking HTTP/2."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from h2.errors import ErrorCodes
from h2_peer import Peer, Reply
from numeric import Model, asked, identity, numeric
from serving import Running
from test_server_inference import values_of, wait_until

from layercast.proto.messages import ModelInferResponse
from layercast.proto.rpc import INFERENCE, INFERENCE_SERVICE

MESSAGE_LIMIT = 64 << 20
ROW = 1 << 18  # of `wide`, in values of four bytes: 1 MiB
MODELS = {
    "same": Model(identity),
    "first": Model(lambda inputs: {"y": inputs["x"][:, :1]}, outputs=[("y", "FP32", (1,))]),
    "wide": Model(lambda inputs: {"y": np.zeros((len(inputs["x"]), ROW), "f4")}),
}
OK, CANCELLED, INVALID, LATE, EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 0, 1, 3, 4, 8, 12, 13, 14
LIVE = b"\x08\x01"
"""The message that ServerLive answers with."""


@contextmanager
def serving_directly(**options: Any) -> Iterator[Running]:
    """Serve MODELS. Fails in the end when a callback of the event loop has raised."""
    faults: list[dict[str, Any]] = []
    with numeric(MODELS, MESSAGE_LIMIT, front_end="direct", **options) as server:
        loop = server.loop
        loop.call_soon_threadsafe(loop.set_exception_handler, lambda _, fault: faults.append(fault))
        server.faults = faults
        yield server
    assert not faults


@contextmanager
def peers_of(server: Running) -> Iterator[Callable[..., Peer]]:
    """Yield what opens connections to `server`, and see in the end that they did no harm."""
    opened = []

    def connect(*settings: Any, **options: Any) -> Peer:
        opened.append(Peer(server.server.grpc_port, *settings, **options))
        return opened[-1]

    try:
        yield connect
    finally:
        for peer in opened:
            peer.close()
    still_serves(server)


def still_serves(server: Running) -> None:
    """Another connection gets a right answer, nothing is left running, and no callback has raised."""
    x = np.array([[1.5, -2]], "f4")
    np.testing.assert_array_equal(values_of(server.call("ModelInfer", asked("same", x), timeout=20)), x)
    wait_until(server, lambda: all(idle(model) for model in server.server.repository.models.values()))
    faults, server.faults[:] = server.faults[:], []
    assert not faults


def idle(model: Any) -> bool:
    return model.batcher.queued_rows == 0


@contextmanager
def held(server: Running, model: str = "same") -> Iterator[Any]:
    """Hold the model, whose calls wait meanwhile; yields its batcher."""
    batcher = server.server.repository.find(model, "").batcher
    server.on_loop(batcher.hold)
    try:
        yield batcher
    finally:
        server.on_loop(batcher.release)


def ended(server: Running, code: str, name: str = "ModelInfer", service: str = INFERENCE_SERVICE) -> float:
    """How many calls of the RPC have ended with that status."""
    kind = INFERENCE[name].kind if name in INFERENCE else "unary"
    assert code in grpc.StatusCode.__members__
    return server.server.metrics.rpc_handled.labels(kind, service, name, code).value


def floats(count: int, model: str = "same") -> Any:
    """A request with one row of so many values."""
    return asked(model, np.arange(count, dtype="f4")[None])


def assert_echoed(reply: Reply, count: int) -> None:
    """The reply is the right answer to `floats(count)`."""
    assert reply.status == OK, reply
    (raw,) = reply.messages
    np.testing.assert_array_equal(values_of(ModelInferResponse.FromString(raw))[0], np.arange(count, dtype="f4"))


def assert_alive(peer: Peer, stream: int) -> None:
    """The connection serves a call on this, its next stream."""
    peer.call(stream, "ServerLive")
    reply = peer.answer(stream)
    assert (reply.status, reply.messages) == (OK, [LIVE]), (reply, peer.goaway)


def assert_connection_error(peer: Peer, *codes: ErrorCodes) -> None:
    """The server says one of these in a GOAWAY, and closes."""
    assert peer.ends() in codes, peer.frames[-5:]


def assert_stream_error(peer: Peer, stream: int, *codes: ErrorCodes) -> None:
    """The server resets the stream, or ends the connection, with one of these."""
    reply = peer.streams[stream]
    while not (reply.over or peer.goaway) and peer.read() is not None:
        pass
    assert reply.reset in codes or peer.said() in codes, peer.frames[-5:]
    if peer.goaway:
        peer.ends()
