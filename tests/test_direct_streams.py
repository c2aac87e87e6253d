"""The front end `direct`: the numbers and states of streams, padding, and header blocks in pieces."""

import struct

import pytest
from direct import (
    LIVE,
    OK,
    assert_alive,
    assert_connection_error,
    assert_stream_error,
    ended,
    floats,
    held,
)
from h2.errors import ErrorCodes
from h2_frames import END_HEADERS, END_STREAM, PADDED, PRIORITISED, Kind, call_headers, frame, message
from test_server_inference import wait_until


@pytest.mark.parametrize("stream", [2, 4, 2**31 - 2])
def test_an_even_number_is_no_clients_stream(connect, stream):
    peer = connect()
    peer.headers(stream, call_headers("ServerLive"))
    assert_connection_error(peer, ErrorCodes.PROTOCOL_ERROR)


def test_numbers_may_be_left_out_but_not_come_later(connect):
    peer = connect()
    assert_alive(peer, 5)
    assert_alive(peer, 11)
    peer.headers(7, call_headers("ServerLive"), end=True)
    assert_stream_error(peer, 7, ErrorCodes.PROTOCOL_ERROR, ErrorCodes.STREAM_CLOSED)


def test_the_last_number_there_is_may_be_used(connect):
    peer = connect()
    assert_alive(peer, 2**31 - 1)


def test_headers_on_a_closed_stream_begin_no_call(connect, direct):
    """They may be trailers that crossed the answer on their way, so that the stream's end will do."""
    peer = connect()
    assert_alive(peer, 1)
    before = ended(direct, "OK", "ServerLive")
    peer.streams[1].ended = False
    peer.call(1, "ServerLive")
    assert_stream_error(peer, 1, ErrorCodes.STREAM_CLOSED, ErrorCodes.PROTOCOL_ERROR)
    if not peer.goaway:
        assert_alive(peer, 3)
        before += 1
    assert ended(direct, "OK", "ServerLive") == before


def test_data_on_a_stream_that_was_answered_is_an_error_of_it_at_most(connect):
    peer = connect()
    assert_alive(peer, 1)
    peer.data(1, b"more")
    peer.frame(Kind.PING, payload=bytes(8))
    peer.until(lambda: peer.goaway or peer.frames[-1].kind == Kind.PING)
    if peer.goaway:
        assert peer.said() is ErrorCodes.STREAM_CLOSED
    else:
        assert peer.streams[1].reset in (None, ErrorCodes.STREAM_CLOSED)
        assert_alive(peer, 3)


@pytest.mark.parametrize("kind", [Kind.DATA, Kind.HEADERS])
def test_nothing_may_follow_the_end_of_a_stream(connect, direct, kind):
    peer = connect()
    with held(direct) as batcher:
        peer.call(1, "ModelInfer", floats(4))
        wait_until(direct, lambda: batcher.queued_rows == 1)
        if kind == Kind.DATA:
            peer.data(1, b"more", end=True)
        else:
            peer.headers(1, [("late", "1")], end=True)
        assert_stream_error(peer, 1, ErrorCodes.STREAM_CLOSED)
        wait_until(direct, lambda: batcher.queued_rows == 0)
    if not peer.goaway:
        assert_alive(peer, 3)


def test_frames_on_a_stream_that_was_reset_by_the_client_harm_nobody(connect, direct):
    """They cross the reset on their way; so do windows that are opened for an answered call."""
    peer = connect()
    with held(direct):
        peer.headers(1, call_headers("ModelInfer"))
        peer.reset(1)
        peer.open_window(1, 100)
        peer.reset(1)
        peer.frame(Kind.PRIORITY, 0, 1, struct.pack(">IB", 0, 15))
        peer.ping()
    assert_alive(peer, 3)
    peer.open_window(3, 100)
    peer.reset(3)
    assert_alive(peer, 5)


