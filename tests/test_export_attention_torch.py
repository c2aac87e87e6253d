"""Torch's own attention in the ONNX program: one operator where that gives the same, torch's steps elsewhere."""

import numpy as np
import onnx
import pytest
import torch
from onnx_layers import CPU, close, program
from torch import nn
from torch.nn import functional

from layercast.models.export.writer import export_artefact
from layercast.models.manifest import Manifest
from layercast.models.onnx_runtime import onnxruntime
from layercast.models.onnx_shapes import steady
from layercast.server.engines.eager import EagerEngine
from layercast.server.engines.encoder.body import body_of
from layercast.server.engines.encoder.steps import Attention, Linear
from layercast.server.work import Tap

WIDTH = 16


class Projected(nn.Module):
    """Two residual blocks by `scaled_dot_product_attention`; `kind` tells how they project, mask and what is odd."""

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
        for _ in range(2):
            q, k, v = self.heads(x)
            causal = self.kind == "causal"
            attended = functional.scaled_dot_product_attention(q, k, v, self.mask(x, mask), is_causal=causal)
            x = self.norm(x + self.out(attended.transpose(1, 2).reshape(x.shape)))
        return x


class OfTorch(nn.Module):
    """`nn.MultiheadAttention`, alone (`kind` tells how it is called) or in `nn.TransformerEncoder`."""

    def __init__(self, kind: str, heads: int = 2, padded: bool = False, bias: bool = True, **options) -> None:
        super().__init__()
        self.kind, self.padded = kind, padded
        if kind == "encoder":
            layer = nn.TransformerEncoderLayer(WIDTH, heads, 32, batch_first=True, **options)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
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


def export(root, name, length=-1, card_says=None, **arguments):
    torch.manual_seed(3)
    module = globals()[name](**arguments).eval()
    card = {
        "name": "m", "architecture": f"test_export_attention_torch:{name}", "arguments": arguments,
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [-1, length, WIDTH]},
            {"name": "mask", "datatype": "INT64", "shape": [-1, length], "range": [0, 1], "pad": 0}
            | (card_says or {}),
        ],
        "outputs": [{"name": "output", "datatype": "FP32", "shape": [-1, length, WIDTH]}],
    }  # fmt: skip
    export_artefact(module, card, root / "m" / "1", programs=("onnx",))
    return module, root / "m" / "1"


def nodes(directory):
    return [node.op_type for node in onnx.load(directory / "model.onnx").graph.node]


def batches(lengths):
    generator = np.random.default_rng(1)
    for rows, length in zip((1, 3, 8), lengths, strict=True):
        mask = np.ones((rows, length), np.int64)
        for row in range(1, rows):
            mask[row] = generator.integers(0, 2, length)
            mask[row, generator.integers(0, length)] = 1
        yield {"x": generator.standard_normal((rows, length, WIDTH)).astype("f4"), "mask": mask}


