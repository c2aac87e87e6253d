"""Wrong requests of every kind against a real server: a clear error, the right status, and the next one is answered."""

import re

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from test_server_inference import assert_answers, request, rows_for

from layercast.proto.messages import ModelInferRequest, ModelReadyRequest
from layercast.proto.rpc import FEATURES, INFERENCE

INVALID, MISSING, UNDONE, TOO_MUCH = "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"


def _set(**fields):
    def change(m):
        for name, value in fields.items():
            setattr(m, name, value)

    return change


def _shape(*sizes):
    def change(m):
        m.inputs[0].shape[:] = sizes

    return change


def _input(**fields):
    return lambda m: [setattr(m.inputs[0], name, value) for name, value in fields.items()]


def _raw(change):
    def changed(m):
        m.raw_input_contents[0] = change(m.raw_input_contents[0])

    return changed


def _typed(field, values, datatype="FP32"):
    def change(m):
        del m.raw_input_contents[:]
        m.inputs[0].datatype = datatype
        getattr(m.inputs[0].contents, field).extend(values)

    return change


def _twice(m):
    m.inputs.append(m.inputs[0])
    m.raw_input_contents.append(m.raw_input_contents[0])


def _crowd(m):
    for number in range(10_000):
        m.inputs.add(name=f"i{number}", datatype="FP32", shape=[1])
        m.raw_input_contents.append(b"\0\0\0\0")


def _outputs(*names):
    return lambda m: [m.outputs.add(name=name) for name in names]


def _parameter(key, **value):
    def change(m):
        for kind, given in value.items():
            setattr(m.parameters[key], kind, given)
        m.parameters[key].SetInParent()

    return change


def _classes(kind, value):
    def change(m):
        setattr(m.outputs.add(name="logits").parameters["classification"], kind, value)

    return change


def _bytes(content, *shape):
    def change(m):
        _input(datatype="BYTES")(m)
        _shape(*shape)(m)
        m.raw_input_contents[0] = content

    return change


def _tokens(values, shape=None, datatype="INT64"):
    """The same for the text model: whole numbers in place of a picture."""

    def change(m):
        array = np.asarray(values)
        m.model_name = "transformer"
        m.inputs[0].name, m.inputs[0].datatype = "tokens", datatype
        m.inputs[0].shape[:] = array.shape if shape is None else shape
        m.raw_input_contents[0] = array.tobytes()

    return change


