"""The front end `direct`: a peer that has ended its side of the connection still gets the answers to what came whole."""

import asyncio
import socket
import struct

import hosting
import numpy as np
import pytest
from direct import LIVE, OK, assert_echoed, ended, floats, held, serving_directly
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2_frames import Kind, call_headers, message
from h2_peer import Peer
from numeric import asked
from test_direct_shutdown import stopping
from test_server_inference import wait_until

LINGER_NOT = struct.pack("ii", 1, 0)


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "asyncio":
            patch.setattr(hosting, "_uvloop", asyncio.new_event_loop)
        with serving_directly() as server:
            yield server


@pytest.fixture
def peer(server):
    with Peer(server.server.grpc_port) as peer:
        yield peer


def shut(peer):
    """End our side of the connection."""
    peer.socket.shutdown(socket.SHUT_WR)


def closes(server):
    """Wait until the server holds no connection."""
    wait_until(server, lambda: not server.server.front_end._connections)


def test_what_came_whole_is_answered_and_then_the_connection_closes(server, peer):
    with held(server) as batcher:
        for stream in (1, 3):
            peer.call(stream, "ModelInfer", floats(10))
        shut(peer)
        peer.until(lambda: peer.goaway)
        assert batcher.queued_rows == 2
    for stream in (1, 3):
        assert_echoed(peer.answer(stream), 10)
    assert peer.ends() is ErrorCodes.NO_ERROR
    closes(server)


@pytest.mark.parametrize("name", ["ServerLive", "ModelInfer"])
def test_an_answer_that_is_ready_at_once_comes(server, peer, name):
    peer.call(1, name, floats(10) if name == "ModelInfer" else b"")
    shut(peer)
    assert peer.answer(1).status == OK
    if name == "ServerLive":
        assert peer.streams[1].messages == [LIVE]
    peer.ends()
    closes(server)


@pytest.mark.parametrize("name", ["ServerLive", "ModelInfer", "ModelStreamInfer"])
def test_what_did_not_come_whole_is_given_up_and_the_rest_answered(server, peer, name):
    kind = "bidi_stream" if name == "ModelStreamInfer" else "unary"
    labels = (kind, "inference.GRPCInferenceService", name, "CANCELLED")
    cancelled = server.server.metrics.rpc_handled.labels(*labels)
    before = cancelled.value
    with held(server):
        peer.call(1, "ModelInfer", floats(10))
        peer.headers(3, call_headers(name))
        peer.data(3, message(b"abc")[:-1])
        shut(peer)
        wait_until(server, lambda: cancelled.value == before + 1)
    assert_echoed(peer.answer(1), 10)
    assert not peer.streams[3].lists
    peer.ends()
    closes(server)


def test_nothing_whole_closes_at_once(server, peer):
    peer.headers(1, call_headers("ModelInfer"))
    peer.data(1, b"\0")
    shut(peer)
    peer.ends()
    closes(server)


@pytest.mark.parametrize("abruptly", [False, True])
def test_who_has_gone_altogether_is_noticed_and_its_rows_run_no_more(server, peer, abruptly):
    before = ended(server, "CANCELLED")
    with held(server) as batcher:
        peer.call(1, "ModelInfer", floats(10))
        wait_until(server, lambda: batcher.queued_rows == 1)
        if abruptly:
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        peer.close()
        wait_until(server, lambda: batcher.queued_rows == 0)
        closes(server)
        assert ended(server, "CANCELLED") == before + 1


def test_who_goes_after_it_has_ended_its_side_is_noticed_too(server, peer):
    with held(server) as batcher:
        peer.call(1, "ModelInfer", floats(10))
        shut(peer)
        peer.until(lambda: peer.goaway)
        assert batcher.queued_rows == 1
        # With bytes unread, the system sends a reset.
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        peer.close()
        wait_until(server, lambda: batcher.queued_rows == 0)
        closes(server)


def test_a_peer_that_reads_slowly_gets_all(server):
    """Whose answers are held back: when they go on, its end is heard once more."""
    with Peer(server.server.grpc_port, {SettingCodes.INITIAL_WINDOW_SIZE: 1 << 30}) as peer:
        peer.open_window(0, 1 << 30)
        with held(server, "wide") as batcher:
            for stream in (1, 3, 5):
                peer.call(stream, "ModelInfer", asked("wide", np.zeros((8, 1), "f4")))
            wait_until(server, lambda: batcher.queued_rows == 24)
            shut(peer)
        (connection,) = server.server.front_end._connections
        wait_until(server, lambda: connection._sending.paused)
        for stream in (1, 3, 5):
            reply = peer.answer(stream)
            assert (reply.status, len(reply.body) > 8 << 20) == (OK, True)
        peer.ends()
    closes(server)


@pytest.mark.parametrize("first", [0, 100], ids=["no window", "some"])
@pytest.mark.parametrize("name", ["ModelInfer", "ModelStreamInfer"])
def test_an_answer_that_does_not_fit_into_its_window_is_given_up(server, name, first):
    """The window would never open; nobody waits for that, and answers that fit are sent."""
    with Peer(server.server.grpc_port, {SettingCodes.INITIAL_WINDOW_SIZE: first}) as peer:
        with held(server) as batcher:
            for stream in (1, 3):
                peer.headers(stream, call_headers(name if stream == 1 else "ModelInfer"))
                peer.open_window(stream, 10_000 if stream == 3 else 1)
                peer.data(stream, message(floats(100).SerializeToString()), end=True)
            wait_until(server, lambda: batcher.queued_rows == 2)
            shut(peer)
        assert_echoed(peer.answer(3), 100)
        assert peer.answer(1).reset is ErrorCodes.CANCEL
        assert peer.ends() is ErrorCodes.NO_ERROR
    closes(server)


def test_a_deadline_still_ends_a_call(server, peer):
    with held(server):
        peer.call(1, "ModelInfer", floats(10), ("grpc-timeout", "50m"))
        shut(peer)
        assert peer.answer(1).status == 4
        peer.ends()
    closes(server)


def test_who_has_said_that_it_leaves_may_end_its_side_too(server, peer):
    with held(server):
        peer.call(1, "ModelInfer", floats(10))
        peer.frame(Kind.GOAWAY, 0, 0, bytes(8))
        shut(peer)
        peer.until(lambda: peer.goaway)
    assert_echoed(peer.answer(1), 10)
    peer.ends()
    closes(server)


def test_a_server_that_stops_does_not_wait_for_more():
    with serving_directly() as server, Peer(server.server.grpc_port) as peer, held(server) as batcher:
        peer.call(1, "ModelInfer", floats(10))
        wait_until(server, lambda: batcher.queued_rows == 1)
        with stopping(server):
            peer.until(lambda: peer.goaway)
            shut(peer)
            peer.until(lambda: len([frame for frame in peer.frames if frame.kind == Kind.GOAWAY]) == 2)
            server.on_loop(batcher.release)
            assert_echoed(peer.answer(1), 10)
            peer.ends()
