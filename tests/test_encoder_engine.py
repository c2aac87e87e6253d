"""The engine encoder on exported networks: which blocks it takes, and what ONNX Runtime computes around them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_programs import LANES
from one_run import made_once
from test_onnx_layers import write
from torch import Tensor, nn

from layercast.models import registry
from layercast.models.layers.attention import MultiHeadAttention, TransformerEncoderBlock
from layercast.models.manifest import Manifest
from layercast.server.engines.base import EngineError
from layercast.server.engines.encoder.body import Body, body_of
from layercast.server.engines.encoder.engine import EncoderEngine
from layercast.server.engines.encoder.steps import Attention, Linear
from layercast.server.engines.onnx import OnnxEngine

WIDTH = 32
PADDING = 256


pytestmark = pytest.mark.usefixtures("kernels_here")


class Plain(nn.Module):
    """Nothing but blocks, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            TransformerEncoderBlock(WIDTH, 2, 48), TransformerEncoderBlock(WIDTH, 1, 48, norm_first=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Rectified(nn.Module):
    """Blocks with ReLU, whose last sum comes the other way round, between other things; and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.attn = nn.ModuleList(MultiHeadAttention(WIDTH, 2) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 80), nn.Linear(80, WIDTH, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.each, self.all = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.sigmoid(self.before(x))
        for attn in self.attn:
            x = self.norms[0](attn(x) + x)
            x = self.norms[1](x + self.down(torch.relu(self.up(x))))
        x = torch.tanh(x)
        return self.each(x), self.all(x.amax(1))


class LookedInto(nn.Module):
    """The second of three blocks is used by what follows them too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TransformerEncoderBlock(WIDTH, 2, 48) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        middle = self.blocks[1](self.blocks[0](x))
        return self.blocks[2](middle) * torch.sigmoid(middle)


class Inner(nn.Module):
    """What the feed-forward network has inside is an output too, so the block ends before it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TransformerEncoderBlock(WIDTH, 2, 48)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        block = self.block
        x = block.norm1(x + block.attn(x))
        wide = block.ff[1](block.ff[0](x))
        return block.norm2(x + block.ff[3](wide)), wide


class Narrow(nn.Module):
    """Heads of 8 numbers, which are no whole vector of AVX-512."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = MultiHeadAttention(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x[..., :12])


TEXT = {"max_length": 40, "embed_dim": WIDTH, "num_heads": 2, "ff_dim": 48, "num_classes": 3}
OUTPUTS = {
    "Plain": [[-1, WIDTH]], "Rectified": [[-1, 3], [5]], "LookedInto": [[-1, WIDTH]], "Inner": [[-1, WIDTH], [-1, 48]],
    "Narrow": [[-1, 12]], "before": [[3]], "after": [[3]],
}  # fmt: skip


def exported(name: str) -> tuple[nn.Module, Path]:
    """Return the module and its artefact, which is for all tests of a run."""
    torch.manual_seed(1)
    of_text = name in ("before", "after")
    arguments: dict[str, Any] = TEXT | {"norm_first": name == "before"} if of_text else {}
    architecture = "TransformerEncoder" if of_text else f"test_encoder_engine:{name}"
    module = registry.build(architecture, **arguments) if of_text else globals()[name]()
    for which, parameter in module.named_parameters():
        if which.endswith("bias"):
            nn.init.uniform_(parameter, -0.3, 0.3)
        elif parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    tokens = {"name": "x", "datatype": "FP32", "shape": [-1, -1, WIDTH]}
    text = {"name": "tokens", "datatype": "INT64", "shape": [-1, -1], "range": [0, 256], "pad": 256, "max_length": 40}
    outputs = [
        {"name": f"output{at}", "datatype": "FP32", "shape": [-1, *shape]} for at, shape in enumerate(OUTPUTS[name])
    ]
    card = {
        "name": name.lower(), "architecture": architecture, "arguments": arguments,
        "inputs": [text if of_text else tokens], "outputs": outputs,
    }  # fmt: skip
    root = made_once(f"encoder-{name}", lambda root: write(module.eval(), card, root))
    return module.eval(), root / card["name"] / "1"


def inputs_for(name: str, rows: int, length: int) -> dict[str, Tensor]:
    if name not in ("before", "after"):
        return {"x": torch.randn(rows, length, WIDTH)}
    tokens = torch.randint(0, 256, (rows, length))
    for row in range(1, rows):
        tokens[row, row * 7 % (length + 1) :] = PADDING
    return {"tokens": tokens}


def found(name: str, directory: Path) -> Body:
    manifest = Manifest.read(directory)
    body = body_of(manifest.read_verified(directory, "model.onnx"), LANES)
    assert body is not None
    return body


@pytest.mark.parametrize(
    ("name", "steps", "before", "behind", "activation"),
    [
        ("Plain", 12, False, False, "gelu"),
        ("Rectified", 12, True, True, "relu"),
        ("LookedInto", 12, False, True, "gelu"),
        ("Inner", 3, False, True, ""),
        ("before", 13, True, True, "gelu"),
        ("after", 12, True, True, "gelu"),
    ],
)
def test_outputs_are_those_of_the_module(name, steps, before, behind, activation):
    module, directory = exported(name)
    body = found(name, directory)
    assert len(body.steps) == steps
    assert (body.start != "x", body.end != "output0") == (before, behind)
    assert {step.activation for step in body.steps if isinstance(step, Linear)} == {"", activation}
    of_text = name in ("before", "after")
    assert (len(body.masks), len(body.factors)) == ((1, 1) if of_text else (0, 0))
    manifest = Manifest.read(directory)
    alone = EncoderEngine(directory, manifest)
    engines = alone, alone.with_threads(2)
    for rows, length in ((1, 1), (1, 13), (3, 40), (4, 2), (20, 17)):
        inputs = inputs_for(name, rows, length)
        with torch.inference_mode():
            wanted = module(*inputs.values())
        got, shared = (engine.run({key: value.numpy() for key, value in inputs.items()}) for engine in engines)
        assert list(got) == list(shared) == [spec.name for spec in manifest.outputs]
        for values, want in zip(got.values(), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            np.testing.assert_allclose(values, want.numpy(), rtol=0, atol=3e-5 * max(1, want.abs().max()))
        for key, values in got.items():
            np.testing.assert_allclose(shared[key], values, rtol=0, atol=1e-6)


def test_what_each_step_is():
    _, directory = exported("after")
    body = found("after", directory)
    kinds = ["Attention", "Linear", "Norm", "Linear", "Linear", "Norm"]
    assert [type(step).__name__ for step in body.steps] == kinds * 2
    attention, out, _, up, down, *_ = body.steps
    assert isinstance(attention, Attention)
    assert (attention.heads, attention.head, attention.hidden) == (2, 16, float(np.finfo("f4").min))
    assert attention.scale == pytest.approx(16**-0.5)
    assert (out.addend, up.addend, down.addend) == (body.start, "", up.source)
    assert body.worth == 2 * (WIDTH * 4 * WIDTH + 2 * WIDTH * 48 + 2 * WIDTH)


def test_without_heads_of_whole_vectors_it_says_so():
    _, directory = exported("Narrow")
    reason = "engine encoder can't run it: it has no fused self-attention with heads of a multiple of"
    with pytest.raises(EngineError, match=reason):
        EncoderEngine(directory, Manifest.read(directory))


@pytest.mark.parametrize("name", ["Plain", "Rectified", "after"])
def test_no_rows_and_no_tokens_give_what_onnx_runtime_gives(name):
    _, directory = exported(name)
    manifest = Manifest.read(directory)
    engine, onnx = (
        EncoderEngine(directory, manifest).with_threads(2),
        OnnxEngine(directory, manifest, torch.device("cpu"), 1),
    )
    for rows, length in ((0, 7), (0, 0), (3, 0)):
        if (rows, length, name) == (3, 0, "Rectified"):
            continue  # the largest of no numbers is refused by either
        inputs = {key: value.numpy() for key, value in inputs_for(name, rows, length).items()}
        for key, values in onnx.run(inputs).items():
            np.testing.assert_allclose(engine.run(inputs)[key], values, rtol=0, atol=1e-6)


def test_what_is_of_another_shape_never_reaches_the_library():
    _, directory = exported("Plain")
    engine = EncoderEngine(directory, Manifest.read(directory))
    for shape in ((2, 5, WIDTH + 1), (2, WIDTH), (2, 5, 5, WIDTH), (WIDTH,), (2, 5, 0)):
        with pytest.raises(EngineError, match=rf"'x': want float32 \[.*{WIDTH}\], got float32"):
            engine.run({"x": np.zeros(shape, "f4")})
    with pytest.raises(EngineError, match="got float64"):
        engine.run({"x": np.zeros((2, 5, WIDTH))})