BAD = {
    "empty": (lambda m: m.Clear(), INVALID, "model_name is empty"),
    "no name": (_set(model_name=""), INVALID, "model_name is empty"),
    "unknown model": (_set(model_name="mnits"), MISSING, "Request for unknown model: 'mnits'; nearest: mnist"),
    "name of a megabyte": (_set(model_name="m" * 1_000_000), MISSING, "unknown model: 'mmm"),
    "a path": (_set(model_name="../../etc/passwd"), MISSING, "unknown model"),
    "a slash": (_set(model_name="mnist/1"), MISSING, "unknown model"),
    "dots": (_set(model_name=".."), MISSING, "unknown model"),
    "a space": (_set(model_name=" mnist"), MISSING, "unknown model"),
    "a nul": (_set(model_name="mnist\0"), MISSING, r"mnist\\x00"),
    "a forged log line": (_set(model_name="x\nERROR forged"), MISSING, r"x\\nERROR forged"),
    "an escape": (_set(model_name="\x1b[31mred"), MISSING, r"\\x1b\[31mred"),
    "unknown version": (_set(model_version="7"), MISSING, "no version 7; known: 1"),
    "version zero": (_set(model_version="0"), INVALID, "positive whole number"),
    "version minus one": (_set(model_version="-1"), INVALID, "positive whole number"),
    "version text": (_set(model_version="latest"), INVALID, "positive whole number"),
    "version padded": (_set(model_version="01"), INVALID, "leading zeros"),
    "version float": (_set(model_version="1.0"), INVALID, "positive whole number"),
    "version huge": (_set(model_version="99999999999999999999"), INVALID, "positive whole number"),
    "no input": (lambda m: (m.ClearField("inputs"), m.ClearField("raw_input_contents")), INVALID, "'image' is missing"),
    "input twice": (_twice, INVALID, "twice"),
    "input unknown": (_input(name="picture"), INVALID, "no input 'picture'"),
    "input nameless": (_input(name=""), INVALID, "no input ''"),
    "ten thousand inputs": (_crowd, INVALID, "10001 inputs; at most 64"),
    "output unknown": (_outputs("probabilities"), INVALID, "unexpected inference output 'probabilities'"),
    "output twice": (_outputs("logits", "logits"), INVALID, "twice"),
    "layer twice": (_outputs("layer:net.0", "layer:net.*"), INVALID, "twice"),
    "outputs by the thousand": (_outputs(*map(str, range(1000))), INVALID, "at most 256"),
    "layer unknown": (_outputs("layer:net.77"), INVALID, "no layer 'net.77'; nearest: net.4"),
    "layer of a megabyte": (_outputs("layer:" + "*a" * 500_000), INVALID, "at most 256"),
    "reducer unknown": (_outputs("layer:net.0@avg"), INVALID, "unknown reducer 'avg'"),
    "reducers by the dozen": (_outputs("layer:net.0" + "@norm" * 12), INVALID, "12 reducers; at most 4"),
    "reducer that does not fit": (_outputs("layer:net.0@cls"), INVALID, "net.0"),
    "datatype empty": (_input(datatype=""), INVALID, "datatype '' is unknown"),
    "datatype in lower case": (_input(datatype="fp32"), INVALID, "'fp32' is unknown"),
    "datatype of another protocol": (_input(datatype="FLOAT"), INVALID, "'FLOAT' is unknown"),
    "datatype not there yet": (_input(datatype="FP8"), INVALID, "'FP8' is unknown"),
    "datatype of another size": (_input(datatype="INT64"), INVALID, "takes 12544 bytes, got 6272"),
    "datatype of another kind": (_input(datatype="INT32"), INVALID, "want datatype FP32, got 'INT32'"),
    "bytes for floats": (_bytes(b"\x01\0\0\0a", 1), INVALID, "want datatype FP32, got 'BYTES'"),
    "shape empty": (_shape(), INVALID, "takes 4 bytes, got 6272"),
    "scalar": (lambda m: (_shape()(m), _raw(lambda r: r[:4])(m)), INVALID, r"want shape \[-1, 1, 28, 28\], got \[\]"),
    "shape zero": (_shape(0), INVALID, "takes 0 bytes, got 6272"),
    "no batch dimension": (
        lambda m: (_shape(1, 28, 28)(m), _raw(lambda r: r[:3136])(m)),
        INVALID, r"want shape \[-1, 1, 28, 28\], got \[1, 28, 28\]; the first dimension is the batch: add it",
    ),
    "sides swapped": (_shape(2, 28, 28, 1), INVALID, "dimension 1, 3 differs"),
    "negative": (_shape(-1, 1, 28, 28), INVALID, "negative dimension -1"),
    "negatives that multiply to the right size": (_shape(-2, -1, 28, 28), INVALID, "negative dimension"),
    "int64 max": (_shape(2**63 - 1), INVALID, "exceeds"),
    "overflow to zero": (_shape(2**32, 2**32), INVALID, "exceeds"),
    "overflow below the bound": (_shape(2**31 - 1, 2**31 - 1, 4), INVALID, "too large for any tensor"),
    "rank of a thousand": (_shape(*[1] * 1000), INVALID, "1000 dimensions; at most 8"),
    "rank of a hundred thousand": (_shape(*[1] * 100_000), INVALID, "100000 dimensions"),
    "a byte short": (_raw(lambda r: r[:-1]), INVALID, "takes 6272 bytes, got 6271"),
    "a byte over": (_raw(lambda r: r + b"\0"), INVALID, "got 6273"),
    "no bytes": (_raw(lambda r: b""), INVALID, "got 0"),
    "twice the bytes": (_raw(lambda r: r * 2), INVALID, "got 12544"),
    "raw missing": (lambda m: m.ClearField("raw_input_contents"), INVALID, "fp32_contents has 0"),
    "raw extra": (lambda m: m.raw_input_contents.append(b""), INVALID, "2 entries for 1 inputs"),
    "raw and typed": (lambda m: m.inputs[0].contents.fp32_contents.append(1.0), INVALID, "both"),
    "typed too few": (_typed("fp32_contents", [1.0]), INVALID, "takes 1568 elements, fp32_contents has 1"),
    "typed elsewhere": (_typed("int64_contents", [1] * 1568), INVALID, "belong in fp32_contents, got int64_contents"),
    "typed half": (_typed("fp32_contents", [1.0] * 1568, "FP16"), INVALID, "no typed field for FP16/BF16"),
    "typed out of range": (_typed("int_contents", [300] * 1568, "INT8"), INVALID, "300 is outside int8"),
    "prefix past the end": (_bytes(b"\x09\0\0\0abc", 1), INVALID, "claims 9 bytes, 3 are left"),
    "prefix of four gigabytes": (_bytes(b"\xff\xff\xff\xffA", 1), INVALID, "claims 4294967295"),
    "bytes trailing": (_bytes(b"\x01\0\0\0abc", 1), INVALID, "2 bytes follow"),
    "half a prefix": (_bytes(b"\x01\0", 1), INVALID, "ends after 0"),
    "not text": (_bytes(b"\x02\0\0\0\xff\xfe", 1), INVALID, "want datatype FP32, got 'BYTES'"),
    "four megabytes of nothing": (_bytes(bytes(4 << 20), 1), INVALID, "4194300 bytes follow"),
    "token beyond the vocabulary": (_tokens([[3, 257]]), INVALID, "values from 0 to 256, got 3 to 257"),
    "token below zero": (_tokens([[-1, 3]]), INVALID, "got -1 to 3"),
    "token int64 max": (_tokens([[2**63 - 1]]), INVALID, "values from 0 to 256"),
    "tokens big-endian": (_tokens(np.array([[1, 2]], ">i8")), INVALID, "values from 0 to 256"),
    "tokens in int32": (_tokens(np.zeros((1, 4), "i4"), datatype="INT32"), INVALID, "want datatype INT64, got 'INT32'"),
    "text too long": (_tokens(np.zeros((1, 33), "i8")), INVALID, "33 long, the model takes at most 32"),
    "text of no tokens": (_tokens(np.zeros((2, 0), "i8")), INVALID, r"got \[2, 0\]"),
    "tokens without a batch": (_tokens(np.zeros(5, "i8")), INVALID, "the first dimension is the batch"),
    "reserved parameter": (_parameter("triton_x", bool_param=True), INVALID, "the prefix triton_ is reserved"),
    "headers": (_parameter("headers", string_param="x"), INVALID, "reserved"),
    "parameter without a value": (_parameter("mine"), INVALID, "'mine' has no value"),
    "parameter of a hostile name": (_parameter("\n\x1b[31m" * 1000), INVALID, r"\\n\\x1b"),
    "priority negative": (_parameter("priority", int64_param=-1), INVALID, "at least 0, got -1"),
    "timeout int64 min": (_parameter("timeout", int64_param=-(2**63)), INVALID, "at least 0"),
    "timeout text": (_parameter("timeout", string_param="1s"), INVALID, "want int64_param"),
    "sequence": (_parameter("sequence_id", int64_param=1), UNDONE, "sequences are not supported"),
    "shared memory in": (
        lambda m: setattr(m.inputs[0].parameters["shared_memory_region"], "string_param", "/dev/shm/mine"),
        UNDONE, "shared memory is not offered",
    ),
    "shared memory out": (
        lambda m: setattr(m.outputs.add(name="logits").parameters["shared_memory_region"], "string_param", "mine"),
        UNDONE, "shared memory is not offered",
    ),
    "no classes": (_classes("int64_param", 0), INVALID, "want 1 to 10 of them, got 0"),
    "negative classes": (_classes("int64_param", -1), INVALID, "got -1"),
    "more classes than there are": (_classes("int64_param", 11), INVALID, "got 11"),
    "two billion classes": (_classes("int64_param", 2**31), INVALID, "got 2147483648"),
    "classes in words": (_classes("string_param", "3"), INVALID, "want int64_param"),
    "an answer too large": (
        lambda m: (m.CopyFrom(request("resnet", rows_for("resnet", 250))), _outputs("layer:layer1.*")(m)),
        TOO_MUCH, "an answer holds 67,108,864",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_a_clear_error_and_the_next_one_is_answered(served, modules, name):
    change, code, message = BAD[name]
    wrong: ModelInferRequest = request("mnist", rows_for("mnist", 2))
    change(wrong)
    with pytest.raises(grpc.RpcError) as raised:
        served.call("ModelInfer", wrong)
    error = raised.value
    assert re.search(message, error.details()), error.details()
    assert error.code().name == code
    assert error.details().isprintable()
    assert len(error.details()) <= 1024
    for leak in ("/work", "/tmp/", "/dev/shm", "Traceback", "0x7", "layercast.", ".py"):
        assert leak not in error.details()
    if code == INVALID:
        violation = BadRequest()
        status = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
        assert status.details[0].Unpack(violation)
        (one,) = violation.field_violations
        assert one.field.split("[")[0].split(".")[0] in ModelInferRequest.DESCRIPTOR.fields_by_name
        assert one.description == error.details()
    assert_answers(served, modules)


HOSTILE = [
    "..", "../mnist", "mnist/../mnist", "a/../b", "/etc/passwd", "./mnist", "mnist/1", "mnist\\1", "~", "%2e%2e", "file:mnist",
    " ", " mnist", "mnist ", "\tmnist", "mnist\n", "mnist\0", "\x1b[31m", "é", "m" * 1_000_000,
]  # fmt: skip
QUESTIONS = {
    "ModelMetadata": "name", "ModelConfig": "name", "ModelStatistics": "name", "TraceSetting": "model_name",
    "ListLayers": "model_name", "Extract": "model_name",
}  # fmt: skip


@pytest.mark.parametrize("rpc", QUESTIONS)
def test_hostile_names_are_unknown_models_to_every_rpc(served, modules, rpc):
    make = {**INFERENCE, **FEATURES}[rpc].request
    for name in HOSTILE:
        with pytest.raises(grpc.RpcError) as raised:
            served.call(rpc, make(**{QUESTIONS[rpc]: name}))
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND, name
        assert raised.value.details().isprintable()
        assert len(raised.value.details()) < 300
        assert not served.call("ModelReady", ModelReadyRequest(name=name)).ready
    assert_answers(served, modules)
