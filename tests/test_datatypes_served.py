"""Every datatype through a real server, raw and typed: what goes in comes out, bit for bit."""

import threading

import grpc
import numpy as np
import pytest
import torch
from numeric import Model, asked, identity, numeric
from test_codec import EXAMPLES, RAW_ONLY

from layercast.proto.codec import decode_outputs, tensor_bytes
from layercast.proto.messages import ModelInferRequest
from layercast.proto.rpc import INFERENCE
from layercast.server.service import inference
from layercast.server.settings import ModelSettings

# datatype -> field of the typed form, a row of two elements, its bytes
ROWS = {
    **EXAMPLES,
    "BYTES": ("bytes_contents", [b"\x00a\xff", b""], "030000000061ff00000000"),
    **{datatype: (None, values, bits) for datatype, (values, bits) in RAW_ONLY.items()},
}
# Quiet and signalling NaN, both infinities, minus zero, the smallest denormal; little-endian.
SPECIAL = {
    "FP32": "0000c07f" "0100807f" "0000807f" "000080ff" "00000080" "01000000",
    "FP64": "000000000000f87f" "010000000000f07f" "000000000000f07f" "000000000000f0ff" "0000000000000080" "0100000000000000",
    "FP16": "007e" "017c" "007c" "00fc" "0080" "0100",
    "BF16": "c07f" "817f" "807f" "80ff" "0080" "0100",
}  # fmt: skip


def both(inputs):
    x = inputs["x"]
    return {"whole": x, "half": x.astype("f2"), "double": x.astype("f8")}


@pytest.fixture(scope="module")
def served():
    wide = ModelSettings(max_batch=65_536, max_delay_ms=0)
    models = {
        datatype.lower(): Model(identity, [("x", datatype, (-1,))], [("y", datatype, (-1,))], settings=wide)
        for datatype in ROWS
    }
    outputs = [("whole", "FP32", (-1,)), ("half", "FP16", (-1,)), ("double", "FP64", (-1,))]
    models["both"] = Model(both, outputs=outputs)
    models["bf16_sum"] = Model(
        lambda inputs: {"y": (torch.from_numpy(inputs["x"].copy()).bfloat16() * 2).float().numpy()},
        [("x", "BF16", (-1,))],
        [("y", "BF16", (-1,))],
    )
    models["wrong"] = Model(lambda inputs: {"y": inputs["x"].astype("f8")})
    with numeric(models) as server:
        yield server


def raw(datatype: str, content: bytes, shape, model: str = "") -> ModelInferRequest:
    message = ModelInferRequest(model_name=model or datatype.lower())
    message.inputs.add(name="x", datatype=datatype, shape=shape)
    message.raw_input_contents.append(content)
    return message


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("datatype", ROWS)
def test_raw_in_raw_out(served, datatype, rows):
    _, _, bits = ROWS[datatype]
    content = bytes.fromhex(bits) * rows
    response = served.call("ModelInfer", raw(datatype, content, [rows, 2]))
    (output,) = response.outputs
    assert (output.name, output.datatype, list(output.shape)) == ("y", datatype, [rows, 2] if rows else [0, 0])
    assert list(response.raw_output_contents) == [content]
    assert not output.HasField("contents")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("datatype", [datatype for datatype, (field, *_) in ROWS.items() if field])
def test_typed_in_typed_out(served, datatype, rows):
    field, values, _ = ROWS[datatype]
    message = ModelInferRequest(model_name=datatype.lower())
    tensor = message.inputs.add(name="x", datatype=datatype, shape=[rows, 2])
    getattr(tensor.contents, field).extend(values * rows)
    response = served.call("ModelInfer", message)
    assert not response.raw_output_contents
    assert list(getattr(response.outputs[0].contents, field)) == values * rows
    assert [name.name for name, _ in response.outputs[0].contents.ListFields()] == [field]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_has_no_typed_form(served, datatype):
    message = ModelInferRequest(model_name=datatype.lower())
    message.inputs.add(name="x", datatype=datatype, shape=[1, 1]).contents.fp32_contents.append(1.0)
    with pytest.raises(grpc.RpcError, match="no typed field for FP16/BF16") as raised:
        served.call("ModelInfer", message)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("datatype", SPECIAL)
