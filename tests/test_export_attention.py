"""Attention in the ONNX program: ONNX Runtime's own operator, which gives what torch gives."""

import math

import beside
import numpy as np
import onnx
import pytest
import torch
from conftest import card_of
from onnx_layers import CPU, close, program
from torch import nn

from layercast.models import registry
from layercast.models.export.writer import export_artefact
from layercast.models.layers.attention import MultiHeadAttention, TransformerEncoderBlock
from layercast.models.manifest import Manifest
from layercast.models.onnx_runtime import onnxruntime
from layercast.models.onnx_shapes import steady
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.tapped import TappedEngine
from layercast.server.work import Tap

PADDING = 256


class Unpooled(nn.Module):
    """Shows what a row of padding alone attends to: zeros, where ONNX Runtime's operator itself gives the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(PADDING + 1, 8)
        self.attn = MultiHeadAttention(8, 2)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens):
        return self.head(self.attn(self.token(tokens), key_padding_mask=tokens == PADDING).amax(dim=1))


class Encoder(nn.Module):
    """Two blocks without any mask, one that normalises first; biases are not zero, as in trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            TransformerEncoderBlock(8, 2, 16), TransformerEncoderBlock(8, 4, 16, norm_first=True)
        )
        for name, bias in self.named_parameters():
            if name.endswith("bias"):
                nn.init.uniform_(bias, -0.5, 0.5)

    def forward(self, x):
        return self.blocks(x)


