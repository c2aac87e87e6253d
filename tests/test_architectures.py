"""Architectures against references built from torch's own functions and layers, and what all of them promise."""

import copy
import io
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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


class TestMNISTClassifier:
    def test_reference_for_both_shapes(self) -> None:
        model, inputs = built("MNISTClassifier")
        image = inputs(3)
        expected = feed_forward(image.reshape(3, 784), model.state_dict(), ["net.0", "net.2"], "net.4")
        torch.testing.assert_close(model(image), expected)
        torch.testing.assert_close(model(image.reshape(3, 784)), expected)
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.2]

    def test_images_in_any_memory_layout(self) -> None:
        model, inputs = built("MNISTClassifier")
        image = inputs(4)
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


def residual_stage(x: Tensor, w: dict[str, Tensor], prefix: str, stride: int, training: bool) -> Tensor:
    def norm(value: Tensor, name: str) -> Tensor:
        mean, var = w[f"{prefix}{name}.running_mean"].clone(), w[f"{prefix}{name}.running_var"].clone()
        return F.batch_norm(value, mean, var, w[f"{prefix}{name}.weight"], w[f"{prefix}{name}.bias"], training)

    out = F.relu(norm(F.conv2d(x, w[f"{prefix}conv1.weight"], stride=stride, padding=1), "bn1"))
    out = norm(F.conv2d(out, w[f"{prefix}conv2.weight"], padding=1), "bn2")
    if f"{prefix}se.squeeze.weight" in w:
        gate = F.linear(out.mean((2, 3)), w[f"{prefix}se.squeeze.weight"], w[f"{prefix}se.squeeze.bias"])
        gate = F.linear(F.relu(gate), w[f"{prefix}se.excite.weight"], w[f"{prefix}se.excite.bias"])
        out = out * torch.sigmoid(gate)[:, :, None, None]
    if f"{prefix}shortcut.0.weight" in w:
        x = norm(F.conv2d(x, w[f"{prefix}shortcut.0.weight"], stride=stride), "shortcut.1")
    return F.relu(out + x)


class TestResNetLike:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("squeeze", [True, False])
    def test_equals_an_out_of_place_reference(self, squeeze: bool, training: bool) -> None:
        torch.manual_seed(1)
        model = ResNetLike(5, squeeze).double().train(training)
        w = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        image = torch.rand(3, 3, 9, 8, dtype=torch.float64)
        mean, variance = w["bn.running_mean"].clone(), w["bn.running_var"].clone()
        x = F.conv2d(image, w["stem.weight"], padding=1)
        x = F.relu(F.batch_norm(x, mean, variance, w["bn.weight"], w["bn.bias"], training))
        for name, stride in (("layer1.0.", 1), ("layer1.1.", 1), ("layer2.0.", 2), ("layer2.1.", 1)):
            x = residual_stage(x, w, name, stride, training)
        torch.testing.assert_close(model(image), F.linear(x.mean((2, 3)), w["head.weight"], w["head.bias"]))

    def test_parameters_by_hand(self) -> None:
        # stem 1,728 + 128; two blocks of 73,984; 230,144 with a shortcut and 295,424 without; head 1,290
        assert sum(p.numel() for p in ResNetLike().parameters()) == 1856 + 2 * 73_984 + 230_144 + 295_424 + 1290
        # 64 -> 4 -> 64 twice, 128 -> 8 -> 128 twice
        more = sum(p.numel() for p in ResNetLike(squeeze_excitation=True).parameters()) - 676_682
        assert more == 2 * (64 * 4 + 4 + 4 * 64 + 64) + 2 * (128 * 8 + 8 + 8 * 128 + 128)

    def test_convolutions_start_kaiming_normal(self) -> None:
        torch.manual_seed(0)
        weight = ResNetLike().layer2[1].conv1.weight
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)

    def test_sizes_of_maps(self) -> None:
        model, shapes = ResNetLike(3).eval(), []
        for stage in (model.layer1, model.layer2):
            stage.register_forward_hook(lambda _, __, output: shapes.append(list(output.shape)))
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3)
        assert shapes == [[1, 64, 32, 32], [1, 128, 16, 16]]