def test_special_floats_are_bit_exact(served, datatype):
    content = bytes.fromhex(SPECIAL[datatype])
    response = served.call("ModelInfer", raw(datatype, content, [1, 6]))
    assert response.raw_output_contents[0].hex() == content.hex()
    if datatype in ("FP32", "FP64"):
        message = ModelInferRequest(model_name=datatype.lower())
        tensor = message.inputs.add(name="x", datatype=datatype, shape=[1, 6])
        values = np.frombuffer(content, {"FP32": "<f4", "FP64": "<f8"}[datatype])
        field = f"{datatype.lower()}_contents"
        getattr(tensor.contents, field).extend(values.tolist())
        # A signalling NaN does not survive the way through a Python float, in this test: compare with what was sent.
        sent = tensor.contents.SerializeToString()
        assert served.call("ModelInfer", message).outputs[0].contents.SerializeToString() == sent


def test_an_output_without_a_typed_form_makes_all_raw_and_a_wish_for_raw_is_granted(served):
    message = ModelInferRequest(model_name="both")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([1, 2])
    message.outputs.add(name="whole")
    message.outputs.add(name="half")
    response = served.call("ModelInfer", message)
    assert [len(content) for content in response.raw_output_contents] == [8, 4]
    assert not any(output.HasField("contents") for output in response.outputs)
    del message.outputs[1]
    assert not served.call("ModelInfer", message).raw_output_contents
    message.parameters["binary_data_output"].bool_param = True
    assert [len(content) for content in served.call("ModelInfer", message).raw_output_contents] == [8]


def test_bfloat16_is_rounded_to_nearest_and_added_in_its_own_precision(served):
    """0.01 + 0.01 in bfloat16 is 0.02002; truncating 0.01 on the way in would make it 0.01990."""
    hundredth = tensor_bytes(np.full((1, 1), 0.01, "f4"), "BF16")
    response = served.call("ModelInfer", raw("BF16", hundredth, [1, 1], "bf16_sum"))
    (doubled,) = decode_outputs(response)["y"].ravel()
    assert doubled == torch.tensor(0.01, dtype=torch.bfloat16).add(torch.tensor(0.01, dtype=torch.bfloat16)).item()
    assert round(float(doubled), 5) == 0.02002


def test_a_client_with_grpcs_default_limit_is_told_and_one_without_gets_its_picture(served):
    picture = np.random.default_rng(0).random((1, 3 * 640 * 640), "f4")
    assert picture.nbytes > 4 << 20
    with grpc.insecure_channel(served.url) as bare:
        method = INFERENCE["ModelInfer"]
        stub = bare.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)
        with pytest.raises(grpc.RpcError) as raised:
            stub(raw("FP32", picture.tobytes(), picture.shape), timeout=30)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    response = served.call("ModelInfer", raw("FP32", picture.tobytes(), picture.shape))
    assert response.raw_output_contents[0] == picture.tobytes()


def test_outputs_come_in_the_order_asked_and_all_of_them_unasked(served):
    x = np.array([[1, 2]], "f4")
    for names in (["double", "whole"], ["whole", "half", "double"], ["half"], []):
        response = served.call("ModelInfer", asked("both", x, names))
        assert [output.name for output in response.outputs] == (names or ["whole", "half", "double"])
        sizes = {"whole": 8, "half": 4, "double": 16}
        assert [len(c) for c in response.raw_output_contents] == [sizes[output.name] for output in response.outputs]


