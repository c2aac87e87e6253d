"""Layers of a running server against hand-written hooks on the same weights."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from test_server_inference import INPUTS, assert_answers, offline, request, rows_for, values_of, wait_until
from torch import nn

from layercast.models.hooks import registered_hooks
from layercast.proto.messages import ExtractRequest, ListLayersRequest

EXTRACTED = {"FP32": "<f4", "FP16": "<f2"}


def hooked(module: nn.Module, values: np.ndarray) -> dict[str, list[np.ndarray]]:
    """What every module inside returns in one forward, copied at once, a list for each call."""
    seen: dict[str, list[np.ndarray]] = {}

    def keep(path: str) -> Any:
        return lambda _module, _inputs, output: seen.setdefault(path, []).append(output.clone().numpy())

    handles = [part.register_forward_hook(keep(path)) for path, part in module.named_modules() if path]
    with torch.inference_mode():
        module(torch.from_numpy(values.copy()))
    for handle in handles:
        handle.remove()
    return seen


def extract(served, model: str, values: np.ndarray, layers, outputs=(), **fields):
    message = ExtractRequest(model_name=model, layers=layers, outputs=outputs, **fields)
    datatype = "INT64" if model == "transformer" else "FP32"
    message.inputs.add(name=INPUTS[model], datatype=datatype, shape=values.shape, data=values.tobytes())
    return served.call("Extract", message)


def arrays(tensors) -> dict[str, np.ndarray]:
    return {t.name: np.frombuffer(t.data, EXTRACTED[t.datatype]).reshape(t.shape) for t in tensors}


def test_values_outside_the_trained_range_are_answered_with_a_warning(served):
    x = rows_for("mnist", 2)
    assert extract(served, "mnist", x, ["net.0"]).warning == ""
    assert "'image': want values from 0 to 1, got" in extract(served, "mnist", x * 255, ["net.0"]).warning


@pytest.mark.parametrize("model", sorted(INPUTS))
def test_every_layer_equals_an_offline_hook(served, modules, model):
    x = rows_for(model, 3)
    wanted = hooked(modules[model], x)
    response = extract(served, model, x, ["*"])
    got = arrays(response.layers)
    flat = {
        (path if len(calls) == 1 else f"{path}#{number}"): value
        for path, calls in wanted.items()
        for number, value in enumerate(calls)
    }
    # The position table's rows belong to no row of the batch, so it is listed as unavailable, with the reason.
    unavailable = {
        layer.path for layer in served.call("ListLayers", ListLayersRequest(model_name=model)).layers if layer.reason
    }
    assert unavailable == ({"position"} if model == "transformer" else set()) | unavailable - set(flat)
    assert set(got) == set(flat) - unavailable
    for name, value in ((name, flat[name]) for name in got):
        np.testing.assert_allclose(got[name], value, atol=1e-5, rtol=1e-5, err_msg=name)
    assert not response.outputs
    assert response.timing.batch_rows == 3


def test_a_layer_before_an_in_place_operation_shows_its_own_values(served, modules):
    x = rows_for("resnet", 2)
    got = values_of(served.call("ModelInfer", request("resnet", x, ["layer:bn"])))
    np.testing.assert_allclose(got, hooked(modules["resnet"], x)["bn"][0], atol=1e-5)
    assert (got < 0).any()


def test_a_module_used_twice_gives_both_calls(served, modules):
    x = rows_for("shared", 2)
    response = served.call("ModelInfer", request("shared", x, ["layer:shared#1", "layer:shared#0", "output"]))
    calls = hooked(modules["shared"], x)["shared"]
    assert [output.name for output in response.outputs] == ["layer:shared#1", "layer:shared#0", "output"]
    np.testing.assert_allclose(values_of(response, 0), calls[1], atol=1e-5)
    np.testing.assert_allclose(values_of(response, 1), calls[0], atol=1e-5)
    np.testing.assert_allclose(values_of(response, 2), offline(modules["shared"], x), atol=1e-5)


def test_layers_and_predictions_come_together_or_layers_alone(served, modules):
    x = rows_for("mnist", 2)
    both = served.call("ModelInfer", request("mnist", x, ["logits", "layer:net.0", "layer:net.2@norm"]))
    inside = hooked(modules["mnist"], x)
    np.testing.assert_allclose(values_of(both, 0), offline(modules["mnist"], x), atol=1e-4)
    np.testing.assert_allclose(values_of(both, 1), inside["net.0"][0], atol=1e-5)
    unit = inside["net.2"][0] / np.linalg.norm(inside["net.2"][0], axis=1, keepdims=True)
    np.testing.assert_allclose(values_of(both, 2), unit, atol=1e-5)
    alone = served.call("ModelInfer", request("mnist", x, ["layer:net.0"]))
    assert [output.name for output in alone.outputs] == ["layer:net.0"]


@pytest.mark.parametrize(
    ("tap", "reduce"),
    [
        ("layer1@mean", lambda v: v.mean((2, 3))),
        ("layer1@max", lambda v: v.max((2, 3))),
        ("pool@flatten", lambda v: v.reshape(len(v), -1)),
        ("layer1@mean@fp16", lambda v: v.mean((2, 3)).astype("f2")),
    ],
)
def test_reducers_over_space(served, modules, tap, reduce):
    x = rows_for("resnet", 2)
    response = served.call("ModelInfer", request("resnet", x, [f"layer:{tap}"]))
    wanted = reduce(hooked(modules["resnet"], x)[tap.split("@")[0]][0])
    np.testing.assert_allclose(values_of(response), wanted, atol=1e-3 if "fp16" in tap else 1e-5)
    assert response.outputs[0].datatype == ("FP16" if "fp16" in tap else "FP32")


def test_token_reducers_leave_padding_out(served, modules):
    x = rows_for("transformer", 2, 20)  # the last five tokens are padding
    inside = hooked(modules["transformer"], x)["blocks.1"][0]
    response = extract(served, "transformer", x, ["blocks.1@mean", "blocks.1@last"])
    got = arrays(response.layers)
    np.testing.assert_allclose(got["blocks.1@mean"], inside[:, :15].mean(1), atol=1e-5)
    np.testing.assert_allclose(got["blocks.1@last"], inside[:, 14], atol=1e-5)


@pytest.mark.parametrize(
    "tap", ["blocks.0@flatten", "blocks.0@norm", "blocks.0.attn.weights@mean", "blocks.0@none@fp16"]
)
def test_a_neighbour_of_another_length_changes_no_layer(served, tap):
    model = served.server.repository.find("transformer", "")
    xs = [rows_for("transformer", 1, length) for length in (10, 16)]
    alone = [arrays(extract(served, "transformer", x, [tap]).layers)[tap] for x in xs]
    served.on_loop(model.batcher.hold)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(extract, served, "transformer", x, [tap]) for x in xs]
        wait_until(served, lambda: model.batcher.queued_rows == 2)
        served.on_loop(model.batcher.release)
        for call, wanted in zip(calls, alone, strict=True):
            got = arrays(call.result().layers)[tap]
            assert got.shape == wanted.shape
            np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_attention_maps_are_layers_too(served):
    x = rows_for("transformer", 2, 12)
    got = arrays(extract(served, "transformer", x, ["blocks.0.attn.weights"]).layers)["blocks.0.attn.weights"]
    assert got.shape == (2, 2, 12, 12)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-5)
    assert (got[..., 9:] == 0).all()


def test_a_layer_alone_stops_the_forward_there(served, modules):
    """The head's hook never fires when only an early layer is asked for: seen through a module that counts."""
    engine = served.server.repository.find("resnet", "").loaded.runner.eager
    calls = []
    handle = engine._module.head.register_forward_hook(lambda *_: calls.append(1))
    try:
        x = rows_for("resnet", 1)
        served.call("ModelInfer", request("resnet", x, ["layer:layer1@mean"]))
        assert not calls
        served.call("ModelInfer", request("resnet", x, ["layer:layer1@mean", "logits"]))
        assert calls
    finally:
        handle.remove()


