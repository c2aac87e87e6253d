"""Requests and responses to arrays and back. The other side of each exchange is written by hand."""

import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layercast.proto.codec import (
    CodecError,
    decode_inputs,
    decode_named,
    decode_outputs,
    fill_inputs,
    fill_outputs,
    is_typed,
    named_tensor,
)
from layercast.proto.messages import InferTensorContents, ModelInferRequest, ModelInferResponse, NamedTensor

# datatype -> (typed field, values, their bytes)
EXAMPLES = {
    "BOOL": ("bool_contents", [True, False], "0100"),
    "INT8": ("int_contents", [-128, 127], "807f"),
    "INT16": ("int_contents", [-2, 32767], "feffff7f"),
    "INT32": ("int_contents", [-(2**31), 5], "0000008005000000"),
    "INT64": ("int64_contents", [-1, 2**62], "ffffffffffffffff0000000000000040"),
    "UINT8": ("uint_contents", [0, 255], "00ff"),
    "UINT16": ("uint_contents", [1, 65535], "0100ffff"),
    "UINT32": ("uint_contents", [1, 2**32 - 1], "01000000ffffffff"),
    "UINT64": ("uint64_contents", [1, 2**64 - 1], "0100000000000000ffffffffffffffff"),
    "FP32": ("fp32_contents", [1.0, -0.5], "0000803f000000bf"),
    "FP64": ("fp64_contents", [1.0, -0.5], "000000000000f03f000000000000e0bf"),
    "BYTES": ("bytes_contents", [b"\x00a", b""], "02000000006100000000"),
}
RAW_ONLY = {"FP16": ([1.0, -0.5], "003c00b8"), "BF16": ([1.0, -0.5], "803f00bf")}


def request_of(*tensors: dict[str, object], raw: list[bytes] | None = None) -> ModelInferRequest:
    request = ModelInferRequest(raw_input_contents=raw)
    for number, tensor in enumerate(tensors):
        request.inputs.add(**{"name": f"x{number}", "datatype": "FP32", "shape": [1], **tensor})
    return request


@pytest.mark.parametrize("datatype", EXAMPLES)
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("typed", [False, True], ids=["raw", "typed"])
def test_every_datatype_raw_and_typed(datatype: str, rows: int, typed: bool) -> None:
    field, values, bits = EXAMPLES[datatype]
    raw = bytes.fromhex(bits) * rows
    contents = InferTensorContents(**{field: values * rows})
    request = ModelInferRequest()
    request.inputs.add(name="x", datatype=datatype, shape=[rows, 2], contents=contents if typed else None)
    if not typed:
        request.raw_input_contents.append(raw)
    assert is_typed(request) is (typed and rows > 0)
    decoded = decode_inputs(request)["x"]
    assert (decoded.shape, decoded.ravel().tolist()) == ((rows, 2), values * rows)
    assert not decoded.flags.writeable

    response = ModelInferResponse()
    fill_outputs(response, [("y", datatype, decoded)], typed)
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", datatype, [rows, 2])
    assert list(response.raw_output_contents) == ([] if typed else [raw])
    assert output.contents == (contents if typed else InferTensorContents())
    assert decode_outputs(response)["y"].ravel().tolist() == values * rows


@pytest.mark.parametrize("datatype", RAW_ONLY)
def test_half_precision_is_raw_only(datatype: str) -> None:
    values, bits = RAW_ONLY[datatype]
    request = request_of({"datatype": datatype, "shape": [2]}, raw=[bytes.fromhex(bits)])
    half = decode_inputs(request)["x0"]
    assert half.tolist() == values
    response = ModelInferResponse()
    fill_outputs(response, [("a", datatype, half), ("b", "FP32", np.ones(1, "f4"))], typed=True)
    assert [raw.hex() for raw in response.raw_output_contents] == [bits, "0000803f"]
    assert not any(output.HasField("contents") for output in response.outputs)
    typed = request_of({"datatype": datatype, "contents": InferTensorContents(fp32_contents=[1])})
    with pytest.raises(CodecError, match="no typed field for FP16/BF16"):
        decode_inputs(typed)


