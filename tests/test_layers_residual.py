"""SqueezeExcitation and ResidualBlock against references in plain functions, without in-place operations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layercast.models.layers import ResidualBlock, SqueezeExcitation

Tensors = dict[str, Tensor]


def batch_norm(x: Tensor, state: Tensors, prefix: str, training: bool) -> Tensor:
    """Batch norm from its definition; the running statistics in `state` are replaced, as torch moves its own."""
    mean, variance = state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"]
    if training:
        count = x.numel() // x.shape[1]
        flat = x.transpose(0, 1).flatten(1)
        state[f"{prefix}.running_mean"] = (0.9 * mean + 0.1 * flat.mean(1)).detach()
        state[f"{prefix}.running_var"] = (0.9 * variance + 0.1 * flat.var(1)).detach()
        mean, variance = flat.mean(1), flat.var(1) * (count - 1) / count
    scale = state[f"{prefix}.weight"] / (variance + 1e-5).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{prefix}.bias"][:, None, None]


def squeeze_excitation(x: Tensor, state: Tensors, prefix: str = "") -> Tensor:
    squeezed = x.mean((2, 3)) @ state[f"{prefix}squeeze.weight"].T + state[f"{prefix}squeeze.bias"]
    gate = squeezed.clamp(min=0) @ state[f"{prefix}excite.weight"].T + state[f"{prefix}excite.bias"]
    return x / (1 + torch.exp(-gate))[:, :, None, None]


def residual_block(x: Tensor, state: Tensors, stride: int, training: bool) -> Tensor:
    out = F.conv2d(x, state["conv1.weight"], stride=stride, padding=1)
    out = batch_norm(out, state, "bn1", training).clamp(min=0)
    out = batch_norm(F.conv2d(out, state["conv2.weight"], padding=1), state, "bn2", training)
    if "se.squeeze.weight" in state:
        out = squeeze_excitation(out, state, "se.")
    shortcut = x
    if "shortcut.0.weight" in state:
        shortcut = batch_norm(F.conv2d(x, state["shortcut.0.weight"], stride=stride), state, "shortcut.1", training)
    return (out + shortcut).clamp(min=0)


def shuffled(module: nn.Module) -> nn.Module:
    """Fill every parameter and running statistic, so that no default of 0 or 1 hides a fault."""
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.3)
    return module.double()


def state_of(module: nn.Module) -> Tensors:
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return {name: t.requires_grad_(name in dict(module.named_parameters())) for name, t in tensors.items()}


class TestSqueezeExcitation:
    @pytest.mark.parametrize(("channels", "reduction"), [(8, 4), (16, 16), (20, 16)])
    def test_formula(self, channels: int, reduction: int) -> None:
        layer = shuffled(SqueezeExcitation(channels, reduction))
        x = torch.randn(3, channels, 4, 5, dtype=torch.float64)
        torch.testing.assert_close(layer(x), squeeze_excitation(x, state_of(layer)))

    def test_size_of_the_squeezed_layer(self) -> None:
        layer = SqueezeExcitation(64)
        assert sum(p.numel() for p in layer.parameters()) == 64 * 4 + 4 + 4 * 64 + 64

    def test_gate_is_one_number_per_channel_and_row(self) -> None:
        layer, x = shuffled(SqueezeExcitation(8, 2)), torch.rand(2, 8, 3, 3, dtype=torch.float64) + 1
        ratio = layer(x) / x
        torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio))
        assert ((ratio > 0) & (ratio < 1)).all()
        torch.testing.assert_close(layer(x)[:1], layer(x[:1]))

    def test_leaves_its_input_alone_and_has_right_gradients(self) -> None:
        layer = shuffled(SqueezeExcitation(4, 2))
        x = torch.randn(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
        before = x.detach().clone()
        assert torch.autograd.gradcheck(layer, (x,))
        assert torch.equal(x, before)

    def test_fewer_channels_than_the_reduction_are_refused(self) -> None:
        with pytest.raises(
            ValueError, match=r"channels \(8\) must be at least reduction \(16\); pass a smaller reduction"
        ):
            SqueezeExcitation(8)
        with pytest.raises(ValueError, match="SqueezeExcitation: reduction must be a positive whole number, got 0"):
            SqueezeExcitation(8, 0)


@pytest.mark.parametrize("squeeze", [False, True])
@pytest.mark.parametrize(("channels", "stride"), [((16, 16), 1), ((8, 16), 1), ((16, 16), 2), ((8, 16), 2)])
class TestResidualBlock:
    @pytest.mark.parametrize("training", [True, False])
    def test_equals_the_reference(self, channels: tuple[int, int], stride: int, squeeze: bool, training: bool) -> None:
        block = shuffled(ResidualBlock(*channels, stride, squeeze)).train(training)
        reference = state_of(block)
        x = torch.randn(2, channels[0], 6, 5, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        for _ in range(2):
            got, expected = block(x), residual_block(y, reference, stride, training)
            torch.testing.assert_close(got, expected)
        weights = torch.randn_like(got)
        (got * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        for name, parameter in block.named_parameters():
            torch.testing.assert_close(parameter.grad, reference[name].grad)
        for name, buffer in block.named_buffers():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(buffer, reference[name])

    def test_leaves_its_input_alone(self, channels: tuple[int, int], stride: int, squeeze: bool) -> None:
        block, x = ResidualBlock(*channels, stride, squeeze).eval(), torch.randn(2, channels[0], 6, 6)
        before = x.clone()
        block(x)
        assert torch.equal(x, before)

    def test_shortcut_is_a_convolution_only_where_the_shape_changes(
        self, channels: tuple[int, int], stride: int, squeeze: bool
    ) -> None:
        block = ResidualBlock(*channels, stride, squeeze)
        assert isinstance(block.shortcut, nn.Identity) is (channels == (16, 16) and stride == 1)
        assert block(torch.randn(2, channels[0], 7, 7)).shape == (2, 16, -(-7 // stride), -(-7 // stride))

    def test_memory_layout_changes_nothing(self, channels: tuple[int, int], stride: int, squeeze: bool) -> None:
        block, x = ResidualBlock(*channels, stride, squeeze).eval(), torch.randn(2, channels[0], 6, 6)
        expected = block(x)
        torch.testing.assert_close(block(x.to(memory_format=torch.channels_last)), expected)
        torch.testing.assert_close(block(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)
        torch.testing.assert_close(copy.deepcopy(block).to(memory_format=torch.channels_last)(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "ResidualBlock: in_channels must be a positive whole number, got 0"),
        ((8, 0), "ResidualBlock: out_channels must be a positive whole number, got 0"),
        ((8, 8, 0), "ResidualBlock: stride must be a positive whole number, got 0"),
        ((8, 8, 1, True), r"SqueezeExcitation: channels \(8\) must be at least reduction \(16\)"),
    ],
)
def test_constructor_arguments_are_validated(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualBlock(*arguments)