@pytest.mark.parametrize(
    ("content", "shape", "message"),
    [
        (b"\0" * (4 << 20), [1, 1], "4194300 bytes follow the last of 1 BYTES"),
        (b"\xff\xff\xff\xff\x41", [1, 1], "claims 4294967295 bytes, 1 are left"),
        (b"\x01\0\0\0a" + b"abc", [1, 1], "3 bytes follow"),
        (b"\x01\0\0\0a" + b"abc", [1, 2], "ends after 1"),
        (b"\0" * 8_000_004, [1, 2_000_001], "at most 1000000"),
    ],
)
def test_broken_framing_of_bytes_costs_next_to_nothing(served, content, shape, message):
    with pytest.raises(grpc.RpcError, match=message) as raised:
        served.call("ModelInfer", raw("BYTES", content, shape))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert served.call("ModelInfer", raw("BYTES", b"\0\0\0\0", [1, 1])).raw_output_contents[0] == b"\0\0\0\0"


def test_large_messages_are_decoded_and_encoded_beside_the_loop(served, monkeypatch):
    threads: dict[str, set[int]] = {"decode": set(), "encode": set()}

    def noted(what, function):
        def call(*args):
            threads[what].add(threading.get_ident())
            return function(*args)

        return call

    monkeypatch.setattr(inference, "decode_inputs", noted("decode", inference.decode_inputs))
    monkeypatch.setattr(inference, "fill_outputs", noted("encode", inference.fill_outputs))
    loop = served.on_loop(threading.get_ident)
    served.call("ModelInfer", raw("INT32", bytes(4000), [1, 1000]))
    assert threads == {"decode": {loop}, "encode": {loop}}
    message = ModelInferRequest(model_name="int32")
    message.inputs.add(name="x", datatype="INT32", shape=[1, 500_000]).contents.int_contents.extend(range(500_000))
    answer = served.call("ModelInfer", message)
    assert list(answer.outputs[0].contents.int_contents) == list(range(500_000))
    assert all(len(seen - {loop}) == 1 for seen in threads.values())


def test_an_answer_that_grows_over_the_limit_as_it_is_encoded_is_refused():
    """A million bytes come in, as whole numbers; negative ones take ten bytes each in an answer."""
    negative = Model(lambda inputs: {"y": -inputs["x"]}, [("x", "INT8", (-1,))], [("y", "INT8", (-1,))])
    long = Model(lambda i: {"y": np.array([[b"x" * (2 << 20)]], object)}, outputs=[("y", "BYTES", (1,))])
    with numeric({"negative": negative, "long": long}, max_bytes=2 << 20) as served:
        message = ModelInferRequest(model_name="negative")
        count = 1_000_000
        message.inputs.add(name="x", datatype="INT8", shape=[1, count]).contents.int_contents.extend([1] * count)
        for wrong in (message, asked("long", np.zeros((1, 1), "f4"))):
            with pytest.raises(
                grpc.RpcError, match=r"the answer takes [\d,]+ bytes, a message holds 2,097,152"
            ) as raised:
                served.call("ModelInfer", wrong)
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # In a stream it is one request's error like any other.
        failed, answered = served.stream([message, asked("negative", np.ones((1, 3), "i1"), datatype="INT8")])
        assert "a message holds" in failed.error_message
        assert not failed.infer_response.outputs
        assert answered.infer_response.raw_output_contents[0] == b"\xff" * 3


def test_an_answer_that_can_not_be_encoded_is_our_fault(served, caplog):
    with pytest.raises(grpc.RpcError, match=r"internal error [0-9a-f]{12}") as raised:
        served.call("ModelInfer", asked("wrong", np.ones((1, 2), "f4")))
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert "FP32 is encoded from float32 arrays, got float64" in caplog.text
    assert raised.value.details().split()[2].rstrip(";") in caplog.text
    failed = served.server.metrics.requests.labels("wrong", "1", "predict", "INTERNAL")
    assert failed.value == 1
