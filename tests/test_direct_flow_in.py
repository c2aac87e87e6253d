"""The front end `direct`: what a client may send before it is told to send more, and that it is told."""

import numpy as np
import pytest
from direct import (
    EXHAUSTED,
    INVALID,
    MESSAGE_LIMIT,
    OK,
    UNIMPLEMENTED,
    assert_alive,
    assert_connection_error,
    assert_echoed,
    assert_stream_error,
    ended,
    floats,
    held,
)
from h2.errors import ErrorCodes
from h2_frames import END_STREAM, PADDED, Kind, call_headers, message
from h2_peer import Peer
from numeric import asked
from test_server_inference import values_of, wait_until
from test_wire import PeakMemory

from layercast.proto.messages import ModelInferResponse, ModelStreamInferResponse


def offered(peer: Peer) -> int:
    """The window of the connection as the server opened it at first."""
    peer.ping()
    return peer.opened[0]


def exhaust(peer: Peer, stream: int, body: bytes, most: int) -> int:
    """Send pieces of `body` over and over until the server opens no window any more; return how much that was."""
    sent = 0
    while True:
        if peer.window(stream) <= 0:
            peer.ping()
            peer.ping()
            if peer.window(stream) <= 0:
                return sent
        at = sent % len(body)
        piece = body[at : at + min(16_384, peer.window(stream))]
        peer.spend(stream, piece)
        sent += len(piece)
        assert sent < most


