"""The front end `direct`: a call that ends before its message is whole is counted like any other, under its status."""

import grpc
import pytest
from direct import floats, held, serving_directly
from h2_frames import END_HEADERS, Kind, call_headers, frame, message
from h2_peer import Peer
from test_direct_shutdown import stopping
from test_server_inference import wait_until

from layercast.proto.rpc import INFERENCE

HEALTH = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
RPCS = {
    "ModelInfer": ("unary", INFERENCE["ModelInfer"].path),
    "ServerLive": ("unary", INFERENCE["ServerLive"].path),
    WATCH: ("server_stream", WATCH),
    HEALTH: ("unary", HEALTH),
    "/no.Such/Rpc": ("unary", "/(unknown)/(unknown)"),
}
"""One with a short path, some with handlers, one that nobody knows."""
ENDS = {
    "no message": (b"", "INVALID_ARGUMENT"),
    "a part of a message": (b"\0\0\0\0\5ab", "INVALID_ARGUMENT"),
    "two messages": (message(b"") * 2, "INVALID_ARGUMENT"),
    "no flag": (message(b"", flag=7), "INVALID_ARGUMENT"),
    "too large": (b"\0\x7f\0\0\0", "RESOURCE_EXHAUSTED"),
    "compressed as nothing says": (message(b"abc", flag=1), "UNIMPLEMENTED"),
}
KNOWN = [name for name in RPCS if name != "/no.Such/Rpc"]


class Counts:
    """What was counted for an RPC since this was made."""

    def __init__(self, server, name):
        kind, path = RPCS[name]
        _, service, method = path.split("/")
        self.labels = {"grpc_type": kind, "grpc_service": service, "grpc_method": method}
        self.server = server
        self.before = self._now()

    def ended(self):
        """How many have ended, by their status."""
        before, now = self.before["ended"], self._now()["ended"]
        return {code: now[code] - before[code] for code in now if now[code] != before[code]}

    def assert_one(self, code):
        """One call has ended with that status, no other; its message was not received."""
        wait_until(self.server, self.ended)
        assert self.ended() == {code: 1}
        now = self._now()
        assert {name: now[name] - self.before[name] for name in ("started", "timed", "received")} == {
            "started": 1, "timed": 1, "received": 0,
        }  # fmt: skip

    def _now(self):
        registry = self.server.server.metrics.registry
        values = {
            "started": "grpc_server_started_total", "timed": "grpc_server_handling_seconds_count",
            "received": "grpc_server_msg_received_total",
        }  # fmt: skip
        found = {name: registry.get_sample_value(metric, self.labels) or 0 for name, metric in values.items()}
        found["ended"] = {
            code.name: registry.get_sample_value("grpc_server_handled_total", {**self.labels, "grpc_code": code.name})
            or 0
            for code in grpc.StatusCode
        }
        return found


def begun(peer, name, *more):
    """Begin a call, with the first bytes of a message."""
    peer.headers(1, call_headers(name, *more))
    peer.data(1, b"\0\0\0\0\5ab")


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("end", ENDS)
def test_one_whose_body_is_no_message(connect, direct, name, end):
    body, code = ENDS[end]
    peer, counts = connect(), Counts(direct, name)
    peer.headers(1, call_headers(name))
    peer.data(1, body, end=True)
    assert peer.answer(1).status == grpc.StatusCode[code].value[0]
    assert counts.ended() == {code: 1}, "who has seen the status finds it in the metrics"
    counts.assert_one(code)


@pytest.mark.parametrize("name", KNOWN)
def test_one_that_is_reset(connect, direct, name):
    peer, counts = connect(), Counts(direct, name)
    begun(peer, name)
    peer.reset(1)
    counts.assert_one("CANCELLED")


@pytest.mark.parametrize("name", RPCS)
def test_one_that_is_reset_in_the_read_that_brings_it(connect, direct, name):
    """Its handler, if it has one, never begins."""
    peer, counts = connect(), Counts(direct, name)
    block = peer.encoder.encode(list(call_headers(name)))
    peer.send(frame(Kind.HEADERS, END_HEADERS, 1, block) + frame(Kind.RST_STREAM, 0, 1, b"\0\0\0\x08"))
    counts.assert_one("CANCELLED")


@pytest.mark.parametrize("name", KNOWN)
def test_one_whose_connection_is_lost(connect, direct, name):
    peer, counts = connect(), Counts(direct, name)
    begun(peer, name)
    peer.close()
    counts.assert_one("CANCELLED")


@pytest.mark.parametrize("name", KNOWN)
def test_one_whose_deadline_passes(connect, direct, name):
    peer, counts = connect(), Counts(direct, name)
    begun(peer, name, ("grpc-timeout", "20m"))
    assert peer.answer(1).status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    counts.assert_one("DEADLINE_EXCEEDED")


def test_one_whose_caller_resets_it_at_its_deadline(connect, direct):
    peer, counts = connect(), Counts(direct, "ModelInfer")
    block = peer.encoder.encode(list(call_headers("ModelInfer", ("grpc-timeout", "0m"))))
    peer.send(frame(Kind.HEADERS, END_HEADERS, 1, block) + frame(Kind.RST_STREAM, 0, 1, b"\0\0\0\x08"))
    counts.assert_one("DEADLINE_EXCEEDED")


@pytest.mark.parametrize("name", RPCS)
def test_one_whose_deadline_can_not_be_read(connect, direct, name):
    peer, counts = connect(), Counts(direct, name)
    peer.call(1, name, b"", ("grpc-timeout", "soon"))
    assert peer.answer(1).status == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    counts.assert_one("INVALID_ARGUMENT")


@pytest.mark.parametrize("name", KNOWN)
def test_one_that_the_end_of_the_server_cuts_off(name):
    with serving_directly() as server, Peer(server.server.grpc_port) as peer:
        counts = Counts(server, name)
        begun(peer, name)
        peer.ping()
        with stopping(server, grace=0.05):
            assert peer.answer(1).status == grpc.StatusCode.UNAVAILABLE.value[0]
            peer.ends()
        counts.assert_one("UNAVAILABLE")


def test_whole_calls_are_counted_once_however_they_end(connect, direct):
    peer, counts = connect(), Counts(direct, "ModelInfer")
    peer.call(1, "ModelInfer", floats(3))
    assert peer.answer(1).status == 0
    with held(direct) as batcher:
        peer.call(3, "ModelInfer", floats(3))
        wait_until(direct, lambda: batcher.queued_rows == 1)
        peer.reset(3)
        wait_until(direct, lambda: batcher.queued_rows == 0)
    peer.call(5, "ModelInfer", b"no message of protobuf")
    peer.answer(5)
    assert counts.ended() == {"OK": 1, "CANCELLED": 1, "INVALID_ARGUMENT": 1}


def test_those_that_nobody_knows_are_counted_once(connect, direct):
    peer, counts = connect(), Counts(direct, "/no.Such/Rpc")
    peer.call(1, "/no.Such/Rpc")
    assert peer.answer(1).status == grpc.StatusCode.UNIMPLEMENTED.value[0]
    assert counts.ended() == {"UNIMPLEMENTED": 1}
