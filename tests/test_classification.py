"""The classification extension: an output as its best classes, and the limits on what may be asked."""

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from numeric import Model, asked, numeric

SCORES = np.array([[0.5, 3.25, -1, 3.25], [np.nan, 1e-9, -np.inf, np.inf], [7, 7, 7, 7]], "f4")


@pytest.fixture(scope="module")
def served():
    labels = ("cat", "dog", "bird", "fisch ü")
    outputs = [("y", "FP32", (4,)), ("deep", "INT64", (2, 2)), ("open", "FP32", (-1,)), ("flags", "BOOL", (4,))]

    def function(inputs):
        x = inputs["x"]
        with np.errstate(invalid="ignore"):
            return {"y": x, "deep": x.astype("i8").reshape(-1, 2, 2), "open": x, "flags": x > 0}

    inputs = [("x", "FP32", (4,))]
    models = {
        "named": Model(function, inputs, outputs, labels),
        "plain": Model(function, inputs, outputs),
        "large": Model(
            lambda i: {"y": np.zeros((len(i["x"]), 9000), "f4")},
            [("x", "FP32", (1,))],
            [("y", "FP32", (9000,))],
        ),
    }
    with numeric(models, max_bytes=2 << 20) as server:
        yield server


def elements(content: bytes) -> list[str]:
    found = []
    while content:
        size = int.from_bytes(content[:4], "little")
        found.append(content[4 : 4 + size].decode())
        content = content[4 + size :]
    return found


def request(model: str, count: object, values=SCORES, output="y", kind="int64_param"):
    message = asked(model, values, [output])
    setattr(message.outputs[0].parameters["classification"], kind, count)
    return message


def test_the_best_come_first_with_their_labels(served):
    response = served.call("ModelInfer", request("named", 3))
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", "BYTES", [3, 3])
    assert elements(response.raw_output_contents[0]) == [
        "3.25:1:dog", "3.25:3:fisch ü", "0.5:0:cat",
        "inf:3:fisch ü", "1e-09:1:dog", "-inf:2:bird",
        "7.0:0:cat", "7.0:1:dog", "7.0:2:bird",
    ]  # fmt: skip


def test_without_labels_there_are_none_and_nan_comes_last(served):
    response = served.call("ModelInfer", request("plain", 4, SCORES[1:2]))
    assert elements(response.raw_output_contents[0]) == ["inf:3", "1e-09:1", "-inf:2", "nan:0"]


def test_scores_read_back_as_the_same_floats(served):
    values = np.random.default_rng(0).standard_normal((16, 4)).astype("f4")
    response = served.call("ModelInfer", request("plain", 4, values))
    got = [part.split(":") for part in elements(response.raw_output_contents[0])]
    restored = np.array([np.float32(score) for score, _ in got], "f4").reshape(16, 4)
    np.testing.assert_array_equal(restored, -np.sort(-values, axis=1))
    np.testing.assert_array_equal(
        np.array([int(index) for _, index in got]).reshape(16, 4), np.argsort(-values, axis=1, kind="stable")
    )


def test_only_the_output_that_asks_is_classified_and_order_and_typed_form_hold(served):
    message = request("named", 1, SCORES[:1])
    message.outputs.insert(0, type(message.outputs[0])(name="deep"))
    first, second = served.call("ModelInfer", message).outputs
    assert (first.name, first.datatype, second.name, second.datatype) == ("deep", "INT64", "y", "BYTES")
    message = request("named", 1, SCORES[:1])
    del message.raw_input_contents[:]
    message.inputs[0].contents.fp32_contents.extend(SCORES[0].tolist())
    (output,) = served.call("ModelInfer", message).outputs
    assert list(output.contents.bytes_contents) == [b"3.25:1:dog"]


def test_more_dimensions_are_one_list_and_no_rows_give_none(served):
    response = served.call("ModelInfer", request("plain", 2, SCORES[:1], "deep"))
    assert elements(response.raw_output_contents[0]) == ["3:1", "3:3"]
    response = served.call("ModelInfer", request("named", 2, SCORES[:0]))
    assert (list(response.outputs[0].shape), list(response.raw_output_contents)) == ([0, 2], [b""])


@pytest.mark.parametrize(
    ("count", "output", "kind", "message"),
    [
        (0, "y", "int64_param", "want 1 to 4 of them, got 0"),
        (-1, "y", "int64_param", "got -1"),
        (5, "y", "int64_param", "got 5"),
        (2**31, "y", "int64_param", "got 2147483648"),
        ("2", "y", "string_param", "want int64_param, got string_param"),
        (2.0, "y", "double_param", "want int64_param, got double_param"),
        (2, "open", "int64_param", "a fixed number of classes"),
        (2, "flags", "int64_param", "takes numbers"),
        (2, "layer:net", "int64_param", "no layer|a layer has no classes"),
    ],
)
def test_what_can_not_be_classified_is_refused(served, count, output, kind, message):
    with pytest.raises(grpc.RpcError, match=message) as raised:
        served.call("ModelInfer", request("named", count, output=output, kind=kind))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    violation = BadRequest()
    status = Status.FromString(dict(raised.value.trailing_metadata())["grpc-status-details-bin"])
    assert status.details[0].Unpack(violation)
    assert violation.field_violations[0].field.startswith("outputs[0]")


def test_an_answer_that_would_be_too_large_is_refused_before_anything_runs(served):
    statistics = served.server.repository.models["large", 1].monitor.statistics
    with pytest.raises(grpc.RpcError, match=r"9000 classes of 10 rows take up to 4,320,000 bytes") as raised:
        served.call("ModelInfer", request("large", 9000, np.zeros((10, 1), "f4")))
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(raised.value.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
    assert statistics.executions == 0
