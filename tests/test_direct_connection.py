"""The front end `direct`: prefaces, settings, pings and what belongs to a connection as a whole (RFC 9113)."""

import socket
import struct

import pytest
from direct import assert_alive, assert_connection_error, held
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from h2_frames import ACK, LARGEST_WINDOW, PREFACE, Kind, call_headers, frame, message, settings_frame


def test_the_first_frame_is_settings_and_ours_are_acknowledged(connect):
    peer = connect()
    first = peer.frames[0]
    assert (first.kind, first.flags & ACK, first.stream, len(first.payload) % 6) == (Kind.SETTINGS, 0, 0, 0)
    assert peer.settings[SettingCodes.MAX_CONCURRENT_STREAMS] == 1024
    assert peer.settings.get(SettingCodes.ENABLE_PUSH, 0) == 0
    acknowledgements = [found for found in peer.frames if found.kind == Kind.SETTINGS and found.flags & ACK]
    assert [found.payload for found in acknowledgements] == [b""]
    assert_alive(peer, 1)


def test_every_change_of_settings_is_acknowledged_once(connect):
    peer = connect()
    peer.send(settings_frame({}) * 3)
    peer.ping()
    assert [found[:2] for found in peer.frames].count((Kind.SETTINGS, ACK)) == 4
    assert_alive(peer, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v2 HTTP/1.0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r!" + settings_frame({}),
        b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(189),
        bytes(24),
        settings_frame({}) * 3,
    ],
    ids=["HTTP/1.1", "HTTP/1.0", "one byte wrong", "TLS", "zeros", "none"],
)
def test_who_does_not_begin_as_http2_does_is_left(connect, data):
    peer = connect(greet=False)
    peer.send(data)
    rest = b""
    try:
        while piece := peer.socket.recv(65_536):
            rest += piece
    except ConnectionError:
        pass
    assert len(rest) < 1000
    # Nothing comes before, which a client of HTTP/1 could not read.
    assert rest.startswith(b"HTTP/1.1 400 Bad Request") == (b"HTTP/1" in data)


@pytest.mark.parametrize("data", [b"", b"P", PREFACE[:23], PREFACE, PREFACE + settings_frame({})[:5]])
def test_who_leaves_while_it_begins_is_left_too(connect, data):
    peer = connect(greet=False)
    peer.send(data)
    peer.socket.shutdown(socket.SHUT_WR)
    peer.ends()


def test_settings_must_be_the_first_frame(connect):
    peer = connect(greet=False)
    peer.send(PREFACE + frame(Kind.PING, payload=bytes(8)))
    assert_connection_error(peer, ErrorCodes.PROTOCOL_ERROR)


def test_a_preface_may_come_byte_by_byte(connect):
    peer = connect(greet=False)
    for byte in PREFACE + settings_frame({}):
        peer.send(bytes([byte]))
    assert_alive(peer, 1)


def test_calls_may_come_before_the_servers_settings_are_read(connect):
    peer = connect(greet=False)
    block = peer.encoder.encode(call_headers("ServerLive"))
    peer.send(PREFACE + settings_frame({}) + frame(Kind.HEADERS, 4, 1, block) + frame(Kind.DATA, 1, 1, message(b"")))
    assert peer.answer(1).status == 0


WRONG_SETTINGS = {
    "a length that is no multiple of six": (frame(Kind.SETTINGS, payload=bytes(5)), ErrorCodes.FRAME_SIZE_ERROR),
    "an acknowledgement with content": (frame(Kind.SETTINGS, ACK, payload=bytes(6)), ErrorCodes.FRAME_SIZE_ERROR),
    "on a stream": (settings_frame({}, stream=1), ErrorCodes.PROTOCOL_ERROR),
    "a window over the largest": (
        settings_frame({SettingCodes.INITIAL_WINDOW_SIZE: LARGEST_WINDOW + 1}), ErrorCodes.FLOW_CONTROL_ERROR,
    ),
    "frames under the smallest": (settings_frame({SettingCodes.MAX_FRAME_SIZE: 16_383}), ErrorCodes.PROTOCOL_ERROR),
    "frames over the largest": (settings_frame({SettingCodes.MAX_FRAME_SIZE: 1 << 24}), ErrorCodes.PROTOCOL_ERROR),
    "a push that is neither on nor off": (settings_frame({SettingCodes.ENABLE_PUSH: 2}), ErrorCodes.PROTOCOL_ERROR),
}  # fmt: skip


@pytest.mark.parametrize("first", [True, False], ids=["in the first", "in a later one"])
@pytest.mark.parametrize("wrong", WRONG_SETTINGS)
def test_wrong_settings_end_the_connection(connect, wrong, first):
    data, code = WRONG_SETTINGS[wrong]
    peer = connect(greet=not first)
    peer.send(PREFACE + data if first else data)
    # An acknowledgement is no first frame either.
    assert_connection_error(peer, code, *([ErrorCodes.PROTOCOL_ERROR] if first else []))


def test_extreme_settings_are_kept(connect):
    peer = connect(
        {
            SettingCodes.HEADER_TABLE_SIZE: 2**32 - 1,
            SettingCodes.ENABLE_PUSH: 1,
            SettingCodes.MAX_CONCURRENT_STREAMS: 0,
            SettingCodes.INITIAL_WINDOW_SIZE: LARGEST_WINDOW,
            SettingCodes.MAX_FRAME_SIZE: (1 << 24) - 1,
            SettingCodes.MAX_HEADER_LIST_SIZE: 2**32 - 1,
        }
    )
    assert_alive(peer, 1)