def test_a_message_near_the_limit_goes_through(connect):
    peer = connect()
    rows = np.zeros((1, MESSAGE_LIMIT // 4 - 1000), "f4")
    rows[0, 0] = 7
    peer.headers(1, call_headers("ModelInfer"))
    peer.upload(1, message(asked("first", rows).SerializeToString()))
    reply = peer.answer(1)
    assert reply.status == OK, reply
    assert values_of(ModelInferResponse.FromString(reply.messages[0]))[0, 0] == 7
    assert_alive(peer, 3)


@pytest.mark.parametrize("name", ["ModelInfer", "ServerLive", "ModelStreamInfer"])
def test_a_message_over_the_limit_is_refused_by_its_head(connect, direct, name):
    """Before any of it has come; who sends it nevertheless harms nobody."""
    peer = connect()
    peer.headers(1, call_headers(name))
    peer.data(1, b"\0" + (MESSAGE_LIMIT + 1).to_bytes(4, "big"))
    reply = peer.answer(1)
    assert reply.status == EXHAUSTED
    assert f"{MESSAGE_LIMIT:,}" in reply.text
    peer.data(1, bytes(16_384), end=True)
    assert_alive(peer, 3)


@pytest.mark.parametrize("name", ["ModelInfer", "ServerLive"])
def test_a_message_over_the_limit_is_refused_by_a_head_in_pieces_too(connect, name):
    peer = connect()
    peer.headers(1, call_headers(name))
    for byte in b"\0" + (MESSAGE_LIMIT + 1).to_bytes(4, "big"):
        peer.data(1, bytes([byte]))
    assert peer.answer(1).status == EXHAUSTED


@pytest.mark.parametrize("name", ["ModelInfer", "ServerLive"])
def test_a_body_that_goes_on_after_its_message_is_not_kept(connect, name):
    """Nor read without end."""
    peer = connect()
    peer.headers(1, call_headers(name))
    body = message(b"") + b"\0\0\0\0\1" * (60 << 20)
    with PeakMemory() as peak:
        peer.upload(1, body)
    assert peak.bytes < 100 << 20
    assert peer.answer(1).status not in (None, OK)
    assert_alive(peer, 3)


def test_a_message_of_very_many_pieces_costs_little_more_than_itself(connect):
    peer = connect()
    body = message(asked("first", np.zeros((1, 1 << 19), "f4")).SerializeToString())
    peer.headers(1, call_headers("ModelInfer"))
    with PeakMemory() as peak:
        peer.upload(1, body, piece=9)
        assert peer.answer(1).status == OK
    assert peak.bytes < 6 * len(body)


def test_streams_that_nobody_reads_are_stopped_by_their_windows(connect, direct):
    """What is sent beyond the window is an error; what was sent within it is served later."""
    peer = connect()
    one = message(floats(1000).SerializeToString())
    with held(direct):
        peer.headers(1, call_headers("ModelStreamInfer"))
        peer.headers(3, call_headers("ModelStreamInfer"))
        with PeakMemory() as peak:
            exhaust(peer, 1, one, 200 << 20)
        assert peak.bytes < 200 << 20
        assert_alive(peer, 5)
        sent = exhaust(peer, 3, one, 200 << 20)
        peer.data(1, b"x" * 16_384)
        assert_stream_error(peer, 1, ErrorCodes.FLOW_CONTROL_ERROR)
    if not peer.goaway:
        peer.open_window(0, 1 << 30)
        peer.open_window(3, 1 << 30)
        whole = sent // len(one)
        peer.upload(3, one[sent % len(one) :] if sent % len(one) else one)
        reply = peer.answer(3)
        assert reply.status == OK
        assert len(reply.messages) == whole + 1


def test_data_beyond_the_window_of_the_connection_ends_it(connect, direct):
    """Streams that each keep to their own windows."""
    peer = connect()
    window, stream = offered(peer), 1
    with held(direct):
        while peer.opened[0] > 0:
            peer.headers(stream, call_headers("ModelInfer"))
            while peer.window(stream) > 0:
                peer.spend(stream, (b"\0\1" + bytes(16_382))[: peer.window(stream)])
                assert stream < 1 + 2 * (window >> 15)
            stream += 2
        peer.ping()
        if peer.opened[0] <= 0:
            peer.headers(stream, call_headers("ModelInfer"))
            peer.data(stream, b"\0")
            assert_connection_error(peer, ErrorCodes.FLOW_CONTROL_ERROR)


def test_padding_is_counted_and_given_back(connect):
    """A message of single bytes, each with as much padding as there may be."""
    peer = connect()
    body = message(floats(200).SerializeToString())
    window = offered(peer)
    for stream in range(1, 2 * (2 * window // (257 * len(body))), 2):
        peer.headers(stream, call_headers("ModelInfer"))
        for number, byte in enumerate(body, 1):
            peer.until(lambda: peer.opened[0] >= 257)
            flags = PADDED | (END_STREAM if number == len(body) else 0)
            peer.frame(Kind.DATA, flags, stream, bytes([255, byte]) + bytes(255))
            peer.opened[0] -= 257
        peer.open_window(0, 1000)
        assert_echoed(peer.answer(stream), 200)


REFUSED = {
    "an unknown RPC": (call_headers("/no/rpc"), UNIMPLEMENTED),
    "no message of the RPC": (call_headers("ModelInfer"), INVALID),
    "no call of gRPC": (call_headers("ServerLive", content_type="text/plain"), None),
    "a malformed call": (call_headers("ServerLive", method=None), None),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_the_bodies_of_refused_calls_are_given_back_to_the_connection(connect, refused):
    pairs, status = REFUSED[refused]
    peer = connect()
    window, sent, stream = offered(peer), 0, 1
    body = message(b"\xff" * 60_000)
    while sent < 2 * window:
        peer.headers(stream, pairs)
        for at in range(0, len(body), 16_384):
            peer.until(lambda: peer.opened[0] >= 16_384)
            peer.spend(stream, body[at : at + 16_384], end=at + 16_384 >= len(body))
        assert peer.answer(stream).status == status
        sent, stream = sent + len(body), stream + 2
    assert_alive(peer, stream)


def test_the_bodies_of_cancelled_calls_are_given_back_to_the_connection(connect, direct):
    """Cancelled in the middle of a message, in the queue, and with data that crosses a reset of the server's."""
    peer = connect()
    window, sent, stream = offered(peer), 0, 1
    body = message(floats(15_000).SerializeToString())
    with held(direct) as batcher:
        while sent < 2 * window:
            peer.headers(stream, call_headers("ModelInfer"))
            end = len(body) if stream % 4 == 1 else 40_000
            for at in range(0, end, 16_384):
                peer.until(lambda: peer.opened[0] >= 16_384)
                peer.spend(stream, body[at : min(at + 16_384, end)], end=at + 16_384 >= len(body))
            peer.reset(stream)
            if stream % 4 == 3:
                peer.until(lambda: peer.opened[0] >= 16_384)
                peer.spend(stream, bytes(16_384))
            sent, stream = sent + end, stream + 2
        wait_until(direct, lambda: batcher.queued_rows == 0)
    assert_alive(peer, stream)


def test_many_streams_that_stay_open_do_not_use_up_the_window_of_the_connection(connect):
    """Each has been read, but none has sent enough to be allowed more by itself."""
    peer = connect()
    window = offered(peer)
    one = message(floats(8000).SerializeToString())
    each = one * (peer.window(99_999) // 5 // len(one))
    streams = range(1, 2 * (2 * window // len(each)), 2)
    for stream in streams:
        peer.headers(stream, call_headers("ModelStreamInfer"))
        peer.open_window(stream, 1 << 24)
        peer.open_window(0, len(each) + 100_000)
        peer.upload(stream, each, end=False)
        reply = peer.streams[stream]
        peer.until(lambda reply=reply: len(reply.body) >= len(each))
    for stream in streams:
        peer.data(stream, end=True)
        reply = peer.answer(stream)
        assert reply.status == OK
        assert len(reply.messages) == len(each) // len(one)
        assert not ModelStreamInferResponse.FromString(reply.messages[-1]).error_message


def test_a_call_of_single_bytes_is_one_call(connect):
    peer = connect()
    body = message(floats(300).SerializeToString())
    peer.headers(1, call_headers("ModelInfer"))
    for number, byte in enumerate(body, 1):
        peer.data(1, bytes([byte]), end=number == len(body))
    assert_echoed(peer.answer(1), 300)


def test_calls_that_come_piece_by_piece_in_turn_are_all_answered(connect, direct):
    peer = connect()
    before = ended(direct, "OK")
    counts = {stream: 100 * stream for stream in range(1, 41, 2)}
    bodies = {stream: message(floats(count).SerializeToString()) for stream, count in counts.items()}
    for stream in counts:
        peer.headers(stream, call_headers("ModelInfer"))
    for at in range(0, max(map(len, bodies.values())), 700):
        for stream, body in bodies.items():
            if at < len(body):
                peer.data(stream, body[at : at + 700], end=at + 700 >= len(body))
    peer.open_window(0, 1 << 20)
    for stream, count in counts.items():
        assert_echoed(peer.answer(stream), count)
    assert ended(direct, "OK") == before + len(counts)
