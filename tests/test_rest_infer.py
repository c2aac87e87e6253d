"""Inference over HTTP against offline forwards of the same weights and against the gRPC answer."""

import gzip
import json
import zlib

import numpy as np
import pytest
from resting import Answer, infer, outputs, tensor, with_binary
from test_server_inference import INPUTS, offline, request, rows_for, values_of

BINARY = {"binary_data_size": 0}


def asked(model: str, x: np.ndarray, **fields) -> dict:
    datatype = "INT64" if model == "transformer" else "FP32"
    return {"inputs": [tensor(x, INPUTS[model], datatype)], **fields}


@pytest.mark.parametrize("model", sorted(INPUTS))
@pytest.mark.parametrize("rows", [0, 1, 5, 37])
def test_json_answers_equal_grpc_and_an_offline_forward(served, modules, model, rows):
    x = rows_for(model, rows)
    got = infer(served, model, asked(model, x, id="q-1"))
    values = next(iter(outputs(got).values()))
    np.testing.assert_allclose(values, offline(modules[model], x), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(values, values_of(served.call("ModelInfer", request(model, x))), atol=1e-5, rtol=1e-5)
    assert (got.json["id"], got.json["model_name"], got.json["model_version"]) == ("q-1", model, "1")
    assert got.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in got.headers


def test_float32_survives_json_bit_for_bit(served):
    x = rows_for("shared", 7)
    exact = values_of(served.call("ModelInfer", request("shared", x)))
    assert outputs(infer(served, "shared", asked("shared", x)))["output"].tobytes() == exact.tobytes()


def test_nested_data_is_the_same_as_flat(served, modules):
    x = rows_for("mnist", 3)
    nested = {"inputs": [tensor(x, "image", data=x.tolist())]}
    np.testing.assert_allclose(
        outputs(infer(served, "mnist", nested))["logits"], offline(modules["mnist"], x), atol=1e-4
    )


def test_binary_in_and_binary_out(served, modules):
    x = rows_for("mnist", 4)
    raw = x.tobytes()
    body, length = with_binary(
        {
            "inputs": [tensor(x, "image", parameters={"binary_data_size": len(raw)})],
            "parameters": {"binary_data_output": True},
        },
        raw,
    )
    got = infer(served, "mnist", body, inference_header_content_length=length, content_type="application/octet-stream")
    np.testing.assert_allclose(outputs(got)["logits"], offline(modules["mnist"], x), atol=1e-4)
    assert got.headers["content-type"] == "application/octet-stream"


def test_json_and_binary_outputs_may_be_mixed_in_the_order_asked(served, modules):
    x = rows_for("mnist", 3)
    wanted = [
        {"name": "layer:net.0", "parameters": {"binary_data": True}},
        {"name": "logits"},
        {"name": "layer:net.0@mean", "parameters": {"binary_data": True}},
    ]
    got = infer(served, "mnist", asked("mnist", x, outputs=wanted))
    found = outputs(got)
    hidden = offline(modules["mnist"].net[0], x.reshape(3, -1))
    assert list(found) == ["layer:net.0", "logits", "layer:net.0@mean"]
    np.testing.assert_allclose(found["layer:net.0"], hidden, atol=1e-4)
    np.testing.assert_allclose(found["logits"], offline(modules["mnist"], x), atol=1e-4)
    document = json.loads(got.body[: int(got.headers["inference-header-content-length"])])
    assert ["data" in output for output in document["outputs"]] == [False, True, False]


def test_an_output_may_differ_from_binary_data_output(served):
    x = rows_for("shared", 2)
    fields = {"outputs": [{"name": "output", "parameters": {"binary_data": False}}]}
    got = infer(served, "shared", asked("shared", x, parameters={"binary_data_output": True}, **fields))
    assert "inference-header-content-length" not in got.headers
    assert outputs(got)["output"].shape == (2, 10)


def test_layers_of_a_pattern_take_the_form_asked_for(served, modules):
    x = rows_for("mnist", 2)
    wanted = [{"name": "layer:net.*@fp16", "parameters": {"binary_data": True}}]
    found = outputs(infer(served, "mnist", asked("mnist", x, outputs=wanted)))
    hidden = offline(modules["mnist"].net[0], x.reshape(2, -1)).astype("f2")
    np.testing.assert_allclose(found["layer:net.0@fp16"], hidden, atol=2e-3)
    assert len(found) > 1


def test_half_floats_have_no_form_in_json(served):
    wanted = [{"name": "layer:net.0@fp16"}]
    got = infer(served, "mnist", asked("mnist", rows_for("mnist", 1), outputs=wanted))
    assert got.status == 400
    assert "FP16, which has no form in JSON; ask for binary_data" in got.error


def test_a_bare_binary_body_is_one_row(served, modules):
    x = rows_for("mnist", 1)
    found = outputs(infer(served, "mnist", x.tobytes(), inference_header_content_length="0"))
    np.testing.assert_allclose(found["logits"], offline(modules["mnist"], x), atol=1e-4)


def test_a_bare_binary_body_sets_the_open_dimension(served, modules):
    tokens = rows_for("transformer", 1, length=12)
    found = outputs(infer(served, "transformer", tokens.tobytes(), inference_header_content_length="0"))
    np.testing.assert_allclose(found["logits"], offline(modules["transformer"], tokens), atol=1e-4)


def test_a_bare_binary_body_of_the_wrong_size_is_refused(served):
    got = infer(served, "mnist", b"\0" * 9, inference_header_content_length="0")
    assert got.status == 400
    assert "takes 3136 bytes, got 9" in got.error


def deflated(answer: Answer) -> Answer:
    content = {"gzip": gzip.decompress, "deflate": zlib.decompress}[answer.headers["content-encoding"]](answer.body)
    return answer._replace(body=content)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_bodies_may_be_compressed_both_ways(served, modules, encoding):
    x = rows_for("mnist", 40)
    pack = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    body = pack(json.dumps(asked("mnist", x)).encode())
    got = infer(served, "mnist", body, content_encoding=encoding, accept_encoding=encoding)
    np.testing.assert_allclose(outputs(deflated(got))["logits"], offline(modules["mnist"], x), atol=1e-4)
    assert got.headers["vary"] == "accept-encoding"


def test_the_inference_header_counts_bytes_before_compression(served):
    x = rows_for("mnist", 40)
    got = infer(served, "mnist", asked("mnist", x, parameters={"binary_data_output": True}), accept_encoding="gzip")
    assert outputs(deflated(got))["logits"].shape == (40, 10)


@pytest.mark.parametrize("accepted", ["identity", "gzip;q=0, br", "*"])
def test_answers_stay_plain_unless_a_known_compression_is_named(served, accepted):
    got = infer(served, "mnist", asked("mnist", rows_for("mnist", 40)), accept_encoding=accepted)
    assert "content-encoding" not in got.headers
    assert outputs(got)["logits"].shape == (40, 10)


def test_values_that_json_has_not_go_in_by_name_and_come_out_as_null(served):
    x = np.zeros((3, 10), "f4")
    x[0, 0], x[1, 0], x[2, 0] = np.nan, np.inf, -np.inf
    body = json.dumps(asked("shared", x))
    assert all(word in body for word in ("NaN", "Infinity", "-Infinity"))
    got = infer(served, "shared", body.encode())
    exact = values_of(served.call("ModelInfer", request("shared", x))).ravel()
    expected = [float(value) if np.isfinite(value) else None for value in exact]
    assert None in expected
    assert got.json["outputs"][0]["data"] == expected


def test_large_json_takes_the_same_way_through_a_thread(served, modules):
    x = rows_for("mnist", 300)
    assert len(json.dumps(asked("mnist", x))) > 2 << 20
    found = outputs(infer(served, "mnist", asked("mnist", x)))
    np.testing.assert_allclose(found["logits"], offline(modules["mnist"], x), atol=1e-4)


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", ""])
def test_any_content_type_is_taken(served, content_type):
    x = rows_for("shared", 1)
    assert infer(served, "shared", asked("shared", x), content_type=content_type).status == 200