def check(module, directory, lengths=(1, 32, 19)):
    content = (directory / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    given = {value.name for value in session.get_inputs()}
    for inputs in batches(lengths):
        with torch.no_grad():
            wanted = module(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()
        (got,) = session.run(None, {name: value for name, value in inputs.items() if name in given})
        np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=0)
    assert steady(content)


@pytest.mark.parametrize(
    ("kind", "length"),
    [(kind, -1) for kind in ("plain", "no bias", "thirds", "chunks", "boolean", "hidden")]
    + [(kind, 28) for kind in ("thirds", "boolean")],
)
def test_attention_of_separate_or_packed_projections_is_one_operator(tmp_path, kind, length):
    module, directory = export(tmp_path, "Projected", length, kind=kind)
    found = nodes(directory)
    assert found.count("Attention") == 2
    assert not {"Softmax", "Transpose", "Reshape"} & set(found)
    check(module, directory, (1, 32, 19) if length < 0 else (28, 28, 28))


@pytest.mark.parametrize(
    ("length", "padded", "arguments"),
    [
        (-1, True, {"norm_first": False, "activation": "relu", "heads": 2}),
        (-1, True, {"norm_first": True, "activation": "gelu", "heads": 4}),
        (-1, False, {"norm_first": False, "activation": "gelu", "heads": 4}),
        (28, False, {"norm_first": True, "activation": "relu", "heads": 4}),
    ],
)
def test_blocks_of_torchs_encoder_become_steps_of_the_engine(tmp_path, length, padded, arguments):
    module, directory = export(tmp_path, "OfTorch", length, kind="encoder", padded=padded, **arguments)
    found = nodes(directory)
    assert found.count("Attention") == 2
    assert not {"Softmax", "Transpose", "Reshape", "Gemm"} & set(found)
    check(module, directory, (1, 32, 19) if length < 0 else (28, 28, 28))
    body = body_of((directory / "model.onnx").read_bytes(), WIDTH // arguments["heads"])
    assert body is not None
    assert sum(isinstance(step, Attention) for step in body.steps) == 2
    assert sum(isinstance(step, Linear) for step in body.steps) == 6
    assert (len(body.masks), len(body.factors)) == (int(padded), int(padded))


@pytest.mark.parametrize(
    ("kind", "padded", "bias"),
    [
        ("without weights", True, True),
        ("without weights", False, False),
        ("with weights", True, False),
        ("with weights", False, True),
    ],
)
def test_torchs_attention_is_one_operator(tmp_path, kind, padded, bias):
    module, directory = export(tmp_path, "OfTorch", kind=kind, padded=padded, bias=bias)
    assert nodes(directory).count("Attention") == 1
    assert not {"Softmax", "Transpose", "Gemm"} & set(nodes(directory))
    check(module, directory)


def test_rows_of_padding_alone_are_no_numbers_as_in_torch(tmp_path):
    module, directory = export(tmp_path, "OfTorch", kind="without weights", padded=True)
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    x, mask = np.ones((3, 5, WIDTH), np.float32), np.ones((3, 5), np.int64)
    mask[1] = 0
    (got,) = session.run(None, {"x": x, "mask": mask})
    with torch.enable_grad():  # without gradients torch takes another way
        wanted = module(torch.from_numpy(x), torch.from_numpy(mask)).detach().numpy()
    assert np.isnan(got[1]).all()
    np.testing.assert_allclose(got[[0, 2]], wanted[[0, 2]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Projected", kind) for kind in ("square", "causal", "keys")]
    + [("OfTorch", kind) for kind in ("additive", "causal", "keys", "weights")],
)
def test_other_attention_keeps_torchs_steps(tmp_path, name, kind):
    _, directory = export(tmp_path, name, kind=kind)
    assert "Attention" not in nodes(directory)
    assert "Softmax" in nodes(directory)


@pytest.mark.parametrize("kind", ["expanded by heads", "expanded by rows"])
def test_a_mask_stays_with_its_row_or_torchs_steps_stay(tmp_path, kind):
    """By the card no number hides anything, so that no example of the export shows a difference."""
    module, directory = export(tmp_path, "OfTorch", kind=kind, card_says={"range": [1, 9], "pad": None})
    check(module, directory)
    assert kind == "expanded by rows" or "Attention" not in nodes(directory)


def test_weights_that_are_used_twice_are_there_once(tmp_path):
    _, directory = export(tmp_path, "Projected", kind="none")
    program = onnx.load(directory / "model.onnx").graph
    assert nodes(directory).count("Attention") == 2
    assert sum(list(weight.dims) == [WIDTH, 3 * WIDTH] for weight in program.initializer) == 1


def test_what_cannot_be_rewritten_stays_as_it_is(tmp_path, monkeypatch):
    def broken(model):
        raise RuntimeError("no such rule")

    monkeypatch.setattr("layercast.models.export.attention.fuse", broken)
    module, directory = export(tmp_path, "Projected", kind="none")
    check(module, directory)
    assert "Attention" not in nodes(directory)


def test_chunks_in_another_order_are_not_mixed_up(tmp_path):
    module, directory = export(tmp_path, "Projected", kind="chunks mixed up")
    check(module, directory)


def test_layers_are_read_from_the_program_as_from_the_module(tmp_path):
    module, directory = export(tmp_path, "OfTorch", kind="encoder", padded=True)
    manifest = Manifest.read(directory)
    for layer in ("self_attn[0]", "norm1", "linear1", "norm2"):
        assert f"layers.layers.1.{layer}" in manifest.onnx_values
    whole, plain = program(directory), EagerEngine(module, manifest, CPU)
    inputs = next(iter(batches((9, 9, 9))))
    for path in whole.layers:
        _, got = whole.part([path], predict=False).tapped(inputs, [Tap(path)], predict=False)
        close(got, plain.tapped(inputs, [Tap(path)], predict=False)[1])
