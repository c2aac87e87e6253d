"""The front end `direct`: which fields make a call, and which make it malformed (RFC 9113, section 8)."""

import pytest
from direct import INVALID, LIVE, OK, UNIMPLEMENTED, assert_alive, assert_stream_error, ended
from h2.errors import ErrorCodes
from h2_frames import call_headers, message


def sent(peer, stream, pairs):
    peer.headers(stream, pairs)
    peer.data(stream, message(b""), end=True)
    return peer.answer(stream)


BASE = call_headers("ServerLive")
PATH = dict(BASE)[":path"]
MALFORMED = {
    "no method": call_headers("ServerLive", method=None),
    "no path": call_headers("ServerLive", path=None),
    "no scheme": call_headers("ServerLive", scheme=None),
    "an empty path": call_headers("ServerLive", path=""),
    "two methods": [(":method", "POST"), *BASE],
    "two paths": [(":path", PATH), *BASE],
    "two schemes": [(":scheme", "http"), *BASE],
    "two authorities": [(":authority", "localhost"), *BASE],
    "a field of answers": [(":status", "200"), *BASE],
    "an unknown pseudo field": [(":colour", "blue"), *BASE],
    "an empty name": [*BASE, ("", "1")],
    "a pseudo field after another": [*BASE[1:], BASE[0]],
    "an upper-case name": [*BASE, ("X-Long", "1")],
    "a name with a space": [*BASE, ("x long", "1")],
    "a name with a colon": [*BASE, ("x:long", "1")],
    "a name with a control": [*BASE, ("x\x01", "1")],
    "a name that isn't ASCII": [*BASE, ("ü", "1")],
    "a value with a newline": [*BASE, ("x", "1\n2")],
    "a value with a return": [*BASE, ("x", "1\r2")],
    "a value with a zero": [*BASE, ("x", "1\x002")],
    "connection": [*BASE, ("connection", "close")],
    "keep-alive": [*BASE, ("keep-alive", "5")],
    "proxy-connection": [*BASE, ("proxy-connection", "close")],
    "transfer-encoding": [*BASE, ("transfer-encoding", "chunked")],
    "upgrade": [*BASE, ("upgrade", "h2c")],
    "te that isn't trailers": call_headers("ServerLive", te="gzip"),
}


@pytest.mark.parametrize("malformed", MALFORMED)
def test_a_malformed_call_is_reset_and_the_connection_lives(connect, direct, malformed):
    peer = connect()
    before = ended(direct, "OK", "ServerLive")
    peer.headers(1, MALFORMED[malformed])
    assert_stream_error(peer, 1, ErrorCodes.PROTOCOL_ERROR)
    assert not peer.goaway
    assert ended(direct, "OK", "ServerLive") == before
    assert_alive(peer, 3)


@pytest.mark.parametrize("name", [" x", "x ", "\tx"])
def test_a_value_with_space_around_it_is_malformed_or_taken_without(connect, name):
    """RFC 9113 has it malformed; gRPC has its peers strip it."""
    peer = connect()
    peer.headers(1, [*BASE, ("x-spaced", name)])
    peer.data(1, message(b""), end=True)
    peer.until(lambda: peer.streams[1].over)
    assert peer.streams[1].status == OK or peer.streams[1].reset is ErrorCodes.PROTOCOL_ERROR
    assert_alive(peer, 3)


@pytest.mark.parametrize(
    "pairs",
    [
        call_headers("ServerLive", te=None),
        call_headers("ServerLive", authority=None),
        call_headers("ServerLive", ("host", "localhost"), authority=None),
        call_headers("ServerLive", scheme="https"),
        call_headers("ServerLive", content_type="application/grpc+proto"),
        call_headers("ServerLive", content_type="application/grpc;charset=utf-8"),
        call_headers("ServerLive", ("x-empty", ""), ("x", "a"), ("x", "b"), ("cookie", "a=1"), ("cookie", "b=2")),
        call_headers("ServerLive", ("x-latin", "h\xe9llo"), ("x-bin", "//8"), ("y-bin", "AP8=,AA=="), ("z-bin", "!")),
        call_headers("ServerLive", ("user-agent", "grpc-c++/1.0"), ("grpc-accept-encoding", "identity, gzip")),
    ],
    ids=["no te", "no authority", "host", "https", "+proto", "charset", "repeated", "binary", "as clients do"],
)  # fmt: skip
def test_what_a_call_may_have_or_lack(connect, pairs):
    peer = connect()
    reply = sent(peer, 1, pairs)
    assert (reply.status, reply.messages) == (OK, [LIVE])
    assert reply.lists[0][":status"] == "200"
    assert reply.lists[0]["content-type"].startswith("application/grpc")


@pytest.mark.parametrize(
    ("pairs", "http"),
    [
        (call_headers("ServerLive", content_type="application/json"), {"415"}),
        (call_headers("ServerLive", content_type="application/grpc-web"), {"415"}),
        (call_headers("ServerLive", content_type="application/grpcx"), {"415"}),
        (call_headers("ServerLive", content_type=None), {"415"}),
        (call_headers("ServerLive", method="GET"), {"405"}),
        (call_headers("ServerLive", method="PUT"), {"405"}),
        (call_headers("ServerLive", method="OPTIONS"), {"405"}),
    ],
    ids=["json", "grpc-web", "grpcx", "no type", "GET", "PUT", "OPTIONS"],
)
def test_what_is_no_call_of_grpc_gets_an_answer_of_http(connect, direct, pairs, http):
    peer = connect()
    before = ended(direct, "OK", "ServerLive")
    reply = sent(peer, 1, pairs)
    assert reply.reset in (None, ErrorCodes.NO_ERROR)
    assert reply.lists[0][":status"] in http
    assert reply.status != OK
    assert ended(direct, "OK", "ServerLive") == before
    assert_alive(peer, 3)


def test_connect_is_no_way_to_reach_anything(connect):
    peer = connect()
    peer.headers(1, [(":method", "CONNECT"), (":authority", "example.org:80")])
    peer.until(lambda: peer.streams[1].over)
    assert peer.streams[1].reset or peer.streams[1].lists[0][":status"] in ("405", "501")
    assert_alive(peer, 3)


@pytest.mark.parametrize(
    "path",
    ["/", "/x", "//", "/x/y/z", "*", "x", "/inference.GRPCInferenceService/", "/inference.GRPCInferenceService/Nothing",
     "/inference.GRPCInferenceService/ServerLive/", "/inference.GRPCInferenceService/ServerLive?x=1", "/" + "n" * 5000],
)  # fmt: skip
def test_an_unknown_path_is_unimplemented(connect, path):
    peer = connect()
    reply = sent(peer, 1, call_headers("ServerLive", path=path))
    assert reply.status == UNIMPLEMENTED or reply.reset is ErrorCodes.PROTOCOL_ERROR
    if path.startswith("/"):
        assert reply.status == UNIMPLEMENTED
        assert len(reply.lists[-1]["grpc-message"]) <= 1024
    assert_alive(peer, 3)


def test_a_malformed_timeout_is_the_callers_fault(connect):
    peer = connect()
    for number, given in enumerate(("", "1", "s", "1s", "-1S", "1.5S", "123456789S", "1 S", "٣S", "1S,2S")):
        reply = sent(peer, 1 + 2 * number, call_headers("ServerLive", ("grpc-timeout", given)))
        assert reply.status == INVALID or (not given and reply.status == OK), given
    assert_alive(peer, 99)
