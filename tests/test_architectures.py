"""Architectures against references built from torch's own functions and layers, and what all of them promise."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from layercast.models.architectures.mlp import MLP, Block, MNISTClassifier
from layercast.models.architectures.resnet import ResNetLike
from layercast.models.architectures.simple import SharedWeights, SimpleNet
from layercast.models.architectures.transformer import TransformerEncoder
from layercast.models.registry import architecture, architectures, build


def texts(rows: int, length: int = 12) -> Tensor:
    """Rows of random bytes, each with another number of paddings at its end."""
    tokens = torch.randint(0, 256, (rows, length))
    for row in range(rows):
        tokens[row, length - row % length :] = 256
    return tokens


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "SimpleNet": (SimpleNet, lambda n: torch.rand(n, 784)),
    "SharedWeights": (SharedWeights, lambda n: torch.rand(n, 10)),
    "MLP": (MLP, lambda n: torch.rand(n, 784)),
    "MLP selu": (lambda: MLP(20, (8, 6), 3, activation_name="selu"), lambda n: torch.rand(n, 20)),
    "MNISTClassifier": (MNISTClassifier, lambda n: torch.rand(n, 1, 28, 28)),
    "ResNetLike": (ResNetLike, lambda n: torch.rand(n, 3, 8, 8)),
    "ResNetLike se": (lambda: ResNetLike(4, squeeze_excitation=True), lambda n: torch.rand(n, 3, 8, 8)),
    "TransformerEncoder": (TransformerEncoder, texts),
    "TransformerEncoder post": (lambda: TransformerEncoder(norm_first=False, causal=True), texts),
}
every = pytest.mark.parametrize("case", CASES)


def built(case: str) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """A model in eval mode whose running statistics aren't those of a fresh one."""
    torch.manual_seed(0)
    factory, inputs = CASES[case]
    model = factory()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model.eval(), inputs


class TestEvery:
    @every
    def test_hooks_fire_on_every_module_that_computes(self, case: str) -> None:
        model, inputs = built(case)
        fired: set[str] = set()
        for name, module in model.named_modules():
            module.register_forward_hook(lambda *_, name=name: fired.add(name))
        model(inputs(2))
        silent = {name for name, _ in model.named_modules()} - fired
        assert {type(model.get_submodule(name)) for name in silent} <= {nn.ModuleList}

    @every
    def test_tensors_are_parameters_or_buffers(self, case: str) -> None:
        model, _ = built(case)
        for module in model.modules():
            stray = [
                name
                for name, value in vars(module).items()
                if isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(torch.is_tensor, value)))
            ]
            assert stray == []
        model.double()
        assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float64}

    @every
    def test_answer_of_a_row_does_not_depend_on_the_others(self, case: str) -> None:
        model, inputs = built(case)
        batch = inputs(5)
        together = model(batch)
        for row in range(5):
            torch.testing.assert_close(model(batch[row : row + 1]), together[row : row + 1], atol=1e-5, rtol=1e-5)

    @every
    def test_inputs_are_left_alone_and_answers_repeat(self, case: str) -> None:
        model, inputs = built(case)
        batch = inputs(3)
        before = batch.clone()
        first, second = model(batch), model(batch)
        assert torch.equal(batch, before)
        assert torch.equal(first, second)

    @every
    def test_strided_inputs(self, case: str) -> None:
        model, inputs = built(case)
        batch = inputs(6)
        every_second, turned = batch[::2], batch.transpose(0, -1).contiguous().transpose(0, -1)
        assert not every_second.is_contiguous()
        assert not turned.is_contiguous()
        torch.testing.assert_close(model(every_second), model(every_second.contiguous()))
        torch.testing.assert_close(model(turned), model(batch))

    @every
    def test_state_survives_saving_loading_and_copying(self, case: str, tmp_path: Path) -> None:
        model, inputs = built(case)
        batch = inputs(3)
        expected = model(batch)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        from_torch, from_safetensors = CASES[case][0]().eval(), CASES[case][0]().eval()
        from_torch.load_state_dict(torch.load(file, weights_only=True), strict=True)
        save_model(model, str(tmp_path / "weights.safetensors"))
        assert load_model(from_safetensors, tmp_path / "weights.safetensors") == (set(), [])
        for other in (from_torch, from_safetensors, copy.deepcopy(model)):
            assert torch.equal(other(batch), expected)

    @every
    def test_every_parameter_learns(self, case: str) -> None:
        model, inputs = built(case)
        model.train()
        output = model(inputs(4))
        (output * torch.randn_like(output)).sum().backward()
        dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # Softmax doesn't change when a key's bias shifts all scores of a query alike: its gradient is 0 but for noise.
        assert [name for name in dead if not name.endswith("key.bias")] == []
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class TestRegistry:
    def test_all_are_known_by_name(self) -> None:
        assert architectures() == sorted(
            ["MLP", "MNISTClassifier", "ResNetLike", "SharedWeights", "SimpleNet", "TransformerEncoder"]
        )
        for name in architectures():
            assert type(build(name)) is architecture(name)
            assert architecture(name).__name__ == name

    def test_arguments_reach_the_constructor(self) -> None:
        assert build("SimpleNet", hidden_size=7).fc1.out_features == 7

    def test_unknown_names_and_arguments(self) -> None:
        with pytest.raises(ValueError, match="unknown architecture 'ResNetLiek'; nearest: ResNetLike"):
            build("ResNetLiek")
        with pytest.raises(ValueError, match="unknown architecture '???'; nearest: .*MLP".replace("?", r"\?")):
            build("???")
        with pytest.raises(ValueError, match=r"architecture MLP: .*unexpected keyword argument 'widths'"):
            build("MLP", widths=[1])