def torch_encoder(model: TransformerEncoder, tokens: Tensor, norm_first: bool, causal: bool) -> Tensor:
    """The same classifier on torch's encoder layers."""
    padding = tokens == 256
    x = model.token.weight[tokens] + model.position.weight[: tokens.shape[1]]
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1) if causal else None
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=norm_first)
        layer.self_attn = block.attn.to_torch()
        layer.linear1, layer.linear2, layer.norm1, layer.norm2 = block.ff[0], block.ff[3], block.norm1, block.norm2
        x = layer(x, mask, padding)
    if norm_first:
        x = F.layer_norm(x, (64,), model.norm.weight, model.norm.bias)
    means = [row[~hidden].mean(0) for row, hidden in zip(x, padding, strict=True)]
    return torch.stack(means) @ model.head.weight.T + model.head.bias


class TestTransformerEncoder:
    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("causal", [True, False])
    def test_equals_torchs_encoder_layers(self, norm_first: bool, causal: bool) -> None:
        torch.manual_seed(0)
        model, tokens = TransformerEncoder(norm_first=norm_first, causal=causal, dropout=0.0), texts(4)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        torch.testing.assert_close(
            model(tokens), torch_encoder(model, tokens, norm_first, causal), atol=1e-4, rtol=1e-4
        )

    def test_more_padding_changes_nothing(self) -> None:
        model, _ = built("TransformerEncoder")
        tokens = torch.randint(0, 256, (2, 10))
        padded = F.pad(tokens, (0, 30), value=256)
        torch.testing.assert_close(model(padded), model(tokens))

    def test_other_tokens_and_their_order_do_change_it(self) -> None:
        model, _ = built("TransformerEncoder")
        tokens = torch.arange(65, 75)[None]
        assert not torch.allclose(model(tokens), model(tokens.flip(1)), atol=1e-5)
        assert not torch.allclose(model(tokens), model(tokens + 1), atol=1e-5)

    def test_row_of_padding_alone_gives_the_heads_bias(self) -> None:
        model, _ = built("TransformerEncoder")
        tokens = torch.full((2, 5), 256)
        tokens[1] = 65
        logits = model(tokens)
        torch.testing.assert_close(logits[0], model.head.bias)
        logits.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert (model.token.weight.grad[256] == 0).all()

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_causal_positions_do_not_see_later_ones(self, norm_first: bool) -> None:
        model, states = TransformerEncoder(norm_first=norm_first, causal=True).eval(), []
        model.blocks[-1].register_forward_hook(lambda _, __, output: states.append(output))
        tokens = torch.randint(0, 256, (1, 8))
        changed = tokens.clone()
        changed[:, 5:] = (changed[:, 5:] + 7) % 256
        model(tokens)
        model(changed)
        torch.testing.assert_close(states[0][:, :5], states[1][:, :5], rtol=0, atol=1e-6)
        assert not torch.allclose(states[0][:, 5:], states[1][:, 5:])

    def test_longest_text_is_accepted_and_a_longer_one_refused_with_the_limit(self) -> None:
        model = TransformerEncoder(max_length=6).eval()
        assert model(torch.zeros(1, 6, dtype=torch.int64)).shape == (1, 2)
        with pytest.raises(ValueError, match=r"tokens must be at most 6 long, got \[1, 7\]; cut them"):
            model(torch.zeros(1, 7, dtype=torch.int64))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_with_padding(self, dtype: torch.dtype) -> None:
        model, inputs = built("TransformerEncoder")
        tokens = inputs(4)
        with torch.autocast("cpu", dtype):
            logits = model(tokens)
        torch.testing.assert_close(logits.float(), model(tokens), rtol=0, atol=1e-2)

    def test_padding_embedding_starts_at_zero_and_stays(self) -> None:
        model = TransformerEncoder(dropout=0.0)
        assert (model.token.weight[256] == 0).all()
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        model(texts(3)).sum().backward()
        optimiser.step()
        assert (model.token.weight[256] == 0).all()


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (lambda: SimpleNet(hidden_size=0), "SimpleNet: hidden_size must be a positive whole number, got 0"),
        (lambda: SharedWeights(-1), "SharedWeights: size must be a positive whole number, got -1"),
        (lambda: Block(4, 0), "Block: out_features must be a positive whole number, got 0"),
        (lambda: MLP(hidden_sizes=(8, 0)), r"MLP: hidden_sizes\[1\] must be a positive whole number, got 0"),
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
