"""Every wrong request over HTTP: its status, what the text says, and that the server is none the worse for it."""

import json
import re

import numpy as np
import pytest
from resting import call, infer, tensor, with_binary
from test_server_inference import assert_answers

ROW = np.zeros((1, 10), "f4")
GOOD = tensor(ROW)


def given(**changes) -> dict:
    return {"inputs": [{**GOOD, **changes}]}


DOCUMENTS = {
    "not JSON": (b"{", "the body is not JSON: Expecting property name"),
    "empty": (b"", "takes 40 bytes|not JSON"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8 at byte 8"),
    "UTF-16": (json.dumps(given()).encode("utf-16"), "not UTF-8"),
    "a list": ([1], "must be a JSON object"),
    "no inputs": ({}, "inputs is missing"),
    "inputs an object": ({"inputs": {}}, "inputs is missing; want a list"),
    "an input a string": ({"inputs": ["x"]}, r"inputs\[0\] must be an object"),
    "many inputs": ({"inputs": [GOOD] * 65}, "65 inputs; at most 64"),
    "no name": ({"inputs": [{"datatype": "FP32", "shape": [0]}]}, r"inputs\[0\]\.name is missing"),
    "name a number": (given(name=4), r"inputs\[0\]\.name must be a string"),
    "unknown input": (given(name="y"), "no input 'y'"),
    "twice": ({"inputs": [GOOD, GOOD]}, "given twice"),
    "datatype unknown": (given(datatype="FP8"), "datatype 'FP8' is unknown"),
    "datatype other": (given(datatype="FP64"), "want datatype FP32, got 'FP64'"),
    "FP16 in JSON": (given(datatype="FP16"), "FP16 has no form in JSON"),
    "shape missing": ({"inputs": [{"name": "x", "datatype": "FP32"}]}, "shape must be a list"),
    "shape of floats": (given(shape=[1.0, 10]), "shape must be a list of whole numbers"),
    "shape of booleans": (given(shape=[True, 10]), "shape must be a list of whole numbers"),
    "shape negative": (given(shape=[-1, 10]), "negative dimension -1"),
    "shape huge": (given(shape=[2**62, 4]), "exceeds 2147483647"),
    "shape beyond 64 bits": (given(shape=[2**70]), "shape must be a list of whole numbers"),
    "shape wrong": (given(shape=[10]), r"want shape \[-1, 10\], got \[10\]"),
    "rank": (given(shape=[1] * 9), "9 dimensions; at most 8"),
    "too few values": (given(data=[1.0] * 9), "takes 10 elements, data has 9"),
    "too many values": (given(data=[1.0] * 11), "takes 10 elements, data has 11"),
    "nested otherwise": (given(data=[[1.0] * 5] * 2), "nested unlike its shape: want a list of 1 there, got a list of 2"),
    "ragged": (given(shape=[2, 10], data=[[1.0] * 10, [1.0] * 9]), "want a list of 10 there, got a list of 9"),
    "deep": (given(data=[[[1.0] * 10]]), "element 0: want a number for FP32, got a list|want a list of 10"),
    "a string in numbers": (given(data=[1.0] * 9 + ["2"]), "element 9: want a number for FP32, got a string"),
    "null in numbers": (given(data=[None] * 10), "element 0: want a number for FP32, got null"),
    "booleans as numbers": (given(data=[True] * 10), "element 0: want a number for FP32, got true or false"),
    "beyond FP32": (given(data=[1e39] * 10), "1e.39 does not fit into FP32"),
    "beyond any float": (given(data=[10**400] * 10), "does not fit into FP32"),
    "data a number": (given(data=4), "want a list of values, got a number"),
    "no data": ({"inputs": [{**GOOD, "data": None}]}, "want a list of values, got null"),
    "neither data nor size": (given(parameters={}) | {"inputs": [{k: v for k, v in GOOD.items() if k != "data"}]}, "neither data nor"),
    "both data and size": (given(parameters={"binary_data_size": 0}), "both data and the parameter binary_data_size"),
    "id a number": (given() | {"id": 4}, "id must be a string"),
    "half a surrogate": (b'{"id": "\\ud800", "inputs": []}', "half of a surrogate pair"),
    "parameters a list": (given() | {"parameters": [1]}, "parameters must be an object"),
    "a parameter a list": (given() | {"parameters": {"a": []}}, "parameter 'a': want"),
    "a parameter beyond 64 bits": (given() | {"parameters": {"a": 2**64}}, "parameter 'a': want"),
    "a reserved parameter": (given() | {"parameters": {"triton_x": 1}}, "the prefix triton_ is reserved"),
    "binary_data_output a number": (given() | {"parameters": {"binary_data_output": 1}}, "must be true or false"),
    "outputs an object": (given() | {"outputs": {}}, "outputs must be a list"),
    "unknown output": (given() | {"outputs": [{"name": "y"}]}, "unexpected inference output 'y'"),
    "output twice": (given() | {"outputs": [{"name": "output"}] * 2}, "asked for twice"),
    "output without name": (given() | {"outputs": [{}]}, r"outputs\[0\]\.name is missing"),
    "many outputs": (given() | {"outputs": [{"name": "output"}] * 300}, "300 outputs"),
    "unknown layer": (given() | {"outputs": [{"name": "layer:nope"}]}, "no layer 'nope'"),
    "nested a thousand deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "lists without end": (b'{"a": [' + b"[]," * 1_000_001 + b"[]]}", "1000004 lists and objects, at most 4000000 and 1000000"),
    "values without end": (b'{"a": [' + b"0," * 4_000_001 + b"0]}", "at most 4000000"),
    "an endless number": (b'{"id": ' + b"1" * 5000 + b"}", "the body is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_wrong_document_is_refused_with_the_reason(served, modules, case):
    body, text = DOCUMENTS[case]
    got = infer(served, "shared", body)
    assert (got.status, got.headers["content-type"]) == (400, "application/json"), got.body
    assert re.search(text, got.error), got.error
    assert len(got.error) < 1000
    assert "Traceback" not in got.error
    assert_answers(served, modules)


def test_shared_memory_is_not_offered(served, modules):
    got = infer(served, "shared", given(parameters={"shared_memory_region": "r"}))
    assert (got.status, "shared memory is not offered" in got.error) == (501, True)
    assert_answers(served, modules)


BINARY = {k: v for k, v in GOOD.items() if k != "data"}
LENGTHS = {
    "not a number": ("x", 40, "want the bytes of JSON"),
    "negative": ("-1", 40, "want the bytes of JSON"),
    "not ASCII": ("\xb2", 40, "want the bytes of JSON"),
    "beyond the body": ("100000", 40, "in the body of"),
    "endless": ("9" * 100, 40, "want the bytes of JSON"),
    "one short": (-1, 40, "not JSON"),
    "one over": (1, 40, "not JSON|UTF-8"),
    "size over the body": (0, 44, "binary_data_size is 44, 40 bytes are left"),
    "size under the body": (0, 36, "4 bytes follow"),
    "size negative": (0, -1, "must be a whole number of bytes"),
    "size a float": (0, 40.0, "must be a whole number of bytes"),
    "size true": (0, True, "must be a whole number of bytes"),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_a_wrong_length_of_binary_data_is_refused(served, modules, case):
    header, size, text = LENGTHS[case]
    body, right = with_binary({"inputs": [{**BINARY, "parameters": {"binary_data_size": size}}]}, ROW.tobytes())
    got = infer(
        served,
        "shared",
        body,
        inference_header_content_length=header if isinstance(header, str) else str(int(right) + header),
    )
    assert got.status == 400, got.body
    assert re.search(text, got.error), got.error
    assert_answers(served, modules)


def test_bytes_that_contradict_the_shape_are_refused(served):
    document = {"inputs": [{**BINARY, "shape": [2, 10], "parameters": {"binary_data_size": 40}}]}
    body, length = with_binary(document, ROW.tobytes())
    got = infer(served, "shared", body, inference_header_content_length=length)
    assert got.status == 400
    assert "takes 80 bytes, got 40" in got.error


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("GET", "/v2/nothing", 404, "there is no '/v2/nothing' here"),
        ("GET", "/v2/models/a%2Fb/config", 404, "there is no"),
        ("GET", "/v2/models/..%2F..%2Fetc/config", 404, "there is no"),
        ("GET", "/v2/models/no-such", 404, "unknown model: 'no-such'"),
        ("GET", "/v2/models/no%0A%23%20TYPE/config", 404, r"unknown model: 'no\n# TYPE'"),
        ("GET", "/v2/models/shared/versions/9", 404, "no version 9"),
        ("GET", "/v2/models/shared/versions/01", 400, "positive whole number"),
        ("POST", "/v2/models/no-such/infer", 404, "unknown model"),
        ("POST", "/v2/models/shared/versions/4/infer", 404, "no version 4"),
        ("GET", "/v2/models/shared/infer", 405, "GET is not possible here; use POST"),
        ("DELETE", "/v2", 405, "DELETE is not possible here"),
        ("POST", "/metrics", 405, "POST is not possible here"),
    ],
)  # fmt: skip
def test_wrong_paths_and_methods_answer_json(served, method, path, status, text):
    got = call(served, method, path, given() if method == "POST" else None)
    assert got.status == status
    assert text in got.error


def test_what_no_service_offers_is_not_implemented(served):
    import grpc

    from layercast.server.rest.status import HTTP_STATUS

    assert set(HTTP_STATUS) == set(grpc.StatusCode)
    got = infer(served, "shared", given() | {"parameters": {"sequence_id": 4}})
    assert (got.status, "sequences are not supported" in got.error) == (501, True)