class TestSimpleNet:
    def test_reference(self) -> None:
        model, inputs = built("SimpleNet")
        w, x = model.state_dict(), inputs(4)
        hidden = (x @ w["fc1.weight"].T + w["fc1.bias"]).clamp(min=0)
        torch.testing.assert_close(model(x), hidden @ w["fc2.weight"].T + w["fc2.bias"])

    def test_parameters(self) -> None:
        assert sum(p.numel() for p in SimpleNet().parameters()) == 784 * 256 + 256 + 256 * 10 + 10


class TestSharedWeights:
    def test_reference_in_value_and_gradient(self) -> None:
        model, x = SharedWeights(), torch.randn(4, 10)
        first, second = (model.shared.weight.detach().clone().requires_grad_() for _ in range(2))
        bias = model.shared.bias.detach()
        expected = (x @ first.T + bias).clamp(min=0) @ second.T + bias
        torch.testing.assert_close(model(x), expected)
        model(x).square().sum().backward()
        expected.square().sum().backward()
        assert first.grad is not None
        assert second.grad is not None
        torch.testing.assert_close(model.shared.weight.grad, first.grad + second.grad)

    def test_110_parameters_and_one_module_called_twice(self) -> None:
        model, calls = SharedWeights(), []
        model.shared.register_forward_hook(lambda *_: calls.append(1))
        model(torch.zeros(1, 10))
        assert sum(p.numel() for p in model.parameters()) == 110
        assert len(calls) == 2
        assert set(model.state_dict()) == {"shared.weight", "shared.bias"}

    @pytest.mark.parametrize("way", ["load", "deepcopy"])
    def test_sharing_survives(self, way: str) -> None:
        model = SharedWeights()
        other = copy.deepcopy(model)
        if way == "load":
            other = SharedWeights()
            other.load_state_dict(model.state_dict())
        assert sum(p.numel() for p in other.parameters()) == 110
        # A step changes both uses: with weight 0 and bias 1 only the second bias is left.
        with torch.no_grad():
            other.shared.weight.zero_()
            other.shared.bias.fill_(1.0)
        assert other(torch.randn(2, 10)).tolist() == [[1.0] * 10] * 2
        assert not torch.equal(model.shared.bias, other.shared.bias)


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: SimpleNet(hidden_size=0), "SimpleNet: hidden_size must be a positive whole number, got 0"),
        (lambda: SharedWeights(-1), "SharedWeights: size must be a positive whole number, got -1"),
        (lambda: Block(4, 0), "Block: out_features must be a positive whole number, got 0"),
        (lambda: MLP(hidden_sizes=(8, 0)), r"MLP: hidden_sizes\[1\] must be a positive whole number, got 0"),
        (lambda: MLP(hidden_sizes=8), r"MLP: hidden_sizes must be a list of sizes, for instance \[512, 256\], got 8"),
        (lambda: MLP(dropout=None), "MLP: dropout must be at least 0 and below 1, got None"),
        (lambda: MLP(activation_name=None), "unknown activation None.*Known: relu"),
        (lambda: MLP(output_size=0), "MLP: output_size must be a positive whole number, got 0"),
        (lambda: MLP(dropout=1.5), "MLP: dropout must be at least 0 and below 1, got 1.5"),
        (lambda: MLP(activation_name="swosh"), "unknown activation 'swosh'.*Known: relu"),
        (lambda: MNISTClassifier(dropout=-0.1), "MNISTClassifier: dropout must be at least 0 and below 1, got -0.1"),
        (lambda: ResNetLike(0), "ResNetLike: num_classes must be a positive whole number, got 0"),
        (
            lambda: TransformerEncoder(embed_dim=-1),
            "TransformerEncoder: embed_dim must be a positive whole number, got -1",
        ),
        (lambda: TransformerEncoder(max_length=0), "TransformerEncoder: max_length must be a positive whole number"),
        (lambda: TransformerEncoder(num_heads=0), "TransformerEncoder: num_heads must be a positive whole number"),
        (lambda: TransformerEncoder(embed_dim=10), r"embed_dim \(10\) must be divisible by num_heads \(4\)"),
        (lambda: TransformerEncoder(num_blocks=0), "TransformerEncoder: num_blocks must be a positive whole number"),
        (
            lambda: TransformerEncoder(dropout=1.0),
            "TransformerEncoder: dropout must be at least 0 and below 1, got 1.0",
        ),
    ],
)
def test_constructor_arguments_are_validated(build_it: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_it()
