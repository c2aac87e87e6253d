"""Patterns over layer names and module classes, in the layer index and in the extractors."""

import pytest
import torch
from torch import nn

from layercast.models.examples import Examples
from layercast.models.hooks import FeatureExtractor, GradientExtractor, LayerError
from layercast.models.layer_index import build_index
from layercast.models.layer_names import match_layers, nearest
from layercast.models.registry import build, input_specs

KINDS = {
    "stem": "Conv2d",
    "bn": "BatchNorm2d",
    "relu#0": "ReLU",
    "relu#1": "ReLU",
    "blocks.0.conv1": "Conv2d",
    "blocks.0.norm": "LayerNorm",
    "lstm[0]": "LSTM",
    "lstm[1][0]": "LSTM",
}


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("type:Conv2d", ["stem", "blocks.0.conv1"]),
        ("type:conv2d", []),
        ("type:*Norm*", ["bn", "blocks.0.norm"]),
        ("type:ReLU", ["relu#0", "relu#1"]),
        ("type:ReLU#1", ["relu#1"]),
        ("type:LSTM[0]", ["lstm[0]"]),
        ("type:stem", []),
        ("relu#1", ["relu#1"]),
        ("blocks.*", ["blocks.0.conv1", "blocks.0.norm"]),
        ("Conv2d", []),
    ],
)
def test_patterns_select_by_path_call_and_class(pattern, wanted):
    assert match_layers(pattern, KINDS) == wanted


def test_the_layer_index_itself_says_the_classes():
    model = build("ResNetLike").eval()
    layers = {layer.path: layer for layer in build_index(model, Examples(input_specs(model)))}
    wanted = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(match_layers("type:Conv2d", layers)) == sorted(wanted)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("type:Conv1d", "; nearest: type:Conv2d"),
        ("conv1", "; nearest: blocks.0.conv1"),
        ("norm", "; nearest: blocks.0.norm"),
        ("stm", "; nearest: stem"),
    ],
)
def test_a_pattern_that_selects_nothing_gets_the_nearest(pattern, hint):
    assert nearest(pattern, KINDS).startswith(hint)


def test_nothing_is_named_where_nothing_is_near():
    assert not nearest("zzzzzz", KINDS)
    assert not nearest("type:zzzzzz", KINDS)


@pytest.mark.parametrize("pattern", ["", "type:"])
def test_an_empty_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="must not be empty"):
        match_layers(pattern, KINDS)


def test_extractors_take_classes_and_calls():
    torch.manual_seed(0)
    model, x = build("SharedWeights").eval(), torch.randn(3, 10)
    with torch.inference_mode(), FeatureExtractor(model, ["type:Linear#1", "type:ReLU@norm"]) as extractor:
        features = extractor.run(x).features
    assert list(features) == ["relu@norm", "shared#1"]
    torch.testing.assert_close(features["shared#1"], model(x).detach())
    with GradientExtractor(model, ["type:ReLU"]) as gradients:
        model(x)[:, 0].sum().backward()
    torch.testing.assert_close(gradients.gradients["relu"], model.shared.weight[:1].detach().expand(3, 10))


def test_extractors_name_the_nearest_class_and_call():
    model, x = build("SharedWeights").eval(), torch.zeros(1, 10)
    with pytest.raises(LayerError, match=r"'type:Linera'; nearest: type:Linear"):
        FeatureExtractor(model, ["type:Linera"])
    with FeatureExtractor(model, ["shared#2"]) as extractor, pytest.raises(LayerError, match=r"nearest: shared#1, s"):
        extractor.run(x)
    with pytest.raises(LayerError, match=r"no layer matches 'type:ReLU#1'; nearest: type:ReLU"):
        FeatureExtractor(model, ["type:ReLU#1"], known=["shared#0", "relu", "shared#1"])
