"""Layers read from the ONNX program: which values carry them, and that they are the module's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import card_of, in_one_thread
from onnx_layers import close, hooks, inputs_of, program
from torch import nn

from layercast.models import registry
from layercast.models.artefact import load_module
from layercast.models.export.writer import export_artefact
from layercast.models.hooks import FeatureExtractor
from layercast.models.manifest import Manifest
from layercast.server.errors import InvalidArgument
from layercast.server.work import Tap

# What fusion leaves no value of: what a batch norm is folded into, and the inside of attention.
FUSED = {
    "mnist": {"net.0.0", "net.2.0"},
    "resnet": {"stem", "layer2.0.shortcut.0"} | {
        f"layer{stage}.{block}.conv{number}" for stage in (1, 2) for block in (0, 1) for number in (1, 2)
    },
    # Besides, the dropout after a projection whose bias is zero, as untrained ones are: both values before it are equal.
    "transformer": {"blocks.0.attn_dropout", "blocks.1.attn_dropout"} | {
        f"blocks.{block}.attn.{part}" for block in (0, 1) for part in ("query", "key", "value", "weights", "dropout")
    },
    "shared": set(),
}  # fmt: skip
VARIANTS = {
    "mlp": ("mnist", "MLP", {"input_size": 12, "hidden_sizes": [8, 6], "output_size": 3, "activation_name": "gelu"}),
    "simple": ("mnist", "SimpleNet", {"input_size": 12, "hidden_size": 6}),
    "squeezed": ("resnet", "ResNetLike", {"squeeze_excitation": True}),
    "causal": ("transformer", "TransformerEncoder", card_of("transformer")["arguments"] | {"causal": True}),
    "after": ("transformer", "TransformerEncoder", card_of("transformer")["arguments"] | {"norm_first": False}),
}


def varied(name: str, root: Path) -> Path:
    """Export another variant of an architecture than the shared repository holds."""
    like, architecture, arguments = VARIANTS[name]
    card = card_of(like) | {"name": name, "architecture": architecture, "arguments": arguments}
    torch.manual_seed(3)
    module = registry.build(architecture, **arguments)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.uniform_(-0.2, 0.2)
            part.running_var.uniform_(0.5, 1.5)
    if like == "resnet":
        card |= {"inputs": [{**card["inputs"][0], "shape": [-1, 3, 8, 8]}], "preprocessing": None}
    if like == "mnist":
        size = arguments.get("output_size", 10)
        card |= {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 12]}], "preprocessing": None}
        card |= {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, size]}], "labels": []}
    return write(module.eval(), card, root)


def write(module: nn.Module, card: dict, root: Path) -> Path:
    with in_one_thread():
        export_artefact(module, card, root / card["name"] / "1", programs=("onnx",))
    return root / card["name"] / "1"


@pytest.fixture(scope="module")
def directories(repository, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    return {name: repository / name / "1" for name in FUSED} | {name: varied(name, root) for name in VARIANTS}


@pytest.mark.parametrize("name", FUSED)
def test_every_layer_has_a_value_but_those_that_fusion_took(directories, name):
    manifest = Manifest.read(directories[name])
    assert {layer.path for layer in manifest.layers if layer.available} - manifest.onnx_values.keys() == FUSED[name]


@pytest.mark.parametrize("name", [*FUSED, *VARIANTS])
def test_every_value_is_what_a_hook_on_the_module_sees(directories, name):
    manifest, whole = Manifest.read(directories[name]), program(directories[name])
    module = load_module(directories[name], manifest)
    together = whole.part(whole.layers, predict=True)
    alone = {path: whole.part([path], predict=False) for path in whole.layers}
    assert len(whole.layers) > len([layer for layer in manifest.layers if layer.available]) / 2
    for batch, length in ((1, 9), (5, 9), (3, 1), (2, 32)):
        inputs = inputs_of(manifest, batch, length)
        if manifest.inputs[0].pad is not None:
            inputs["tokens"][-1] = manifest.inputs[0].pad  # a row of padding alone
        with torch.inference_mode(), FeatureExtractor(module, ["*"]) as extractor:
            wanted = extractor.run(**{key: torch.from_numpy(value) for key, value in inputs.items()})
        features = {path: wanted.features[path].numpy() for path in whole.layers}
        outputs, got = together.tapped(inputs, [Tap(path) for path in whole.layers], predict=True)
        close({tap.layer: value for tap, value in got.items()}, features)
        np.testing.assert_allclose(next(iter(outputs.values())), wanted.output.numpy(), atol=1e-4)
        for path, part in alone.items() if batch < 3 else ():
            close(part.tapped(inputs, [Tap(path)], predict=False)[1], {Tap(path): features[path]})


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("transformer", ["blocks.0@mean", "blocks.1@cls", "blocks.1@last", "blocks.0@max", "norm@flatten@norm"]),
        ("transformer", ["blocks.0.attn@none", "blocks.0@proj8", "blocks.0@mean@fp16", "token@norm"]),
        ("resnet", ["layer1@mean", "layer2@max@norm", "pool@flatten", "bn@proj16:3", "head@none"]),
    ],
)
@pytest.mark.parametrize("predict", [True, False])
def test_reducers_mixed_taps_and_predictions_are_those_of_hooks(directories, name, taps, predict):
    manifest, engine = Manifest.read(directories[name]), hooks(directories[name])
    asked = [Tap(*tap.split("@", 1)) for tap in taps]
    inputs = inputs_of(manifest, 5, 20)
    if name == "transformer":
        inputs["tokens"][-1] = 256
    part = program(directories[name]).part({tap.layer for tap in asked}, predict)
    outputs, features = part.tapped(inputs, asked, predict)
    wanted_outputs, wanted = engine.tapped(inputs, asked, predict)
    close(features, wanted)
    close(outputs, wanted_outputs)
    assert bool(outputs) == predict


def test_a_reducer_that_does_not_fit_is_refused_as_hooks_refuse_it(directories):
    part = program(directories["resnet"]).part(["layer1"], predict=False)
    inputs = inputs_of(Manifest.read(directories["resnet"]), 1)
    with pytest.raises(InvalidArgument) as mine:
        part.tapped(inputs, [Tap("layer1", "cls")], predict=False)
    with pytest.raises(InvalidArgument) as theirs:
        hooks(directories["resnet"]).tapped(inputs, [Tap("layer1", "cls")], predict=False)
    assert str(mine.value) == str(theirs.value)


class Positive(nn.Module):
    """A ReLU that changes nothing on inputs of its range, a dropout after it, and a layer that is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout()
        self.dead = nn.Linear(4, 4)
        nn.init.uniform_(self.first.weight, 0.1, 0.9)
        nn.init.uniform_(self.first.bias, 0.1, 0.9)
        nn.init.zeros_(self.dead.weight)

    def forward(self, x):
        x = self.drop(self.relu(self.first(x)))
        return x + self.dead(x)


def test_values_that_are_equal_by_accident_are_told_apart_or_left_out(tmp_path):
    spec = {"datatype": "FP32", "shape": [-1, 4]}
    card = {
        "name": "m", "architecture": "test_onnx_layers:Positive", "arguments": {},
        "inputs": [{"name": "x", "range": [0, 1], **spec}], "outputs": [{"name": "output", **spec}],
    }  # fmt: skip
    module = Positive().eval()
    directory = write(module, card, tmp_path)
    assert Manifest.read(directory).onnx_values.keys() == {"first", "relu"}
    below = np.full((2, 4), -3, "f4")
    got = program(directory).part(["first", "relu"], predict=False)
    _, features = got.tapped({"x": below}, [Tap("first"), Tap("relu")], predict=False)
    with torch.inference_mode():
        np.testing.assert_allclose(features[Tap("first")], module.first(torch.from_numpy(below)), atol=1e-5)
    assert (features[Tap("first")] < 0).all()
    assert (features[Tap("relu")] == 0).all()
