"""The engine winograd on exported networks: which convolutions it takes, and what ONNX Runtime computes around them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from one_run import made_once
from onnx import TensorProto, helper
from test_onnx_layers import write
from torch import nn

from layercast.models.manifest import Manifest
from layercast.models.onnx_cut import CutError, remaining
from layercast.server import compiled
from layercast.server.engines.base import EngineError
from layercast.server.engines.winograd.body import body_of
from layercast.server.engines.winograd.engine import WinogradEngine

PANEL = 64


pytestmark = pytest.mark.usefixtures("kernels_here")


def conv(into: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )  # fmt: skip


class Photograph(nn.Module):
    """As networks for photographs begin: a large kernel and a pool; then a block, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.one, self.two = conv(64, 64), nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64))
        self.down, self.beside = conv(64, 128, 3, 2), nn.Conv2d(64, 128, 1, 2)
        self.last = nn.Conv2d(128, 128, 3, padding=1)
        self.head, self.other = nn.Linear(128, 5), nn.Linear(128, 2)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.two(self.one(x)))
        x = torch.relu(self.last(self.down(x)) + self.beside(x)).mean((2, 3))
        return self.head(x), self.other(x)


class Maps(nn.Module):
    """Gives maps, as segmentation does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(3, 64), nn.Conv2d(64, 64, 3, padding=1))

    def forward(self, x):
        return self.layers(x)


class Grouped(nn.Module):
    """What the engine leaves to ONNX Runtime lies between what it takes; the first map is used behind it too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = conv(3, 64), nn.Conv2d(64, 64, 3, padding=1, groups=4)
        self.taken = nn.Sequential(conv(64, 64), conv(64, 128))
        self.head = nn.Linear(128 + 64, 3)

    def forward(self, x):
        early = self.first(x)
        late = self.taken(torch.sigmoid(self.grouped(early)))
        return self.head(torch.cat([early.mean((2, 3)), late.mean((2, 3))], 1))


