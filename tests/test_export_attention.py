"""Attention in the ONNX program: ONNX Runtime's own operator, which gives what torch gives."""

import numpy as np
import onnx
import torch
from conftest import card_of
from torch import nn

from layercast.models import registry
from layercast.models.export.writer import export_artefact
from layercast.models.layers.attention import MultiHeadAttention
from layercast.models.manifest import Manifest
from layercast.models.onnx_runtime import onnxruntime

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
