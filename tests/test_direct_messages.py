"""The front end `direct`: gRPC's messages inside HTTP/2, compressed ones too, and how answers are written."""

import base64
import gzip
import zlib

import numpy as np
import pytest
from direct import (
    EXHAUSTED,
    INTERNAL,
    INVALID,
    LIVE,
    MESSAGE_LIMIT,
    OK,
    UNIMPLEMENTED,
    assert_alive,
    assert_echoed,
    floats,
)
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from h2.settings import SettingCodes
from h2_frames import END_STREAM, LARGEST_WINDOW, Kind, call_headers, message
from numeric import asked

from layercast.proto.messages import ModelStreamInferResponse

INFER = call_headers("ModelInfer")


def sent(peer, stream, body, pairs=INFER, end=True):
    peer.headers(stream, pairs, end=end and not body)
    if body:
        peer.data(stream, body, end=end)
    return peer.answer(stream)


def test_an_answer_is_headers_a_message_and_trailers(connect):
    peer = connect()
    peer.call(1, "ServerLive")
    reply = peer.answer(1)
    found = [each for each in peer.frames if each.stream == 1]
    assert [each.kind for each in found] == [Kind.HEADERS, Kind.DATA, Kind.HEADERS]
    assert [each.flags & END_STREAM for each in found] == [0, 0, END_STREAM]
    assert reply.lists[0] == {
        ":status": "200", "content-type": "application/grpc", "grpc-accept-encoding": "identity,gzip,deflate",
    }  # fmt: skip
    assert reply.lists[1] == {"grpc-status": "0"}
    assert bytes(reply.body) == message(LIVE)


def test_a_call_that_fails_is_answered_by_headers_alone(connect):
    peer = connect()
    reply = sent(peer, 1, message(b"\xff"))
    found = [each for each in peer.frames if each.stream == 1]
    assert [(each.kind, each.flags & END_STREAM) for each in found] == [(Kind.HEADERS, END_STREAM)]
    assert (reply.lists[0][":status"], reply.status) == ("200", INVALID)
    assert reply.lists[0]["content-type"] == "application/grpc"


def test_the_text_of_a_failure_is_escaped_and_its_details_are_base64(connect):
    peer = connect()
    request = asked("same", np.zeros((1, 1), "f4"))
    request.inputs[0].name = "50 % of ü\n日本"
    reply = sent(peer, 1, message(request.SerializeToString()))
    assert reply.status == INVALID
    given = reply.lists[0]["grpc-message"]
    assert given.isascii()
    assert "50 %25 of " in given
    assert "日本" in reply.text
    packed = reply.lists[0]["grpc-status-details-bin"]
    assert not packed.endswith("=")
    status = Status.FromString(base64.b64decode(packed + "=" * (-len(packed) % 4)))
    violation = BadRequest()
    assert status.details[0].Unpack(violation)
    assert (status.code, status.message) == (INVALID, reply.text)
    assert violation.field_violations[0].description == reply.text


def test_a_failure_with_a_long_text_stays_within_a_header(connect):
    peer = connect()
    for number, text in enumerate(("x" * 100_000, "日" * 50_000, "%" * 100_000)):
        request = asked("same", np.zeros((1, 1), "f4"))
        request.inputs[0].name = text
        peer.headers(1 + 2 * number, INFER)
        peer.upload(1 + 2 * number, message(request.SerializeToString()))
        reply = peer.answer(1 + 2 * number)
        assert reply.status == INVALID
        assert sum(len(name) + len(value) + 32 for name, value in reply.lists[0].items()) < 8192


ODD = {
    "no message": (b"", {INVALID, INTERNAL, UNIMPLEMENTED}),
    "a part of a head": (b"\0\0\0", {INVALID, INTERNAL}),
    "a head alone": (b"\0\0\0\0\5", {INVALID, INTERNAL}),
    "a part of a message": (b"\0\0\0\0\5ab", {INVALID, INTERNAL}),
    "two messages": (message(floats(1).SerializeToString()) * 2, {INVALID, INTERNAL, UNIMPLEMENTED}),
    "a message and a part": (message(floats(1).SerializeToString()) + b"\0", {INVALID, INTERNAL, UNIMPLEMENTED}),
    "an unknown flag": (message(floats(1).SerializeToString(), 2), {INVALID, INTERNAL, UNIMPLEMENTED}),
    "all flags": (message(floats(1).SerializeToString(), 255), {INVALID, INTERNAL, UNIMPLEMENTED}),
    "compressed, with nothing that says how": (message(gzip.compress(b""), 1), {INVALID, INTERNAL, UNIMPLEMENTED}),
}


