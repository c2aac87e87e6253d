"""What a model's own settings let callers have of its layers: one text, whichever way they ask."""

import shutil
from pathlib import Path

import grpc
import numpy as np
import pytest
from resting import infer, tensor
from serving import Running, running
from test_feature_stream import asked, stream
from test_server_explain import message
from test_server_features import arrays, extract, hooked
from test_server_inference import offline, request, rows_for, values_of

from layercast.client import Client, Edit, LayercastError
from layercast.models.reducers import pools
from layercast.proto.messages import ListLayersRequest
from layercast.server.errors import StartError
from layercast.server.settings import ModelSettings, read

KNOBS = {
    "shared": "features = false\n",
    "resnet": 'features = "pooled"\n',
    "transformer": 'features = "pooled"\n',
    "mnist": 'feature_layers = ["net.0", "type:ReLU"]\nmax_taps = 3\nmax_feature_bytes = 9000\n'
    "max_explain_evaluations = 8\n",
}
OFF = "this model gives no layers (its setting features is false)"
POOLED = "this model gives its layers pooled only, reduced by mean, max, cls, last"
LISTED = "this model gives only the layers that its setting feature_layers lists"


@pytest.fixture(scope="module")
def limited(repository: Path, tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("limited")
    for name, knobs in KNOBS.items():
        shutil.copytree(repository / name, root / name)
        (root / name / "layercast.toml").write_text(knobs)
    with running(root, engine="eager") as server:
        yield server


def refused(call, *arguments) -> str:
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments)
    assert raised.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    return raised.value.details()


def stream_all(server: Running, message) -> list:
    return list(stream(server, message))


def every_way(server: Running, model: str, x: np.ndarray, tap: str) -> list[str]:
    """Ask for a layer over every call that takes one; what each says."""
    inference = request(model, x, [f"layer:{tap}"])
    document = {"inputs": [tensor(x, inference.inputs[0].name, inference.inputs[0].datatype)],
                "outputs": [{"name": f"layer:{tap}"}]}  # fmt: skip
    over_http = infer(server, model, document)
    assert over_http.status == 400
    (in_stream,) = server.stream([inference])
    return [
        refused(extract, server, model, x, [tap]),
        refused(server.call, "ModelInfer", inference),
        refused(stream_all, server, asked(model, x, [tap])),
        over_http.error,
        in_stream.error_message,
    ]


def listed(server: Running, model: str) -> dict[str, object]:
    return {layer.path: layer for layer in server.call("ListLayers", ListLayersRequest(model_name=model)).layers}


def test_off_is_off_on_every_call_with_one_text(limited, modules):
    x = rows_for("shared", 2)
    assert {layer.reason for layer in listed(limited, "shared").values()} == {OFF}
    for tap in ("relu", "*", "shared#1@norm"):
        texts = every_way(limited, "shared", x, tap)
        assert len(set(texts)) == 1
        assert f"can't be tapped: {OFF}" in texts[0]
    assert refused(limited.call, "Explain", message("shared", x)) == f"model 'shared' can't be explained: {OFF}"
    got = values_of(limited.call("ModelInfer", request("shared", x)))
    np.testing.assert_allclose(got, offline(modules["shared"], x), atol=1e-5)


@pytest.mark.parametrize("tap", ["layer1", "layer1@flatten", "layer1@norm", "layer1@proj64", "layer1@fp16", "layer?"])
def test_pooled_gives_no_map_of_places(limited, tap):
    texts = every_way(limited, "resnet", rows_for("resnet", 1), tap)
    assert len(set(texts)) == 1
    assert f"layer 'layer1' of shape [-1, 64, 32, 32]: {POOLED}; ask for layer1@mean" in texts[0]


def test_pooled_gives_vectors(limited, modules):
    x = rows_for("resnet", 2)
    taps = ["layer1@mean", "layer2@max@norm", "layer1@mean@proj8", "pool@mean", "head"]
    got = arrays(extract(limited, "resnet", x, taps).layers)
    assert {name: values.ndim for name, values in got.items()} == dict.fromkeys(taps, 2)
    np.testing.assert_allclose(got["layer1@mean"], hooked(modules["resnet"], x)["layer1"][0].mean((2, 3)), atol=1e-5)
    tokens = rows_for("transformer", 2, 12)
    assert arrays(extract(limited, "transformer", tokens, ["blocks.0@cls"]).layers)["blocks.0@cls"].shape == (2, 16)
    assert POOLED in refused(extract, limited, "transformer", tokens, ["blocks.0"])
    assert all(layer.available or layer.reason for layer in listed(limited, "transformer").values())


def test_pooled_explains_the_input_and_shows_no_layer(limited):
    x = rows_for("resnet", 1)
    assert limited.call("Explain", message("resnet", x)).attributions.shape == [1, 3, 32, 32]
    assert POOLED in refused(limited.call, "Explain", message("resnet", x, "gradcam"))
    tokens = rows_for("transformer", 1, 12)
    assert POOLED in refused(limited.call, "Explain", message("transformer", tokens, "attention-rollout"))


def test_a_list_of_layers_keeps_the_others_back(limited, modules):
    x = rows_for("mnist", 1)
    layers = listed(limited, "mnist")
    assert {path for path, layer in layers.items() if layer.available} == {"net.0", "net.0.2", "net.2.2"}
    assert layers["net.2"].reason == LISTED
    texts = every_way(limited, "mnist", x, "net.2")
    assert set(texts) == {f"layer 'net.2' can't be tapped: {LISTED}"}
    got = arrays(extract(limited, "mnist", x, ["net.*"]).layers)
    assert set(got) == {"net.0", "net.0.2", "net.2.2"}
    np.testing.assert_allclose(got["net.0"], hooked(modules["mnist"], x)["net.0"][0], atol=1e-5)


