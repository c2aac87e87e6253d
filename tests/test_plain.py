"""The short path of common requests: what it takes, the general path takes to the same end; the rest it leaves alone."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from layercast.models.manifest import FileEntry, Manifest, TensorSpec
from layercast.proto.codec import decode_inputs, is_typed
from layercast.proto.messages import ModelInferRequest, ModelInferResponse
from layercast.server.service.answering import Answered
from layercast.server.service.parameters import check_parameters
from layercast.server.service.plain import Plain
from layercast.server.service.requests import check_inputs, warnings
from layercast.server.work import Answer

ENTRY = FileEntry(sha256="0" * 64, bytes=1)


def manifest(**inputs: TensorSpec) -> Manifest:
    return Manifest(
        name="m",
        version=3,
        architecture="A",
        inputs=tuple(inputs.values()),
        outputs=(
            TensorSpec(name="y", datatype="FP32", shape=(-1, 2)),
            TensorSpec(name="n", datatype="INT8", shape=(-1,)),
        ),
        files={"weights.safetensors": ENTRY, "golden.safetensors": ENTRY},
    )


MANIFEST = manifest(
    image=TensorSpec(name="image", datatype="FP32", shape=(-1, 2, 2), range=(0, 1)),
    count=TensorSpec(name="count", datatype="UINT8", shape=(-1,), range=(0, 9)),
)
PLAIN = Plain(MANIFEST, 1 << 20, 1 << 18)


def request(rows: int = 3) -> ModelInferRequest:
    message = ModelInferRequest(model_name="m", id="7")
    image = np.linspace(0, 1, rows * 4, dtype="f4").reshape(rows, 2, 2)
    count = np.arange(rows, dtype="u1")
    message.inputs.add(name="image", datatype="FP32", shape=image.shape)
    message.inputs.add(name="count", datatype="UINT8", shape=count.shape)
    message.raw_input_contents.extend([image.tobytes(), count.tobytes()])
    return message


def general(message: ModelInferRequest) -> tuple[dict[str, np.ndarray], int]:
    check_parameters(message)
    inputs = decode_inputs(message)
    rows = check_inputs(MANIFEST, inputs, {tensor.name: tensor.datatype for tensor in message.inputs})
    assert not is_typed(message)
    assert not warnings(MANIFEST, inputs)
    assert not message.outputs
    return inputs, rows


def test_a_plain_request_gives_read_only_views_of_its_bytes():
    message = request()
    found = PLAIN.inputs(message)
    assert found
    inputs, rows = found
    assert rows == 3
    assert list(inputs) == ["image", "count"]
    for name, wanted in general(message)[0].items():
        np.testing.assert_array_equal(inputs[name], wanted)
        assert (inputs[name].dtype, inputs[name].flags.writeable) == (wanted.dtype, False)


def test_whatever_it_takes_of_broken_requests_the_general_path_takes_alike():
    rng, wire, taken = random.Random(0), request().SerializeToString(), 0
    for _ in range(3000):
        content = bytearray(wire)
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(content))
            content[at] = rng.choice([rng.randrange(256), content[at] ^ 1 << rng.randrange(8)])
        try:
            message = ModelInferRequest.FromString(bytes(content))
        except DecodeError:
            continue
        if found := PLAIN.inputs(message):
            taken += 1
            inputs, rows = general(message)
            assert rows == found[1]
            assert all(np.array_equal(inputs[name], found[0][name]) for name in inputs)
    assert taken > 100


def shaped(tensor: ModelInferRequest.InferInputTensor, *sizes: int) -> None:
    tensor.shape[:] = sizes


def raw(message: ModelInferRequest, at: int, content: bytes) -> None:
    message.raw_input_contents[at] = content


CHANGES: dict[str, Callable[[ModelInferRequest], object]] = {
    "parameters": lambda m: setattr(m.parameters["priority"], "int64_param", 1),
    "tensor parameters": lambda m: setattr(m.inputs[0].parameters["binary_data_size"], "int64_param", 1),
    "outputs": lambda m: m.outputs.add(name="y"),
    "order": lambda m: (m.inputs.reverse(), m.raw_input_contents.reverse()),
    "missing": lambda m: (m.inputs.pop(), m.raw_input_contents.pop()),
    "typed": lambda m: m.raw_input_contents.clear(),
    "both": lambda m: m.inputs[0].contents.fp32_contents.append(1),
    "float outside": lambda m: raw(m, 0, np.full((3, 2, 2), 2, "f4").tobytes()),
    "not a number": lambda m: raw(m, 0, np.full((3, 2, 2), np.nan, "f4").tobytes()),
    "integer outside": lambda m: raw(m, 1, b"\x01\x02\x0a"),
    "datatype": lambda m: setattr(m.inputs[0], "datatype", "INT32"),
    "name": lambda m: setattr(m.inputs[0], "name", "picture"),
    "rows": lambda m: (shaped(m.inputs[0], 2, 2, 2), raw(m, 0, bytes(32))),
    "length": lambda m: raw(m, 0, bytes(49)),
    "shape": lambda m: shaped(m.inputs[0], 3, 4),
    "no shape": lambda m: shaped(m.inputs[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_doubt_leaves_a_request_to_the_general_path(change):
    message = request()
    CHANGES[change](message)
    assert message != request()
    assert PLAIN.inputs(message) is None


def test_no_rows_and_more_rows_than_an_answer_holds_are_left_to_the_general_path():
    assert PLAIN.inputs(request(0)) is None
    small = Plain(MANIFEST, (64 << 10) + 4 * 9, 1 << 18)
    assert small.inputs(request(4))
    assert small.inputs(request(5)) is None


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec(name="x", datatype="BOOL", shape=(-1, 2)),
        TensorSpec(name="x", datatype="BYTES", shape=(-1, 2)),
        TensorSpec(name="x", datatype="BF16", shape=(-1, 2)),
        TensorSpec(name="x", datatype="FP32", shape=(-1, -1)),
    ],
    ids=str,
)
def test_models_whose_inputs_take_more_than_a_view_have_no_plain_requests(spec):
    message = ModelInferRequest(model_name="m", raw_input_contents=[bytes(8)])
    message.inputs.add(name="x", datatype=spec.datatype, shape=[1, 2])
    assert Plain(manifest(x=spec), 1 << 20, 1 << 18).inputs(message) is None


def test_the_answer_holds_every_output_in_order_the_parts_joined():
    parts = [
        Answer({"y": np.full((rows, 2), rows, "f4"), "n": np.full(rows, rows, "i1")}, {}, 0, 0, 0) for rows in (2, 1)
    ]
    response = ModelInferResponse()
    PLAIN.fill(response, request(), parts, Answered([], 5, 6, 7))
    assert {name: each.int64_param for name, each in response.parameters.items()} == {
        "queue_ns": 5,
        "compute_ns": 6,
        "batch_rows": 7,
    }
    assert (response.model_name, response.model_version, response.id) == ("m", "3", "7")
    assert [(output.name, output.datatype, list(output.shape)) for output in response.outputs] == [
        ("y", "FP32", [3, 2]),
        ("n", "INT8", [3]),
    ]
    assert np.frombuffer(response.raw_output_contents[0], "f4").tolist() == [2, 2, 2, 2, 1, 1]
    assert response.raw_output_contents[1] == b"\x02\x02\x01"
