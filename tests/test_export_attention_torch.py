"""Torch's own attention in the ONNX program: one operator where that gives the same, torch's steps elsewhere."""

import beside
import numpy as np
import onnx
import pytest
import torch
from onnx_layers import CPU, close, program
from torch import nn
from torch.nn import functional

from layercast.models.manifest import Manifest
from layercast.models.onnx_runtime import onnxruntime
from layercast.models.onnx_shapes import steady
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.encoder.body import body_of
from layercast.server.engines.encoder.steps import Attention, Linear
from layercast.server.work import Tap

WIDTH = 16
PASSES = dict.fromkeys(("plain", "no bias", "thirds", "chunks", "boolean", "hidden"), 2)
"""How often a block of a kind that is fused is gone through; others are once."""


class Projected(nn.Module):
    """Residual blocks by `scaled_dot_product_attention`; `kind` tells how they project, mask and what is odd."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        linear = [nn.Linear(WIDTH, WIDTH, bias=kind != "no bias") for _ in range(4)]
        self.query, self.key, self.value, self.out = linear
        self.packed = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def heads(self, x):
        rows, length, _ = x.shape
        if self.kind == "thirds":
            return self.packed(x).reshape(rows, length, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if self.kind in ("chunks", "chunks mixed up"):
            parts = self.packed(x).chunk(3, dim=-1)
            parts = parts if self.kind == "chunks" else parts[::-1]
        else:
            parts = self.query(x), self.key(x * 2 if self.kind == "keys" else x), self.value(x)
        return (part.view(rows, length, 2, 8).transpose(1, 2) for part in parts)

    def mask(self, x, mask):
        length = x.shape[1]
        return {
            "boolean": mask[:, None, None, :] > 0,
            "hidden": ~(mask == 0)[:, None, None, :],
            "square": torch.ones(length, length, dtype=torch.bool).tril(1) if self.kind == "square" else None,
        }.get(self.kind)

    def forward(self, x, mask):
        for _ in range(PASSES.get(self.kind, 1)):
            q, k, v = self.heads(x)
            causal = self.kind == "causal"
            attended = functional.scaled_dot_product_attention(q, k, v, self.mask(x, mask), is_causal=causal)
            x = self.norm(x + self.out(attended.transpose(1, 2).reshape(x.shape)))
        return x


class OfTorch(nn.Module):
    """`nn.MultiheadAttention`, alone (`kind` tells how it is called) or in `nn.TransformerEncoder`."""

    def __init__(
        self, kind: str, heads: int = 2, padded: bool = False, bias: bool = True, layers: int = 1, **options
    ) -> None:
        super().__init__()
        self.kind, self.padded = kind, padded
        if kind == "encoder":
            layer = nn.TransformerEncoderLayer(WIDTH, heads, 32, batch_first=True, **options)
            self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        else:
            self.attn = nn.MultiheadAttention(WIDTH, heads, batch_first=True, bias=bias)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, x, mask):
        hidden = mask == 0 if self.padded else x.mean(-1) if self.kind == "additive" else None
        if self.kind == "encoder":
            return self.layers(x, src_key_padding_mask=hidden)
        if self.kind == "without weights":
            return self.attn(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        if self.kind == "causal":
            length = x.shape[1]
            later = torch.ones(length, length, dtype=torch.bool).triu(1)
            return self.attn(x, x, x, key_padding_mask=hidden, attn_mask=later, need_weights=False)[0]
        if self.kind in ("expanded by heads", "expanded by rows"):
            rows, length, heads = *mask.shape, self.attn.num_heads
            hidden = torch.where(mask == 0, float("-inf"), 0.0)
            if self.kind == "expanded by heads":  # a usual mistake: head h of row n is given another row's mask
                every = hidden[None].expand(heads, rows, length)
            else:
                every = hidden[:, None].expand(rows, heads, length)
            every = every.reshape(heads * rows, 1, length).expand(heads * rows, length, length)
            return self.attn(x, x, x, attn_mask=every, need_weights=False)[0]
        output, weights = self.attn(x, x * 2 if self.kind == "keys" else x, x, key_padding_mask=hidden)
        return output + weights.amax(-1, keepdim=True) if self.kind == "weights" else output


def export(root, name, parts, length=-1, card_says=None):
    """Export modules of the class `name` beside each other."""
    inputs = [
        {"name": "x", "datatype": "FP32", "shape": [-1, length, WIDTH]},
        {"name": "mask", "datatype": "INT64", "shape": [-1, length], "range": [0, 1], "pad": 0} | (card_says or {}),
    ]
    output = {"datatype": "FP32", "shape": [-1, length, WIDTH]}
    return beside.export(root, f"test_export_attention_torch:{name}", parts, inputs, output)


def batches(lengths):
    generator = np.random.default_rng(1)
    for rows, length in zip((1, 3, 8), lengths, strict=True):
        mask = np.ones((rows, length), np.int64)
        for row in range(1, rows):
            mask[row] = generator.integers(0, 2, length)
            mask[row, generator.integers(0, length)] = 1
        yield {"x": generator.standard_normal((rows, length, WIDTH)).astype("f4"), "mask": mask}


def check(module, directory, part, lengths=(1, 32, 19)):
    content = (directory / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    given = {value.name for value in session.get_inputs()}
    for inputs in batches(lengths):
        with torch.no_grad():
            wanted = module.named[part](**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()
        (got,) = session.run([beside.output_of(part)], {name: value for name, value in inputs.items() if name in given})
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)
    assert steady(content)


PROJECTED = {kind: {"kind": kind} for kind in (*PASSES, "chunks mixed up", "square", "causal", "keys")}
OF_TORCH = {
    "without weights": {"kind": "without weights", "padded": True, "bias": True},
    "without weights or padding": {"kind": "without weights", "padded": False, "bias": False},
    "with weights": {"kind": "with weights", "padded": True, "bias": False},
    "with weights, without padding": {"kind": "with weights", "padded": False, "bias": True},
    **{kind: {"kind": kind} for kind in ("additive", "causal", "keys", "weights")},
}


@pytest.fixture(scope="module")
def projected(tmp_path_factory):
    """All of `PROJECTED`; were one rewritten to what gives something else, none would be rewritten."""
    return export(tmp_path_factory.mktemp("projected"), "Projected", PROJECTED)


@pytest.fixture(scope="module")
def of_torch(tmp_path_factory):
    return export(tmp_path_factory.mktemp("of_torch"), "OfTorch", OF_TORCH)


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """Two layers of torch's encoder, with padding."""
    arguments = {"kind": "encoder", "padded": True, "layers": 2, "norm_first": False, "activation": "relu"}
    return export(tmp_path_factory.mktemp("layered"), "OfTorch", {"output": arguments})