def test_a_reset_of_another_size_ends_the_connection(connect):
    for payload in (bytes(3), bytes(5)):
        peer = connect()
        peer.headers(1, call_headers("ModelInfer"))
        peer.frame(Kind.RST_STREAM, 0, 1, payload)
        assert_connection_error(peer, ErrorCodes.FRAME_SIZE_ERROR)


def test_a_priority_of_another_size_is_an_error_of_its_stream_at_most(connect):
    peer = connect()
    peer.headers(1, call_headers("ModelInfer"))
    peer.frame(Kind.PRIORITY, 0, 1, bytes(4))
    assert_stream_error(peer, 1, ErrorCodes.FRAME_SIZE_ERROR)


def test_data_over_the_largest_frame_is_refused(connect):
    peer = connect()
    peer.headers(1, call_headers("ModelInfer"))
    peer.data(1, bytes(16_385))
    assert_stream_error(peer, 1, ErrorCodes.FRAME_SIZE_ERROR)


@pytest.mark.parametrize("padding", [0, 1, 255])
def test_padding_is_no_part_of_headers_or_data(connect, padding):
    peer = connect()
    fill = bytes([padding]), bytes(padding)
    block = peer.encoder.encode(call_headers("ServerLive"))
    peer.frame(Kind.HEADERS, END_HEADERS | PADDED, 1, fill[0] + block + fill[1])
    peer.frame(Kind.DATA, PADDED, 1, fill[0] + message(b"")[:2] + fill[1])
    peer.frame(Kind.DATA, PADDED, 1, fill[0] + fill[1])
    peer.frame(Kind.DATA, PADDED | END_STREAM, 1, fill[0] + message(b"")[2:] + fill[1])
    assert (peer.answer(1).status, peer.answer(1).messages) == (OK, [LIVE])


@pytest.mark.parametrize("payload", [b"", b"\x01", b"\x05abcd", b"\xff" + bytes(254)])
@pytest.mark.parametrize("kind", [Kind.DATA, Kind.HEADERS])
def test_padding_that_is_longer_than_its_frame_ends_the_connection(connect, kind, payload):
    peer = connect()
    if kind == Kind.DATA:
        peer.headers(1, call_headers("ServerLive"))
    peer.frame(kind, END_HEADERS | PADDED, 1, payload)
    # A frame that has no room for the length of its padding is one of a wrong size.
    assert_connection_error(peer, ErrorCodes.PROTOCOL_ERROR, *([] if payload else [ErrorCodes.FRAME_SIZE_ERROR]))


@pytest.mark.parametrize("padded", [False, True])
def test_headers_may_have_a_priority(connect, padded):
    peer = connect()
    block = struct.pack(">IB", 1 << 31 | 77, 9) + peer.encoder.encode(call_headers("ServerLive"))
    flags = END_HEADERS | PRIORITISED
    if padded:
        flags, block = flags | PADDED, b"\x09" + block + bytes(9)
    peer.frame(Kind.HEADERS, flags, 1, block)
    peer.data(1, message(b""), end=True)
    assert peer.answer(1).status == OK


def test_headers_without_room_for_their_priority_end_the_connection(connect):
    for payload, flags in ((bytes(4), PRIORITISED), (b"\x01" + bytes(5), PRIORITISED | PADDED)):
        peer = connect()
        peer.frame(Kind.HEADERS, END_HEADERS | flags, 1, payload)
        assert_connection_error(peer, ErrorCodes.FRAME_SIZE_ERROR, ErrorCodes.PROTOCOL_ERROR)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_header_block_may_come_in_pieces(connect, size):
    peer = connect()
    block = peer.encoder.encode(call_headers("ServerLive", ("x-long", "value" * 30)))
    pieces = [block[at : at + size] for at in range(0, len(block), size)]
    kinds = [Kind.HEADERS] + [Kind.CONTINUATION] * (len(pieces) - 1)
    for number, (kind, piece) in enumerate(zip(kinds, pieces, strict=True), 1):
        peer.frame(kind, END_HEADERS if number == len(pieces) else 0, 1, piece)
    peer.data(1, message(b""), end=True)
    assert peer.answer(1).status == OK


