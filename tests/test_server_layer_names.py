"""Layers asked for by class and by call, and projected, from a running server."""

import grpc
import numpy as np
import pytest
from test_server_features import arrays, extract, hooked
from test_server_inference import request, rows_for, values_of

from layercast.proto.messages import ListLayersRequest


def test_layers_by_class_and_projected(served, modules):
    x = rows_for("resnet", 2)
    response = served.call("ModelInfer", request("resnet", x, ["layer:type:Conv?d@mean@proj16:3"]))
    inside = hooked(modules["resnet"], x)
    names = [output.name.removeprefix("layer:").removesuffix("@mean@proj16:3") for output in response.outputs]
    assert names == [path for path in inside if type(modules["resnet"].get_submodule(path)).__name__ == "Conv2d"]
    for place, name in enumerate(names):
        means = inside[name][0].mean((2, 3))
        raw = np.random.PCG64(3).random_raw(means.shape[1] * 16) % 6
        matrix = ((raw == 0).astype("f8") - (raw == 1)).reshape(-1, 16) * (3 / 16) ** 0.5
        np.testing.assert_allclose(values_of(response, place), means @ matrix, atol=1e-5, err_msg=name)


def test_layers_by_class_and_call(served, modules):
    x = rows_for("shared", 2)
    got = arrays(extract(served, "shared", x, ["type:Linear#1"]).layers)
    assert list(got) == ["shared#1"]
    np.testing.assert_allclose(got["shared#1"], hooked(modules["shared"], x)["shared"][1], atol=1e-5)


def test_layers_are_listed_by_class(served):
    listed = served.call("ListLayers", ListLayersRequest(model_name="transformer", pattern="type:*Norm")).layers
    assert listed
    assert {layer.type for layer in listed} == {"LayerNorm"}


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("type:Conv3d", "no layer 'type:Conv3d'; nearest: type:Conv2d"),
        ("conv1", r"no layer 'conv1'; nearest: layer1\.0\.conv1"),
        ("layer1@proj4096", r"layer 'layer1': reducer proj4096 takes at most 1,024 values a row"),
    ],
)
def test_what_fits_no_layer_is_told_the_nearest(served, tap, message):
    with pytest.raises(grpc.RpcError, match=message) as caught:
        served.call("ModelInfer", request("resnet", rows_for("resnet", 1), [f"layer:{tap}"]))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
