"""Messages that would cost far more than they weigh are refused before they are parsed."""

import time

import grpc
import numpy as np
import pytest
from numeric import Model, asked, identity, numeric
from test_server_inference import values_of

from layercast.proto.bulk import MAX_FIELDS, MAX_VARINT_BYTES, MessageTooComplex, check_bulk
from layercast.proto.codec import CodecError
from layercast.proto.messages import ModelInferRequest
from layercast.proto.rpc import INFERENCE

SIZE = 16 << 20


def delimited(number: int, content: bytes) -> bytes:
    size = len(content)
    varint = bytes([*(size >> 7 * place & 0x7F | 0x80 for place in range(4)), size >> 28])
    return bytes([number << 3 | 2]) + varint + content


# Each 16 MiB: what two bytes, or one, can stand for. Field 5 is `inputs`, and in it 3 `shape`, 4 `parameters`,
# 5 `contents`, whose field 3 is `int64_contents` and 8 `bytes_contents`; 6 is `outputs`.
BOMBS = {
    "inputs": b"\x2a\x00" * (SIZE // 2),
    "outputs": b"\x32\x00" * (SIZE // 2),
    "parameters of one input": delimited(5, b"\x22\x00" * (SIZE // 2)),
    "raw contents": b"\x3a\x00" * (SIZE // 2),
    "numbers": delimited(5, delimited(5, delimited(3, b"\x01" * SIZE))),
    "numbers in one list each": delimited(5, delimited(5, b"\x1a\x01\x01" * (SIZE // 3))),
    "numbers one by one": delimited(5, delimited(5, b"\x18\x01" * (SIZE // 2))),
    "dimensions": delimited(5, delimited(3, b"\x01" * SIZE)),
    "texts": delimited(5, delimited(5, b"\x42\x00" * (SIZE // 2))),
    "unknown fields": b"\xc0\x3e\x07" * (SIZE // 3),
}


@pytest.fixture(scope="module")
def served():
    with numeric({"same": Model(identity)}) as server:
        yield server


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_quickly_and_the_next_request_is_answered(served, name):
    call = served.channel.unary_unary(INFERENCE["ModelInfer"].path)
    with pytest.raises(grpc.RpcError, match="send tensors as raw bytes") as raised:
        call(BOMBS[name], timeout=30)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    began = time.thread_time()
    with pytest.raises(MessageTooComplex):
        check_bulk(BOMBS[name], ModelInferRequest)
    assert time.thread_time() - began < 2  # parsed, it takes many seconds and gigabytes
    x = np.array([[1.5, -2]], "f4")
    np.testing.assert_array_equal(values_of(served.call("ModelInfer", asked("same", x))), x)


def test_inside_a_stream_it_is_one_requests_error(served):
    method = INFERENCE["ModelStreamInfer"]
    call = served.channel.stream_stream(method.path, None, method.response.FromString)
    good = asked("same", np.ones((1, 2), "f4"), id="next").SerializeToString()
    refused, answered = call(iter([BOMBS["inputs"], good]), timeout=30)
    assert refused.infer_response.parameters["error_code"].string_param == "RESOURCE_EXHAUSTED"
    assert answered.infer_response.id == "next"


def test_large_tensors_pass(served):
    x = np.random.default_rng(0).random((4, 1_000_000), "f4")
    response = served.call("ModelInfer", asked("same", x))
    assert response.raw_output_contents[0] == x.tobytes()
    typed = ModelInferRequest(model_name="same")
    typed.inputs.add(name="x", datatype="FP32", shape=[1, 1_000_000]).contents.fp32_contents.extend(x[0].tolist())
    assert list(served.call("ModelInfer", typed).outputs[0].contents.fp32_contents) == x[0].tolist()


def test_the_bounds_are_exact():
    kind = ModelInferRequest
    check_bulk(b"\x2a\x00" * MAX_FIELDS, kind)
    with pytest.raises(MessageTooComplex):
        check_bulk(b"\x2a\x00" * (MAX_FIELDS + 1), kind)
    numbers = delimited(5, delimited(5, delimited(3, b"\x01" * MAX_VARINT_BYTES)))
    check_bulk(numbers, kind)
    with pytest.raises(MessageTooComplex):
        check_bulk(numbers + delimited(5, delimited(3, b"\x01")), kind)


@pytest.mark.parametrize(
    "wire", [b"\x2a\x05\x00", b"\x9b\x3e", b"\xff" * 11, b"\x0a", b"\x2a\x02\x0a\x05", b"\x09\x00"]
)
def test_what_is_no_message_is_said_to_be_none(wire):
    with pytest.raises(CodecError):
        check_bulk(wire, ModelInferRequest)