class Dense(nn.Module):
    """No convolution at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 20 * 24, 2)

    def forward(self, x):
        return self.layer(x.flatten(1))


OUTPUTS = {"Photograph": [[5], [2]], "Maps": [[64, 20, 24]], "Grouped": [[3]], "Dense": [[2]]}


def exported(name: str) -> tuple[nn.Module, Path]:
    """Return the module and its artefact, which is for all tests of a run."""
    torch.manual_seed(1)
    module = globals()[name]().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.2, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    outputs = [
        {"name": f"output{at}", "datatype": "FP32", "shape": [-1, *shape]} for at, shape in enumerate(OUTPUTS[name])
    ]
    card = {
        "name": name.lower(), "architecture": f"test_winograd_engine:{name}", "arguments": {},
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 20, 24]}], "outputs": outputs,
    }  # fmt: skip
    root = made_once(f"winograd-{name}", lambda root: write(module, card, root))
    return module, root / card["name"] / "1"


@pytest.mark.parametrize(
    ("name", "steps", "before", "behind"),
    [("Photograph", 5, True, True), ("Maps", 2, False, False), ("Grouped", 2, True, True)],
)
def test_outputs_are_those_of_the_module(name, steps, before, behind):
    module, directory = exported(name)
    manifest = Manifest.read(directory)
    body = body_of(manifest.read_verified(directory, "model.onnx"), PANEL)
    assert body is not None
    assert len(body.steps) == steps
    assert (body.start != "x", body.end != "output0") == (before, behind)
    engine = WinogradEngine(directory, manifest)
    for rows in (1, 3, 6):
        x = torch.randn(rows, 3, 20, 24)
        with torch.inference_mode():
            wanted = module(x)
        got = engine.run({"x": x.numpy()})
        assert list(got) == [spec.name for spec in manifest.outputs]
        for values, want in zip(got.values(), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            np.testing.assert_allclose(values, want.numpy(), rtol=0, atol=3e-5 * max(1, want.abs().max()))


def test_inputs_may_be_read_only_and_not_contiguous():
    module, directory = exported("Maps")
    x = np.random.default_rng(1).standard_normal((20, 24, 3, 4)).astype("f4").transpose(3, 2, 0, 1)
    x.flags.writeable = False
    with torch.inference_mode():
        wanted = module(torch.from_numpy(x.copy())).numpy()
    got = WinogradEngine(directory, Manifest.read(directory)).run({"x": x})
    np.testing.assert_allclose(got["output0"], wanted, rtol=0, atol=1e-4)


def test_without_convolutions_it_says_so():
    _, directory = exported("Dense")
    with pytest.raises(
        EngineError, match="engine winograd can't run it: it has no 3x3 convolution of stride 1 to a multiple"
    ):
        WinogradEngine(directory, Manifest.read(directory))


def value(name: str, *sizes: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *(sizes or (64, 8, 8))])


def convolved(source: str, target: str, **attributes: Any) -> onnx.NodeProto:
    attributes = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]} | attributes
    return helper.make_node("Conv", [source, "w", "b"], [target], **attributes)


def program(
    *nodes: onnx.NodeProto, weights: tuple[int, ...] = (64, 64, 3, 3), bias: tuple[int, ...] = (64,), end: str = "y"
) -> bytes:
    made = [
        helper.make_tensor(name, TensorProto.FLOAT, dims, [0.01] * math.prod(dims))
        for name, dims in (("w", weights), ("b", bias))
    ]
    graph = helper.make_graph(list(nodes), "g", [value("x")], [value(end)], made)
    return helper.make_model(graph).SerializeToString()


def artefact(content: bytes, monkeypatch) -> tuple[Path, Manifest]:
    """Return an artefact whose program is `content`, whoever made it."""
    _, directory = exported("Maps")
    manifest = Manifest.read(directory)
    monkeypatch.setattr(Manifest, "read_verified", lambda manifest, directory, name: content)
    spec = manifest.inputs[0].model_copy(update={"shape": (-1, 64, 8, 8)})
    output = manifest.outputs[0].model_copy(update={"name": "y"})
    return directory, manifest.model_copy(update={"inputs": (spec,), "outputs": (output,)})


def test_which_convolutions_it_takes():
    plain = body_of(program(convolved("x", "y")), PANEL)
    assert plain is not None
    assert (plain.start, plain.end, plain.steps[0].stride, plain.steps[0].relu) == ("x", "y", 1, False)
    strided = body_of(program(convolved("x", "a"), convolved("a", "y", strides=[2, 2])), PANEL)
    assert strided is not None
    assert [step.stride for step in strided.steps] == [1, 2]
    for other in (
        {"pads": [0, 0, 0, 0]}, {"pads": [1, 1, 0, 0]}, {"dilations": [2, 2]}, {"group": 2}, {"strides": [1, 2]},
        {"auto_pad": "SAME_UPPER"}, {"kernel_shape": [1, 1]}, {"strides": [1.0, 1.0]},
    ):  # fmt: skip
        taken = body_of(program(convolved("x", "a"), convolved("a", "y", **other)), PANEL)
        assert taken is not None
        assert [step.target for step in taken.steps] == ["a"], other
    assert body_of(program(convolved("x", "y"), weights=(32, 64, 3, 3), bias=(32,)), PANEL) is None
    assert body_of(program(convolved("x", "y"), weights=(64, 64, 5, 5)), PANEL) is None
    assert body_of(program(convolved("x", "y"), weights=(64, 64, 3)), PANEL) is None
    assert body_of(program(convolved("x", "y"), bias=(64, 1)), PANEL) is None
    assert body_of(program(convolved("x", "y"), bias=()), PANEL) is None


def test_a_run_ends_where_the_rest_of_the_program_looks_into_it():
    inner, late = helper.make_node("Sigmoid", ["a"], ["s"]), helper.make_node("Mul", ["c", "s"], ["y"])
    body = body_of(program(convolved("x", "a"), convolved("a", "v"), convolved("v", "c"), inner, late), PANEL)
    assert body is not None
    assert (body.start, body.end) == ("a", "c")
    unused = body_of(program(convolved("x", "y"), convolved("y", "dead")), PANEL)
    assert unused is not None
    assert unused.end == "y"


@pytest.mark.parametrize(
    "nodes",
    [
        [convolved("x", "x"), convolved("x", "y")],
        [convolved("x", "a"), convolved("a", "a"), convolved("a", "y")],
        [convolved("x", "w"), convolved("w", "y")],
    ],
)
def test_a_program_whose_values_share_a_name_is_refused(monkeypatch, nodes):
    directory, manifest = artefact(program(*nodes), monkeypatch)
    with pytest.raises(EngineError, match="values share a name"):
        WinogradEngine(directory, manifest)


@pytest.mark.parametrize(
    "content",
    [
        b"nothing",
        program(helper.make_node("Abs", ["x"], ["a"]), convolved("a", "y")),  # nobody says of what type `a` is
        program(convolved("x", "a"), helper.make_node("Abs", ["a"], ["y"])),
        program(convolved("x", "y"), weights=(64, 3, 3, 3)),
    ],
)
def test_whatever_is_wrong_it_is_left_out(monkeypatch, content):
    directory, manifest = artefact(content, monkeypatch)
    with pytest.raises(EngineError, match="engine winograd can't"):
        WinogradEngine(directory, manifest)


def test_a_library_that_is_broken_is_told_without_its_path(tmp_path, monkeypatch):
    _, directory = exported("Maps")
    broken = tmp_path / "winograd-v4.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(compiled, "kernel", lambda name: broken)
    with pytest.raises(EngineError, match="engine winograd can't be loaded: OSError") as raised:
        WinogradEngine(directory, Manifest.read(directory))
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 3, 20, 23), "f4"), np.zeros((2, 3, 24, 20), "f4"), np.zeros((2, 3, 20, 24), "f8"), np.zeros(5, "f4")],
)
def test_what_is_of_another_shape_never_reaches_the_library(images):
    _, directory = exported("Maps")
    with pytest.raises(EngineError, match=r"want FP32 \[-1, 3, 20, 24\], got"):
        WinogradEngine(directory, Manifest.read(directory)).run({"x": images})


def test_no_rows_give_none():
    _, directory = exported("Maps")
    got = WinogradEngine(directory, Manifest.read(directory)).run({"x": np.zeros((0, 3, 20, 24), "f4")})
    assert got["output0"].shape == (0, 64, 20, 24)


def test_the_rest_of_a_program_begins_with_the_value_given():
    _, directory = exported("Photograph")
    content = Manifest.read(directory).read_verified(directory, "model.onnx")
    body = body_of(content, PANEL)
    assert body is not None
    rest = onnx.load_from_string(remaining(content, body.end)).graph
    assert [value.name for value in rest.input] == [body.end]
    assert [value.name for value in rest.output] == ["output0", "output1"]
    assert not any(node.op_type == "Conv" for node in rest.node)
    with pytest.raises(CutError, match="no value 'absent' inside"):
        remaining(content, "absent")
