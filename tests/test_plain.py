"""The short path of common requests: what it takes, the general path takes to the same end; the rest it leaves alone."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from layercast.models.manifest import FileEntry, Manifest, TensorSpec
from layercast.proto.codec import DATATYPES, CodecError, decode_inputs, fill_outputs, is_typed
from layercast.proto.messages import ModelInferRequest, ModelInferResponse
from layercast.server.service.answering import Answered, tell_times
from layercast.server.service.form import check_of
from layercast.server.service.parameters import check_parameters
from layercast.server.service.plain import Plain
from layercast.server.service.requests import _outside, check_inputs, resolve_outputs, warnings
from layercast.server.service.template import Template, id_field
from layercast.server.settings import ModelSettings

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
PLAIN = Plain(MANIFEST, 1 << 20, 1 << 18, ModelSettings())


def taken(message: ModelInferRequest, plain: Plain = PLAIN) -> tuple[dict[str, np.ndarray], int] | None:
    """Return the inputs and rows of a request that is plain and right in every way."""
    form = plain.form(message)
    inputs = form.inputs(message.raw_input_contents) if form else None
    return (inputs, form.rows) if form and inputs else None


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
    assert not message.outputs or resolve_outputs(MANIFEST, [o.name for o in message.outputs], ModelSettings())
    return inputs, rows


def test_a_plain_request_gives_read_only_views_of_its_bytes():
    message = request()
    found = taken(message)
    assert found
    inputs, rows = found
    assert rows == 3
    assert list(inputs) == ["image", "count"]
    for name, wanted in general(message)[0].items():
        np.testing.assert_array_equal(inputs[name], wanted)
        assert (inputs[name].dtype, inputs[name].flags.writeable) == (wanted.dtype, False)


def test_whatever_it_takes_of_broken_requests_the_general_path_takes_alike():
    rng, wire, count = random.Random(0), request().SerializeToString(), 0
    for _ in range(3000):
        content = bytearray(wire)
        for _ in range(rng.randint(1, 2)):
            at = rng.randrange(len(content))
            content[at] = rng.choice([rng.randrange(256), content[at] ^ 1 << rng.randrange(8)])
        try:
            message = ModelInferRequest.FromString(bytes(content))
        except DecodeError:
            continue
        if found := taken(message):
            count += 1
            inputs, rows = general(message)
            assert rows == found[1]
            assert all(np.array_equal(inputs[name], found[0][name]) for name in inputs)
    assert count > 100


def shaped(tensor: ModelInferRequest.InferInputTensor, *sizes: int) -> None:
    tensor.shape[:] = sizes


def raw(message: ModelInferRequest, at: int, content: bytes) -> None:
    message.raw_input_contents[at] = content


CHANGES: dict[str, Callable[[ModelInferRequest], object]] = {
    "parameters": lambda m: setattr(m.parameters["priority"], "int64_param", 1),
    "tensor parameters": lambda m: setattr(m.inputs[0].parameters["binary_data_size"], "int64_param", 1),
    "unknown output": lambda m: m.outputs.add(name="z"),
    "unknown layer": lambda m: m.outputs.add(name="layer:z"),
    "output twice": lambda m: (m.outputs.add(name="y"), m.outputs.add(name="y")),
    "classes": lambda m: setattr(m.outputs.add(name="y").parameters["classification"], "int64_param", 1),
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
    assert taken(message) is None


def test_no_rows_and_more_rows_than_an_answer_holds_are_left_to_the_general_path():
    assert taken(request(0)) is None
    small = Plain(MANIFEST, (64 << 10) + 4 * 9, 1 << 18, ModelSettings())
    assert taken(request(4), small)
    assert taken(request(5), small) is None


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec(name="x", datatype="BOOL", shape=(-1, 2)),
        TensorSpec(name="x", datatype="BYTES", shape=(-1, 2)),
        TensorSpec(name="x", datatype="BF16", shape=(-1, 2)),
    ],
    ids=str,
)
def test_models_whose_inputs_take_more_than_a_view_have_no_plain_requests(spec):
    message = ModelInferRequest(model_name="m", raw_input_contents=[bytes(8)])
    message.inputs.add(name="x", datatype=spec.datatype, shape=[1, 2])
    assert taken(message, Plain(manifest(x=spec), 1 << 20, 1 << 18, ModelSettings())) is None


def template_of(rows: int) -> Template:
    form = PLAIN.form(request(rows))
    assert form
    return form.template


def answer_of(
    rows: int, times: tuple[int, int, int], identifier: str = "7", **outputs: np.ndarray
) -> ModelInferResponse:
    content = template_of(rows).answer(id_field(ModelInferRequest(id=identifier)), outputs, *times)
    return ModelInferResponse.FromString(content)


def filled(rows: int, times: tuple[int, int, int], identifier: str, **outputs: np.ndarray) -> ModelInferResponse:
    """The same as the general path fills it."""
    response = ModelInferResponse(model_name="m", model_version="3", id=identifier)
    fill_outputs(response, [(spec.name, spec.datatype, outputs[spec.name]) for spec in MANIFEST.outputs], typed=False)
    tell_times(response, Answered([], *times))
    return response


@pytest.mark.parametrize("identifier", ["", "7", "ü" * 300])
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("power", [0, 7, 14, 35, 62])
def test_the_answer_is_what_the_general_path_fills(rows, identifier, power):
    times = ((1 << power) - 1, 1 << power, rows)
    outputs = {"y": np.arange(rows * 2, dtype="f4").reshape(rows, 2), "n": np.arange(rows).astype("i1")}
    assert answer_of(rows, times, identifier, **outputs) == filled(rows, times, identifier, **outputs)


def test_an_answer_tells_the_times_of_its_own_batch():
    template, outputs = template_of(1), {"y": np.ones((1, 2), "f4"), "n": np.ones(1, "i1")}
    for times in ((1, 2, 3), (1, 2, 4), (9, 5, 4), (1, 2, 3)):
        answer = ModelInferResponse.FromString(template.answer(b"", outputs, *times))
        assert [answer.parameters[name].int64_param for name in ("queue_ns", "compute_ns", "batch_rows")] == [*times]


def test_a_model_that_gives_other_shapes_than_it_says_is_answered_as_on_the_general_path():
    outputs = {"y": np.ones((3, 5), "f4"), "n": np.arange(6, dtype="i1")[::2]}
    assert answer_of(3, (1, 2, 3), **outputs) == filled(3, (1, 2, 3), "7", **outputs)
    with pytest.raises(CodecError, match="FP32 is encoded from float32"):
        answer_of(3, (1, 2, 3), y=np.ones((3, 2)), n=np.ones(3, "i1"))


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "INT8", "INT32", "INT64", "UINT8", "UINT64"])
@pytest.mark.parametrize(
    "bounds", [(0, 1), (0, 100), (0, 0), (0, -0.0), (0, 0.1), (-1, 1), (-0.0, 3), (0, 3e4), (5, 7)]
)
def test_a_range_is_checked_as_the_general_path_does(datatype, bounds):
    spec = TensorSpec(name="x", datatype=datatype, shape=(-1,), range=bounds)
    dtype = DATATYPES[datatype]
    values = [0, 1, 2, 5, 6, 7, 100, 101, 127]
    if dtype.kind == "f":
        near = [np.nextafter(dtype.type(value), dtype.type(side)) for value in (0, 1, 5, 100) for side in (-6e4, 6e4)]
        values += [-0.0, 0.1, -0.1, np.nan, -np.nan, np.inf, -np.inf, *near]
    elif dtype.kind == "i":
        values += [-1, -128, np.iinfo(dtype).min]
    check = check_of(spec)
    assert check
    for value in [*values, *([np.iinfo(dtype).max] if dtype.kind in "iu" else [])]:
        array = np.array([dtype.type(0), dtype.type(value)][bounds[0] == 5 :], dtype)
        right = not (_outside(spec, array))
        assert check(array.tobytes()) == right, value


TOKENS = manifest(
    ids=TensorSpec(name="ids", datatype="INT64", shape=(-1, -1), range=(0, 99), pad=0, max_length=8),
    mask=TensorSpec(name="mask", datatype="INT64", shape=(-1, -1), range=(0, 1), pad=0),
)


@pytest.mark.parametrize(
    ("ids", "mask", "right"),
    [
        ((2, 3), (2, 3), True),
        ((1, 8), (1, 8), True),
        ((1, 9), (1, 9), False),
        ((2, 3), (2, 4), False),
        ((2, 3), (3, 3), False),
        ((2, 0), (2, 0), False),
        ((0, 3), (0, 3), False),
        ((6,), (6,), False),
        ((2, 3, 1), (2, 3, 1), False),
    ],
)
def test_inputs_with_a_length_are_taken_when_they_are_what_the_general_path_takes(ids, mask, right):
    message = ModelInferRequest(model_name="m")
    for name, shape in (("ids", ids), ("mask", mask)):
        message.inputs.add(name=name, datatype="INT64", shape=shape)
        message.raw_input_contents.append(np.ones(shape, "i8").tobytes())
    found = taken(message, Plain(TOKENS, 1 << 20, 1 << 18, ModelSettings()))
    assert bool(found) == right
    if found:
        assert check_inputs(TOKENS, decode_inputs(message), dict.fromkeys(found[0], "INT64")) == found[1]
        assert [array.shape for array in found[0].values()] == [ids, mask]
