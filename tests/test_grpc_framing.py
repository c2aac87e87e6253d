"""gRPC's frames, cut out of pieces of any size."""

import gzip
import zlib

import pytest

from layercast.server.errors import InvalidArgument, ResourceExhausted
from layercast.server.transport.framing import Frames, framed, status_headers
from layercast.server.transport.inflate import Broken, TooLarge, inflate

MESSAGES = [b"", b"a", bytes(range(256)) * 5, b"", b"\0\0\0\0\1"]


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 7, 300, 10_000])
def test_messages_come_out_as_they_went_in_however_they_are_cut(size):
    body = b"".join(map(framed, MESSAGES))
    frames, found = Frames(2000), []
    for start in range(0, len(body), size):
        frames.feed(body[start : start + size])
        while (message := frames.next()) is not None:
            found.append(message)
    assert found == [(False, message) for message in MESSAGES]
    assert frames.empty


def test_a_message_over_the_limit_is_refused_by_its_head():
    frames = Frames(100)
    frames.feed(framed(bytes(100)))
    assert frames.next() == (False, bytes(100))
    frames.feed(b"\0\0\0\0\x65")
    with pytest.raises(ResourceExhausted, match="101 bytes, the limit is 100"):
        frames.next()


def test_a_flag_that_grpc_does_not_have_is_refused():
    frames = Frames(100)
    frames.feed(b"\2\0\0\0\0")
    with pytest.raises(InvalidArgument, match="begins with 2"):
        frames.next()


def test_a_status_is_written_as_grpc_writes_it():
    assert status_headers(5, "50 % of ü\n", [("a", "b"), ("c-bin", b"\xff\0")]) == [
        (b"grpc-status", b"5"), (b"grpc-message", b"50 %25 of %C3%BC%0A"), (b"a", b"b"), (b"c-bin", b"/wA"),
    ]  # fmt: skip
    assert status_headers(0, "", ()) == [(b"grpc-status", b"0")]


@pytest.mark.parametrize(("pack", "name"), [(gzip.compress, "gzip"), (zlib.compress, "deflate")])
def test_the_limit_counts_what_comes_out(pack, name):
    assert inflate(pack(bytes(1000)), name, 1000) == bytes(1000)
    with pytest.raises(TooLarge):
        inflate(pack(bytes(1001)), name, 1000)
    with pytest.raises(Broken, match="cut off"):
        inflate(pack(bytes(1000))[:-9], name, 1000)
    with pytest.raises(Broken):
        inflate(b"neither", name, 1000)