def test_typed_floats_keep_special_values() -> None:
    values = [np.nan, np.inf, -np.inf, -0.0, 2.0**-149]
    request = request_of({"shape": [5], "contents": InferTensorContents(fp32_contents=values)})
    decoded = decode_inputs(request)["x0"]
    assert decoded.tobytes() == np.array(values, "<f4").tobytes()
    response = ModelInferResponse()
    fill_outputs(response, [("y", "FP32", decoded)], typed=True)
    assert decode_outputs(response)["y"].tobytes() == decoded.tobytes()


def test_several_inputs_keep_their_order_and_empty_slots() -> None:
    request = ModelInferRequest()
    fill_inputs(
        request,
        [
            ("text", "BYTES", np.array(["hé"], object)),
            ("none", "FP32", np.zeros((0, 3), "f4")),
            ("column", "INT16", np.arange(6, dtype="i2").reshape(2, 3).T),
        ],
    )
    assert [raw.hex() for raw in request.raw_input_contents] == ["0300000068c3a9", "", "000003000100040002000500"]
    decoded = decode_inputs(ModelInferRequest.FromString(request.SerializeToString()))
    assert list(decoded) == ["text", "none", "column"]
    assert decoded["text"].tolist() == ["hé".encode()]
    assert decoded["none"].shape == (0, 3)
    assert decoded["column"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_named_tensors() -> None:
    tensor = named_tensor("a.b", "FP16", np.array([[1.5]], "f2"))
    assert tensor == NamedTensor(name="a.b", datatype="FP16", shape=[1, 1], data=b"\x00\x3e")
    assert decode_named([tensor])["a.b"].tolist() == [[1.5]]
    with pytest.raises(CodecError, match=r"layer 'a\.b' is given twice"):
        decode_named([tensor, tensor], kind="layer")
    many = [named_tensor(str(number), "BOOL", np.ones(1, bool)) for number in range(65)]
    with pytest.raises(CodecError, match="65 inputs; at most 64"):
        decode_named(many)
    assert len(decode_named(many, kind="layer", limit=None)) == 65
    wrong = NamedTensor(name="a", datatype="FP32", shape=[2], data=b"\x00" * 4)
    with pytest.raises(CodecError, match=r"input 'a': FP32 of shape \[2\] takes 8 bytes, got 4") as caught:
        decode_named([tensor, wrong])
    assert caught.value.field == "inputs[1].data"


def typed(**contents: object) -> dict[str, object]:
    return {"contents": InferTensorContents(**contents)}


ONE = b"\x00" * 4
MALFORMED = {
    "duplicate": (request_of({"name": "a"}, {"name": "a"}, raw=[ONE, ONE]), "inputs[1].name", "'a' is given twice"),
    "too many": (request_of(*[{}] * 65), "inputs", "65 inputs; at most 64"),
    "mixed": (request_of(typed(fp32_contents=[1]), raw=[ONE]), "inputs[0].contents", "both set"),
    "raw missing": (request_of({}, {}, raw=[ONE]), "raw_input_contents", "1 entries for 2 inputs"),
    "raw extra": (request_of({}, raw=[ONE, ONE]), "raw_input_contents", "2 entries for 1 inputs"),
    "raw without inputs": (request_of(raw=[ONE]), "raw_input_contents", "1 entries for 0 inputs"),
    "no data": (
        request_of({}),
        "inputs[0].contents.fp32_contents",
        "fp32_contents has 0; send them there or as raw_input_contents[0]",
    ),
    "raw size": (request_of({"shape": [1, 12]}, raw=[b"x" * 40]), "raw_input_contents[0]", "takes 48 bytes, got 40"),
    "minus one": (request_of({"shape": [-1, 12]}, raw=[b"x" * 48]), "inputs[0].shape", "negative dimension -1"),
    "huge": (request_of({"shape": [2**32, 2**32]}, raw=[b""]), "inputs[0].shape", "exceeds"),
    "typed huge": (
        request_of({"shape": [2**30]} | typed(fp32_contents=[1])),
        "inputs[0].contents.fp32_contents",
        "has 1",
    ),
    "typed minus one": (request_of({"shape": [-1]} | typed(fp32_contents=[1])), "inputs[0].shape", "negative"),
    "rank": (request_of({"shape": [1] * 100_000}, raw=[ONE]), "inputs[0].shape", "100000 dimensions"),
    "datatype": (request_of({"datatype": "FLOAT"}, raw=[ONE]), "inputs[0].datatype", "'FLOAT' is unknown"),
    "typed datatype": (request_of({"datatype": "fp32"} | typed(fp32_contents=[1])), "inputs[0].datatype", "'fp32'"),
    "wrong field": (
        request_of(typed(int64_contents=[1])),
        "inputs[0].contents.int64_contents",
        "FP32 elements belong in fp32_contents, got int64_contents",
    ),
    "two fields": (
        request_of(typed(fp32_contents=[1], bool_contents=[True])),
        "inputs[0].contents.bool_contents",
        "belong in fp32_contents",
    ),
    "int8 range": (
        request_of({"datatype": "INT8", "shape": [2]} | typed(int_contents=[1, 128])),
        "inputs[0].contents.int_contents",
        "128 is outside int8, -128 to 127",
    ),
    "uint16 range": (
        request_of({"datatype": "UINT16"} | typed(uint_contents=[65536])),
        "inputs[0].contents.uint_contents",
        "65536 is outside uint16",
    ),
    "bool bytes": (request_of({"datatype": "BOOL"}, raw=[b"\x07"]), "raw_input_contents[0]", "0 or 1; got 7"),
    "bytes framing": (
        request_of({"datatype": "BYTES"}, raw=[b"\xff\xff\xff\xffA"]),
        "raw_input_contents[0]",
        "claims 4294967295",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_name_the_field_and_the_input(case: str) -> None:
    request, field, text = MALFORMED[case]
    with pytest.raises(CodecError) as caught:
        decode_inputs(request)
    assert caught.value.field == field
    assert text in str(caught.value)


def test_shared_memory_is_refused_without_echoing_the_region() -> None:
    request = request_of({})
    request.inputs[0].parameters["shared_memory_region"].string_param = "secret_region"
    with pytest.raises(CodecError, match="shared memory is not supported") as caught:
        decode_inputs(request)
    assert "secret_region" not in str(caught.value)


def test_a_hostile_name_is_escaped_in_the_message() -> None:
    request = request_of({"name": "x\nI0205 forged\x1b[31m" + "y" * 10_000}, raw=[b""])
    with pytest.raises(CodecError) as caught:
        decode_inputs(request)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_typed_outputs_are_checked_like_raw_ones() -> None:
    for is_wanted_typed in (True, False):
        with pytest.raises(CodecError, match="got float64"):
            fill_outputs(ModelInferResponse(), [("y", "FP32", np.zeros(1))], is_wanted_typed)


def test_large_lists_let_other_threads_in_between() -> None:
    """One call of numpy's or protobuf's for all elements would keep the server's loop waiting until it returns."""
    request = request_of({"datatype": "INT32", "shape": [3_000_000], "contents": InferTensorContents()})
    request.inputs[0].contents.int_contents.extend(range(3_000_000))
    for work in (
        lambda: decode_inputs(request),
        lambda: fill_outputs(ModelInferResponse(), [("y", "INT32", np.arange(3_000_000, dtype="i4"))], True),
    ):
        moments: list[float] = []
        over = threading.Event()

        def other(moments=moments, over=over) -> None:
            while not over.wait(0.001):
                moments.append(time.perf_counter())

        thread = threading.Thread(target=other)
        thread.start()
        began = time.perf_counter()
        work()
        ended = time.perf_counter()
        over.set()
        thread.join()
        # One could come before such a call, and one after it. How far apart they are is the machine's affair.
        assert sum(began < moment < ended for moment in moments) >= 4


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200))
def test_any_parsable_message_decodes_or_is_refused(wire: bytes) -> None:
    request = ModelInferRequest()
    request.inputs.add(name="x", datatype="FP32", shape=[1])
    try:
        request.MergeFromString(wire)
    except Exception:  # not a message: the RPC layer refuses it before us
        return
    with suppress(CodecError):
        assert all(array.size * array.itemsize <= len(wire) * 8 for array in decode_inputs(request).values())