def test_plain_and_tapped_requests_in_one_batch_get_their_own(served, modules):
    model = served.server.repository.find("mnist", "")
    before = model.monitor.statistics.executions
    xs = [rows_for("mnist", 1) for _ in range(6)]
    outputs = [[], ["layer:net.0"], ["logits", "layer:net.2"], [], ["layer:net.0@norm", "layer:net.0"], ["logits"]]
    served.on_loop(model.batcher.hold)
    with ThreadPoolExecutor(6) as pool:
        calls = [
            pool.submit(served.call, "ModelInfer", request("mnist", x, names))
            for x, names in zip(xs, outputs, strict=True)
        ]
        wait_until(served, lambda: model.batcher.queued_rows == 6)
        served.on_loop(model.batcher.release)
        answers = [call.result() for call in calls]
    assert model.monitor.statistics.executions == before + 1
    for x, names, answer in zip(xs, outputs, answers, strict=True):
        assert [output.name for output in answer.outputs] == (names or ["logits"])
        inside = {**hooked(modules["mnist"], x), "logits": [offline(modules["mnist"], x)]}
        for index, name in enumerate(names or ["logits"]):
            path, _, reducer = name.removeprefix("layer:").partition("@")
            wanted = inside[path][0]
            wanted = wanted / np.linalg.norm(wanted, axis=1, keepdims=True) if reducer else wanted
            np.testing.assert_allclose(values_of(answer, index), wanted, atol=1e-4)


