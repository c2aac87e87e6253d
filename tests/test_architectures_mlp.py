"""MLP and MNISTClassifier against plain matrix products."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layercast.models.architectures.mlp import MLP, Block, MNISTClassifier


def feed_forward(x: Tensor, w: dict[str, Tensor], blocks: list[str], head: str, training: bool = False) -> Tensor:
    for block in blocks:
        x = x @ w[f"{block}.0.weight"].T + w[f"{block}.0.bias"]
        mean, variance = w[f"{block}.1.running_mean"], w[f"{block}.1.running_var"]
        if training:
            mean, variance = x.mean(0), x.var(0, unbiased=False)
        x = (x - mean) / (variance + 1e-5).sqrt() * w[f"{block}.1.weight"] + w[f"{block}.1.bias"]
        x = x.clamp(min=0)
    return x @ w[f"{head}.weight"].T + w[f"{head}.bias"]


class TestMLP:
    def test_reference_in_both_modes(self) -> None:
        model, x = MLP(12, (9, 7), 5, dropout=0.0), torch.randn(6, 12)
        w = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.testing.assert_close(model(x), feed_forward(x, w, ["hidden.0", "hidden.2"], "head", training=True))
        w = model.state_dict()
        torch.testing.assert_close(model.eval()(x), feed_forward(x, w, ["hidden.0", "hidden.2"], "head"))

    def test_defaults(self) -> None:
        model = MLP()
        assert [m.out_features for m in model.modules() if isinstance(m, nn.Linear)] == [512, 256, 128, 10]
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.2] * 3
        assert sum(isinstance(m, nn.BatchNorm1d) for m in model.modules()) == 3

    def test_no_hidden_layer_is_a_linear_one(self) -> None:
        model, x = MLP(4, (), 3), torch.randn(2, 4)
        torch.testing.assert_close(model(x), x @ model.head.weight.T + model.head.bias)

    @pytest.mark.parametrize(
        "name",
        [
            *("relu", "relu6", "leaky_relu", "prelu", "elu", "gelu", "selu"),
            *("sigmoid", "tanh", "softmax", "log_softmax", "silu"),
        ],
    )
    def test_activations_by_name(self, name: str) -> None:
        model, x = MLP(6, (5,), 3, activation_name=name).eval(), torch.randn(4, 6) * 3
        linear, norm, _ = model.hidden[0]
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "softmax": lambda v: F.softmax(v, -1),
            "log_softmax": lambda v: F.log_softmax(v, -1),
            "prelu": lambda v: torch.where(v > 0, v, 0.25 * v),
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
        }
        function = functions.get(name) or getattr(F, name)
        torch.testing.assert_close(model(x), model.head(function(norm(linear(x)))))
        assert type(model.hidden[1]) is (nn.AlphaDropout if name == "selu" else nn.Dropout)

    def test_children_are_not_modules(self) -> None:
        block = Block(784, 256)
        assert [type(m).__name__ for m in block.children()] == ["Linear", "BatchNorm1d", "ReLU"]
        model = nn.Sequential(block, Block(256, 64), nn.Linear(64, 10))
        assert (len(list(model.children())), len(list(model.modules()))) == (3, 1 + 2 * 4 + 1)


def classifier() -> MNISTClassifier:
    """In eval mode, with running statistics that aren't those of a fresh one."""
    model = MNISTClassifier().eval()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


class TestMNISTClassifier:
    def test_reference_for_both_shapes(self) -> None:
        model, image = classifier(), torch.rand(3, 1, 28, 28)
        expected = feed_forward(image.reshape(3, 784), model.state_dict(), ["net.0", "net.2"], "net.4")
        torch.testing.assert_close(model(image), expected)
        torch.testing.assert_close(model(image.reshape(3, 784)), expected)
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.2]

    def test_images_in_any_memory_layout(self) -> None:
        model, image = classifier(), torch.rand(4, 1, 28, 28)
        expected = model(image)
        channels_last = image.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        for same in (
            image.to(memory_format=torch.channels_last),
            channels_last,
            image.transpose(2, 3).contiguous().transpose(2, 3),
            torch.stack((image, image), 1)[:, 0],
            image.flatten(1).T.contiguous().T,
        ):
            torch.testing.assert_close(model(same), expected)