def assert_fused(directory, kind):
    found = beside.operators_of(directory, kind)
    assert found.count("Attention") == PASSES.get(kind, 1)
    assert not {"Softmax", "Transpose", "Reshape"} & set(found)


@pytest.mark.parametrize("kind", PASSES)
def test_attention_of_separate_or_packed_projections_is_one_operator(projected, kind):
    assert_fused(projected[1], kind)
    check(*projected, kind)


def test_so_it_is_where_the_length_is_fixed(tmp_path):
    fixed = export(tmp_path, "Projected", {kind: {"kind": kind} for kind in ("thirds", "boolean")}, length=28)
    for kind in fixed[0].named:
        assert_fused(fixed[1], kind)
        check(*fixed, kind, (28, 28, 28))


def assert_steps(module, directory, length, padded, heads, layers):
    found = beside.operators_of(directory, "output")
    assert found.count("Attention") == layers
    assert not {"Softmax", "Transpose", "Reshape", "Gemm"} & set(found)
    check(module, directory, "output", (1, 32, 19) if length < 0 else (28, 28, 28))
    body = body_of((directory / "model.onnx").read_bytes(), WIDTH // heads)
    assert body is not None
    assert sum(isinstance(step, Attention) for step in body.steps) == layers
    assert sum(isinstance(step, Linear) for step in body.steps) == 3 * layers
    assert (len(body.masks), len(body.factors)) == (int(padded), int(padded))


def test_blocks_of_torchs_encoder_become_steps_of_the_engine(layered):
    assert_steps(*layered, -1, padded=True, heads=2, layers=2)


@pytest.mark.parametrize(
    ("length", "padded", "layers", "arguments"),
    [
        (-1, True, 2, {"norm_first": True, "activation": "gelu"}),
        (-1, False, 1, {"norm_first": False, "activation": "gelu"}),
        (28, False, 1, {"norm_first": True, "activation": "relu"}),
    ],
)
def test_so_does_another_block_of_torchs_encoder(tmp_path, length, padded, layers, arguments):
    arguments = {"kind": "encoder", "padded": padded, "heads": 4, "layers": layers, **arguments}
    assert_steps(*export(tmp_path, "OfTorch", {"output": arguments}, length), length, padded, heads=4, layers=layers)


@pytest.mark.parametrize("part", list(OF_TORCH)[:4])
def test_torchs_attention_is_one_operator(of_torch, part):
    found = beside.operators_of(of_torch[1], part)
    assert found.count("Attention") == 1
    assert not {"Softmax", "Transpose", "Gemm"} & set(found)
    check(*of_torch, part)


def test_rows_of_padding_alone_are_no_numbers_as_in_torch(of_torch):
    module, directory = of_torch
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    x, mask = np.ones((3, 5, WIDTH), np.float32), np.ones((3, 5), np.int64)
    mask[1] = 0
    (got,) = session.run(["without_weights"], {"x": x, "mask": mask})
    with torch.enable_grad():  # without gradients torch takes another way
        wanted = module.named["without weights"](torch.from_numpy(x), torch.from_numpy(mask)).detach().numpy()
    assert np.isnan(got[1]).all()
    np.testing.assert_allclose(got[[0, 2]], wanted[[0, 2]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("made", "kind"),
    [("projected", kind) for kind in ("square", "causal", "keys")]
    + [("of_torch", kind) for kind in ("additive", "causal", "keys", "weights")],
)
def test_other_attention_keeps_torchs_steps(request, made, kind):
    found = beside.operators_of(request.getfixturevalue(made)[1], kind)
    assert "Attention" not in found
    assert "Softmax" in found


def test_a_mask_stays_with_its_row_or_torchs_steps_stay(tmp_path):
    """By the card no number hides anything, so that no example of the export shows a difference."""
    kinds = {kind: {"kind": kind} for kind in ("expanded by heads", "expanded by rows")}
    expanded = export(tmp_path, "OfTorch", kinds, card_says={"range": [1, 9], "pad": None})
    for kind in kinds:
        check(*expanded, kind)
    assert "Attention" not in beside.operators_of(expanded[1], "expanded by heads")
    assert "Softmax" in beside.operators_of(expanded[1], "expanded by heads")


def test_weights_that_are_used_twice_are_there_once(projected):
    fused = [node for node in beside.nodes_of(projected[1], "plain") if node.op_type == "Attention"]
    assert (len(fused), len({node.input[1] for node in fused})) == (2, 1)
    graph = onnx.load(projected[1] / "model.onnx").graph
    assert {weight.name for weight in graph.initializer} <= {name for node in graph.node for name in node.input}


def test_what_cannot_be_rewritten_stays_as_it_is(tmp_path, monkeypatch):
    def broken(model):
        raise RuntimeError("no such rule")

    monkeypatch.setattr("layercast.models.export.attention.fuse", broken)
    module, directory = export(tmp_path, "Projected", {"chunks": {"kind": "chunks"}})
    check(module, directory, "chunks")
    assert "Attention" not in beside.operators_of(directory, "chunks")


def test_chunks_in_another_order_are_not_mixed_up(projected):
    check(*projected, "chunks mixed up")


def test_layers_are_read_from_the_program_as_from_the_module(layered):
    module, directory = layered
    manifest = Manifest.read(directory)
    for layer in ("self_attn[0]", "norm1", "linear1", "norm2"):
        assert f"parts.0.layers.layers.1.{layer}" in manifest.onnx_values
    whole, plain = program(directory), EagerEngine(module, manifest, CPU)
    inputs = next(iter(batches((9, 9, 9))))
    for path in whole.layers:
        _, got = whole.part([path], predict=False).tapped(inputs, [Tap(path)], predict=False)
        close(got, plain.tapped(inputs, [Tap(path)], predict=False)[1])