def test_too_many_layers_or_bytes_are_refused_before_anything_runs(limited):
    statistics = limited.server.repository.find("mnist", "").monitor.statistics
    before = statistics.executions
    taps = ["net.0", "net.0@norm", "net.0@fp16", "net.0.2"]
    x = rows_for("mnist", 2)
    for text in (refused(extract, limited, "mnist", x, taps), refused(stream_all, limited, asked("mnist", x, taps))):
        assert text.startswith("4 layers are asked for, this model gives at most 3 to one request")
    one_by_one = request("mnist", x, [f"layer:{tap}" for tap in taps])
    assert "this model gives at most 3" in refused(limited.call, "ModelInfer", one_by_one)
    x = rows_for("mnist", 5)  # 5 * 512 * 4 bytes
    streamed = asked("mnist", x, ["net.0"])
    for text in (refused(extract, limited, "mnist", x, ["net.0"]), refused(stream_all, limited, streamed)):
        assert "take 10,240 bytes for 5 rows, model 'mnist' gives at most 9,000 to one request" in text
    assert statistics.executions == before
    assert arrays(extract(limited, "mnist", x, ["net.0@fp16"]).layers)["net.0@fp16"].shape == (5, 512)


def test_explanations_are_bounded_by_their_evaluations(limited):
    x = rows_for("mnist", 2)
    assert "at most 8 may be" in refused(limited.call, "Explain", message("mnist", x, "integrated-gradients", steps=5))
    assert limited.call("Explain", message("mnist", x, "integrated-gradients", steps=4)).attributions.data


def test_grad_cam_shows_listed_layers_only(tmp_path, repository):
    shutil.copytree(repository / "resnet", tmp_path / "resnet")
    (tmp_path / "resnet" / "layercast.toml").write_text('feature_layers = ["layer1.*"]\n')
    x = rows_for("resnet", 1)
    with running(tmp_path, engine="eager", max_batch=4) as server:
        assert server.call("Explain", message("resnet", x, "gradcam", layer="layer1.1.conv2")).attributions.data
        assert LISTED in refused(server.call, "Explain", message("resnet", x, "gradcam", layer="layer2.0.conv1"))
        assert LISTED in refused(server.call, "Explain", message("resnet", x, "gradcam"))


def test_a_rollout_shows_listed_maps_only(tmp_path, repository):
    shutil.copytree(repository / "transformer", tmp_path / "transformer")
    knobs = tmp_path / "transformer" / "layercast.toml"
    tokens = rows_for("transformer", 2)
    for listed, shown in (('["blocks.*.attn"]', False), ('["blocks.*.attn", "*.weights"]', True)):
        knobs.write_text(f"feature_layers = {listed}\n")
        with running(tmp_path, engine="eager", max_batch=4) as server:
            wanted = message("transformer", tokens, "attention-rollout", layer="blocks.*.attn")
            if shown:
                assert server.call("Explain", wanted).attributions.data
            else:
                assert LISTED in refused(server.call, "Explain", wanted)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [("features = false", OFF), ('features = "pooled"', POOLED), ('feature_layers = ["net.1"]', LISTED)],
)
def test_what_is_kept_back_can_not_be_steered(tmp_path, repository, knobs, said):
    shutil.copytree(repository / "mnist", tmp_path / "mnist")
    (tmp_path / "mnist" / "layercast.toml").write_text(f"steering = true\n{knobs}\n")
    with running(tmp_path, engine="eager", max_batch=4) as server, Client(server.url) as client:
        with pytest.raises(LayercastError) as refusal:
            client.steer("mnist", rows_for("mnist", 1), Edit.zero("net.0"))
        assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "meant"), [("true", "true"), ("false", "false"), ('"pooled"', "pooled"), ('"false"', "false")]
)
def test_the_switch_is_read_as_toml_writes_it(tmp_path, given, meant):
    (tmp_path / "layercast.toml").write_text(f"features = {given}\n")
    assert read({}).for_model(tmp_path).features == meant


def test_the_switch_takes_nothing_else(tmp_path):
    (tmp_path / "layercast.toml").write_text("features = 3\n")
    with pytest.raises(StartError, match="features: Input should be 'true', 'pooled' or 'false', got 3"):
        read({}).for_model(tmp_path)
    assert ModelSettings(features=False).features == "false"


@pytest.mark.parametrize(
    ("shape", "reducers", "pooled"),
    [
        ((-1, 8), "none", True), ((-1, 8), "flatten", True), ((-1, 8), "proj4", True), ((-1, -1), "none", False),
        ((-1, 8, 4, 4), "none", False), ((-1, 8, 4, 4), "mean", True), ((-1, 8, -1, -1), "max@norm", True),
        ((-1, 8, 4, 4), "flatten", False), ((-1, 8, 4, 4), "proj64", False), ((-1, 8, 4, 4), "norm@mean", True),
        ((-1, 8, 4, 4), "flatten@mean", False), ((-1, -1, 8), "cls@fp16", True), ((-1, 2, -1, -1), "mean", True),
        ((-1, 5, -1), "mean", False), ((-1, 5, 6), "last@proj4", True), ((-1,), "none", True),
    ],
)  # fmt: skip
def test_what_pooling_is(shape, reducers, pooled):
    assert pools(shape, reducers) is pooled


def test_the_client_shows_what_is_kept_back(limited):
    with Client(limited.url) as client:
        assert not any(layer.available for layer in client.layers("shared"))
        assert sum(layer.available for layer in client.layers("mnist")) == 3
