"""Summaries: counts by hand, sharing, and that looking leaves the model as it was."""

import pytest
import torch
from torch import Tensor, nn

from layercast.models.architectures.resnet import ResNetLike
from layercast.models.architectures.simple import SharedWeights, SimpleNet
from layercast.models.layers import MultiHeadAttention
from layercast.models.summary import Row, render, summarise

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(model: nn.Module, *inputs: Tensor) -> dict[str, Row]:
    return {row.path: row for row in summarise(model, inputs).rows}


def test_simple_net_by_hand() -> None:
    summary = summarise(SimpleNet(), torch.zeros(3, 784))
    assert [(row.path, row.kind, row.run.output, row.trainable, row.run.multiply_adds) for row in summary.rows] == [
        ("", "SimpleNet", "[3, 10]", 0, 0),
        ("fc1", "Linear", "[3, 256]", 784 * 256 + 256, 3 * 784 * 256),
        ("relu", "ReLU", "[3, 256]", 0, 0),
        ("fc2", "Linear", "[3, 10]", 256 * 10 + 10, 3 * 256 * 10),
    ]
    assert summary.parameters == summary.trainable == 203_530
    assert summary.multiply_adds == 3 * (784 * 256 + 2560)
    assert (summary.children, summary.modules) == (3, 4)


def test_shared_module_is_counted_once_and_called_twice() -> None:
    summary = summarise(SharedWeights(), torch.zeros(1, 10))
    assert summary.parameters == 110
    shared = summary.rows[1]
    assert (shared.path, shared.run.calls, shared.run.multiply_adds, shared.note) == (
        "shared",
        2,
        200,
        "called 2 times",
    )


def test_module_at_two_places_and_children_against_modules() -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, nn.Linear(3, 3)), shared)
    summary = summarise(model, torch.zeros(2, 3))
    assert summary.parameters == 24
    assert summary.children == len(list(model.named_children())) == 3
    assert summary.modules == len(list(model.named_modules())) == 5
    assert {row.path: row.note for row in summary.rows if row.note} == {
        "0": "called 3 times",
        "2.0": "same module as 0",
        "3": "same module as 0",
    }
    assert summary.multiply_adds == 2 * 4 * 9


def test_tied_parameter_is_counted_at_its_first_place() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    summary = summarise(model, torch.zeros(2, dtype=torch.int64))
    assert summary.parameters == sum(p.numel() for p in model.parameters()) == 7 * 4 + 7
    assert [(row.trainable, row.note) for row in summary.rows[1:]] == [(28, ""), (7, "weight shared with 0.weight")]


def test_frozen_and_buffers() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    model[0].weight.requires_grad_(False)
    by_path = rows(model, torch.zeros(2, 4))
    assert (by_path["0"].trainable, by_path["0"].frozen) == (3, 12)
    assert (by_path["1"].trainable, by_path["1"].frozen, by_path["1"].buffers) == (6, 0, 3 + 3 + 1)


@pytest.mark.parametrize(
    ("module", "shape", "multiply_adds"),
    [
        (nn.Conv2d(3, 8, 3, stride=2), (2, 3, 9, 9), 2 * 8 * 4 * 4 * 27),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), (1, 4, 5, 5), 8 * 25 * 18),
        (nn.Conv1d(2, 4, 5), (1, 2, 9), 4 * 5 * 10),
        (nn.ConvTranspose2d(4, 8, 3), (1, 4, 9, 9), 4 * 81 * 8 * 9),
        (nn.LSTM(4, 8, batch_first=True), (2, 5, 4), 2 * 5 * (4 * 32 + 8 * 32)),
    ],
)
def test_multiply_adds_of_layers(module: nn.Module, shape: tuple[int, ...], multiply_adds: int) -> None:
    assert summarise(module, torch.zeros(shape)).multiply_adds == multiply_adds