@pytest.mark.parametrize("end", ["with the data", "by an empty frame", "by trailers"])
@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_single_message_is_the_callers_fault(connect, odd, end):
    body, codes = ODD[odd]
    peer = connect()
    peer.headers(1, INFER, end=not body and end == "with the data")
    if body:
        peer.data(1, body, end=end == "with the data")
    if end == "by an empty frame":
        peer.data(1, end=True)
    if end == "by trailers":
        peer.headers(1, [("x", "1")], end=True)
    assert peer.answer(1).status in codes
    assert_alive(peer, 3)


PACKED = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("size", [100, 100_000])
@pytest.mark.parametrize("encoding", PACKED)
def test_compressed_messages_are_read(connect, encoding, size):
    peer = connect()
    packed = PACKED[encoding](floats(size).SerializeToString())
    peer.headers(1, call_headers("ModelInfer", ("grpc-encoding", encoding)))
    peer.upload(1, message(packed, 1))
    peer.open_window(0, 1 << 24)
    peer.open_window(1, 1 << 24)
    assert_echoed(peer.answer(1), size)
    # A message may be as it is nevertheless.
    reply = sent(
        peer, 3, message(floats(5).SerializeToString()), call_headers("ModelInfer", ("grpc-encoding", encoding))
    )
    assert_echoed(reply, 5)


WRONGLY_PACKED = {
    "not compressed at all": ("gzip", b"neither", INVALID),
    "cut off": ("gzip", gzip.compress(bytes(1000))[:-9], INVALID),
    "an unknown way": ("snappy", b"x", UNIMPLEMENTED),
    "not to be compressed": ("identity", b"x", None),
    "a bomb": ("gzip", gzip.compress(bytes(80 << 20), 1), EXHAUSTED),
}


@pytest.mark.parametrize("wrong", WRONGLY_PACKED)
def test_a_message_that_does_not_inflate_is_the_callers_fault(connect, wrong):
    encoding, packed, status = WRONGLY_PACKED[wrong]
    peer = connect()
    peer.headers(1, call_headers("ModelInfer", ("grpc-encoding", encoding)))
    peer.upload(1, message(packed, 1))
    found = peer.answer(1).status
    assert found == status or (status is None and found in (INVALID, INTERNAL, UNIMPLEMENTED))
    assert_alive(peer, 3)


def test_a_stream_is_answered_message_by_message(connect):
    peer = connect()
    peer.headers(1, call_headers("ModelStreamInfer"))
    reply = peer.streams[1]
    for number in range(1, 6):
        peer.data(1, message(floats(number).SerializeToString()))
        peer.until(lambda number=number: len(reply.messages) == number)
        answer = ModelStreamInferResponse.FromString(reply.messages[-1])
        assert not answer.error_message
        assert list(answer.infer_response.outputs[0].shape) == [1, number]
    assert not reply.ended
    peer.data(1, end=True)
    assert peer.answer(1).status == OK


def test_messages_of_a_stream_may_come_in_one_frame_and_one_message_in_many(connect):
    peer = connect()
    body = b"".join(message(floats(number).SerializeToString()) for number in range(1, 9))
    for stream, size in ((1, len(body)), (3, 1), (5, 333)):
        peer.headers(stream, call_headers("ModelStreamInfer"))
        for at in range(0, len(body), size):
            peer.data(stream, body[at : at + size], end=at + size >= len(body))
        reply = peer.answer(stream)
        assert reply.status == OK
        shapes = [
            ModelStreamInferResponse.FromString(each).infer_response.outputs[0].shape[1] for each in reply.messages
        ]
        assert shapes == list(range(1, 9))


def test_an_answer_over_the_limit_is_an_error_and_not_sent(connect):
    peer = connect({SettingCodes.INITIAL_WINDOW_SIZE: LARGEST_WINDOW})
    peer.call(1, "ModelInfer", asked("wide", np.zeros((MESSAGE_LIMIT >> 20, 1), "f4")))
    reply = peer.answer(1)
    assert reply.status == EXHAUSTED
    assert f"{MESSAGE_LIMIT:,}" in reply.text
    assert_alive(peer, 3)
