"""Parameters of a request: the protocol's own are checked, others change nothing; ids and versions come back."""

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from numeric import Model, asked, identity, numeric
from test_server_inference import values_of

from layercast.proto.messages import InferParameter

X = np.arange(6, dtype="f4").reshape(2, 3)


@pytest.fixture(scope="module")
def served():
    with numeric({"same": [Model(identity), Model(lambda i: {"y": -i["x"]}, version=3)]}) as server:
        yield server


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mine", {"bool_param": True}),
        ("mine", {"int64_param": -(2**63)}),
        ("mine", {"string_param": "text\n\x1b[31m"}),
        ("mine", {"double_param": float("nan")}),
        ("mine", {"uint64_param": 2**64 - 1}),
        ("mine", {"string_param": ""}),
        ("priority", {"uint64_param": 1}),
        ("priority", {"int64_param": 0}),
        ("timeout", {"int64_param": 10_000_000}),
        ("sequence_id", {"int64_param": 0}),
        ("sequence_id", {"string_param": ""}),
        ("sequence_start", {"bool_param": False}),
        ("triton_enable_empty_final_response", {"bool_param": True}),
        ("binary_data_output", {"bool_param": True}),
    ],
)
def test_parameters_that_are_fine_change_nothing(served, key, value):
    message = asked("same", X)
    message.parameters[key].CopyFrom(InferParameter(**value))
    message.inputs[0].parameters["mine"].CopyFrom(InferParameter(**value))
    np.testing.assert_array_equal(values_of(served.call("ModelInfer", message)), -X)


REFUSED = [
    ("request", "triton_secret", {"bool_param": True}, "INVALID_ARGUMENT", "the prefix triton_ is reserved"),
    ("request", "headers", {"string_param": "x"}, "INVALID_ARGUMENT", "reserved"),
    ("request", "mine", {}, "INVALID_ARGUMENT", "'mine' has no value"),
    ("request", "priority", {"int64_param": -1}, "INVALID_ARGUMENT", "at least 0, got -1"),
    ("request", "priority", {"string_param": "high"}, "INVALID_ARGUMENT", "want uint64_param or int64_param"),
    ("request", "timeout", {"int64_param": -(2**63)}, "INVALID_ARGUMENT", "at least 0, got -9223372036854775808"),
    ("request", "timeout", {"double_param": 1.0}, "INVALID_ARGUMENT", "got double_param"),
    ("request", "sequence_id", {"int64_param": 7}, "UNIMPLEMENTED", "sequences are not supported"),
    ("request", "sequence_start", {"bool_param": True}, "UNIMPLEMENTED", "sequences are not supported"),
    ("request", "binary_data_output", {"string_param": "yes"}, "INVALID_ARGUMENT", "want bool_param"),
    ("request", "shared_memory_region", {"string_param": "r"}, "UNIMPLEMENTED", "shared memory is not offered"),
    ("input", "shared_memory_region", {"string_param": "/dev/shm/x"}, "UNIMPLEMENTED", "shared memory is not offered"),
    ("input", "shared_memory_offset", {"int64_param": 2**62}, "UNIMPLEMENTED", "shared memory is not offered"),
    ("input", "mine", {}, "INVALID_ARGUMENT", "has no value"),
    ("output", "shared_memory_region", {"string_param": "r"}, "UNIMPLEMENTED", "shared memory is not offered"),
    ("output", "binary_data", {"int64_param": 1}, "INVALID_ARGUMENT", "want bool_param"),
]


@pytest.mark.parametrize(("level", "key", "value", "code", "text"), REFUSED, ids=lambda case: str(case)[:24])
def test_parameters_that_are_not_are_refused_with_their_path(served, level, key, value, code, text):
    message = asked("same", X, ["y"])
    holder, path = {
        "request": (message, "parameters"),
        "input": (message.inputs[0], "inputs[0].parameters"),
        "output": (message.outputs[0], "outputs[0].parameters"),
    }[level]
    holder.parameters[key].CopyFrom(InferParameter(**value))
    with pytest.raises(grpc.RpcError, match=text) as raised:
        served.call("ModelInfer", message)
    assert raised.value.code().name == code
    assert "/dev/shm" not in raised.value.details()
    violation = BadRequest()
    status = Status.FromString(dict(raised.value.trailing_metadata())["grpc-status-details-bin"])
    assert status.details[0].Unpack(violation)
    assert violation.field_violations[0].field == f"{path}[{key}]"


def test_too_many_parameters_are_refused(served):
    message = asked("same", X)
    for number in range(65):
        message.parameters[f"k{number}"].bool_param = True
    with pytest.raises(grpc.RpcError, match="65 parameters; at most 64"):
        served.call("ModelInfer", message)


@pytest.mark.parametrize("identifier", ["", "d3b1", "é\n日本", "x" * 4096])
def test_the_id_comes_back_with_the_version_that_ran(served, identifier):
    for version, wanted in (("", "3"), ("1", "1"), ("3", "3")):
        response = served.call("ModelInfer", asked("same", X, id=identifier, model_version=version))
        assert (response.id, response.model_name, response.model_version) == (identifier, "same", wanted)