class Other(nn.Module):
    """Attention that the operator does not compute; `kind` tells which."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attn = MultiHeadAttention(8, 2)
        self.few = nn.Linear(8, 4)
        self.register_buffer("scales", torch.tensor([1.0, 3.0])[:, None, None])
        self.to(torch.float64 if kind == "double" else torch.float32)

    def forward(self, x):
        length = x.shape[1]
        masks = {
            "boolean": torch.ones(length, length, dtype=torch.bool, device=x.device).triu(2),
            "additive": torch.ones(length, length, device=x.device).triu(1),
        }
        if self.kind in masks:
            return self.attn(x, attn_mask=masks[self.kind])
        if self.kind == "causal":
            return self.attn(x, is_causal=True)
        if self.kind == "keys":
            return self.attn(x, torch.cat([x, x * 2], dim=1))
        if self.kind == "values":
            return self.attn(x, x, x * 2)
        if self.kind == "weights":
            output, weights = self.attn.attend(x)
            return output + weights.amax((1, 3))[..., None]
        return self.by_hand(x)

    def by_hand(self, x):
        """Attend with one scale for each head or row, or with one head of keys for all."""
        split = self.attn._split
        q, k, v = split(self.attn.query(x)), split(self.attn.key(x)), split(self.attn.value(x))
        if self.kind == "one head":
            k = self.few(x).reshape(*x.shape[:2], 1, 4).transpose(1, 2)
        scales = {"scales": self.scales, "a row's own scale": 1 + x.abs().amax((1, 2))[:, None, None, None]}
        scale = scales.get(self.kind, math.sqrt(4))
        attended = ((q / scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.attn.out(attended.transpose(1, 2).flatten(2))


def fused(directory) -> int:
    nodes = onnx.load(directory / "model.onnx").graph.node
    return sum((node.op_type, node.domain) == ("Attention", "com.microsoft") for node in nodes)


def export(module, directory, **card):
    export_artefact(module, {**card_of("transformer"), **card}, directory / "m" / "1", programs=("onnx",))
    return directory / "m" / "1"


def test_the_encoders_attention_is_one_operator_and_gives_what_torch_gives(repository, modules):
    directory = repository / "transformer" / "1"
    assert fused(directory) == 2
    assert Manifest.read(directory).opsets == {"ai.onnx": 20, "com.microsoft": 1}
    assert Manifest.read(repository / "mnist" / "1").opsets == {"ai.onnx": 20}
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(1)
    for rows, length in ((1, 1), (3, 32), (8, 19)):
        tokens = generator.integers(0, PADDING, (rows, length))
        for row in range(1, rows):
            tokens[row, generator.integers(0, length) :] = PADDING
        tokens[-1] = PADDING
        (got,) = session.run(None, {"tokens": tokens})
        with torch.inference_mode():
            wanted = modules["transformer"](torch.from_numpy(tokens)).numpy()
        np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)


def test_a_causal_encoder_keeps_torchs_steps(tmp_path):
    arguments = {**card_of("transformer")["arguments"], "causal": True}
    directory = export(registry.build("TransformerEncoder", **arguments).eval(), tmp_path, arguments=arguments)
    assert fused(directory) == 0
    assert max(Manifest.read(directory).parity["onnx"].values()) <= 1e-4


def test_rows_of_padding_alone_attend_to_nothing(tmp_path):
    module = Unpooled().eval()
    directory = export(
        module, tmp_path, architecture="test_export_attention:Unpooled", arguments={}, preprocessing=None
    )
    assert fused(directory) == 1
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = np.full((3, 7), PADDING)
    tokens[0, :4] = 5
    with torch.inference_mode():
        wanted = module(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(session.run(None, {"tokens": tokens})[0], wanted, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(wanted[1], wanted[2])
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-3


SEQUENCE = {
    name: [{"name": label, "datatype": "FP32", "shape": [-1, -1, 8]}]
    for name, label in (("inputs", "x"), ("outputs", "output"))
} | {"preprocessing": None, "labels": []}


@pytest.fixture(scope="module")
def unmasked(tmp_path_factory):
    """An encoder that attends to everything, and its artefact."""
    torch.manual_seed(2)
    module = Encoder().eval()
    card = {"architecture": "test_export_attention:Encoder", "arguments": {}, **SEQUENCE}
    return module, export(module, tmp_path_factory.mktemp("unmasked"), **card)


def test_attention_without_a_mask_is_one_operator_and_gives_what_torch_gives(unmasked):
    module, directory = unmasked
    assert fused(directory) == 2
    assert Manifest.read(directory).opsets == {"ai.onnx": 20, "com.microsoft": 1}
    content = (directory / "model.onnx").read_bytes()
    assert steady(content)
    assert not {"Softmax", "Transpose"} & {node.op_type for node in onnx.load_from_string(content).graph.node}
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(1)
    for rows, length, spread in ((1, 1, 1), (3, 32, 1), (8, 19, 1), (2, 7, 100)):
        x = (generator.standard_normal((rows, length, 8)) * spread).astype("f4")
        with torch.inference_mode():
            wanted = module(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(session.run(None, {"x": x})[0], wanted, atol=1e-5 * spread, rtol=0)


def test_layers_around_attention_without_a_mask_are_read_from_the_program_and_maps_by_hooks(unmasked):
    module, directory = unmasked
    manifest = Manifest.read(directory)
    inside = {
        f"blocks.{block}.attn.{part}" for block in (0, 1) for part in ("query", "key", "value", "weights", "dropout")
    }
    without = {layer.path for layer in manifest.layers if layer.available} - manifest.onnx_values.keys()
    assert without == inside
    x = np.random.default_rng(3).standard_normal((3, 9, 8)).astype("f4")
    whole, plain = program(directory), EagerEngine(module, manifest, CPU)
    for path in whole.layers:
        _, got = whole.part([path], predict=False).tapped({"x": x}, [Tap(path)], predict=False)
        close(got, plain.tapped({"x": x}, [Tap(path)], predict=False)[1])
    engine = TappedEngine(plain, whole)
    maps = [Tap(f"blocks.{block}.attn.weights") for block in (0, 1)]
    for _ in range(8):
        _, got = engine.tapped({"x": x}, maps, predict=False)
        engine.settle()
    assert (engine.name, [got[tap].shape for tap in maps]) == ("eager", [(3, 2, 9, 9), (3, 4, 9, 9)])
    np.testing.assert_allclose(got[maps[0]].sum(-1), 1, atol=1e-5)


OTHERS = ("boolean", "additive", "causal", "keys", "values", "weights", "scales", "a row's own scale", "one head")


def export_others(root, kinds, datatype="FP32"):
    """Return the artefact of attention of these kinds."""
    inputs = [{**spec, "datatype": datatype} for spec in SEQUENCE["inputs"]]
    parts, output = {kind: {"kind": kind} for kind in kinds}, {"datatype": datatype, "shape": [-1, -1, 8]}
    return beside.export(root, "test_export_attention:Other", parts, inputs, output)[1]


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """All of `OTHERS`, and attention that is the same: were a wrong one fused, none would be."""
    return export_others(tmp_path_factory.mktemp("others"), (*OTHERS, "by hand"))


@pytest.fixture(scope="module")
def in_double(tmp_path_factory):
    return export_others(tmp_path_factory.mktemp("double"), ("double",), "FP64")


@pytest.mark.parametrize(("made", "kind"), [*(("others", kind) for kind in OTHERS), ("in_double", "double")])
def test_other_attention_keeps_torchs_steps(request, made, kind):
    directory = request.getfixturevalue(made)
    found = beside.operators_of(directory, kind)
    assert "Attention" not in found
    assert "Softmax" in found
    assert max(Manifest.read(directory).parity["onnx"].values()) <= 1e-4


def test_attention_by_hand_is_found_where_it_is_the_same(others):
    assert beside.operators_of(others, "by hand").count("Attention") == 1
    assert fused(others) == 1