def test_the_end_of_a_stream_may_stand_on_headers_whose_block_goes_on(connect):
    peer = connect()
    block = peer.encoder.encode(call_headers("ServerLive"))
    peer.frame(Kind.HEADERS, END_STREAM, 1, block[:5])
    peer.frame(Kind.CONTINUATION, 0, 1, b"")
    peer.frame(Kind.CONTINUATION, END_HEADERS, 1, block[5:])
    assert peer.answer(1).status not in (None, OK)  # there was no message
    assert_alive(peer, 3)


@pytest.mark.parametrize(
    "between",
    [
        frame(Kind.DATA, 0, 1, b"x"), frame(Kind.PING, payload=bytes(8)), frame(0x50, 0, 1, b"unknown"),
        frame(Kind.HEADERS, END_HEADERS, 3, b"\x83"), frame(Kind.CONTINUATION, END_HEADERS, 3, b"\x83"),
        frame(Kind.WINDOW_UPDATE, payload=b"\0\0\0\1"), frame(Kind.RST_STREAM, 0, 1, bytes(4)),
    ],
    ids=["DATA", "PING", "unknown", "HEADERS", "another's", "WINDOW_UPDATE", "RST_STREAM"],
)  # fmt: skip
def test_nothing_may_come_between_the_pieces_of_a_header_block(connect, between):
    peer = connect()
    peer.headers(1, call_headers("ServerLive"), flags=0)
    peer.send(between)
    assert_connection_error(peer, ErrorCodes.PROTOCOL_ERROR)


def test_a_continuation_after_the_end_of_headers_ends_the_connection(connect):
    peer = connect()
    peer.headers(1, call_headers("ServerLive"))
    peer.frame(Kind.CONTINUATION, END_HEADERS, 1, b"")
    assert_connection_error(peer, ErrorCodes.PROTOCOL_ERROR)


def test_a_call_of_more_headers_than_its_stream_may_have_is_counted_nowhere(connect, direct):
    """What never became a call is none."""
    peer = connect()
    before = ended(direct, "OK", "ServerLive")
    peer.headers(1, call_headers("ServerLive"), flags=0)
    peer.frame(Kind.PING, payload=bytes(8))
    assert_connection_error(peer, ErrorCodes.PROTOCOL_ERROR)
    assert ended(direct, "OK", "ServerLive") == before


def test_fields_after_the_messages_end_a_call_as_well(connect):
    peer = connect()
    peer.headers(1, call_headers("ServerLive"))
    peer.data(1, message(b""))
    peer.headers(1, [("x-checksum", "1")], end=True)
    assert (peer.answer(1).status, peer.answer(1).messages) == (OK, [LIVE])


@pytest.mark.parametrize(
    ("pairs", "end"),
    [([("x-checksum", "1")], False), ([(":path", "/x")], True), ([("X-Checksum", "1")], True)],
    ids=["no end", "a pseudo field", "an upper-case name"],
)
def test_wrong_fields_after_the_messages_are_an_error_of_the_stream(connect, pairs, end):
    peer = connect()
    peer.headers(1, call_headers("ServerLive"))
    peer.data(1, message(b""))
    peer.headers(1, pairs, end=end)
    assert_stream_error(peer, 1, ErrorCodes.PROTOCOL_ERROR)
    if not peer.goaway:
        assert_alive(peer, 3)


def test_streams_that_wait_hold_up_no_other(connect, direct):
    peer = connect()
    with held(direct) as batcher:
        for stream in (1, 3):
            peer.call(stream, "ModelInfer", floats(4))
        peer.headers(5, call_headers("ModelInfer"))
        wait_until(direct, lambda: batcher.queued_rows == 2)
        assert_alive(peer, 7)
    assert [peer.answer(stream).status for stream in (1, 3)] == [OK, OK]
    peer.data(5, message(floats(4).SerializeToString()), end=True)
    assert peer.answer(5).status == OK