def test_multiply_adds_of_attention_ours_and_torchs() -> None:
    n, t, d, heads = 2, 5, 32, 4
    projections, products = 4 * n * t * d * d, 2 * n * heads * t * t * (d // heads)
    ours = rows(MultiHeadAttention(d, heads), torch.zeros(n, t, d))
    assert ours[""].run.multiply_adds == products  # without its children, the projections
    assert sum(row.run.multiply_adds for row in ours.values()) == projections + products
    x = torch.zeros(n, t, d)
    # As a torch encoder layer in eval mode: neither its fused path nor fused attention may hide the work.
    layer = nn.TransformerEncoderLayer(d, heads, 64, batch_first=True).eval()
    assert rows(layer, x)["self_attn"].run.multiply_adds == projections + products
    assert rows(layer, x)["linear1"].run.output == "[2, 5, 64]"


def test_resnet_parameters_by_hand() -> None:
    stem = 3 * 64 * 9 + 2 * 64
    layer1 = 2 * (2 * 64 * 64 * 9 + 4 * 64)
    layer2 = (64 + 3 * 128) * 128 * 9 + 8 * 128 + 64 * 128 + 2 * 128
    summary = summarise(ResNetLike(), torch.zeros(1, 3, 8, 8))
    assert summary.parameters == stem + layer1 + layer2 + 128 * 10 + 10
    assert summary.buffers == 2 * (64 * 5 + 128 * 5) + 10


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.pair = Pair()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
        return {"pair": self.pair(x), "y": y, "none": None}


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.mean(1)


def test_several_inputs_and_nested_outputs() -> None:
    inputs = {"y": torch.zeros(4), "x": torch.zeros(2, 3)}
    summary = summarise(Several(), inputs)
    assert [row.run.output for row in summary.rows] == [
        "{pair: ([2, 3], [2]), y: [4], none: None}",
        "-",
        "([2, 3], [2])",
    ]
    assert "for inputs of {y: [4], x: [2, 3]}" in render(summary)


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_model_as_it_was(fails: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout())
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if fails:
        with pytest.raises(RuntimeError):
            summarise(model, torch.zeros(2, 5))
    else:
        summarise(model, torch.ones(2, 4))
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()
    assert torch.is_grad_enabled()


def test_rows_up_to_a_depth_take_in_what_lies_below() -> None:
    shared = nn.Linear(3, 3)
    inner = nn.Sequential(shared, nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    whole = summarise(nn.Sequential(inner, nn.Linear(3, 3).requires_grad_(False), shared), torch.zeros(2, 3))
    folded = whole.up_to(1)
    assert [(row.path, row.trainable, row.frozen, row.buffers, row.run.multiply_adds) for row in folded.rows] == [
        ("", 0, 0, 0, 0),
        ("0", 12 + 12 + 6, 0, 7, 2 * 2 * 9 + 2 * 9),  # the shared layer runs twice and counts where it is first
        ("1", 0, 12, 0, 2 * 9),
        ("2", 0, 0, 0, 0),
    ]
    assert folded.up_to(0).rows[0].trainable == whole.trainable == folded.trainable == 30
    assert (folded.multiply_adds, folded.buffers, folded.modules) == (whole.multiply_adds, whole.buffers, whole.modules)
    assert whole.up_to(9) == whole


def test_text() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(1000, 20), nn.BatchNorm1d(20))
            self.head = nn.Linear(20, 2).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.body(x))
            return logits

    assert render(summarise(Net(), torch.zeros(2, 1000))) == "\n".join(
        [
            "module   type         output   trainable  frozen  buffers  multiply-adds",
            "------------------------------------------------------------------------",
            "(model)  Net          [2, 2]           -       -        -              -",
            "  body   Sequential   [2, 20]          -       -        -              -",
            "    0    Linear       [2, 20]     20,020       -        -         40,000",
            "    1    BatchNorm1d  [2, 20]         40       -       41              -",
            "  head   Linear       [2, 2]           -      42        -             80",
            "------------------------------------------------------------------------",
            "children       2 (named_children)",
            "modules        5 (named_modules, with the model itself)",
            "parameters     20,102 (20,060 trainable, 42 frozen)",
            "buffers        41",
            "multiply-adds  40,080 for inputs of [2, 1000]",
        ]
    )


def test_text_with_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 3).requires_grad_(False), nn.BatchNorm1d(3, affine=False))
    lines = [line.strip() for line in render(summarise(model, torch.zeros(2, 4)), parameters=True).splitlines()]
    assert [line for line in lines if line.endswith(("trainable", "frozen", "buffer"))] == [
        "weight [3, 4] float32 frozen",
        "bias [3] float32 frozen",
        "running_mean [3] float32 buffer",
        "running_var [3] float32 buffer",
        "num_batches_tracked [] int64 buffer",
    ]
