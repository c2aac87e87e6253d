"""The front end `direct`: calls that end in odd moments are forgotten, answered once, and cost others nothing."""

import struct

import numpy as np
import pytest
from batching import ask, batching
from direct import (
    EXHAUSTED,
    OK,
    assert_alive,
    assert_connection_error,
    assert_echoed,
    ended,
    floats,
    serving_directly,
)
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2_frames import END_HEADERS, LARGEST_WINDOW, Kind, call_headers, frame
from h2_peer import Peer
from numeric import Model, asked, numeric
from test_direct_shutdown import stopping
from test_server_inference import wait_until

from layercast.proto.rpc import INFERENCE
from layercast.server.transport.direct.calls import MAX_STREAMS

NO_WINDOW = {SettingCodes.INITIAL_WINDOW_SIZE: 0}
CANCEL = struct.pack(">I", ErrorCodes.CANCEL)


@pytest.mark.parametrize("name", ["ServerLive", "ModelStreamInfer", "ModelInfer"])
def test_calls_that_are_reset_as_they_begin_are_forgotten(connect, name):
    peer = connect()
    for stream in range(1, 2 * MAX_STREAMS + 100, 2):
        block = peer.encoder.encode(list(call_headers(name)))
        peer.send(frame(Kind.HEADERS, END_HEADERS, stream, block) + frame(Kind.RST_STREAM, 0, stream, CANCEL))
    peer.ping()
    assert_alive(peer, stream + 2)


@pytest.mark.parametrize("name", ["ModelInfer", "ServerLive"])
def test_an_answer_that_nobody_takes_is_given_up_at_the_deadline(connect, direct, name):
    peer = connect(NO_WINDOW)
    answered = ended(direct, "OK", name)
    peer.call(1, name, floats(10, "first") if name == "ModelInfer" else b"", ("grpc-timeout", "300m"))
    reply = peer.answer(1)
    assert (reply.reset, reply.messages) == (ErrorCodes.CANCEL, [])
    assert ended(direct, "OK", name) == answered + 1


def test_an_answer_that_waits_for_its_caller_at_the_end_is_sent_once():
    with serving_directly() as server, Peer(server.server.grpc_port, NO_WINDOW) as peer:
        peer.call(1, "ModelInfer", floats(10))
        wait_until(server, lambda: ended(server, "OK") == 1)
        with stopping(server):
            peer.until(lambda: peer.goaway)
            (connection,) = server.server.front_end._connections
            server.on_loop(connection.cut_off)
            peer.open_window(1, 10_000)
            assert_echoed(peer.answer(1), 10)
            peer.close()


def test_the_last_answer_reaches_a_caller_who_opens_windows_meanwhile():
    wide = {SettingCodes.INITIAL_WINDOW_SIZE: LARGEST_WINDOW}
    with serving_directly() as server, Peer(server.server.grpc_port, wide) as peer:
        peer.open_window(0, 1 << 30)
        peer.call(1, "ModelInfer", asked("wide", np.zeros((8, 1), "f4")))
        wait_until(server, lambda: ended(server, "OK") == 1)
        with stopping(server):
            size = 0
            while not peer.streams[1].ended:
                found = peer.read()
                assert found, size
                if found.kind == Kind.DATA:
                    size += len(found.payload)
                    peer.open_window(0, len(found.payload))
                    peer.open_window(1, len(found.payload))
            assert peer.streams[1].status == OK
            assert size > 8 << 20
            peer.close()


def test_windows_that_open_in_crumbs_earn_nothing(connect):
    peer = connect(NO_WINDOW)
    peer.call(1, "ModelInfer", asked("wide", np.zeros((1, 1), "f4")))
    crumbs = frame(Kind.WINDOW_UPDATE, 0, 1, struct.pack(">I", 1)) * 1000
    for _ in range(100):
        if peer.goaway:
            break
        peer.send(crumbs)
        seen = len(peer.frames)
        peer.until(lambda seen=seen: len(peer.frames) > seen)
    assert_connection_error(peer, ErrorCodes.ENHANCE_YOUR_CALM)


def test_a_connection_that_is_accepted_while_the_server_stops_is_told(direct, connect):
    front = direct.server.front_end
    direct.on_loop(lambda: setattr(front.handlers, "stopping", True))
    try:
        peer = connect(greet=False)
        peer.until(lambda: peer.goaway)
        assert peer.said() is ErrorCodes.NO_ERROR
    finally:
        direct.on_loop(lambda: setattr(front.handlers, "stopping", False))


def test_an_answer_larger_than_its_manifest_and_a_message_gets_a_status():
    odd = Model(lambda inputs: {"y": np.zeros((len(inputs["x"]), 1 << 19), "f4")}, outputs=[("y", "FP32", (1,))])
    with numeric({"odd": odd}, 1 << 20, front_end="direct") as server, Peer(server.server.grpc_port) as peer:
        peer.call(1, "ModelInfer", floats(10, "odd"))
        reply = peer.answer(1)
        assert (reply.status, "a message holds 1,048,576" in reply.text) == (EXHAUSTED, True)
        assert ended(server, "RESOURCE_EXHAUSTED") == 1


def test_a_short_path_that_fails_leaves_its_call_to_the_handler(direct, connect, caplog):
    short, path = direct.server.front_end.short, INFERENCE["ModelInfer"].path
    begin = short[path]
    short[path] = lambda *_: 1 // 0
    try:
        peer = connect()
        peer.call(1, "ModelInfer", floats(10))
        assert_echoed(peer.answer(1), 10)
    finally:
        short[path] = begin
    assert "the short path to" in caplog.text


async def test_a_batch_is_answered_even_if_the_next_one_can_not_be_started(monkeypatch):
    async with batching() as (batcher, _):
        free = batcher._forwards._freed

        def fails() -> None:
            monkeypatch.setattr(batcher._forwards, "_freed", free)
            raise ValueError("no next one")

        monkeypatch.setattr(batcher._forwards, "_freed", fails)
        assert await ask(batcher, 1) == [-1]
        assert await ask(batcher, 2) == [-2]
        assert not batcher._forwards.running
