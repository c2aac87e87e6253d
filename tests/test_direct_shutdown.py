"""The front end `direct`: GOAWAY from either side. What runs is answered, what comes is refused, and then it closes."""

import asyncio
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from direct import LIVE, OK, UNAVAILABLE, assert_alive, assert_echoed, ended, floats, held, serving_directly
from grpc_health.v1 import health_pb2
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2_frames import LARGEST_WINDOW, Kind, call_headers, message
from h2_peer import Peer
from test_server_inference import wait_until

from layercast.proto.messages import ModelStreamInferResponse


@pytest.fixture
def server() -> Iterator:
    """A server that the test stops."""
    with serving_directly() as server:
        yield server


@contextmanager
def stopping(server, grace: float = 20.0) -> Iterator[threading.Thread]:
    """Stop the server while the block runs; the thread ends when it has stopped."""
    thread = threading.Thread(target=server.wait, args=(server.server.front_end.stop(grace),))
    thread.start()
    try:
        yield thread
    finally:
        thread.join(30)
        assert not thread.is_alive()


def goes_away(peer: Peer) -> None:
    peer.until(lambda: peer.goaway)
    assert peer.said() is ErrorCodes.NO_ERROR


@pytest.mark.parametrize("name", ["ModelInfer", "ModelStreamInfer"])
def test_what_runs_is_answered_and_then_the_connection_closes(server, name):
    with Peer(server.server.grpc_port) as peer, held(server) as batcher:
        for stream in (1, 5):
            peer.call(stream, name, floats(10))
        wait_until(server, lambda: batcher.queued_rows == 2)
        with stopping(server) as thread:
            goes_away(peer)
            assert int.from_bytes(peer.goaway.payload[:4], "big") >= 5
            assert thread.is_alive()
            server.on_loop(batcher.release)
            for stream in (1, 5):
                reply = peer.answer(stream)
                if name == "ModelInfer":
                    assert_echoed(reply, 10)
                else:
                    assert not ModelStreamInferResponse.FromString(reply.messages[0]).error_message
                    assert reply.status in (OK, UNAVAILABLE)
            assert peer.ends() is ErrorCodes.NO_ERROR


def test_large_answers_that_are_still_on_their_way_arrive(server):
    with Peer(server.server.grpc_port, {SettingCodes.INITIAL_WINDOW_SIZE: 1000}) as peer:
        peer.call(1, "ModelInfer", floats(100_000))
        wait_until(server, lambda: ended(server, "OK") == 1)
        with stopping(server):
            goes_away(peer)
            peer.open_window(1, 1 << 20)
            peer.open_window(0, 1 << 20)
            assert_echoed(peer.answer(1), 100_000)
            assert peer.ends() is ErrorCodes.NO_ERROR


def test_a_call_whose_message_is_still_coming_is_answered_too(server):
    body = message(floats(10).SerializeToString())
    with Peer(server.server.grpc_port) as peer:
        peer.headers(1, call_headers("ModelInfer"))
        peer.data(1, body[:9])
        peer.ping()
        with stopping(server):
            goes_away(peer)
            peer.data(1, body[9:], end=True)
            reply = peer.answer(1)
            assert reply.status in (OK, UNAVAILABLE)
            assert peer.ends() is ErrorCodes.NO_ERROR


def test_what_comes_after_the_goaway_is_refused_so_that_clients_try_elsewhere(server):
    with Peer(server.server.grpc_port) as peer, held(server) as batcher:
        peer.call(1, "ModelInfer", floats(10))
        wait_until(server, lambda: batcher.queued_rows == 1)
        with stopping(server):
            goes_away(peer)
            peer.call(3, "ServerLive")
            peer.ping()
            reply = peer.streams[3]
            assert reply.reset is ErrorCodes.REFUSED_STREAM or reply.status == UNAVAILABLE or not reply.lists
            assert not reply.messages
            with pytest.raises(OSError):  # noqa: PT011 # refused, or reset while it greets
                Peer(server.server.grpc_port).close()
            server.on_loop(batcher.release)
            assert_echoed(peer.answer(1), 10)
            assert peer.ends() is ErrorCodes.NO_ERROR


def test_a_call_that_outlasts_the_grace_is_cut_off_as_unavailable(server):
    with Peer(server.server.grpc_port) as peer, held(server) as batcher:
        peer.call(1, "ModelInfer", floats(10))
        peer.headers(3, call_headers("ModelInfer"))
        wait_until(server, lambda: batcher.queued_rows == 1)
        with stopping(server, grace=0.1):
            assert peer.answer(1).status == UNAVAILABLE
            assert peer.answer(3).status == UNAVAILABLE
            peer.ends()
        wait_until(server, lambda: batcher.queued_rows == 0)


def test_idle_connections_are_closed_at_once_and_watches_end(server):
    request = health_pb2.HealthCheckRequest().SerializeToString()
    with Peer(server.server.grpc_port) as idle, Peer(server.server.grpc_port) as watching:
        assert_alive(idle, 1)
        watching.call(1, "/grpc.health.v1.Health/Watch", request)
        watching.until(lambda: watching.streams[1].body)
        with stopping(server):
            assert idle.ends() is ErrorCodes.NO_ERROR
            assert watching.answer(1).status is not None
            assert watching.ends() is ErrorCodes.NO_ERROR


def test_who_never_reads_and_who_never_begins_keep_no_server(server):
    with Peer(server.server.grpc_port, {SettingCodes.INITIAL_WINDOW_SIZE: LARGEST_WINDOW}) as deaf:
        deaf.open_window(0, 1 << 30)
        for stream in range(1, 21, 2):
            deaf.call(stream, "ModelInfer", floats(1, "wide"))
        wait_until(server, lambda: ended(server, "OK") > 3)
        with Peer(server.server.grpc_port, greet=False), stopping(server, grace=0.2):
            pass


def test_no_task_outlives_its_connections(server):
    before = server.on_loop(lambda: len(asyncio.all_tasks()))
    with held(server) as batcher:
        for how in range(3):
            peer = Peer(server.server.grpc_port)
            for stream in range(1, 21, 2):
                peer.call(stream, ("ModelInfer", "ModelStreamInfer", "ServerLive")[how], floats(2) if how < 2 else b"")
            peer.ping()
            peer.close()
        wait_until(server, lambda: batcher.queued_rows == 0)
    wait_until(server, lambda: len(asyncio.all_tasks()) <= before + 1)


@pytest.mark.parametrize("code", [ErrorCodes.NO_ERROR, ErrorCodes.INTERNAL_ERROR])
def test_a_client_that_goes_away_gets_the_answers_to_what_it_asked(connect, direct, code):
    peer = connect()
    with held(direct) as batcher:
        peer.call(1, "ModelInfer", floats(10))
        wait_until(direct, lambda: batcher.queued_rows == 1)
        peer.frame(Kind.GOAWAY, payload=struct.pack(">II", 0, code) + b"bye")
        peer.ping()
    assert_echoed(peer.answer(1), 10)
    assert peer.ends() in (None, ErrorCodes.NO_ERROR)


def test_an_idle_client_that_goes_away_is_left(connect):
    peer = connect()
    peer.call(1, "ServerLive")
    peer.frame(Kind.GOAWAY, payload=bytes(8))
    assert peer.answer(1).messages == [LIVE]
    assert peer.ends() in (None, ErrorCodes.NO_ERROR)
