"""Thousands of slightly broken messages: every one is answered, or refused as the caller's fault. Never ours."""

import random

import numpy as np
import pytest
from numeric import Model, asked, identity, numeric
from test_server_inference import values_of

from layercast.proto import messages
from layercast.proto.rpc import FEATURES, INFERENCE, Method

ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED"}
METHODS: dict[str, Method] = {**INFERENCE, **FEATURES}


def typed() -> messages.ModelInferRequest:
    message = messages.ModelInferRequest(model_name="numbers", id="7")
    message.inputs.add(name="x", datatype="INT16", shape=[2, 3]).contents.int_contents.extend(range(6))
    message.outputs.add(name="y").parameters["classification"].int64_param = 2
    message.parameters["mine"].string_param = "value"
    return message


def texts() -> messages.ModelInferRequest:
    message = messages.ModelInferRequest(model_name="texts")
    message.inputs.add(name="x", datatype="BYTES", shape=[2])
    message.raw_input_contents.append(b"\x02\0\0\0hi\x01\0\0\0!")
    return message


def extract() -> messages.ExtractRequest:
    message = messages.ExtractRequest(model_name="same", layers=["*", "a@mean"], outputs=["y"])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 2], data=bytes(8))
    return message


def log() -> messages.LogSettingsRequest:
    message = messages.LogSettingsRequest()
    message.settings["log_error"].bool_param = True
    return message


SEEDS = {
    "raw": ("ModelInfer", asked("same", np.ones((2, 3), "f4"), ["y"], id="a", model_version="1")),
    "typed": ("ModelInfer", typed()),
    "texts": ("ModelInfer", texts()),
    "extract": ("Extract", extract()),
    "layers": ("ListLayers", messages.ListLayersRequest(model_name="same", pattern="*")),
    "metadata": ("ModelMetadata", messages.ModelMetadataRequest(name="same", version="1")),
    "statistics": ("ModelStatistics", messages.ModelStatisticsRequest(name="same")),
    "index": ("RepositoryIndex", messages.RepositoryIndexRequest(ready=True)),
    "log": ("LogSettings", log()),
    "memory": ("SystemSharedMemoryRegister", messages.SystemSharedMemoryRegisterRequest(name="a", key="/b", offset=1)),
}


@pytest.fixture(scope="module")
def served():
    models = {
        "same": Model(identity),
        "numbers": Model(identity, [("x", "INT16", (3,))], [("y", "INT16", (3,))], ("a", "b", "c")),
        "texts": Model(identity, [("x", "BYTES", ())], [("y", "BYTES", ())]),
    }
    with numeric(models, max_bytes=1 << 20) as server:
        yield server


def mutated(wire: bytes, rng: random.Random) -> bytes:
    """The message with some of its bytes changed, removed, doubled or replaced by telling ones."""
    content = bytearray(wire)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(5):
            case 0:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del content[at : at + rng.randint(1, 5)]
            case 2:
                content[at:at] = content[at : at + rng.randint(1, 9)]
            case 3:
                content[at : at + 1] = rng.choice([b"\xff", b"\x00", b"\x80", b"\x7f", b"\xff\xff\xff\xff\x0f"])
            case 4:
                content[at:at] = rng.choice([b"\x3a\x00", b"\x2a\x00", b"\x32\x00", b"\x22\x02\x0a\x00"])
    return bytes(content)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_mutation_is_answered_or_the_callers_fault(served, seed, caplog):
    name, message = SEEDS[seed]
    wire, rng, call = message.SerializeToString(), random.Random(seed), served.channel.unary_unary(METHODS[name].path)
    seen = set()
    for _ in range(300):
        content = mutated(wire, rng)
        ended = call.future(content, timeout=30)
        code, details = ended.code().name, ended.details() or ""
        assert code in ALLOWED, (content, details)
        assert details.isprintable()
        seen.add(code)
    assert len(seen) > 1 or seed == "memory"  # the mutations reached past the parser
    assert "internal error" not in caplog.text
    x = np.array([[1.5, -2]], "f4")
    np.testing.assert_array_equal(values_of(served.call("ModelInfer", asked("same", x))), x)


def test_every_mutation_inside_a_stream_gets_an_answer_of_its_own(served):
    wire, rng = SEEDS["raw"][1].SerializeToString(), random.Random(1)
    sent = [mutated(wire, rng) if number % 2 else wire for number in range(600)]
    method = INFERENCE["ModelStreamInfer"]
    call = served.channel.stream_stream(method.path, None, method.response.FromString)
    answers = list(call(iter(sent), timeout=60))
    assert len(answers) == 600
    assert all(not answer.error_message for answer in answers[::2])
    codes = {answer.infer_response.parameters["error_code"].string_param for answer in answers if answer.error_message}
    assert "INVALID_ARGUMENT" in codes
    assert codes <= ALLOWED
