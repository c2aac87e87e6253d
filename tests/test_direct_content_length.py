"""The front end `direct`: a request that says how long its body is has one of that length (RFC 9113, section 8.1.1)."""

import pytest
from direct import INVALID, LIVE, OK, assert_alive, assert_echoed, assert_stream_error, ended, floats
from h2.errors import ErrorCodes
from h2_frames import END_STREAM, PADDED, Kind, call_headers, frame, message

REQUEST = floats(3).SerializeToString()
BODY = message(REQUEST)


def infer(*lengths):
    return call_headers("ModelInfer", *(("content-length", str(length)) for length in lengths))


def one_frame(peer, body):
    peer.data(1, body, end=True)


def byte_by_byte(peer, body):
    for at in range(len(body)):
        peer.data(1, body[at : at + 1])
    peer.data(1, end=True)


def many_frames_at_once(peer, body):
    pieces = [body[at : at + 5] for at in range(0, len(body), 5)]
    peer.send(b"".join(frame(Kind.DATA, 0, 1, piece) for piece in pieces) + frame(Kind.DATA, END_STREAM, 1))


def padded(peer, body):
    peer.frame(Kind.DATA, PADDED, 1, bytes([9]) + body + bytes(9))
    peer.frame(Kind.DATA, PADDED | END_STREAM, 1, bytes([200]) + bytes(200))


def with_trailers(peer, body):
    peer.data(1, body)
    peer.headers(1, [("x-trailer", "1")], end=True)


WAYS = pytest.mark.parametrize("send", [one_frame, byte_by_byte, many_frames_at_once, padded, with_trailers])


@WAYS
@pytest.mark.parametrize("lengths", [(len(BODY),), (len(BODY), len(BODY)), (f"000{len(BODY)}",)])
def test_a_body_of_the_length_that_was_said_is_taken(connect, send, lengths):
    peer = connect()
    peer.headers(1, infer(*lengths))
    send(peer, BODY)
    assert_echoed(peer.answer(1), 3)


@WAYS
@pytest.mark.parametrize("more", [1, -1, 1000, -len(BODY)])
def test_a_body_of_another_length_is_reset(connect, direct, send, more):
    """Also where all of a message has come, which is the common case: a body cut off would else be answered."""
    peer = connect()
    before = ended(direct, "OK")
    peer.headers(1, infer(len(BODY) + more))
    send(peer, BODY)
    assert_stream_error(peer, 1, ErrorCodes.PROTOCOL_ERROR)
    assert not peer.goaway
    assert ended(direct, "OK") == before
    assert_alive(peer, 3)


def test_too_much_is_reset_before_the_end(connect):
    peer = connect()
    peer.headers(1, infer(len(BODY) - 1))
    peer.data(1, BODY)
    assert_stream_error(peer, 1, ErrorCodes.PROTOCOL_ERROR)
    assert_alive(peer, 3)


@pytest.mark.parametrize("name", ["ServerLive", "ModelStreamInfer"])
def test_calls_with_a_handler_too(connect, name):
    peer = connect()
    peer.headers(1, call_headers(name, ("content-length", "6")))
    peer.data(1, message(b""), end=True)
    assert_stream_error(peer, 1, ErrorCodes.PROTOCOL_ERROR)
    peer.headers(3, call_headers("ServerLive", ("content-length", "5")))
    peer.data(3, message(b""), end=True)
    assert peer.answer(3).messages == [LIVE]


@pytest.mark.parametrize("by_data", [False, True])
def test_no_body_where_one_was_promised(connect, by_data):
    peer = connect()
    peer.headers(1, call_headers("ServerLive", ("content-length", "5")), end=not by_data)
    if by_data:
        peer.data(1, end=True)
    assert_stream_error(peer, 1, ErrorCodes.PROTOCOL_ERROR)
    assert_alive(peer, 3)


def test_no_body_and_none_promised_is_a_call_without_its_message(connect):
    peer = connect()
    peer.headers(1, call_headers("ServerLive", ("content-length", "0")), end=True)
    assert peer.answer(1).status == INVALID


@pytest.mark.parametrize(
    "lengths",
    [
        (len(BODY), len(BODY) + 1), (len(BODY) + 1, len(BODY)), ("five",), ("",), ("-5",), ("+5",), ("5.0",), ("0x5",),
        (" 5",), ("\u00b2",), ("5, 5",), ("9" * 5000,),
    ],
)  # fmt: skip
def test_what_is_no_length_is_reset_before_a_body(connect, lengths):
    peer = connect()
    peer.headers(1, infer(*lengths))
    assert_stream_error(peer, 1, ErrorCodes.PROTOCOL_ERROR)
    assert not peer.goaway
    assert_alive(peer, 3)


def test_calls_with_equal_headers_count_each_their_own(connect):
    """What equal header blocks say is kept and shared."""
    peer = connect()
    for stream in (1, 3, 5, 7):
        peer.headers(stream, infer(len(BODY)))
        peer.data(stream, BODY if stream != 5 else BODY[:-1], end=True)
    assert_stream_error(peer, 5, ErrorCodes.PROTOCOL_ERROR)
    for stream in (1, 3, 7):
        reply = peer.answer(stream)
        assert reply.status == OK
        assert_echoed(reply, 3)
