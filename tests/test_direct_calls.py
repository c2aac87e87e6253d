"""The front end `direct`: how calls end before their time, and how many there may be at a time."""

import asyncio
import socket
import struct

import pytest
from direct import (
    LATE,
    OK,
    UNIMPLEMENTED,
    assert_alive,
    assert_echoed,
    ended,
    floats,
    held,
)
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2_frames import ACK, LARGEST_WINDOW, Kind, call_headers, frame, message
from test_server_inference import wait_until


@pytest.mark.parametrize("timeout", ["30m", "30000u", "00000030m"])
@pytest.mark.parametrize("name", ["ModelInfer", "ModelStreamInfer"])
def test_a_call_ends_with_its_deadline(connect, direct, name, timeout):
    peer = connect()
    before = ended(direct, "DEADLINE_EXCEEDED", name)
    with held(direct):
        peer.call(1, name, floats(1), ("grpc-timeout", timeout))
        if name == "ModelInfer":
            assert peer.answer(1).status == LATE
        else:
            assert peer.answer(1).status in (LATE, OK)  # each message has an answer of its own
    assert name != "ModelInfer" or ended(direct, "DEADLINE_EXCEEDED", name) == before + 1
    assert_alive(peer, 3)


@pytest.mark.parametrize("body", [b"", message(floats(9).SerializeToString())[:-1]], ids=["before", "in"])
@pytest.mark.parametrize("name", ["ModelInfer", "ServerLive", "ModelStreamInfer", "/no/rpc"])
def test_a_deadline_passes_also_while_the_message_is_still_to_come(connect, name, body):
    peer = connect()
    peer.headers(1, call_headers(name, ("grpc-timeout", "50m")))
    if body:
        peer.data(1, body)
    assert peer.answer(1).status == (UNIMPLEMENTED if name == "/no/rpc" else LATE)
    peer.data(1, body)
    assert_alive(peer, 3)


def test_a_deadline_of_nothing_is_over_at_once(connect):
    peer = connect()
    peer.call(1, "ModelInfer", floats(1), ("grpc-timeout", "0n"))
    assert peer.answer(1).status == LATE
    peer.call(3, "ModelInfer", floats(3), ("grpc-timeout", "99999999H"))
    assert_echoed(peer.answer(3), 3)


@pytest.mark.parametrize("how", ["reset", "closed", "reset by TCP"])
@pytest.mark.parametrize("name", ["ModelInfer", "ModelStreamInfer"])
def test_a_call_whose_caller_leaves_is_cancelled(connect, direct, name, how):
    peer = connect()
    before = ended(direct, "CANCELLED", name)
    with held(direct) as batcher:
        peer.call(1, name, floats(1))
        wait_until(direct, lambda: batcher.queued_rows == 1)
        if how == "reset":
            peer.reset(1)
        else:
            if how == "reset by TCP":
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
        wait_until(direct, lambda: ended(direct, "CANCELLED", name) == before + 1)
        wait_until(direct, lambda: batcher.queued_rows == 0)
    if how == "reset":
        assert_alive(peer, 3)
        assert not peer.streams[1].lists


@pytest.mark.parametrize("code", [ErrorCodes.NO_ERROR, ErrorCodes.CANCEL, ErrorCodes.INTERNAL_ERROR, 0xFFFFFFFF])
def test_a_reset_means_the_same_whatever_its_reason(connect, direct, code):
    peer = connect()
    with held(direct) as batcher:
        peer.call(1, "ModelInfer", floats(1))
        wait_until(direct, lambda: batcher.queued_rows == 1)
        peer.reset(1, code)
        wait_until(direct, lambda: batcher.queued_rows == 0)
    assert_alive(peer, 3)


def test_a_caller_that_stops_sending_may_still_read_its_answer(connect, direct):
    """What it sends last is the end of its side of the connection."""
    peer = connect()
    with held(direct) as batcher:
        peer.call(1, "ModelInfer", floats(1))
        wait_until(direct, lambda: batcher.queued_rows == 1)
        peer.socket.shutdown(socket.SHUT_WR)
    peer.ends()  # answered or not: it is not kept
    wait_until(direct, lambda: batcher.queued_rows == 0)


def test_only_so_many_calls_run_on_a_connection(connect, direct):
    peer = connect({SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})
    peer.open_window(0, 1 << 24)
    most = peer.settings[SettingCodes.MAX_CONCURRENT_STREAMS]
    streams = range(1, 2 * most, 2)
    with held(direct) as batcher:
        for stream in streams:
            peer.call(stream, "ModelInfer", floats(1))
        wait_until(direct, lambda: batcher.queued_rows == most)
        peer.call(2 * most + 1, "ServerLive")
        assert peer.answer(2 * most + 1).reset is ErrorCodes.REFUSED_STREAM
        assert batcher.queued_rows == most
        peer.reset(1)
        wait_until(direct, lambda: batcher.queued_rows == most - 1)
        assert_alive(peer, 2 * most + 3)
    for stream in streams[1:]:
        assert peer.answer(stream).status == OK


def test_settings_that_arrive_in_the_middle_of_calls_stop_none(connect, direct):
    peer = connect()
    with held(direct) as batcher:
        peer.call(1, "ModelInfer", floats(10))
        wait_until(direct, lambda: batcher.queued_rows == 1)
        peer.set({SettingCodes.MAX_CONCURRENT_STREAMS: 0, SettingCodes.MAX_FRAME_SIZE: 50_000})
        assert peer.frames[-1][:2] == (Kind.SETTINGS, ACK)
    assert_echoed(peer.answer(1), 10)


@pytest.mark.parametrize("passes", range(8))
@pytest.mark.parametrize("name", ["ModelStreamInfer", "ServerLive"])
def test_answers_that_meet_the_end_of_their_connection_harm_nobody(connect, direct, name, passes):
    """The connection is lost so many passes of the event loop after calls have come that are answered at once."""
    peer = connect()
    calls, body = b"", message(b"" if name == "ServerLive" else b"no request, which needs no model")
    for stream in (1, 3, 5):
        calls += frame(1, 4, stream, peer.encoder.encode(call_headers(name))) + frame(0, 0, stream, body)
    port = peer.socket.getsockname()[1]

    async def meet() -> None:
        (connection,) = (each for each in direct.server.front_end._connections if each.peer.endswith(f":{port}"))
        connection.data_received(calls)
        for _ in range(passes):
            await asyncio.sleep(0)
        connection.abort()

    direct.wait(meet())
    peer.ends()
    assert_alive(connect(), 1)


def test_a_call_that_was_late_on_a_connection_that_is_lost_before_it_heard_of_it_is_cleared_away(connect, direct):
    """Nothing goes out, since the caller reads nothing; then it leaves."""
    peer = connect({SettingCodes.INITIAL_WINDOW_SIZE: LARGEST_WINDOW})
    peer.open_window(0, 1 << 30)
    peer.headers(1, call_headers("ModelInfer", ("grpc-timeout", "1500m")))
    peer.headers(3, call_headers("ModelInfer"))
    for stream in range(5, 45, 2):
        peer.call(stream, "ModelInfer", floats(1, "wide"))
    port = peer.socket.getsockname()[1]
    (connection,) = (each for each in direct.server.front_end._connections if each.peer.endswith(f":{port}"))
    wait_until(direct, lambda: connection._sending.paused)
    late = connection._calls._streams[1]
    wait_until(direct, lambda: late.cause is not None)
    assert 1 in connection._calls._streams
    peer.close()
    wait_until(direct, lambda: not connection._calls._streams)