def test_unknown_settings_frames_and_flags_are_ignored(connect):
    peer = connect({0x7777: 7, 0xFE03: 1})
    peer.frame(0x50, 0xFF, 0, b"unknown")
    peer.frame(0x50, 0xFF, 99, bytes(16_384))
    peer.frame(Kind.PING, 0xFE, 0, bytes(8))
    peer.until(lambda: any(found[:2] == (Kind.PING, ACK) for found in peer.frames))
    assert_alive(peer, 1)


def test_the_reserved_bit_of_a_stream_is_ignored(connect):
    peer = connect()
    peer.headers(1, call_headers("ServerLive"))
    peer.send(frame(Kind.DATA, 1, 1 << 31 | 1, message(b"")))
    assert peer.answer(1).status == 0


def test_a_ping_comes_back_with_its_bytes_once(connect):
    peer = connect()
    peer.frame(Kind.PING, 0, 0, b"\x00\xffping!!")
    peer.frame(Kind.PING, ACK, 0, b"nobodyas")  # answers no question, and gets none
    peer.ping()
    answers = [found.payload for found in peer.frames if found.kind == Kind.PING]
    assert answers[0] == b"\x00\xffping!!"
    assert len(answers) == 2
    assert all(found.flags & ACK for found in peer.frames if found.kind == Kind.PING)


def test_a_ping_is_answered_while_calls_wait(connect, direct):
    peer = connect()
    with held(direct):
        peer.headers(1, call_headers("ModelInfer"))
        peer.ping()
        peer.reset(1)


WRONG_FRAMES = {
    "a ping of seven bytes": (frame(Kind.PING, payload=bytes(7)), ErrorCodes.FRAME_SIZE_ERROR),
    "a ping of nine bytes": (frame(Kind.PING, payload=bytes(9)), ErrorCodes.FRAME_SIZE_ERROR),
    "a ping on a stream": (frame(Kind.PING, 0, 1, bytes(8)), ErrorCodes.PROTOCOL_ERROR),
    "a push": (frame(Kind.PUSH_PROMISE, 4, 1, struct.pack(">I", 2) + b"\x82"), ErrorCodes.PROTOCOL_ERROR),
    "goaway on a stream": (frame(Kind.GOAWAY, 0, 1, bytes(8)), ErrorCodes.PROTOCOL_ERROR),
    "goaway of seven bytes": (frame(Kind.GOAWAY, 0, 0, bytes(7)), ErrorCodes.FRAME_SIZE_ERROR),
    "a window that opens by nothing": (frame(Kind.WINDOW_UPDATE, payload=bytes(4)), ErrorCodes.PROTOCOL_ERROR),
    "a window update of three bytes": (frame(Kind.WINDOW_UPDATE, payload=bytes(3)), ErrorCodes.FRAME_SIZE_ERROR),
    "a window of an idle stream": (frame(Kind.WINDOW_UPDATE, 0, 5, b"\0\0\0\1"), ErrorCodes.PROTOCOL_ERROR),
    "a reset of the connection": (frame(Kind.RST_STREAM, payload=bytes(4)), ErrorCodes.PROTOCOL_ERROR),
    "a reset of an idle stream": (frame(Kind.RST_STREAM, 0, 5, bytes(4)), ErrorCodes.PROTOCOL_ERROR),
    "data on the connection": (frame(Kind.DATA, payload=b"x"), ErrorCodes.PROTOCOL_ERROR),
    "data on an idle stream": (frame(Kind.DATA, 0, 5, b"x"), ErrorCodes.PROTOCOL_ERROR),
    "headers on the connection": (frame(Kind.HEADERS, 4, 0, b"\x83\x86\x84"), ErrorCodes.PROTOCOL_ERROR),
    "a continuation of nothing": (frame(Kind.CONTINUATION, 4, 1, b"\x83"), ErrorCodes.PROTOCOL_ERROR),
    "a continuation of the connection": (frame(Kind.CONTINUATION, 4, 0, b"\x83"), ErrorCodes.PROTOCOL_ERROR),
    "a priority of the connection": (frame(Kind.PRIORITY, payload=bytes(5)), ErrorCodes.PROTOCOL_ERROR),
    "settings over the largest frame": (frame(Kind.SETTINGS, payload=bytes(16_386)), ErrorCodes.FRAME_SIZE_ERROR),
    "headers over the largest frame": (frame(Kind.HEADERS, 4, 1, bytes(16_385)), ErrorCodes.FRAME_SIZE_ERROR),
    "a strange frame over the largest": (frame(0x50, 0, 0, bytes(16_385)), ErrorCodes.FRAME_SIZE_ERROR),
    "the largest frame there is, by its head": (frame(0x50, length=2**24 - 1), ErrorCodes.FRAME_SIZE_ERROR),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_FRAMES)
def test_a_wrong_frame_ends_the_connection(connect, wrong):
    data, code = WRONG_FRAMES[wrong]
    peer = connect()
    peer.send(data)
    assert_connection_error(peer, code)


def test_the_last_stream_that_was_taken_is_in_the_goaway(connect):
    peer = connect()
    assert_alive(peer, 1)
    assert_alive(peer, 7)
    peer.frame(Kind.PING, 0, 0, b"")
    assert_connection_error(peer, ErrorCodes.FRAME_SIZE_ERROR)
    assert int.from_bytes(peer.goaway.payload[:4], "big") == 7


def test_a_priority_is_tolerated_on_any_stream_and_changes_nothing(connect):
    peer = connect()
    peer.frame(Kind.PRIORITY, 0, 1, struct.pack(">IB", 0, 255))
    peer.frame(Kind.PRIORITY, 0, 9, struct.pack(">IB", 1 << 31 | 7, 0))
    assert_alive(peer, 1)
    peer.frame(Kind.PRIORITY, 0, 1, struct.pack(">IB", 0, 15))
    assert_alive(peer, 3)