def test_sixty_four_threads_never_see_each_others_layers(served, modules):
    xs = [rows_for("mnist", 1 + i % 3) for i in range(192)]
    layers = ["net.0", "net.2", "net.1", "net.3"]
    wanted = [hooked(modules["mnist"], x)[layers[i % 4]][0] for i, x in enumerate(xs)]
    with ThreadPoolExecutor(64) as pool:
        answers = list(
            pool.map(
                lambda i: served.call("ModelInfer", request("mnist", xs[i], [f"layer:{layers[i % 4]}"])), range(192)
            )
        )
    for answer, value in zip(answers, wanted, strict=True):
        np.testing.assert_allclose(values_of(answer), value, atol=1e-5)
    assert registered_hooks(served.server.repository.find("mnist", "").loaded.runner.eager._module) == []


def test_hooks_are_gone_after_an_error_inside_the_forward(served, modules, monkeypatch):
    runner = served.server.repository.find("mnist", "").loaded.runner
    module = runner.eager._module.net[2]

    def fail(*_: Any) -> Any:
        raise RuntimeError("this text is for the log only")

    monkeypatch.setattr(module, "forward", fail)
    with pytest.raises(grpc.RpcError, match="internal error [0-9a-f]{12}") as raised:
        served.call("ModelInfer", request("mnist", rows_for("mnist", 1), ["layer:net.4", "logits"]))
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert "log only" not in raised.value.details()
    monkeypatch.undo()
    assert registered_hooks(runner.eager._module) == []
    assert_answers(served, modules)


def test_list_layers_tells_type_shape_and_order(served):
    response = served.call("ListLayers", ListLayersRequest(model_name="resnet", pattern="layer1.0.*"))
    layers = {layer.path: layer for layer in response.layers}
    assert layers["layer1.0.conv1"].type == "Conv2d"
    assert list(layers["layer1.0.conv1"].shape) == [-1, 64, 32, 32]
    assert layers["layer1.0.conv1"].parameters == 64 * 64 * 9
    assert layers["layer1.0.conv1"].order < layers["layer1.0.bn1"].order
    assert all(layer.available for layer in response.layers)
    with pytest.raises(grpc.RpcError, match="no layer 'layer9'; nearest: layer"):
        served.call("ListLayers", ListLayersRequest(model_name="resnet", pattern="layer9"))


def test_extract_with_outputs_and_its_wrong_requests(served, modules):
    x = rows_for("mnist", 2)
    response = extract(served, "mnist", x, ["net.0"], ["logits"], id="e-1")
    assert response.id == "e-1"
    np.testing.assert_allclose(arrays(response.outputs)["logits"], offline(modules["mnist"], x), atol=1e-4)
    for arguments, message in (
        ((x, []), "no layers are asked for"),
        ((x, ["net.88"]), "no layer 'net.88'"),
        ((x, ["net.0"], ["logit"]), "nearest: logits"),
        ((x[:, :, :5], ["net.0"]), r"want shape \[-1, 1, 28, 28\]"),
    ):
        with pytest.raises(grpc.RpcError, match=message) as raised:
            extract(served, "mnist", *arguments)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_answers(served, modules)
